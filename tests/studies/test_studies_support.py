"""What several studies share: tuning a baseline further, the queue, cells of tables and the figure of gains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockwise_lr.compare.over_seeds import LossGap

SUPPORT = Path(__file__).parents[2] / "studies" / "_support"


@pytest.fixture(autouse=True)
def _support_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SUPPORT))


def arm(**changes: Any) -> Any:
    from arms import Arm

    return Arm(**{"shape": "tiny", "steps": 4, "base_lr": 1e-3, **changes})


def run(tune_loss: float | None) -> dict[str, Any]:
    return {"tune_loss": tune_loss}


def test_a_baseline_keeps_the_best_change_once_all_have_ended() -> None:
    from baseline import ADAMW, gains_of_changes, tune_baseline
    from tuning import Results

    runs = {arm().name: run(3.0)}
    tried, best = tune_baseline(arm(), ADAMW, Results(runs))
    assert best is None
    assert len(tried) == len(ADAMW)
    assert gains_of_changes(arm(), ADAMW, Results(runs)) == ["-"] * len(ADAMW)
    for each in tried:
        runs[each.name] = run(3.0 + (each.beta2 == 0.9) - 0.1 * (each.weight_decay == 0.1))
    assert tune_baseline(arm(), ADAMW, Results(runs))[1] == arm(weight_decay=0.1)
    assert gains_of_changes(arm(), ADAMW, Results(runs)) == ["+0.100", "+0.000", "+0.000", "-1.000"]
    runs[arm().name] = run(2.0)
    assert tune_baseline(arm(), ADAMW, Results(runs))[1] == arm()


def test_the_queue_has_each_missing_arm_once_and_only_of_the_named_shapes() -> None:
    from tuning import Results, at_seeds, waiting

    first, second, other = arm(), arm(seed=1), arm(shape="llama-600k")
    wanted = [first, second, first, other, second]
    assert waiting(wanted, Results({})) == [first, second, other]
    assert waiting(wanted, Results({second.name: run(3.0)}), ["tiny"]) == [first]
    assert at_seeds(first, (1, 2)) == [second, replace(first, seed=2)]
    assert at_seeds(None, (1, 2)) == []


def test_cells_of_tables() -> None:
    from comparison_tables import other_settings, progress, speedup_cell

    assert other_settings(arm(base_lr=3e-3, ratios={"emb": 2.0}, seed=2, warmup=0.4)) == ""
    assert other_settings(arm(beta2=0.99, floor={"ffn": 4.0})) == "beta2 0.99, floor {'ffn': 4.0}"
    assert [speedup_cell(1.5, bound) for bound in ("exact", "at_least", "at_most")] == [
        "1.50x", ">= 1.50x", "<= 1.50x",
    ]  # fmt: skip
    assert speedup_cell(None, None) == "-"
    rules = ("uniform", "half")
    assert progress("A", rules, {"half"}) == "A: `half` tuned, `uniform` not yet."
    assert progress("A", rules, set()) == "A: `uniform`, `half` not yet."
    assert progress("A", rules, set(rules)) == "A: `uniform`, `half` tuned."


def test_a_page_shows_what_there_is() -> None:
    from pages import bullets, filled, image

    assert filled({"a": "| x |\n| --- |", "b": "| x |\n| --- |\n| 1 |"}) == {
        "a": "None yet.",
        "b": "| x |\n| --- |\n| 1 |",
    }
    assert bullets(["one", "two"]) == "- one\n- two"
    assert bullets([]) == "- None."
    assert image("text", "file.png", True) == "![text](file.png)"
    assert image("text", "file.png", False) == ""


def test_gains_are_drawn_if_there_are_any(tmp_path: Path) -> None:
    from gain_figure import draw_gains

    path = tmp_path / "figure.png"
    assert not draw_gains({"short": {}}, path, over="uniform")
    assert not path.exists()
    gaps = {"half": LossGap(0.1, (0.05, 0.15), 0.01), "own": LossGap(None, None, None)}
    assert draw_gains({"short": gaps, "long": {"own": LossGap(0.2, None, None)}}, path, over="uniform")
    assert path.stat().st_size > 5000


def test_an_arm_that_another_process_has_or_has_ended_is_left_to_it(tmp_path: Path) -> None:
    from contextlib import ExitStack

    from filelock import FileLock
    from text_runs import claim

    arms = [arm(), arm(seed=1), arm(seed=2), arm(steps=8)]
    results = tmp_path / "results"
    results.mkdir()
    (results / f"{arms[1].name}.json").write_text("{}")
    with ExitStack() as locks, FileLock(tmp_path / f"{arms[0].name}.lock"):
        assert claim(arms, tmp_path, results, 3, locks) == [arms[2]]
