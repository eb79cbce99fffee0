"""The downstream study: its items and scores are what it says, and its queue ends at equal losses."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

STUDY = Path(__file__).parents[2] / "studies" / "2026-11-downstream"

DOCUMENTS = [
    f"The {noun} is kept in the {place} for a long time and in good order. "
    f"This {noun} has a name that nobody in the {place} knows.\n\n"
    f"A second {noun} was found in another {place} at the end of last year. "
    f"Many people were asked about the {noun} in the {place}."
    for noun, place in zip(
        ("lamp", "book", "coin", "knife", "chair", "table", "spoon", "plate", "clock", "brush"),
        ("house", "tower", "river", "castle", "garden", "market", "school", "forest", "valley", "harbour"),
    )
]


@pytest.fixture(autouse=True)
def _study_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDY.parent / "_support"))
    monkeypatch.syspath_prepend(str(STUDY))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    from blockwise_lr.data.vocabulary import END_OF_TEXT, train_bpe

    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(iter(DOCUMENTS), 400),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture
def model() -> Any:
    from shapes import build

    return build("llama-600k", seed=0).eval()


def test_the_items_have_one_right_answer_and_are_the_same_every_time() -> None:
    import items

    for task in items.TASKS:
        made = items.make(DOCUMENTS, task)
        assert made
        assert made == items.make(DOCUMENTS, task)
        assert len({json.dumps(item) for item in made}) == len(made)
        text = [" ".join(document.split()) for document in DOCUMENTS]
        for item in made:
            right = item.get("target") or item["choices"][item["answer"]]
            holding = [document for document in text if item["prompt"] + right in document]
            assert len(holding) == 1
            if task == "continuation":
                assert len(set(item["choices"])) == 4
                wrong = [choice for i, choice in enumerate(item["choices"]) if i != item["answer"]]
                assert not any(choice.strip() in holding[0] for choice in wrong)
            if task == "pairs":
                one, other = (choice.split() for choice in item["choices"])
                assert sum(a != b for a, b in zip(one, other)) == 1


def test_code_and_lists_give_no_items() -> None:
    import items

    assert items.sentences("def f(x): return x\n\n* one\n* two\n\nshort it is.") == []
    assert list(items.pairs(["x = 1"], random.Random(0))) == []


def test_only_held_out_documents_are_used(tmp_path: Path) -> None:
    import items

    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(32)))
    assert items.held_out(path) == [f"document {i}" for i in (10, 15, 26, 31)]


def test_a_log_likelihood_is_that_of_one_text_alone(model: Any, tokenizer: Any) -> None:
    import score

    texts = [("The lamp is kept in", " the tower"), ("", "A second coin was found."), ("This book", " has")]
    texts += [("The clock is " * 60, "here")]  # longer than the context
    for (prompt, continuation), (value, greedy) in zip(texts, score.log_likelihoods(model, tokenizer, texts)):
        whole = tokenizer.encode(prompt + continuation)
        before = len(tokenizer.encode(prompt)) if prompt else 0
        ids = [*([] if prompt else [tokenizer.eos_token_id]), *whole]
        count = len(whole) - before
        ids = ids[-129:]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0, -count:]
        ahead = torch.tensor(ids[-count:])
        expected = -torch.nn.functional.cross_entropy(logits, ahead, reduction="sum")
        assert value == pytest.approx(float(expected), abs=1e-3)
        assert greedy == bool((logits.argmax(-1) == ahead).all())


@pytest.mark.slow
def test_the_scores_are_the_harnesss(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm_eval, which brings forty packages: pip install lm_eval")
    import items
    import score

    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    made = {task: items.make(DOCUMENTS, task) for task in items.TASKS}
    for task, own in made.items():
        items.write_task(tmp_path, task, own)
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--model_args"]
    command += [f"pretrained={tmp_path / 'model'},dtype=float32", "--tasks", ",".join(made)]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "found")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "found").rglob("results*.json")
    theirs = json.loads(path.read_text())["results"]
    for task, own in made.items():
        ours = score.score(model, tokenizer, own)
        for kind in ("acc", "acc_norm"):
            if kind in ours:
                assert theirs[task][f"{kind},none"] == pytest.approx(np.mean([int(c) for c in ours[kind]]))
        if task == "cloze":
            perplexity = math.exp(-float(np.mean(ours["log_likelihood"])))
            assert theirs[task]["perplexity,none"] == pytest.approx(perplexity, rel=1e-3)


def test_a_score_counts_the_choice_of_the_highest_log_likelihood(
    monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: Any
) -> None:
    import items
    import score

    made = items.make(DOCUMENTS, "continuation")[:3]
    own = score.score(model, tokenizer, made)
    for place, item in enumerate(made):
        each = score.log_likelihoods(model, tokenizer, [(item["prompt"], c) for c in item["choices"]])
        best = max(range(4), key=lambda i: each[i][0])
        norm = max(range(4), key=lambda i: each[i][0] / len(item["choices"][i]))
        assert own["acc"][place] == str(int(best == item["answer"]))
        assert own["acc_norm"][place] == str(int(norm == item["answer"]))
    (single,) = items.make(DOCUMENTS, "cloze")[:1]
    found = score.score(model, tokenizer, [single])
    assert set(found) == {"acc", "log_likelihood"}


def test_fine_tuning_begins_at_the_weights_and_is_tuned_by_the_tune_loss(model: Any, tokenizer: Any) -> None:
    import fine_tuning
    from arms import Arm

    text = fine_tuning.code_text(tokenizer, [*DOCUMENTS * 6])
    assert len(text.val)
    assert text.train[0, 0] == tokenizer.eos_token_id
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = Arm("llama-600k", 1, 2e-3)
    ids = torch.from_numpy(text.val.astype(np.int64))
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)
    assert fine_tuning.loss_before(first, weights, text) == pytest.approx(expected, abs=1e-4)
    done: dict[str, Any] = {}
    for rate, loss in ((2e-3, 3.0), (1.41e-3, 3.1), (2.83e-3, 3.2)):
        arm = Arm("llama-600k", 1, rate)
        done[arm.name] = {"arm": arm.to_dict(), "tune_loss": loss}
    assert fine_tuning.tuned(first, weights, text, done)[0] == first
    ended = fine_tuning.fine_tune(Arm("llama-600k", 1, 1e-2, warmup=0.0), weights, text)
    assert ended["val_loss"] < expected


def test_paired_differences_are_those_of_the_items_and_of_the_seeds() -> None:
    from paired import paired, standard_error, values

    assert values({"acc": "0110"}, "acc").tolist() == [0, 1, 1, 0]
    ones = {0: values({"acc": "0011"}, "acc"), 1: values({"acc": "0111"}, "acc")}
    other = {0: values({"acc": "1011"}, "acc"), 1: values({"acc": "1111"}, "acc")}
    found = paired(ones, other)
    assert found.mean == pytest.approx(0.25)
    assert found.items95[1] - found.items95[0] == pytest.approx(2 * 1.96 * 0.5 / 2)
    assert found.seeds.mean == pytest.approx(0.25)
    by_item = np.array([0, 0.5, 1, 1])
    assert standard_error(ones) == pytest.approx(by_item.std(ddof=1) / 2)


def pretend(arm: Any) -> dict[str, Any]:
    """A loss that falls with the logarithm of the steps and is lowest at one rate; half is 0.1 below uniform."""
    from arms import RULES

    loss = 4 - 0.3 * math.log2(arm.steps / 1200) - 0.1 * (arm.ratios == RULES["half"])
    loss += 0.05 * math.log2(arm.base_lr / 4e-3 * (arm.steps / 1200) ** 0.25) ** 2 + arm.seed / 100
    loss += (arm.warmup != 0.15) / 1000 + (arm.weight_decay != 0.03) / 1000 + (arm.beta2 != 0.95) / 1000
    return {"arm": arm.to_dict(), "tune_loss": loss, "val_loss": loss + 0.2}


def tuning_arms(plan: Any, steps: int, rule: str, results: Any) -> list[Any]:
    """The runs that the tuning of a rule still needs."""
    import rules

    arms, best = rules.tuning(plan.SHAPE, steps, rule, results)
    if best is not None and rule == "uniform":
        arms = [*arms, *rules.baseline(best, results)[0]]
    return [arm for arm in arms if arm.name not in results.runs]


def all_runs() -> tuple[Any, Any]:
    """Every run of the tuning at 1 200 steps, and of this study."""
    import plan
    from tuning import Results

    tuning_runs: dict[str, Any] = {}
    for steps in (300, 1200):
        for rule in plan.COMPARED:
            while missing := tuning_arms(plan, steps, rule, Results(tuning_runs)):
                tuning_runs |= {arm.name: pretend(arm) for arm in missing}
    runs: dict[str, Any] = {}
    while arms := plan.queue(Results(runs), tuning_runs=Results(tuning_runs)):
        runs |= {arm.name: pretend(arm) for arm in arms}
    return Results(runs), Results(tuning_runs)


def test_nothing_is_queued_before_the_rules_are_tuned() -> None:
    import plan
    from tuning import Results

    assert plan.queue(Results({}), tuning_runs=Results({})) == []


def test_the_longer_uniform_run_ends_at_the_loss_of_half() -> None:
    import plan

    results, tuning_runs = all_runs()
    found = plan.models(results, tuning_runs)
    assert list(found) == ["uniform", "half", "measured", "uniform, longer"]
    assert plan.mean_loss(found["uniform, longer"], results) == pytest.approx(
        plan.mean_loss(found["half"], results), abs=plan.TOLERANCE
    )
    assert 1200 < found["uniform, longer"].steps < 1800
    steps = {run["arm"]["steps"] for run in results.runs.values()}
    assert 2400 not in steps  # the ladder ends once the loss is reached


def test_a_length_that_misses_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    import plan
    from arms import RULES, Arm
    from tuning import Results

    uniform, half = (Arm("llama-600k", 1200, 4e-3, RULES[rule]) for rule in ("uniform", "half"))
    runs: dict[str, Any] = {}

    def loss(arm: Any) -> dict[str, Any]:
        # At seed 0 half is better by twice as much as at the others.
        extra = 0.1 * (arm.seed == 0 and arm.ratios != {})
        return {"tune_loss": pretend(arm)["tune_loss"] - extra}

    for seed in plan.SEEDS:
        for arm in (uniform, half):
            one = plan.replace(arm, seed=seed)
            runs[one.name] = loss(one)
    best = None
    for _ in range(12):
        arms, best = plan.equal_loss(uniform, half, Results(runs))
        runs |= {arm.name: loss(arm) for arm in arms if arm.name not in runs}
        if best is not None:
            break
    assert best is not None
    target = plan.mean_loss(half, Results(runs))
    assert plan.mean_loss(best, Results(runs)) == pytest.approx(target, abs=plan.TOLERANCE)


def pretend_score(arm: Any, items: int = 40) -> dict[str, Any]:
    """Half has eight items in ten right, all others seven."""
    rng = np.random.default_rng(arm.seed)
    share = 0.8 if pretend(arm)["tune_loss"] < 3.95 + arm.seed / 100 else 0.7
    right = "".join(str(int(value < share)) for value in rng.permutation(items) / items)
    task = {"items": "0", "acc": right, "acc_norm": right, "log_likelihood": [-2.0] * items}
    tuned = {"arm": {**arm.to_dict(), "base_lr": 2e-3}, "val_loss": 3.5}
    return {
        "arm": arm.to_dict(),
        "tasks": dict.fromkeys(("cloze", "continuation", "pairs"), task),
        "code": {"val_loss": 5.0, "fine_tuned": tuned},
    }


def test_the_tables_compare_at_equal_steps_and_at_equal_loss(tmp_path: Path) -> None:
    import plan
    import report
    from arms import Arm
    from tuning import Results

    results, tuning_runs = all_runs()
    scores = Results({name: pretend_score(Arm(**run["arm"])) for name, run in results.runs.items()})
    tables = report.tables(results, scores, tuning_runs)
    assert "None yet." not in tables.values()
    assert "| half | uniform | cloze, acc | +10.0 |" in tables["differences"]
    assert "| half | uniform, longer | cloze, acc | +0.0 |" in tables["differences"]
    assert "| half | uniform | +0.1" in tables["loss_gaps"]
    assert "| measured | uniform | " in tables["loss_gaps"]
    assert "| measured | uniform, longer |" not in "".join(tables.values())  # that has the loss of half
    assert tables["runs"].count("\n") == 4 * len(plan.SEEDS) + 1
    assert tables["items_pairs"] == "40"
    found = report.compared(results, scores, tuning_runs)
    assert report.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_every_table_of_the_templates_is_made_also_from_few_runs() -> None:
    import re

    import report
    from tuning import Results

    results, tuning_runs = all_runs()
    few = Results(dict(list(results.runs.items())[:2]))
    tables = report.tables(few, Results({}), tuning_runs)
    named = {
        name
        for page in ("README", "details")
        for name in re.findall(r"\{\{(\w+)\}\}", (STUDY / f"{page}.template.md").read_text())
    }
    assert named - {"figure", "to_details", "to_answer"} == set(tables)


def test_a_run_keeps_the_weights_it_ended_with(tmp_path: Path) -> None:
    from argparse import Namespace

    import run
    import score
    from arms import Arm
    from stacked import Text

    windows = np.random.default_rng(0).integers(0, 3072, (8, 128)).astype(np.uint16)
    text = Text(np.concatenate([windows] * 4), windows[:2], windows[:2])
    arm = Arm("llama-600k", 1, 1e-3, {"emb": 4.0}, warmup=0.0, seed=1)
    (result,) = run.train([arm], text, Namespace(out=tmp_path, device="cpu"))
    model = score.trained(arm, tmp_path)
    ids = torch.from_numpy(text.val.astype(np.int64))
    with torch.no_grad():
        assert float(model(input_ids=ids, labels=ids).loss) == pytest.approx(result["val_loss"], abs=1e-4)


def test_the_pages_have_the_tables_that_follow_from_the_runs() -> None:
    import report

    if not (STUDY / "README.md").exists():
        pytest.skip("the study has no page yet: its runs are being made")
    pages = [(STUDY / name).read_text(encoding="utf-8") for name in ("README.md", "details.md")]
    scores, tuning_runs = report.load(report.SCORES), report.load(report.HORIZON / "data" / "runs")
    for name, text in report.tables(report.load(report.RESULTS), scores, tuning_runs).items():
        assert any(text in page for page in pages), name
