"""The study of samplers and of the early end: its surrogate, its replay, and its pages, which show its data."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blockwise_lr.tune.early_end import EarlyEnd
from blockwise_lr.tune.space import Point
from support.processes import run_python

STUDY = Path(__file__).parents[2] / "studies" / "2026-11-samplers"
PAGES = {name: (STUDY / f"{name}.md").read_text(encoding="utf-8") for name in ("README", "details")}
PROSE = " ".join(PAGES["README"].split())


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDY.parent / "_support"))
    monkeypatch.syspath_prepend(str(STUDY))


@pytest.fixture(scope="module")
def surrogate() -> Any:
    """A surrogate of two settings with 14 invented runs, which share a valley with a small difference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDY))
        from records import Run
        from surrogate import Surrogate, collect

    def run(setting: str, rate: float, emb: float) -> Run:
        loss = (
            4 + 0.05 * (math.log2(rate) + 9) ** 2 + 0.02 * (math.log2(emb) - 2) ** 2 + 0.1 * (setting == "b")
        )
        return Run(setting, (emb, 1.0, 1.0, 1.0, 0.5, 1.0), rate, 0.15, 0, loss, loss)

    points = [(2.0**-power, emb) for power in (8, 9, 11) for emb in (1.0, 4.0)]
    runs = {"a": [run("a", *point) for point in [*points, (2**-10, 2.0)]]}
    runs["b"] = [run("b", *point) for point in [*points, (2**-10, 8.0)]]
    return Surrogate(collect(runs, ("a", "b")), iterations=10)


def curves() -> Any:
    """A set of 12 runs with random train losses."""
    from records import Run
    from replay import Set

    generator = np.random.default_rng(0)
    final = generator.normal(4, 0.2, 12)
    logged = np.arange(10.0, 100.0, 10.0)
    train = 4 + final[:, None] * (100 - logged) / 100 + generator.normal(0, 0.3, (12, 9))
    runs = [Run("a, 100 steps", None, 1e-3, 0.15, 0, loss, loss) for loss in final]
    return Set("a", 100, logged, train, final, runs)


def test_the_pages_show_the_data() -> None:
    from report import load, tables

    made = tables(load("samplers"), load("early-end"))
    for name in PAGES:
        template = (STUDY / f"{name}.template.md").read_text(encoding="utf-8")
        for key, table in made.items():
            assert (f"{{{{{key}}}}}" in template) == (table in PAGES[name])
    assert all(table in "".join(PAGES.values()) for table in made.values())


def test_what_the_page_says_of_the_samplers() -> None:
    from report import NAMES, all_races, difference, load

    found = load("samplers")
    mean, half = difference(found, "drawn", "tpe")
    assert f"ends {mean:.3f} nats ({mean - half:.3f} to {mean + half:.3f}) below the trust-region" in PROSE
    mean, half = difference(found, "mean", "cma-es")
    assert f"CMA-ES is best, by {mean:.3f} nats" in PROSE
    assert mean > half
    points = sum(each["points"] for each in found["surrogate"].values())
    assert f"the tune losses of {points} points" in PROSE
    assert f"noise of one run, {found['noise']:.3f} nats" in PROSE
    for by_sampler in found["nats_below_uniform"]["drawn"].values():
        assert max(NAMES, key=lambda name: np.mean(by_sampler[name]["end"])) == "tpe"
    curves = {
        name: np.mean([each[name]["mean"] for each in found["nats_below_uniform"]["drawn"].values()], axis=0)
        for name in NAMES
    }
    assert int(np.argmax(curves["tpe"][3:] > curves["trust-region"][3:])) + 4 in (24, 25, 26)
    leads = [
        np.mean([each["tpe"]["mean"][32] - each["trust-region"]["mean"][32] for each in by_setting.values()])
        for by_setting in (found["nats_below_uniform"][name] for name in ("drawn", "wide box", "mean"))
    ]
    shown = "{:.3f} nats on drawn surfaces, {:.3f} in the wide box and {:.3f} on the mean surfaces"
    assert shown.format(*leads) in PROSE
    smooth = found["nats_below_uniform"]["mean"]
    begin = np.mean([each["tpe"]["mean"][2] for each in smooth.values()])
    assert max(all_races(found, "mean", name).mean() for name in NAMES) - begin < 0.0105


def test_what_the_page_says_of_real_runs() -> None:
    from report import STARTS, load

    races = load("real_race")["races"]
    start = min(races["trust-region, seed 0"][:STARTS])
    assert min(races["tpe, wide box, seed 0"]) == start
    assert start - min(races["trust-region, seed 0"]) == pytest.approx(0.042, abs=5e-4)
    tuned = load("tune-quickstart-tpe")
    ratio_trials = [trial for trial in tuned["trials"] if trial["phase"] == "ratios"]
    assert (tuned["sampler"], len(ratio_trials)) == ("tpe", 32)
    assert tuned["best"]["trial"] == next(
        each["trial"] for each in tuned["start"] if each["name"] == "measured"
    )


def test_what_the_page_says_of_tune_on_the_quickstart() -> None:
    from gaps import gap
    from report import load

    found = load("tune-quickstart")
    gain = found["gain"]
    assert (found["sampler"], len(found["trials"])) == ("trust-region", 44)
    low, high = gain["ci95"]
    assert f"{gain['mean']:.3f} nats of val loss over tuned uniform ({low:.3f} to {high:.3f}" in PROSE
    (measured,) = (trial for trial in found["trials"] if trial["number"] == 10)
    best = found["best"]["trial"]
    ratios = next(trial for trial in found["trials"] if trial["number"] == best)["point"]["ratios"]
    ours = {t["seed"]: t["val_loss"] for t in found["trials"] if t["point"]["ratios"] == ratios}
    others = load("measured-other-seeds")["runs"]
    for run in others:
        assert (run["base_lr"], run["warmup"]) == (
            measured["point"]["base_lr"],
            measured["point"]["warmup"],
        )
    won = gap({0: measured["val_loss"], **{run["seed"]: run["val_loss"] for run in others}}, ours)
    assert won.ci95 is not None
    low, high = won.ci95
    assert f"wins {won.mean:.3f} nats over `measured`" in PROSE
    assert f"({low:.3f} to {high:.3f}, three seeds, paired" in PROSE


def test_what_the_page_says_of_the_early_end() -> None:
    from report import load

    found = load("early-end")
    share, margin = f"{found['chosen']['share']:g}", f"{found['chosen']['margin']:g}"
    halves = [found["rules"][half] for half in ("fixed", "tested")]
    saved = np.mean([half[share][margin]["saved"] for half in halves])
    assert f"after {float(share):.0%} of its steps".replace("%", " %") in PROSE
    assert f"its train loss is {margin} nats above" in PROSE
    assert f"saves {saved:.1%} of the steps".replace("%", " %") in PROSE
    assert all(half[share][margin]["wrong"] == 0 for half in halves)
    nearest = [
        max(each["needed"][share] for each in found["sets"] if each["half"] == half)
        for half in ("fixed", "tested")
    ]
    assert f"{nearest[0]:.3f} nats behind in the one half, and {nearest[1]:.3f} in the other" in PROSE
    quick = [half["0.5"]["0.2"] for half in halves]
    assert np.mean([each["saved"] for each in quick]) == pytest.approx(2 * saved, rel=0.1)
    assert [each["lost"] for each in quick] == [0, 0]
    assert f"ends {np.mean([each['wrong'] for each in quick]):.1%}".replace("%", " %") in PROSE
    assert f"the loss curves of {sum(each['runs'] for each in found['sets'])} runs" in PROSE
    pairs, behind = found["behind"]["blockwise against uniform"]["0.5"]
    assert behind / pairs < 0.01


def test_the_figures_can_be_drawn(tmp_path: Path) -> None:
    from report import draw_early_end, draw_races, load

    draw_races(load("samplers"), tmp_path / "races.png")
    draw_early_end(load("early-end"), tmp_path / "early.png")
    assert min(path.stat().st_size for path in tmp_path.glob("*.png")) > 1000


def test_recorded_runs_are_read_once_each() -> None:
    from records import RULES, all_runs

    runs = all_runs()
    assert len(runs) > 800
    (known,) = [run for run in runs if run.tune_loss == 4.39556485414505]
    assert known.setting == "llama-2m, 300 steps"
    assert known.ratios == (16.0, 16.0, 32.0, 4.0, 0.5, 1.0)
    assert (known.base_lr, known.warmup, known.seed, known.steps) == (2e-3, 0.15, 0, 300)
    search = json.loads((RULES / "search/llama-2m.json").read_text())["ratios"]["runs"]
    start, best = min(each["tune_loss"] for each in search[:2]), min(each["tune_loss"] for each in search)
    assert f"{start - best:.3f} nats below its best start point" in PROSE
    kept = [run for run in runs if run.train]
    assert len(kept) > 400
    assert all(step < run.steps for run in kept for step, _ in run.curve)


def test_noise_is_what_point_and_seed_leave() -> None:
    from records import Run, run_to_run_noise

    def run(rate: float, seed: int, loss: float) -> Run:
        return Run("a, 1 steps", (1.0,) * 6, rate, 0.1, seed, loss, loss)

    point, seeds, left = (1.0, 3.0), (0.5, -0.2, 0.1), 0.01 * np.array([[1, -2, 1], [-1, 2, -1]])
    runs = [run(p, s, p + seeds[s] + left[i, s]) for i, p in enumerate(point) for s in range(3)]
    assert run_to_run_noise(runs) == pytest.approx(math.sqrt((left**2).sum() / 2))


def test_what_is_left_out_is_predicted_as_by_a_process_without_it(surrogate: Any) -> None:
    from surrogate import unflatten

    data, everything = surrogate.data, surrogate._covariance_of_data()
    for by_group in (False, True):
        error, score = surrogate.left_out(by_group=by_group)
        for i in range(len(data.above)):
            out = data.group == data.group[i] if by_group else torch.arange(len(data.above)) == i
            weights = torch.linalg.solve(
                everything[~out][:, ~out], (surrogate._target - surrogate._mean)[~out]
            )
            predicted = surrogate._mean + everything[i, ~out] @ weights
            spread = everything[i, ~out] @ torch.linalg.solve(everything[~out][:, ~out], everything[~out, i])
            assert error[i] == pytest.approx(float(data.above[i] - unflatten(predicted)), abs=1e-6)
            expected = (surrogate._target[i] - predicted) / (everything[i, i] - spread).sqrt()
            assert score[i] == pytest.approx(float(expected), rel=1e-4)


def test_drawn_surfaces_have_the_mean_and_spread_of_the_posterior(surrogate: Any) -> None:
    from surrogate import flatten

    data = surrogate.data
    x, setting = data.x[:1] + torch.tensor([[0.5, 1.0, 0.0, 0.5, 0.0, -0.3, 0.4]]), torch.tensor([1])
    to_data = surrogate.covariance(x, setting, data.x, data.setting)
    mean = float(flatten(surrogate.mean("b")(x)))
    spread = surrogate.covariance(x, setting, x, setting) - to_data @ surrogate._inverse @ to_data.T
    drawn = torch.stack([flatten(surrogate.draw("b", seed)(x)) for seed in range(600)])
    assert float(drawn.mean()) == pytest.approx(mean, abs=4 * float(spread.sqrt()) / math.sqrt(600))
    assert float(drawn.std()) == pytest.approx(float(spread.sqrt()), rel=0.15)
    assert torch.equal(surrogate.draw("b", 3)(x), surrogate.draw("b", 3)(x))


def test_the_mean_surface_passes_near_the_runs(surrogate: Any) -> None:
    data = surrogate.data
    for number, name in enumerate(data.settings):
        own = data.setting == number
        torch.testing.assert_close(surrogate.mean(name)(data.x[own]), data.above[own], rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["trust-region", "random", "tpe", "cma-es"])
def test_a_race_keeps_the_true_loss_of_the_best_observed_point(surrogate: Any, name: str) -> None:
    pytest.importorskip("optuna")
    pytest.importorskip("cmaes")
    from race import SAMPLERS, race
    from surrogate import inputs

    start = [Point(2**-11, 0.15, {"vo": 0.5}), Point(2**-9, 0.15, {"emb": 4.0, "vo": 0.5})]
    surface = surrogate.mean("a")
    true = race(SAMPLERS[name], surface, start, box="recorded", trials=6, noise=0.0, seed=1)
    first = [
        float(
            surface(
                torch.tensor([inputs(point.base_lr, 0.15, [point.ratios.get("emb", 1), 1, 1, 1, 0.5, 1])])
            )
        )
        for point in start
    ]
    assert true[:2] == pytest.approx([first[0], min(first)], abs=1e-9)
    assert len(true) == 6
    assert all(later <= earlier for earlier, later in itertools.pairwise(true)), (
        "without noise, it only falls"
    )
    assert true == race(SAMPLERS[name], surface, start, box="recorded", trials=6, noise=0.0, seed=1)


def test_the_replay_ends_the_runs_that_the_rule_ends() -> None:
    from replay import replay

    runs, generator, share, margin = curves(), np.random.default_rng(5), 0.4, 0.2
    rule, trained, regrets = EarlyEnd(share=share, margin=margin, rows=1), [], []
    losses = [dict(zip(runs.logged.astype(int).tolist(), row)) for row in runs.train]
    for _ in range(20):
        order = generator.permutation(12)
        best, steps = order[0], 100
        for run in order[1:]:
            seen: dict[int, float] = {}
            for step, loss in losses[run].items():
                seen[step] = loss
                if rule.lost(seen, losses[best], 100):
                    steps += step
                    break
            else:
                steps += 100
                best = run if runs.final[run] < runs.final[best] else best
        trained.append(steps)
        regrets.append(runs.final[best] - runs.best)
    found = replay(runs, share, margin, orders=20, seed=5)
    assert found.saved == pytest.approx(1 - np.mean(trained) / 1200)
    assert 0 < found.saved < 0.6
    assert found.regret == pytest.approx(np.mean(regrets))
    assert found.lost == np.mean(np.array(regrets) > 0.01)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_needed_margin_is_the_smallest_that_ends_no_better_run(share: float) -> None:
    from replay import needed_margin, wrong_ends

    runs = curves()
    needed = needed_margin(runs, share)
    assert wrong_ends(runs, share, needed) == 0 < wrong_ends(runs, share, needed - 1e-9)
    assert 0 <= needed_margin(runs, share, within=0.01) <= needed


def test_every_pair_has_one_kind() -> None:
    from records import Run
    from replay import KINDS, behind, kind_of

    def run(ratios: tuple[float, ...] | None, warmup: float, rate: float = 1e-3) -> Run:
        return Run("a, 1 steps", ratios, rate, warmup, 0, 4.0, 4.0)

    uniform, half = (1.0,) * 6, (4.0,) * 6
    assert kind_of(run(half, 0.15), run(uniform, 0.15)) == "blockwise against uniform"
    assert kind_of(run(None, 0.15), run(uniform, 0.15)) == "blockwise against uniform"
    assert kind_of(run(uniform, 0.15), run(half, 0.15)) == "other ratios"
    assert kind_of(run(half, 0.6), run(uniform, 0.15)) == "longer warm-up"
    assert kind_of(run(half, 0.15), run(half, 0.6)) == "shorter warm-up"
    assert kind_of(run(half, 0.15, 1e-3), run(half, 0.15, 2e-3)) == "another rate"
    assert sum(behind([curves()], kind, 0.5, 0.1)[0] for kind in KINDS) == 12 * 11 / 2


def test_the_chosen_rule_saves_most_without_an_end_that_was_wrong() -> None:
    from run import choose

    def values(saved: float, wrong: float) -> dict[str, float]:
        return {"saved": saved, "wrong": wrong}

    rules = {
        "0.3": {"0.2": values(0.5, 0.1), "0.6": values(0.1, 0.0)},
        "0.5": {"0.2": values(0.2, 0.0), "0.6": values(0.05, 0.0)},
    }
    assert choose(rules) == (0.5, 0.2)


@pytest.mark.slow
def test_the_command_makes_what_the_pages_are_made_from(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    pytest.importorskip("cmaes")
    small = ["--repeats", "1", "--trials", "6", "--orders", "3", "--iterations", "5", "--out", tmp_path]
    done = run_python(STUDY / "run.py", *small)
    assert done.returncode == 0, done.stderr
    from report import load, tables

    samplers, early = load("samplers", tmp_path), load("early-end", tmp_path)
    assert tables(samplers, early)["sets"] == tables(samplers, load("early-end"))["sets"]
    assert early["chosen"] == load("early-end")["chosen"]
    assert json.loads((tmp_path / "samplers.json").read_text())["trials"] == 6


def test_the_rule_is_checked_on_the_longer_runs_by_every_pair() -> None:
    import longer_runs
    from records import Run

    def run(final: float, *losses: float) -> Run:
        curve = tuple((step, loss) for step, loss in zip((25, 50, 75), losses))
        return Run("a, 100 steps", (1.0,) * 6, 1e-3, 0.15, 0, final, final, curve, curve)

    # The best run is 0.45 behind another at 75 of 100 steps, so one of 15 pairs breaks the rule of 0.4 nats.
    runs = [run(3.0, 9.0, 9.0, 4.45)] + [run(3.1 + i / 10, 5.0, 5.0, 4.0 + i / 10) for i in range(5)]
    (found,) = longer_runs.check(runs)
    assert found["runs"] == 6
    assert found["farthest_behind"] == pytest.approx(0.45)
    assert found["wrong"] == pytest.approx(1 / 15)
    assert longer_runs.check(runs[:5]) == []
    recorded = json.loads(longer_runs.OUT.read_text())["sets"]
    assert {each["setting"] for each in recorded} >= {f"llama-600k, {n} steps" for n in (300, 1200, 4800)}
    assert all(each["wrong"] == 0 for each in recorded)
    assert longer_runs.check(longer_runs.horizon_runs())[0]["runs"] >= recorded[0]["runs"]
