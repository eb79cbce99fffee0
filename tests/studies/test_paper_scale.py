"""The page and the figures of the study at the paper's smallest size come from its data, and its runner works."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from blockwise_lr.directional.directional_figure import plot_directional
from support.processes import run_python

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "studies" / "2026-11-paper-scale"
PAGE = (STUDY / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _study_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDY))
    monkeypatch.syspath_prepend(str(STUDY.parent / "_support"))


def test_the_page_shows_the_data() -> None:
    from draw import best, load, runs_table, sharpness_table

    for table in (runs_table("1000-steps"), runs_table("240-steps"), sharpness_table()):
        assert table in PAGE
    runs = load("1000-steps")["runs"]
    gap = best(runs, "uniform")["val"] - best(runs, "measured")["val"]
    for text in (PAGE, (ROOT / "README.md").read_text(encoding="utf-8")):
        assert f"{gap:.3f} nats" in text


def test_what_the_page_says_of_the_models_own_measurement() -> None:
    from draw import conditions, load, reports
    from joint_rule import joint_ratios

    found = reports()
    own = joint_ratios(found)[0]
    assert {block.value: pytest.approx(ratio) for block, ratio in own.items()} == load("240-steps")[
        "own_ratios"
    ]
    joint = [report.joint_best_lr for report in found]
    assert sum(rates["norm"] < 0 for rates in joint) == 6
    longest = max(abs(rates[b]) / report[b].lr for rates, report in zip(joint, found) for b in report)
    assert round(longest, -2) == 6200
    alone = {block: [report[block].factor for report in found] for block in ("norm", "head")}
    assert (round(min(alone["norm"])), round(max(alone["norm"]), -2)) == (45, 7600)
    assert (round(min(alone["head"])), round(max(alone["head"]), -2)) == (5, 2600)
    assert (math.floor(min(conditions(found))), round(max(conditions(found)))) == (12, 34)


def test_the_figures_can_be_drawn(tmp_path: Path) -> None:
    import draw

    for name, made in (
        ("curves", draw.draw),
        ("brackets", draw.draw_brackets),
        ("sharp", draw.draw_sharpness),
    ):
        made(tmp_path / f"{name}.png")
    plot_directional(draw.reports(), tmp_path / "directional.png")
    assert min(path.stat().st_size for path in tmp_path.glob("*.png")) > 1000


@pytest.mark.parametrize("best", [-3.2, -0.6, 0.4, 2.3, 4.9])
def test_a_bracket_ends_with_a_worse_rate_on_both_sides(best: float) -> None:
    from bracket import bracket

    tried = {}

    def loss_at(rate: float) -> float:
        power = round(math.log2(rate))
        assert power not in tried, "no rate is tried twice"
        tried[power] = abs(power - best) if power < best + 2 else math.nan  # diverges
        return tried[power]

    found = bracket(1.0, loss_at, most=20)
    assert found == 2.0 ** round(best)
    assert {round(best) - 1, round(best) + 1} <= set(tried)


def test_a_bracket_without_time() -> None:
    from bracket import bracket

    left = iter([3.0, 2.0, None])
    assert bracket(1.0, lambda _: next(left)) == 2.0
    assert bracket(1.0, lambda _: None) is None


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bytes of the documentation as tokens."""
    folder = tmp_path_factory.mktemp("tokens")
    text = b"".join(path.read_bytes() for path in sorted((ROOT / "docs").rglob("*.md")))
    np.frombuffer(text[:60_000], np.uint8).astype(np.uint16).tofile(folder / "train.bin")
    np.frombuffer(text[60_000:90_000], np.uint8).astype(np.uint16).tofile(folder / "val.bin")
    return folder


@pytest.mark.slow
def test_the_runner_searches_measures_and_goes_on(tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs.json"
    basic = ["--tiny", "--device", "cpu", "--data", tokens, "--out", out]
    search = ["--measure", "uniform:6e-4:0.5:4", "--search", "uniform", "own", "--steps", "4"]
    done = run_python(STUDY / "train.py", *basic, *search)
    assert done.returncode == 0, done.stderr
    first = json.loads(out.read_text())
    arms = [run["arm"] for run in first["runs"]]
    assert arms.count("uniform") >= 3
    assert arms.count("own") >= 3
    assert [row["step"] for row in first["sharpness"]] == [0, 1, 2, 3, 4]
    assert [report["step"] for report in first["directional"]] == [1, 2, 3]
    assert all(2 < run["val"] < 8 for run in first["runs"])

    done = run_python(STUDY / "train.py", *basic, *search, "--runs", "emb=4,norm=2:1e-3:0.5:2")
    assert done.returncode == 0, done.stderr
    second = json.loads(out.read_text())
    assert second["runs"][:-1] == first["runs"], "known runs are not trained again"
    assert second["runs"][-1]["ratios"]["emb"] == 4
    assert [step for step, _ in second["runs"][-1]["curve"]] == [1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--runs", "uniform:1e-3:4"], "expected RATIOS:BASE_LR:WARM_UP:STEPS"),
        (["--runs", "nothing:1e-3:0.2:4"], "'nothing' is no file and none of uniform"),
        (["--runs", "own:1e-3:0.2:4"], "add --measure"),
        (["--data", "nowhere"], "has no train.bin"),
        (["--runs", "uniform:1e-3:0.2:9", "--budget-seconds", "0"], "no time left"),
    ],
)
def test_the_runners_messages(tokens: Path, tmp_path: Path, arguments: list[str], expected: str) -> None:
    basic = ["--tiny", "--device", "cpu", "--data", tokens, "--out", tmp_path / "runs.json"]
    done = run_python(STUDY / "train.py", *basic, *arguments)
    assert expected in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_results_of_another_setting_are_kept(tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs.json"
    out.write_text(json.dumps({"device": "NVIDIA H200", "runs": []}))
    done = run_python(STUDY / "train.py", "--tiny", "--device", "cpu", "--data", tokens, "--out", out)
    assert "give another file as --out" in done.stderr
    assert json.loads(out.read_text())["device"] == "NVIDIA H200"
