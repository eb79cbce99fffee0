"""Comparisons with the real trainer and real text: the command with its processes, and a grid in this process."""

import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from synthetic_comparison import quiet

from blockwise_lr.compare import Arm, compare
from blockwise_lr.train.metrics import read_metrics
from support.commands import run_command, train_here


def run_compare(tmp_path, config, *flags):
    (tmp_path / "tiny.json").write_text(json.dumps(config.to_dict()))
    return run_command("compare", tmp_path / "tiny.json", "--out", tmp_path / "out", *flags)


@pytest.mark.slow
def test_compare_trains_the_arms_reports_them_and_does_nothing_twice(tiny, tmp_path):
    arms = ("adamw:uniform", "mine=adamw:emb=3,vo=0.5", "adamw:auto")
    flags = ("--arms", *arms, "--steps", "12", "--jobs", "2")
    done = run_compare(tmp_path, tiny, *flags)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    content = json.loads((out / "compare.json").read_text())

    assert content["steps"] == 12
    assert {name: arm["steps"] for name, arm in content["arms"].items()} == {
        "adamw:uniform": 12,
        "adamw:uniform 2N": 24,
        "mine": 12,
        "adamw:auto": 12,
    }
    assert (out / "ratios.png").stat().st_size > 10_000
    assert content["arms"]["mine"]["ratios"] == "emb=3,vo=0.5"
    for arm in content["arms"].values():
        (seed,) = arm["seeds"]
        rows = read_metrics(out / seed["run"] / "metrics.jsonl")
        assert rows[-1]["step"] == arm["steps"]
        assert seed["terminal_val_loss"] == rows[-1]["val_loss"]
    gap = next(c for c in content["comparisons"] if c["arm"] == "mine")["loss_gap"]
    losses = {name: arm["seeds"][0]["terminal_val_loss"] for name, arm in content["arms"].items()}
    assert gap["mean"] == pytest.approx(losses["adamw:uniform"] - losses["mine"])
    assert gap["ci95"] is None

    page = (out / "report.html").read_text()
    HTMLParser().feed(page)
    assert "noise" in page
    assert 'src="http' not in page
    for text in (done.stdout, (out / "report.md").read_text()):
        assert "mine" in text

    before = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")}
    again = run_compare(tmp_path, tiny, *flags)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")} == before


@pytest.mark.slow
def test_a_grid_tunes_every_arm_alike_and_chooses_on_tune(tiny, tmp_path):
    arms = [Arm.parse("adamw:uniform"), Arm.parse("adamw:paper")]
    grid = [3e-3, 1e-2, 3e-2]
    compare(
        replace(tiny, steps=12),
        arms,
        seeds=(0, 1),
        base_lrs=grid,
        out=tmp_path,
        command="",
        progress=quiet(),
        runner=train_here,
    )
    content = json.loads((tmp_path / "compare.json").read_text())
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 3 * (len(grid) + 1)
    for name, arm in content["arms"].items():
        assert [seed["seed"] for seed in arm["seeds"]] == [0, 1]
        tried = [t for t in content["tuning"] if t["arm"] == name]
        assert sorted(t["base_lr"] for t in tried) == grid
        assert arm["base_lr"] == min(tried, key=lambda t: t["tune_loss"])["base_lr"]
    for comparison in content["comparisons"]:
        low, high = comparison["loss_gap"]["ci95"]
        assert low <= comparison["loss_gap"]["mean"] <= high
