"""The page and the figure of the study at the paper's smallest size come from its data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from support.processes import run_python

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "studies" / "2026-11-paper-scale"


def test_the_page_shows_the_data_and_the_figure_can_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(STUDY))
    from draw import best, draw, load, runs_table, sharpness_table

    page = (STUDY / "README.md").read_text(encoding="utf-8")
    for table in (runs_table("1000-steps"), runs_table("240-steps"), sharpness_table()):
        assert table in page
    runs = load("1000-steps")["runs"]
    gap = best(runs, "uniform")["val"] - best(runs, "measured")["val"]
    for text in (page, (ROOT / "README.md").read_text(encoding="utf-8")):
        assert f"{gap:.3f} nats" in text
    negative = sum(report["joint_best_lr"]["norm"] < 0 for report in load("240-steps")["directional"])
    assert negative == 6
    draw(tmp_path / "loss_curves.png")
    assert (tmp_path / "loss_curves.png").stat().st_size > 1000


def test_the_runs_can_be_trained_again(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0)
    for name in ("train", "val"):
        tokens.integers(0, 512, 130 * 16).astype(np.uint16).tofile(tmp_path / f"{name}.bin")
    arguments = ["--tiny", "--device", "cpu", "--data", tmp_path, "--out", tmp_path / "runs.json"]
    done = run_python(STUDY / "train.py", *arguments, "--runs", "uniform:1e-3:0.5:2", "measured:1e-3:0.5:2")
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert [run["arm"] for run in runs] == ["uniform", "measured"]
    assert all(5 < run["val"] < 8 for run in runs)
