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
from blockwise_lr.cli.flags import parse
from blockwise_lr.cli.sweep_flags import SweepCommand, planned
from blockwise_lr.compare.ratio_sweeps import (
    SCALES,
    ablation_points,
    blocks_of,
    robustness_points,
    valley_width,
)
from blockwise_lr.compare.sweep_findings import _worth
from blockwise_lr.compare.sweep_plan import SweepPlan, finished_runs, sweep_plan
from blockwise_lr.compare.sweep_report import run_sweep
from blockwise_lr.compare.sweep_wording import answer
from blockwise_lr.errors import UserError
from blockwise_lr.optim.ratios import resolve_ratios
from blockwise_lr.train.checks import check_config
from blockwise_lr.train.config import ModelConfig
from blockwise_lr.train.presets import Setting, get_preset
from blockwise_lr.train.ratio_text import parse_ratios
from support.commands import call, run_command

TRAINER = Path(__file__).with_name("valley_trainer.py")
RATIOS = "emb=4,vo=0.5"
BLOCKS = [Block.EMB, Block.QK, Block.VO, Block.FFN, Block.NORM, Block.HEAD]


def valley_run(config: Path, folder: Path) -> list[str]:
    return [sys.executable, str(TRAINER), str(config), str(folder)]


def diverging_run(config: Path, folder: Path) -> list[str]:
    return [sys.executable, str(TRAINER), str(config), str(folder), "diverging"]


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
    assert content["tuned_arms"] == []
    assert "not tuned for unscaled and uniform (base LR 0.002)" in content["warnings"][0]
    assert re.search(r"\| vo \| 0\.5 \| ≤ 0\.5 \| ≤ 0\.5 \| ≥ 4 \| ≥ 4 \|", report)
    assert [len(width["per_seed"]) for width in content["widths"].values()] == [2, 2, 2, 2]
    assert content["baseline"]["gain"]["mean"] == pytest.approx(0.021 * 1.005, abs=1e-6)
    assert content["answer"][0].startswith(
        "The ratios emb=4,vo=0.5 end 0.021 nats below uniform after 60 steps"
    )
    assert "times 4, it changes the loss by +0.080 nats" in content["answer"][1]  # QK
    assert content["answer"][-1] == "5 of the 8 scaled arms still end below uniform."
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
    for order in content["worth"].values():
        assert {block: found["mean"] for block, found in order.items()} == pytest.approx(
            {"emb": 0.02, "vo": 0.001}
        )
    report = (tmp_path / "report.md").read_text()
    assert "all and none each tuned over 0.001, 0.002, 0.004 with seed 0, chosen by the tune loss" in report
    assert "Switched on largest first, EMB wins most: +0.020 nats alone." in report
    assert "Switched on smallest first, EMB wins most: +0.020 nats given the blocks before it." in report
    assert "One seed cannot separate an effect from noise." in report
    assert (tmp_path / "ablation.png").exists()
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == page.count("<img ") == 2
    assert "http://" not in page.replace("http://www.w3.org", "")
    base = replace(BASE, optim=replace(BASE.optim, ratios=RATIOS, base_lr=2e-3))
    plan = sweep_plan(base, points, seeds=(0,), base_lrs=(1e-3, 2e-3, 4e-3))
    assert finished_runs(plan, tmp_path) == plan.runs_in_all == 8
    next(tmp_path.glob("runs/adamw-emb_4-*/result.json")).unlink()
    assert finished_runs(plan, tmp_path) == 7
    next(tmp_path.glob("runs/adamw-uniform-*-lr0.001-*/result.json")).unlink()
    assert finished_runs(plan, tmp_path) == 5  # what follows the choice of a setting is not known


def test_all_arms_have_the_setting_that_was_tuned_for_the_ratios(tmp_path):
    """The synthetic losses of all arms are lowest at 2e-3; the plan alone decides who is tuned."""
    points = ablation_points("adamw", "emb=4,vo=0.5,qk=2", BLOCKS)
    base = replace(BASE, optim=replace(BASE.optim, ratios="emb=4,qk=2,vo=0.5"))
    options = {"seeds": (0, 1), "base_lrs": (1e-3, 2e-3), "refine": True}
    plan = sweep_plan(base, points, **options)
    assert {run.series.name for run in plan.tuning_runs()} == {"none", "all"}
    losses = {
        run: abs(run.base_lr - (1e-3 if run.series.name == "none" else 2e-3)) for run in plan.tuning_runs()
    }
    chosen = plan.choose(losses)
    assert chosen.pop("none") == Setting(1e-3)
    assert set(chosen.values()) == {Setting(2e-3)}
    assert {run.series.name for run in plan.refining_runs(losses)} == {"none", "all"}
    finals = plan.final_runs(plan.choose(losses))
    distinct = {run.folder for run in [*losses, *plan.refining_runs(losses), *finals]}
    assert len(distinct) == plan.runs_in_all == 2 * 4 + 2 * 6 - 2
    assert SweepPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    every = sweep_plan(base, points, tune="all", **options)
    assert {run.series.name for run in every.tuning_runs()} == {point.arm.name for point in points}
    assert every.runs_in_all == 6 * 4 + 2 * 6 - 6
    once = sweep_plan(base, points, seeds=(0, 1))
    assert once.runs_in_all == len({run.folder for run in once.final_runs(once.choose({}))}) == 12


def test_uniform_has_its_own_setting_and_all_other_arms_that_of_the_ratios():
    base = replace(BASE, optim=replace(BASE.optim, ratios="measured"))
    points = ablation_points("adamw", "measured", BLOCKS)
    tuned = {"adamw:measured:N": Setting(5e-4, 0.2), "adamw:uniform:N": Setting(9e-3)}
    plan = sweep_plan(base, points, seeds=(0,), tuned=tuned)
    chosen = plan.choose({})
    assert plan.tuned_before == ("all", "none")
    assert chosen.pop("none") == Setting(9e-3)
    assert set(chosen.values()) == {Setting(5e-4, 0.2)}
    assert set(sweep_plan(base, points, seeds=(0,)).choose({}).values()) == {Setting(base.optim.base_lr)}


def test_sentences_for_one_block_and_for_a_gain_within_the_noise():
    gain = {"mean": 0.001, "ci95": [-0.01, 0.012], "significant": False}
    content = {
        "kind": "ablation", "seeds": [0, 1], "steps": 300, "ratios": "emb=4", "centre": "all", "tuned_arms": ["none"],
        "baseline": {"arm": "none", "gain": gain}, "worth": {"alone": {"emb": gain}},
    }  # fmt: skip
    assert answer(content) == [
        "The ratios emb=4 and tuned uniform cannot be told apart after 300 steps: +0.001 nats (95 % CI −0.010 to "
        "+0.012, 2 seeds).",
        "EMB alone wins +0.001 nats.",
    ]


def robustness_answer(losses):
    """The answer of one seed about losses by arm, the unscaled one first; None stands for a run that diverged."""
    reference = losses["unscaled"]
    points = [
        {
            "arm": arm, "curve": "" if arm == "unscaled" else arm.partition(" ")[0], "position": 2.0, "loss": loss,
            "cost": {"mean": None if None in (loss, reference) else loss - reference},
        }
        for arm, loss in losses.items()
    ]  # fmt: skip
    found = {"kind": "robustness", "seeds": [0, 1], "points": points, "centre": "unscaled"}
    costs = {point["curve"]: {2.0: point["cost"]["mean"]} for point in points if point["curve"]}
    widths = {curve: valley_width(each, 0.01) for curve, each in costs.items()}
    return answer({**found, "widths": widths, "baseline": {"arm": "unscaled", "loss": reference}})


def test_only_arms_that_diverged_are_said_to_have_diverged():
    unknown = "A run with the unscaled ratios diverged, so what scaling changes is not known."
    assert robustness_answer({"unscaled": None, "emb x2": 3.0, "vo x2": 3.1}) == [unknown]
    assert robustness_answer({"unscaled": None, "emb x2": 3.0, "vo x2": None}) == [
        unknown,
        "Of the ratios that were scaled alone, vo x2 diverged.",
    ]


def test_the_ratio_that_matters_most_changes_the_loss_most_in_either_direction():
    said, *_ = robustness_answer({"unscaled": 3.0, "emb x2": 2.8, "vo x2": 3.02})
    assert said.endswith("is that of EMB: times 2, it changes the loss by −0.200 nats.")


def test_the_block_that_wins_most_is_one_of_those_that_are_known():
    gain = {"mean": None, "ci95": None, "significant": None}
    worth = {"largest first": {"emb": gain, "vo": {"mean": 0.02}, "qk": {"mean": 0.01}}}
    content = {
        "kind": "ablation", "seeds": [0, 1], "steps": 300, "ratios": "paper", "centre": "all", "tuned_arms": [],
        "baseline": {"arm": "none", "gain": gain}, "worth": worth,
    }  # fmt: skip
    assert answer(content)[1:] == [
        "Switched on largest first, VO wins most, of those without a run that diverged: +0.020 nats given the blocks "
        "before it."
    ]


def test_one_block_alone_is_one_that_the_model_has():
    tied = replace(BASE.model, family="gpt2", tied=True)
    points = ablation_points("adamw", "head=4,pos=2", blocks_of(tied))  # a tied head is no block
    found = [{"arm": p.arm.name, "curve": p.curve, "ratios": p.arm.ratios} for p in points]
    assert _worth(found, {"none": [3.0], "all": [2.9]}, tied)["alone"].keys() == {"pos"}


def test_a_scaled_arm_that_is_uniform_is_the_baseline():
    points = robustness_points("adamw", "emb=4", [Block.EMB, Block.QK], (0.25, 2.0))
    plan = sweep_plan(replace(BASE, optim=replace(BASE.optim, ratios="emb=4")), points, seeds=(0,))
    assert (plan.baseline, plan.centre, len(plan.arms)) == ("emb x0.25", "unscaled", len(points))
    swept_uniform = sweep_plan(
        replace(BASE, optim=replace(BASE.optim, ratios="uniform")),
        robustness_points("adamw", "uniform", [Block.EMB, Block.QK], (0.25, 2.0)),
        seeds=(0,),
    )
    assert swept_uniform.baseline == swept_uniform.centre == "unscaled"


def test_a_diverged_arm_is_named_and_hostile_text_is_shown_and_not_run(tmp_path):
    points = robustness_points("adamw", "qk=16,emb=4", [Block.QK, Block.EMB], (0.5, 2.0))
    base = replace(BASE, optim=replace(BASE.optim, ratios="emb=4,qk=16", base_lr=1e-2))
    plan = sweep_plan(base, points, seeds=(0,))
    hostile = "<script>alert(1)</script>`|x`"
    content = run_sweep(
        "robustness", plan, points, tmp_path, jobs=2, command=hostile, progress=quiet(), runner=diverging_run
    )
    assert "Of the ratios that were scaled alone, qk x2 diverged." in content["answer"]
    assert content["widths"]["qk"]["high"] == 1.0
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert f"\n```\n{hostile}\n```\n" in (tmp_path / "report.md").read_text()


def test_a_sweep_does_not_replace_the_report_of_the_other_and_shares_its_runs(tmp_path):
    """Two folders with one `runs`, as studies/2026-11-robustness has them."""
    points = {
        "robustness": robustness_points("adamw", RATIOS, [Block.EMB, Block.VO], (0.5,)),
        "ablation": ablation_points("adamw", RATIOS, BLOCKS),
    }
    for kind in points:
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "runs").symlink_to(Path("..") / "runs", target_is_directory=True)
    (tmp_path / "runs").mkdir()
    for first, second in (("robustness", "ablation"), ("ablation", "robustness")):
        swept(first, points[first], tmp_path / first, seeds=(0,))
        report = (tmp_path / first / "report.md").read_bytes()
        with pytest.raises(UserError) as error:
            swept(second, points[second], tmp_path / first, seeds=(0,))
        assert str(error.value) == (
            f"{tmp_path / first} holds the report of {first} ({first}.json), and {second} would replace it; "
            "choose another --out"
        )
        assert (tmp_path / first / "report.md").read_bytes() == report
        assert not (tmp_path / first / f"{second}.json").exists()
    arms = {path.parent.name.partition("-60steps")[0] for path in tmp_path.glob("runs/*/result.json")}
    assert len(arms) == len(list(tmp_path.glob("runs/*/result.json")))  # what both need was trained once


@pytest.mark.parametrize("kind", ["robustness", "ablation"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("compare.json", r"holds the report of compare \(compare\.json\)"),
        ("tune.json", r"holds the report of tune \(tune\.json\)"),
        ("scaling.json", r"holds the report of scaling \(scaling\.json\)"),
        ("plan.json", r"holds a comparison or a search \(plan\.json\)"),
    ],
)
def test_a_sweep_is_refused_in_the_folder_of_another_command(tmp_path, kind, name, message):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    points = ablation_points("adamw", RATIOS, BLOCKS)
    with pytest.raises(UserError, match=f"{message}.*choose another --out"):
        swept(kind, points, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


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


TINY = (
    "--steps 4 --layers 1 --hidden-size 16 --vocab-size 300 --context 16 --batch-size 2 --eval-tokens 64 "
    "--eval-every 0 --log-every 2 --save-every 0 --device cpu --ratios emb=4,vo=0.5 --base-lr 1e-3"
)


def test_a_dry_run_counts_the_runs_and_trains_nothing(capsys, tmp_path):
    grid = ["--base-lrs", "1e-3", "2e-3", "--warmups", "0.15", "0.6", "--seeds", "0", "1", "--jobs", "2"]
    where = ["--out", tmp_path / "out", "--dry-run"]
    code, out, err = call(capsys, "robustness", "quickstart", *TINY.split(), *grid, *where)
    assert (code, err) == (0, "")
    # 2 arms try 4 settings each; 30 arms train with 2 seeds, and 2 of these runs are of the grid.
    assert re.fullmatch(r"30 arms, 66 runs of 4 steps: about .* on one idle core, .* with 2 jobs\.\n", out)
    assert not (tmp_path / "out").exists()
    code, _, err = call(capsys, "ablation", "quickstart", *TINY.split(), "--seed", "1", *where)
    assert (code, err) == (2, "blockwise-lr: --seed 1 belongs to train; ablation takes it as --seeds 0 1 2\n")
    code, _, err = call(capsys, "ablation", "quickstart", *TINY.split(), "--warmups", "0.2", *where)
    assert code == 2
    assert "--warmups is part of the tuning: give the grid too, such as --base-lrs" in err


@pytest.mark.parametrize("kind", ["robustness", "ablation"])
@pytest.mark.parametrize(
    ("flags", "middle", "uniform"),
    [
        ("", Setting(5.66e-3, 0.6), Setting(5.66e-3, 0.6)),
        ("--ratios measured", Setting(2e-3, 0.15), Setting(5.66e-3, 0.6)),
        ("--ratios paper", Setting(2e-3, 0.6), Setting(5.66e-3, 0.6)),
        ("--ratios measured --base-lr 1e-3", Setting(1e-3), Setting(1e-3)),
        ("--ratios emb=4", Setting(5.66e-3), Setting(5.66e-3)),
        ("--ratios measured --steps 600", Setting(5.66e-3), Setting(5.66e-3)),
    ],
)
def test_ratios_have_the_settings_that_were_tuned_for_them(kind, flags, middle, uniform):
    preset = get_preset("quickstart")
    parsed = parse(SweepCommand, kind, flags.split(), SweepCommand(Path("out"), preset))
    plan, _ = planned(kind, parsed, check_config(parsed.config), preset)
    chosen = plan.choose({})
    assert (chosen[plan.centre], chosen[plan.baseline]) == (middle, uniform)


@pytest.mark.slow
def test_the_command_trains_and_reports(text, cache, tmp_path):
    where = ["--data", text, "--cache", cache, "--out", tmp_path / "out"]
    done = run_command("ablation", "quickstart", *TINY.split(), "--ratios", "emb=4", *where)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert [point["arm"] for point in content["points"]] == ["none", "all"]
    assert done.stdout.splitlines()[0].startswith("2 arms, 2 runs of 4 steps: about ")
    assert done.stdout.splitlines()[-1] == f"Report: {tmp_path / 'out' / 'report.html'}"
