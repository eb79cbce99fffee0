"""The horizon study: arms that train stacked end where each would end alone, and the queue follows from the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blockwise_lr import classify, cosine_schedule, param_groups
from blockwise_lr.train.build_model import build_model
from support.processes import run_python

STUDY = Path(__file__).parents[2] / "studies" / "2026-11-horizon"
STEPS, ROWS, CONTEXT = 12, 4, 16


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDY.parent / "_support"))
    monkeypatch.syspath_prepend(str(STUDY))


def text(seed: int = 0) -> Any:
    from stacked import Text

    windows = np.random.default_rng(seed).integers(0, 64, (3, 256, CONTEXT)).astype(np.uint16)
    return Text(*windows)


def arms() -> list[Any]:
    from arms import RULES, Arm

    return [
        Arm("tiny", STEPS, 1e-2, RULES["uniform"], seed=1),
        Arm("tiny", STEPS, 2e-3, RULES["measured"], warmup=0.4, seed=2, weight_decay=0.1, beta2=0.99),
        Arm("tiny", STEPS, 4e-3, RULES["half"], clip=1e9, floor="proportional", decay="constant"),
    ]


def alone(arm: Any, windows: Any) -> dict[str, torch.Tensor]:
    """Train the arm in an ordinary loop on transformers' model, torch's AdamW and the library's schedule."""
    from shapes import LLAMAS

    model = build_model(LLAMAS[arm.shape], seed=arm.seed).double()
    model.set_attn_implementation("eager")
    groups = param_groups(model, arm.base_lr, arm.ratios, weight_decay=arm.weight_decay, decay=arm.decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, arm.beta2))
    schedule = cosine_schedule(
        optimizer,
        warmup_steps=round(arm.warmup * arm.steps),
        total_steps=arm.steps,
        floor=arm.base_lr / 20,
        floor_mode=arm.floor,
    )
    order = windows.order(arm.seed, STEPS * ROWS).reshape(STEPS, ROWS)
    for rows in order:
        ids = torch.from_numpy(windows.train[rows].astype(np.int64))
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), arm.clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("first", "last", "compiled"),
    [(0, 3, False), (1, 2, False), pytest.param(1, 2, True, marks=pytest.mark.slow)],
    ids=["three arms", "a stack of one", "a stack of one, compiled"],
)
def test_stacked_arms_end_where_each_ends_alone(first: int, last: int, compiled: bool) -> None:
    from stacked import Stack

    windows = text()
    chosen = arms()[first:last]
    stack = Stack(chosen, windows, rows=ROWS, dtype=torch.float64, compiled=compiled)
    for _ in range(STEPS):
        stack.advance()
    for i, arm in enumerate(chosen):
        for name, expected in alone(arm, windows).items():
            # The model computes its norms and softmax in float32, which compiled code rounds otherwise.
            rtol, atol = (1e-4, 1e-6) if compiled else (1e-9, 1e-12)
            torch.testing.assert_close(stack.weights[name][i], expected, rtol=rtol, atol=atol)


def test_a_stack_that_is_cut_off_goes_on_to_the_bit(tmp_path: Path) -> None:
    from stacked import Stack

    whole = Stack(arms(), text(), rows=ROWS).run(points=3)
    cut = Stack(arms(), text(), rows=ROWS)
    for _ in range(5):
        cut.advance()
    # What step 4 has left.
    cut.curves, cut.copying = ([[result[of][0]] for result in whole] for of in ("curve", "copying"))
    torch.save(cut._state(), tmp_path / "state.pt")
    again = Stack(arms(), text(), rows=ROWS).run(checkpoint=tmp_path / "state.pt", points=3)
    for one, other in zip(whole, again):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert not (tmp_path / "state.pt").exists()


@pytest.mark.parametrize("number", [1, 2])
def test_the_gain_on_tokens_that_come_again_is_that_of_the_models_own_loss(number: int) -> None:
    from stacked import Stack

    stack = Stack(arms()[:number], text(), rows=ROWS)
    for _ in range(3):
        stack.advance()
    found = stack.copying_gain()
    for index, gain in enumerate(found):
        model = stack.model
        model.load_state_dict({name: weight[index] for name, weight in stack.weights.items()}, strict=False)
        once = torch.randint(64, (ROWS, 8), generator=torch.Generator().manual_seed(0))
        logits = model(input_ids=once.repeat(1, 2)).logits
        first = torch.nn.functional.cross_entropy(logits[:, :7].flatten(0, 1), once[:, 1:].flatten())
        again = torch.nn.functional.cross_entropy(logits[:, 8:15].flatten(0, 1), once[:, 1:].flatten())
        assert gain == pytest.approx(float((first - again).detach()), abs=1e-5)


def test_no_window_is_read_twice_and_too_little_text_is_said() -> None:
    assert len(set(text().order(0, 256))) == 256
    with pytest.raises(ValueError, match="reads 257 windows and the text has 256"):
        text().order(0, 257)


@pytest.mark.parametrize("floor", ["shared", "proportional", {"emb": 2.0}])
def test_the_ratio_at_the_last_step_is_the_one_asked_for(floor: Any) -> None:
    from arms import Arm

    arm = Arm("tiny", 1000, 1e-3, {"emb": 4.0}, floor=floor)
    ends = {"shared": 1.0, "proportional": 4.0}.get(floor if isinstance(floor, str) else "", 2.0)
    assert arm.lr("emb", 1000) == pytest.approx(ends * 1e-3 / 20)
    assert arm.lr("emb", 150) == pytest.approx(4e-3)
    shrunk = Arm("tiny", 1000, 1e-3, {"emb": 4.0}, floor="proportional", shrink=0.5)
    assert shrunk.lr("emb", 1000) / shrunk.lr("ffn", 1000) == pytest.approx(2.0)


def test_decay_of_matrices_leaves_out_embedding_head_and_norms() -> None:
    from arms import Arm
    from shapes import LLAMAS

    arm = Arm("tiny", 10, 1e-3, {"emb": 4.0}, decay="matrices")
    model = build_model(LLAMAS["tiny"], seed=0)
    decayed = {str(block.value) for block in classify(model).values() if arm.weight_decay_of(block.value, 5)}
    assert decayed == {"qk", "vo", "ffn"}
    constant = Arm("tiny", 10, 1e-3, {"emb": 4.0}, decay="constant")
    for step in range(10):
        assert constant.weight_decay_of("emb", step) * constant.lr("emb", step) == pytest.approx(
            0.03 * constant.lr("ffn", step)
        )


def pretend(arm: Any) -> dict[str, Any]:
    """A loss that is lowest at 5.6e-3, twice where the longest search begins, and at the shortest warm-up.

    With a ratio for one block alone it is lowest at half of that rate, so such an arm differs from one at uniform's.
    Uniform loses more in shorter runs, so the best exponent falls with the length.
    """
    import math

    loss = 3 + 3 * (not arm.ratios) / arm.steps + abs(arm.warmup - 0.05) / 100
    loss += (math.log2(arm.base_lr / (2.8e-3 if len(arm.ratios) == 1 else 5.6e-3))) ** 2 / 100
    loss += sum((math.log2(arm.ratios.get(block, 1.0)) - 1) ** 2 for block in ("emb", "qk", "norm")) / 1000
    return {"tune_loss": loss, "val_loss": loss}


@pytest.mark.slow
def test_the_queue_brackets_the_best_rate_of_every_rule_and_ends() -> None:
    from plan import queue
    from rules import tuning
    from tuning import Results

    runs: dict[str, Any] = {}
    while arms := queue(Results(runs), ["llama-2m"]):
        runs[arms[0].name] = pretend(arms[0])
    tried, best = tuning("llama-2m", 4800, "uniform", Results(runs))
    assert best is not None
    assert best.warmup == 0.05
    assert min(arm.base_lr for arm in tried) < best.base_lr < max(arm.base_lr for arm in tried)
    assert len(runs) > 40


def test_the_search_is_the_same_whatever_the_order_in_which_its_trials_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rules import TRIALS, search, tuning
    from tuning import Results

    monkeypatch.setitem(TRIALS, 300, 12)
    runs: dict[str, Any] = {}
    for rule in ("uniform", "half", "measured"):
        while (tried := tuning("llama-600k", 300, rule, Results(runs)))[1] is None:
            runs |= {arm.name: pretend(arm) for arm in tried[0]}
    tuned_runs, found = len(runs), []
    for newest_first in (False, True):
        done = dict(runs)
        while (tried := search("llama-600k", 300, Results(done)))[1] is None:
            missing = [arm for arm in tried[0] if arm.name not in done]
            arm = missing[-1 if newest_first else 0]
            done[arm.name] = pretend(arm)
        found.append(tried)
        assert len(done) == tuned_runs + TRIALS[300]
    assert found[0] == found[1]
    best = found[0][1]
    assert min(pretend(arm)["tune_loss"] for arm in found[0][0]) >= pretend(best)["tune_loss"]


@pytest.mark.parametrize(("shape", "steps", "rules"), [("llama-600k", 300, 4), ("llama-2m", 4800, 2)])
def test_the_first_runs_are_one_of_each_rule(shape: str, steps: int, rules: int) -> None:
    from plan import queue
    from tuning import Results

    first = queue(Results({}), [shape])[:rules]
    assert [arm.steps for arm in first] == [steps] * rules
    assert len({json.dumps(arm.ratios) for arm in first}) == rules


def test_the_pages_have_the_tables_that_follow_from_the_runs() -> None:
    import report

    pages = [(STUDY / name).read_text(encoding="utf-8") for name in ("README.md", "details.md")]
    for name, table in report.tables(report.load(report.RESULTS)).items():
        assert any(table in page for page in pages), name


def test_what_the_pages_say_in_words_follows_from_the_runs() -> None:
    import report
    from tuned import EMBEDDING, UNCHANGED

    tuned = report.all_tuned(report.load(report.RESULTS))

    def won(steps: int, rule: str) -> str:
        mean = report.gap(*(tuned["llama-600k", steps, r].losses for r in ("uniform", rule))).mean
        assert mean is not None
        return f"{mean:.3f}"

    def lead(steps: int, rule: str, other: str) -> tuple[str, str, str]:
        found = report.gap(*(tuned["llama-600k", steps, r].losses for r in (other, rule)))
        assert found.mean is not None
        assert found.ci95 is not None
        return f"{found.mean:.3f}", f"{found.ci95[0]:.3f}", f"{found.ci95[1]:.3f}"

    root = STUDY.parents[1]
    pages = {
        name: " ".join((root / name).read_text(encoding="utf-8").split())
        for name in (
            "README.md",
            "studies/README.md",
            "studies/2026-11-horizon/README.md",
            "docs/how-to/choose-ratios-and-learning-rate.md",
        )
    }
    default_rule = UNCHANGED["half"]
    long = (won(1200, "half"), won(1200, "measured"))
    assert (
        "`half` wins {} nats (0.047 to 0.150) and `measured` {} (".format(*long)
        in pages["studies/2026-11-horizon/README.md"]
    )
    assert (
        f"`half` wins {won(300, 'half')} nats over 300 steps and {long[0]} (0.047 to 0.150) over 1 200, "
        f"`measured` {won(300, 'measured')} and {long[1]}." in pages["studies/README.md"]
    )
    choice = pages["docs/how-to/choose-ratios-and-learning-rate.md"]
    assert "it wins {} nats and `measured` {}, with".format(*long) in choice
    assert f"it wins {won(300, default_rule)} of the {won(300, 'half')} nats" in choice
    assert f"and {won(1200, default_rule)} of {long[0]} over 1 200 steps" in choice
    losses = [tuned["llama-600k", 1200, rule].losses for rule in ("measured", "half", default_rule)]
    ahead, default_ahead = (report.gap(losses[0], other) for other in losses[1:])
    assert ahead.ci95 is not None
    assert default_ahead.ci95 is not None
    difference = f"{ahead.mean:.3f} ({ahead.ci95[0]:.3f} to {ahead.ci95[1]:.3f})"
    assert difference in choice
    horizon = pages["studies/2026-11-horizon/README.md"]
    assert difference in horizon
    low, high = default_ahead.ci95
    assert (
        f"{default_ahead.mean:.3f} over tuned `measured` is not decided ({low:.3f} to {high:.3f})" in horizon
    )
    default = f"wins {won(300, default_rule)} nats over 300 steps and {won(1200, default_rule)} ("
    assert default in pages["studies/2026-11-horizon/README.md"]
    short = f"{float(won(300, 'half')):.2f} nats over 300 steps and {float(long[0]):.2f} over 1 200"
    assert f"`half` wins {short}" in pages["README.md"]
    uniform = tuned["llama-600k", 1200, "uniform"].losses
    low, high = report.gap(uniform, losses[2]).ci95
    assert (
        f"they end {won(1200, default_rule)} nats below uniform AdamW ({low:.3f} to {high:.3f},"
        in pages["README.md"]
    )
    factors = {f"{report.speedup('llama-600k', 300, rule, tuned).value:.1f}" for rule in ("half", "measured")}
    assert factors == {"2.2"}
    tuned_half = "the gain of tuned `half` is {} nats ({} to {}".format(*lead(4800, "half", "uniform"))
    unchanged = "{} ({} to {})".format(*lead(4800, default_rule, "uniform"))
    for page in (choice, horizon):
        assert tuned_half in page.replace("The gain", "the gain")
    assert f"and {unchanged} with nothing else changed" in choice
    assert f"With nothing else changed it is {unchanged}" in horizon
    alone_long = "{} ({} to {})".format(*lead(4800, UNCHANGED[EMBEDDING], "uniform"))
    assert f"for the embedding alone {alone_long}" in horizon
    assert f"the gain is {unchanged[:-1]}, three seeds)" in pages["README.md"]
    uniform_losses = tuned["llama-600k", 4800, "uniform"].losses
    assert (
        "uniform ends at {:.3f}, {:.3f} and {:.3f} with three seeds".format(*uniform_losses.values())
        in horizon
    )
    factors = [
        "{:.2f} ({:.2f} to {:.2f})".format(found.value, *found.ci95)
        for found in (report.speedup("llama-600k", 1200, rule, tuned) for rule in ("half", "measured"))
    ]
    assert "Uniform needs {} and {} times as many steps there".format(*factors) in horizon
    results, again = (report.load(folder).runs for folder in (report.RESULTS, report.AGAIN))
    moved = [abs(again[name][of] - results[name][of]) for name in again for of in ("tune_loss", "val_loss")]
    assert len(moved) == 4
    assert 0.0025 < max(moved) < 0.003
    longest = {
        bool(run["arm"]["ratios"]): run
        for run in results.values()
        if run["arm"]["steps"] == 19200
        and run["arm"]["base_lr"] == (5.6e-3 if run["arm"]["ratios"] else 8e-3)
    }
    ends = "It ends at {:.3f} and uniform at {:.3f}".format(
        *(longest[of]["val_loss"] for of in (True, False))
    )
    assert ends in horizon
    won_longest = longest[False]["val_loss"] - longest[True]["val_loss"]
    others = [
        run
        for run in results.values()
        if (run["arm"]["shape"], run["arm"]["steps"], run["arm"]["seed"]) == ("llama-2m", 4800, 0)
    ]
    early = {
        bool(run["arm"]["ratios"]): run["val_loss"]
        for run in others
        if (run["arm"]["base_lr"], run["arm"]["warmup"]) == (4e-3, 0.4)
    }
    assert (
        f"With one seed each, `half` ends {won_longest:.3f} nats below uniform over 19 200 steps, and "
        f"{early[False] - early[True]:.3f} on a LLaMA of 1.8M over 4 800" in pages["README.md"]
    )
    assert f"ends at {early[False]:.3f} at best, with the base learning rate 4e-3" in horizon
    assert f"There `half` ends at {early[True]:.3f}" in horizon
    uniform_at = {run["arm"]["base_lr"]: run for run in others if not run["arm"]["ratios"]}
    assert len(uniform_at) == 4
    assert early[False] == min(run["val_loss"] for run in uniform_at.values())
    assert uniform_at[5.66e-3]["tune_loss"] == min(run["tune_loss"] for run in uniform_at.values())
    copied = [next(step for step, gain in longest[of]["copying"] if gain >= 0.5) for of in (True, False)]
    assert copied == [4000, 5600]
    details = " ".join((STUDY / "details.md").read_text(encoding="utf-8").split())
    assert "Two of them were made again with equal settings, and end within 0.003 nats of before" in details
    assert "where uniform needs 2.2 times as many steps" in horizon
    short = lead(300, EMBEDDING, "uniform")[0]
    alone, alone_low, alone_high = lead(1200, EMBEDDING, "uniform")
    assert f"wins {short} nats over 300 steps and {alone} ({alone_low} to {alone_high}) over 1 200" in horizon
    assert "this is {} more than `half` ({} to {})".format(*lead(300, EMBEDDING, "half")) in horizon
    assert (
        "With nothing else changed it wins {} and {}.".format(
            *(won(steps, UNCHANGED[EMBEDDING]) for steps in (300, 1200))
        )
        in horizon
    )
    assert "lead of {} is not decided ({} to {})".format(*lead(1200, EMBEDDING, "half")) in horizon
    both = f"win {short} nats over 300 steps and {alone} over 1 200, where `half` wins {won(300, 'half')} and {long[0]}"
    assert both in choice
    assert f"1 for all other blocks, {float(short):.2f} and {float(alone):.2f}" in pages["README.md"]


def line_at(results: Any) -> float:
    """The exponent at 1 200 steps of the 1.8M model on a least-squares line, by its closed form."""
    import math

    import prediction

    points = [
        (math.log(steps * 2048 / 655_936), prediction.exponent("llama-600k", steps, results)[0])
        for steps in (300, 1200, 4800)
    ]
    x, y = (sum(values) / 3 for values in zip(*points))
    slope = sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
    return float(y + slope * (math.log(1200 * 2048 / 1_836_160) - x))


def test_rules_that_are_tuned_get_their_gain_their_speed_up_and_their_exponent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import prediction
    import report
    from plan import queue
    from rules import SEEDS, TRIALS
    from tuning import Results

    for steps in TRIALS:
        monkeypatch.setitem(TRIALS, steps, 4)
    runs: dict[str, Any] = {}
    shapes = ["llama-600k", "llama-6m", "llama-2m"]
    while arms := queue(Results(runs), shapes):
        runs |= {arm.name: {"arm": arm.to_dict(), **pretend(arm)} for arm in arms}
    results = Results(runs)
    found = report.tables(results)
    assert all(name in found["runs"] for name in ("uniform", "half", "measured", "paper", "searched"))
    tuned = report.all_tuned(results)
    gap = report.gap(*(tuned["llama-600k", 300, rule].losses for rule in ("uniform", "half")))
    assert gap.mean == pytest.approx(0.01 + 0.003 - 0.00325, abs=1e-3)  # rates are sqrt 2 apart
    report.draw_gains(tuned, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert found["searched"].count("0.6M") == 3
    wide = {row.split(" | ")[0].strip("| "): row for row in found["wider"].splitlines()[2:]}
    assert list(wide) == ["uniform", "half", "measured", "searched"]
    assert tuned["llama-600k", 300, "searched"].arm.ratios != {}
    # The pretended loss knows no width: there too, the searched ratios are the best.
    assert all(float(wide["searched"].split(" | ")[2]) <= float(row.split(" | ")[2]) for row in wide.values())
    assert found["runs"].count("| 5.8M | 300 | ") >= 20
    small = found["gains"].split("\n\n")[0].splitlines()
    longest = [row.strip("| ").split(" | ")[-1] for row in small]
    assert longest[0] == "19 200 steps"
    assert "not tuned yet" not in found["gains"]
    assert sum("(one seed)" in cell for cell in longest) == 5  # all but the paper's and the searched ratios
    assert all(set(each.losses) == set(SEEDS[steps]) for (_, steps, _), each in tuned.items())
    assert found["prediction"].splitlines()[2].startswith("| predicted | EMB ")
    predicted = tuned["llama-2m", 1200, "predicted"].arm
    assert predicted.ratios == prediction.power(prediction.MEASURED_RATIOS, round(line_at(results), 2))
    report.draw_ratios(tuned, results, tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").stat().st_size > 5000
    assert prediction.best_exponent([4.0, 4.1, 4.0]) is None
    assert len(found["ratio_fits"].splitlines()) == 2 + 5


def test_a_ratios_line_and_its_error_have_their_closed_forms() -> None:
    from ratio_fits import line

    exact = line([(1, 16, 1), (4, 8, 1), (16, 4, 1)])
    assert (exact.slope, exact.residual) == (pytest.approx(-1.0), pytest.approx(0.0, abs=1e-9))
    assert exact.error == pytest.approx(2**-0.5)  # one over the root of the sum of squared distances
    two = line([(1, 16, 0.3), (16, 8, 0.4)])
    assert (two.slope, two.error) == (
        pytest.approx(-0.5),
        pytest.approx(0.25),
    )  # the root of 0.09 + 0.16, over 2
    assert line([(1, 2, 0.01), (4, 4, 0.01), (16, 2, 100)]).slope == pytest.approx(1.0, abs=1e-3)


@pytest.mark.slow
def test_the_runner_trains_on_a_text_and_a_second_call_goes_on(tmp_path: Path) -> None:
    document = " ".join(f"word{i % 97} and line {i}" for i in range(400))
    lines = (json.dumps({"text": f"{i} {document}"}) for i in range(40))
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    code = (
        "import run, arms, pathlib; queue = lambda results, shapes: [arm for arm in "
        "[arms.Arm('llama-600k', 3, lr) for lr in (1e-3, 2e-3)] if arm.name not in results.runs]; "
        "run.text_runs.main('', queue, ['llama-600k'], results=run.RESULTS, out=pathlib.Path('runs'))"
    )
    for _ in range(2):
        done = run_python(
            "-c", code, "--text", tmp_path / "text.jsonl", "--out", tmp_path / "out",
            "--results", tmp_path / "results", "--stack", "2", folder=STUDY,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    found = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")]
    assert sorted(result["arm"]["base_lr"] for result in found) == [1e-3, 2e-3]
    assert all(result["val_loss"] < 9 and result["versions"]["torch"] for result in found)
    assert done.stdout == ""  # nothing was left to do
