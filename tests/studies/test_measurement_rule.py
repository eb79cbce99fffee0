"""The page of the measurement's rule comes from its data, and the rule does on the reports what the page says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from blockwise_lr import Block, DirectionalReport, param_groups
from blockwise_lr.optim.ratios import MEASURED_RATIOS
from support.processes import run_python

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "studies" / "2026-11-measurement-rule"


@pytest.fixture(autouse=True)
def _studies_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("_support", STUDY.name):
        monkeypatch.syspath_prepend(str(ROOT / "studies" / folder))


def test_the_page_shows_the_data() -> None:
    from rule_report import tables

    page = (STUDY / "README.md").read_text(encoding="utf-8")
    template = (STUDY / "README.template.md").read_text(encoding="utf-8")
    for name, table in tables().items():
        template = template.replace(f"{{{{{name}}}}}", table)
    assert page == template


def test_on_the_nine_reports_every_block_is_near_what_won_or_is_not_determined() -> None:
    from choose_rule import BLOCKS, LARGE, ratios, reports
    from joint_rule import joint_ratios

    assert len(reports()[LARGE]) == 9
    found = ratios(LARGE)
    assert set(found.undetermined) == {Block.QK, Block.NORM}
    farthest = max(abs(math.log(found[block] / MEASURED_RATIOS[block])) for block in BLOCKS)
    assert f"{math.exp(farthest):.1f}" == "2.3"
    earlier = joint_ratios(reports()[LARGE])[0]
    worst = max(abs(math.log(earlier[block] / MEASURED_RATIOS[block])) for block in BLOCKS)
    page = (STUDY / "README.md").read_text(encoding="utf-8")
    assert f"by up to a factor of {math.exp(worst):.0f}" in " ".join(page.split())
    table = (ROOT / "docs" / "concepts" / "ratios.md").read_text(encoding="utf-8")
    (row,) = [
        line for line in table.splitlines() if line.startswith("| LLaMA, 134M, at half its best rate |")
    ]
    order = (Block.EMB, Block.QK, Block.FFN, Block.VO, Block.NORM, Block.HEAD)
    cells = [f"({found[b]:.2g})" if b in found.undetermined else f"{found[b]:.2g}" for b in order]
    assert row.split(" | ")[1:] == [*cells[:-1], f"{cells[-1]} |"]


def won(rule: str, other: str) -> str:
    """What the page says that a rule wins over another one: nats of val loss with the interval."""
    from gaps import gap, losses
    from rule_report import RUNS, tuned
    from text_runs import load
    from try_rule import SEEDS, with_horizon

    runs = with_horizon(load(RUNS))
    chosen = tuned(runs)
    found = gap(losses(chosen[other], runs, SEEDS), losses(chosen[rule], runs, SEEDS))
    assert found.ci95 is not None
    return f"{found.mean:.3f} nats ({found.ci95[0]:.3f} to {found.ci95[1]:.3f})"


def test_what_the_page_says_of_training_with_the_ratios() -> None:
    from rule_report import RUNS
    from text_runs import load
    from try_rule import queue

    assert queue(load(RUNS)) == []
    page = " ".join((STUDY / "README.md").read_text(encoding="utf-8").split())
    assert f"its ratios win {won('the rule', 'uniform')}" in page
    assert f"`measured` wins {won('measured', 'the rule')} more" in page
    assert f"the embedding alone wins {won('embedding alone', 'uniform')}" in page
    assert f"Over `measured`, it wins {won('embedding alone', 'measured')}" in page


def test_every_block_of_the_small_models_is_determined_and_two_checkpoints_decide_nothing() -> None:
    from choose_rule import LARGE, ratios, reports

    for name, along in reports().items():
        if name != LARGE:
            assert ratios(name).undetermined == {}
            last = DirectionalReport.ratios_of_run(along[-2:])
            assert set(last.undetermined) == {*last} - {last.anchor}


def test_the_chosen_constants_are_the_best_on_the_small_models_and_fit_the_data() -> None:
    from choose_rule import CHOICES, CHOSEN, MODELS, distance, leave_one_out, report_scatter, search_spread

    small = [name for names in MODELS.values() for name in names]
    assert min(CHOICES, key=lambda choice: distance(small, choice)) == CHOSEN
    assert {leave_one_out(model)[0][1:] for model in MODELS} == {(0.1, 20.0)}
    assert 2 ** sorted(search_spread().values())[2] == pytest.approx(2, abs=0.3)
    least = min(factor for name in small for factor in report_scatter(name).values())
    assert least == pytest.approx(3, abs=0.05)


def test_the_exponent_of_a_known_spectrum() -> None:
    """Eigenvalues i^(-1 / (alpha - 1)) have a density with the exponent alpha."""
    from other_rules import exponent

    for alpha in (1.5, 3.0):
        eigenvalues = torch.arange(1, 201).double() ** (-1 / (alpha - 1))
        assert exponent(torch.diag(eigenvalues.sqrt())) == pytest.approx(alpha, rel=0.03)


def test_the_signal_to_noise_ratio_of_known_gradients() -> None:
    """A gradient that never changes has the ratio 1; one that alternates in sign has nearly 0."""
    from other_rules import signal_to_noise, undamped

    model = nn.ModuleDict({"embed_tokens": nn.Embedding(3, 2), "lm_head": nn.Linear(2, 3, bias=False)})
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, ratios="uniform"), lr=1e-3, betas=(0.9, 0.95))
    for step in range(400):
        model["embed_tokens"].weight.grad = torch.ones(3, 2)
        model["lm_head"].weight.grad = torch.full((3, 2), (-1.0) ** step)
        optimizer.step()
    found = signal_to_noise(model, optimizer)
    assert found["emb"] == pytest.approx(1, rel=1e-3)
    assert found["head"] == pytest.approx(
        (0.1 / 1.9) ** 2, rel=1e-2
    )  # the mean of +-1 with weights 0.1 * 0.9^k
    assert undamped([{"emb": 1.0, "ffn": 0.25}] * 3) == {"emb": 0.5, "ffn": 1.0}


def test_base_learning_rates_are_tried_until_the_best_has_a_worse_one_on_both_sides() -> None:
    from arms import Arm
    from tuning import Results, bracket

    first, runs = Arm("tiny", 10, 1e-3), {}
    while True:
        arms, best = bracket(first, Results(runs))
        missing = [arm for arm in arms if arm.name not in runs]
        if best is not None and not missing:
            break
        for arm in missing:
            runs[arm.name] = {"tune_loss": abs(math.log2(arm.base_lr / 2e-3))}
    assert best == replace(first, base_lr=1.99e-3)
    assert sorted(arm.base_lr for arm in arms) == [7.07e-4, 1e-3, 1.41e-3, 1.99e-3, 2.81e-3]


@pytest.mark.slow
def test_the_runners_measure_and_train(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    pages = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").rglob("*.md"))]
    text.write_text("".join(json.dumps({"text": page}) + "\n" for page in pages * 8))
    flags = ("--text", text, "--out", tmp_path / "out")
    done = run_python(STUDY / "measure.py", *flags, "--measured", tmp_path / "measured", "--steps", "4")
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "measured" / "llama-600k.json").read_text())
    assert [report["step"] for report in measured["reports"]] == [1, 2, 3, 4]
    blocks = {"emb", "qk", "vo", "ffn", "norm", "head"}
    assert set(measured["after MoLS"]) == set(measured["after LLR"]) == blocks

    done = run_python(STUDY / "try_rule.py")
    assert done.returncode == 2
    assert "--text is missing" in done.stderr
    done = run_python(STUDY / "try_rule.py", "--results", tmp_path / "runs", "--list")
    assert done.returncode == 0, done.stderr
    arms = [json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines()]
    assert all(arm["ratios"] for arm in arms)  # uniform is trained, in the horizon study
    assert 8.66 in {arm["ratios"]["emb"] for arm in arms}
