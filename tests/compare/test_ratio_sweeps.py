"""Sweeps over ratios: their arms, the width of a valley, the report, and one small real run of each command."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_comparison import BASE, quiet
from valley_trainer import CURVATURE

from blockwise_lr.blocks import Block
from blockwise_lr.compare.ratio_sweeps import (
    SCALES,
    ablation_points,
    blocks_of,
    robustness_points,
    sweep_plan,
    valley_width,
)
from blockwise_lr.compare.sweep_report import run_sweep
from blockwise_lr.errors import UserError
from blockwise_lr.optim.ratios import resolve_ratios
from blockwise_lr.train.config import ModelConfig
from blockwise_lr.train.presets import Setting
from blockwise_lr.train.ratio_text import parse_ratios
from support.commands import run_command

TRAINER = Path(__file__).with_name("valley_trainer.py")
RATIOS = "emb=4,vo=0.5"
BLOCKS = [Block.EMB, Block.QK, Block.VO, Block.FFN, Block.NORM, Block.HEAD]


def valley_run(config: Path, folder: Path) -> list[str]:
    return [sys.executable, str(TRAINER), str(config), str(folder)]


def swept(kind, points, out, **options):
    base = replace(BASE, optim=replace(BASE.optim, ratios=RATIOS, base_lr=2e-3))
    plan = sweep_plan(base, points, **{"seeds": (0, 1), **options})
    command = f"blockwise-lr {kind} quickstart"
    return run_sweep(kind, plan, points, out, jobs=2, command=command, progress=quiet(), runner=valley_run)


def test_every_ratio_is_scaled_alone_and_with_all_others():
    points = robustness_points("adamw", "measured", BLOCKS)
    middle = resolve_ratios("measured")
    assert len(points) == 1 + len(SCALES) * (len(BLOCKS) + 1)
    for point in points:
        given = resolve_ratios(parse_ratios(point.arm.ratios))
        for block in BLOCKS:
            scaled = point.curve in (block.value, "all together")
            assert given[block] == pytest.approx(middle[block] * (point.position if scaled else 1))


def test_blocks_are_switched_on_in_both_orders():
    points = ablation_points("adamw", "measured", BLOCKS)
    full = {block: ratio for block, ratio in resolve_ratios("measured").items() if block in BLOCKS}
    on = [block for block in BLOCKS if full[block] != 1]
    for curve, largest in (("largest first", True), ("smallest first", False)):
        before: set[Block] = set()
        for count, point in enumerate((p for p in points if p.curve == curve), start=1):
            given = resolve_ratios(parse_ratios(point.arm.ratios))
            now = {block for block in on if given[block] == full[block]}
            assert now > before
            assert len(now) == count == point.position
            (added,) = now - before
            rest = [full[block] for block in on if block not in now]
            assert all(full[added] >= ratio if largest else full[added] <= ratio for ratio in rest)
            assert all(given[block] == 1 for block in BLOCKS if block not in now)
            before = now
    assert (points[0].arm.ratios, points[-1].arm.ratios) == ("uniform", "measured")
    assert len(points) == 2 * len(on)


def test_the_blocks_are_those_of_the_model():
    model = ModelConfig(hidden_size=16, layers=1, heads=2, vocab_size=64, context=16)
    assert blocks_of(model) == [Block.EMB, Block.QK, Block.VO, Block.FFN, Block.NORM, Block.HEAD]
    gpt2 = replace(model, family="gpt2", kv_heads=None, tied=True)
    assert blocks_of(gpt2) == [Block.EMB, Block.QK, Block.VO, Block.FFN, Block.NORM, Block.POS]


@pytest.mark.parametrize("curvature", [0.02, 0.005, 0.001])
def test_the_width_of_a_parabola(curvature):
    """Between two factors the valley is a chord of the parabola; the exact width is a little larger."""
    costs = {scale: curvature * math.log2(scale) ** 2 for scale in SCALES}
    found = valley_width(costs, 0.01)
    exact = 2 ** math.sqrt(0.01 / curvature)
    if exact > 4:
        assert found == {"low": 0.25, "low_bound": "at_most", "high": 4.0, "high_bound": "at_least"}
    else:
        assert found["high_bound"] == found["low_bound"] == "exact"
        assert found["high"] == pytest.approx(1 / found["low"])
        assert 2 ** (math.log2(exact) - 0.25) < found["high"] <= exact


def test_a_run_that_diverged_ends_the_valley():
    found = valley_width({0.5: 0.001, 0.25: 0.002, 2.0: 0.001, 4.0: None}, 0.01)
    assert (found["high"], found["high_bound"]) == (2.0, "at_least")


def test_the_report_of_a_valley(tmp_path):
    blocks = [Block.EMB, Block.QK, Block.VO]
    points = robustness_points("adamw", RATIOS, blocks, (0.5, 4.0))
    content = swept("robustness", points, tmp_path)
    assert json.loads((tmp_path / "robustness.json").read_text()) == content
    for point in content["points"]:
        moved = [point["curve"]] if point["curve"] != "all together" else blocks
        rise = sum(CURVATURE.get(block, 0.0) for block in moved) * math.log2(point["position"]) ** 2
        assert point["cost"]["mean"] == pytest.approx(rise * 1.005, abs=1e-6)  # the mean of two seeds
        if rise:
            low, high = point["cost"]["ci95"]
            assert low < point["cost"]["mean"] < high
    assert content["widths"]["vo"]["high_bound"] == "at_least"
    assert content["widths"]["qk"]["high_bound"] == "exact"
    report = (tmp_path / "report.md").read_text()
    assert "All arms have one setting (base LR 0.002); it was not tuned for each of them." in report
    assert re.search(r"\| vo \| ≤ 0\.5 \| ≥ 4 \|", report)
    assert (tmp_path / "robustness.png").stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    swept("robustness", points, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == before


def test_the_report_of_an_ablation_that_is_tuned(tmp_path):
    points = ablation_points("adamw", RATIOS, BLOCKS)
    content = swept("ablation", points, tmp_path, seeds=(0,), base_lrs=(1e-3, 2e-3, 4e-3))
    assert [point["arm"] for point in content["points"]] == ["none", "+emb", "+vo", "all"]
    gains = [-point["cost"]["mean"] for point in content["points"]]
    assert gains == pytest.approx([0, 0.02, 0.001, 0.021], abs=1e-6)
    assert {point["setting"] for point in content["points"]} == {"base LR 0.002"}
    report = (tmp_path / "report.md").read_text()
    assert "Every arm tuned its base learning rate over 0.001, 0.002, 0.004 with seed 0" in report
    assert "One seed cannot separate an effect from noise." in report
    assert (tmp_path / "ablation.png").exists()


def test_the_setting_is_that_of_the_ratios_that_are_swept():
    base = replace(BASE, optim=replace(BASE.optim, ratios="measured"))
    points = ablation_points("adamw", "measured", BLOCKS)
    tuned = {"adamw:measured:N": Setting(5e-4, 0.2), "adamw:uniform:N": Setting(9e-3)}
    assert set(sweep_plan(base, points, seeds=(0,), tuned=tuned).choose({}).values()) == {Setting(5e-4, 0.2)}
    assert set(sweep_plan(base, points, seeds=(0,)).choose({}).values()) == {Setting(base.optim.base_lr)}


def test_mistakes_are_explained():
    with pytest.raises(
        UserError, match="--ratios uniform has no block to switch on: give ratios that are not all"
    ):
        ablation_points("adamw", "uniform", BLOCKS)
    with pytest.raises(
        UserError, match="--ratios auto moves the ratios during the run; give ratios that stay"
    ):
        robustness_points("adamw", "auto", BLOCKS)
    with pytest.raises(UserError, match="'nothing' is no file and none of"):
        robustness_points("adamw", "nothing", BLOCKS)


@pytest.mark.slow
def test_the_command_trains_and_reports(text, cache, tmp_path):
    settings = (
        "--steps 4 --layers 1 --hidden-size 16 --vocab-size 300 --context 16 --batch-size 2 --eval-tokens 64 "
        "--eval-every 0 --log-every 2 --save-every 0 --device cpu --ratios emb=4 --base-lr 1e-3"
    )
    where = ["--data", text, "--cache", cache, "--out", tmp_path / "out"]
    done = run_command("ablation", "quickstart", *settings.split(), *where)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert [point["arm"] for point in content["points"]] == ["none", "all"]
    assert done.stdout.splitlines()[-1] == f"Report: {tmp_path / 'out' / 'report.md'}"
