import dataclasses
import json

import pytest

from blockwise_lr.compare.arms import Arm
from blockwise_lr.compare.plan import Plan, run_folder
from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.errors import UserError
from blockwise_lr.train.config import OptimConfig, TrainConfig
from blockwise_lr.train.presets import Setting

BASE = TrainConfig(steps=100)
ARMS = (Arm.parse("adamw:uniform"), Arm.parse("blockwise=adamw:paper"))
GRID = (1e-3, 2e-3, 4e-3)


def plan(**changes) -> Plan:
    return Plan(**({"base": BASE, "arms": ARMS, "seeds": (0, 1)} | changes))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("adamw:paper", Arm("adamw:paper", "adamw", "paper")),
        ("mine=adamw:paper", Arm("mine", "adamw", "paper")),
        ("mine=adamw:runs/lr=2/ratios.json", Arm("mine", "adamw", "runs/lr=2/ratios.json")),
        ("adamw:runs/lr=2/ratios.json", Arm("adamw:runs/lr=2/ratios.json", "adamw", "runs/lr=2/ratios.json")),
    ],
)
def test_an_arm_is_read_from_text_with_or_without_a_name(text, expected):
    assert Arm.parse(text) == expected


@pytest.mark.parametrize("text", ["", "adamw", "adamw:", ":paper", "=adamw:paper", "a\nb=adamw:paper"])
def test_text_that_is_no_arm_is_refused_with_the_form_expected(text):
    with pytest.raises(UserError, match=r"expected OPTIMIZER:RATIOS or NAME=OPTIMIZER:RATIOS"):
        Arm.parse(text)


def test_the_baseline_also_runs_for_twice_the_steps():
    assert [(s.name, s.steps) for s in plan().series] == [
        ("adamw:uniform", 100),
        ("adamw:uniform 2N", 200),
        ("blockwise", 100),
    ]


def test_every_arm_tunes_over_the_same_grid_with_the_same_number_of_runs_at_one_seed():
    runs = plan(base_lrs=GRID).tuning_runs()
    for series in plan().series:
        mine = [run for run in runs if run.series == series]
        assert [run.base_lr for run in mine] == list(GRID)
        assert {run.config.seed for run in mine} == {0}
        assert {run.config.steps for run in mine} == {series.steps}


def test_the_lowest_tune_loss_chooses_and_a_diverged_run_never_does():
    tuning = plan(base_lrs=GRID)
    losses = dict(zip(tuning.tuning_runs(), [3.0, 2.9, 3.1, 2.5, 2.6, 2.7, 3.0, 2.8, float("inf")]))
    chosen = tuning.choose(losses)
    assert chosen == {
        "adamw:uniform": Setting(2e-3), "adamw:uniform 2N": Setting(1e-3), "blockwise": Setting(2e-3)
    }  # fmt: skip


def test_every_arm_tries_every_warm_up_with_every_learning_rate():
    runs = plan(base_lrs=GRID, warmups=(0.1, 0.6)).tuning_runs()
    for series in plan().series:
        mine = [run for run in runs if run.series == series]
        tried = [(run.config.optim.base_lr, run.config.optim.warmup_fraction) for run in mine]
        assert sorted(tried) == sorted((lr, warmup) for lr in GRID for warmup in (0.1, 0.6))
    assert len({run.folder for run in runs}) == len(runs)


def test_a_warm_up_in_steps_gives_way_to_those_that_are_tuned():
    base = dataclasses.replace(BASE, optim=OptimConfig(warmup_steps=7))
    assert {r.config.optim.warmup_steps for r in plan(base=base, base_lrs=GRID).tuning_runs()} == {7}
    tuned = plan(base=base, base_lrs=GRID, warmups=(0.5,))
    assert {r.config.optim.warmup_steps for r in tuned.tuning_runs()} == {None}


def test_every_arm_is_refined_on_both_sides_of_its_best_at_its_best_warm_up():
    tuning = plan(base_lrs=GRID, warmups=(0.1, 0.6), refine=True)
    best = {"adamw:uniform": (2e-3, 0.6), "adamw:uniform 2N": (1e-3, 0.1), "blockwise": (4e-3, 0.1)}
    losses = {
        run: 2.0 if best[run.series.name] == (run.base_lr, run.setting.warmup_fraction) else 3.0
        for run in tuning.tuning_runs()
    }
    runs = tuning.refining_runs(losses)
    assert {run.config.seed for run in runs} == {0}
    assert [(r.series.name, r.base_lr, r.config.optim.warmup_fraction) for r in runs] == [
        ("adamw:uniform", 1.41e-3, 0.6), ("adamw:uniform", 2.83e-3, 0.6),
        ("adamw:uniform 2N", 7.07e-4, 0.1), ("adamw:uniform 2N", 1.41e-3, 0.1),
        ("blockwise", 2.83e-3, 0.1), ("blockwise", 5.66e-3, 0.1),
    ]  # fmt: skip
    better = losses | {run: 1.9 for run in runs if run.base_lr == 2.83e-3}
    assert tuning.choose(better) == {
        "adamw:uniform": Setting(2.83e-3, 0.6),
        "adamw:uniform 2N": Setting(1e-3, 0.1),
        "blockwise": Setting(2.83e-3, 0.1),
    }
    assert plan(base_lrs=GRID).refining_runs(losses) == []


def test_a_plan_with_warm_ups_is_read_back_and_one_from_before_them_too():
    tuning = plan(base_lrs=GRID, warmups=(0.1, 0.6), refine=True)
    stored = json.loads(json.dumps(tuning.to_dict()))
    assert Plan.from_dict(stored) == tuning
    del stored["warmups"], stored["refine"]
    assert Plan.from_dict(stored) == plan(base_lrs=GRID)


def test_the_chosen_run_of_the_grid_is_not_run_again_for_its_seed():
    tuning = plan(base_lrs=GRID)
    final = {
        run.folder for run in tuning.final_runs(dict.fromkeys((s.name for s in tuning.series), Setting(2e-3)))
    }
    assert len(final & {run.folder for run in tuning.tuning_runs()}) == 3


def test_runs_of_one_seed_share_all_but_what_is_compared():
    runs = plan().final_runs(dict.fromkeys((s.name for s in plan().series), Setting(1e-3)))
    neutral = {
        dataclasses.replace(r.config, steps=1, optim=dataclasses.replace(r.config.optim, ratios="uniform"))
        for r in runs
        if r.config.seed == 1
    }
    assert len(neutral) == 1


def test_learning_rates_tuned_beforehand_are_taken_by_arm_and_horizon():
    tuned = {
        "adamw:uniform:N": Setting(2e-3, 0.6), "adamw:uniform:2N": Setting(1e-3), "adamw:paper:N": Setting(5e-4)
    }  # fmt: skip
    before = plan(tuned=tuned)
    chosen = before.choose({})
    assert chosen == {
        "adamw:uniform": Setting(2e-3, 0.6),
        "adamw:uniform 2N": Setting(1e-3),
        "blockwise": Setting(5e-4),
    }
    assert Plan.from_dict(json.loads(json.dumps(before.to_dict()))) == before
    warmups = {run.series.name: run.config.optim.warmup_fraction for run in before.final_runs(chosen)}
    assert warmups == {"adamw:uniform": 0.6, "adamw:uniform 2N": 0.02, "blockwise": 0.02}


@pytest.mark.parametrize(
    "free",
    [{"data": DataConfig(cache="elsewhere")}, {"save_every": 0}, {"report_to": "none"}, {"preset": "mine"}],
)
def test_what_changes_no_number_is_the_same_run(free):
    assert run_folder(dataclasses.replace(BASE, **free)) == run_folder(BASE)


def test_a_run_is_known_by_its_configuration_and_not_by_its_arms_name():
    renamed = (Arm.parse("other=adamw:uniform"), Arm.parse("adamw:paper"))
    folders = [[r.folder for r in plan(arms=arms, base_lrs=GRID).tuning_runs()] for arms in (ARMS, renamed)]
    assert folders[0] == folders[1]


@pytest.mark.parametrize(
    "changed",
    [
        {"steps": 101},
        {"seed": 1},
        {"batch_size": 8},
        {"data": DataConfig(data="elsewhere")},
        {"optim": OptimConfig(weight_decay=0.2)},
    ],
)
def test_another_configuration_is_another_run(changed):
    assert run_folder(dataclasses.replace(BASE, **changed)) != run_folder(BASE)


def test_a_whole_number_and_its_float_are_the_same_configuration():
    runs = [
        plan(base=dataclasses.replace(BASE, optim=OptimConfig(clip=clip))).final_runs for clip in (1, 1.0)
    ]
    chosen = {"adamw:uniform": Setting(1), "adamw:uniform 2N": Setting(1.0), "blockwise": Setting(1)}
    assert [r.folder for r in runs[0](chosen)] == [r.folder for r in runs[1](chosen)]


def test_a_file_of_ratios_is_spelled_out_so_that_the_plan_does_not_need_it(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"qk": 8}')
    before = plan(arms=(ARMS[0], Arm.parse(f"mine=adamw:{file}")), base_lrs=GRID)
    file.unlink()
    again = Plan.from_dict(json.loads(json.dumps(before.to_dict())))
    assert again.arms[1] == Arm("mine", "adamw", "qk=8")
    assert again.tuning_runs() == before.tuning_runs()
    assert {run.config.optim.ratios for run in again.tuning_runs()[-3:]} == {"qk=8"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ARMS[:1]}, "needs a baseline and at least one other arm; got 1"),
        (
            {"arms": (ARMS[0], Arm("adamw:uniform", "adamw", "paper"))},
            "each arm name may be given once.*adamw:uniform",
        ),
        ({"arms": (ARMS[0], Arm("adamw:uniform 2N", "adamw", "paper"))}, "each arm name may be given once"),
        ({"arms": (ARMS[0], Arm("b", "adamw", "uniform"))}, "two arms are both adamw:uniform"),
        (
            {"arms": (ARMS[0], Arm("b", "adamv", "paper"))},
            "arm 'b': no optimizer named 'adamv'; there are adamw",
        ),
        (
            {"arms": (ARMS[0], Arm("b", "adamw", "papre"))},
            "arm 'b': ratios: 'papre' is no file and none of uniform, half, paper",
        ),
        ({"seeds": ()}, "no seeds were given"),
        ({"seeds": (1, 1)}, "each seed may be given once; given more than once: 1"),
        ({"base_lrs": ()}, "--base-lrs was given without values"),
        ({"base_lrs": (1e-3, 1e-3)}, "each base learning rate may be given once"),
        ({"base_lrs": (1e-3, 0.0)}, "must be a positive number; got 0"),
        ({"base_lrs": (1e-3, float("nan"))}, "must be a positive number; got nan"),
        ({"warmups": (0.1,)}, "--warmups is part of the tuning: give the grid too"),
        ({"refine": True}, "--refine is part of the tuning: give the grid too"),
        ({"base_lrs": GRID, "warmups": ()}, "--warmups was given without values"),
        ({"base_lrs": GRID, "warmups": (0.1, 1.0)}, "from 0 to below 1; got 1 in --warmups"),
        ({"base_lrs": GRID, "warmups": (0.1, 0.1)}, "each warm-up may be given once"),
        (
            {"tuned": {"adamw:uniform:N": Setting(1e-3)}},
            "no base learning rate was tuned for adamw:uniform:2N",
        ),
        ({"horizons": ("2N",)}, "must hold N and be of"),
        ({"base": TrainConfig(steps=1)}, "at least 2 steps; got 1"),
        ({"base": TrainConfig(init_seed=0, data_seed=0)}, "2 seeds would repeat one run"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        plan(**changes)


def test_a_file_without_ratios_is_refused_before_anything_runs(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"qq": 1}')
    with pytest.raises(UserError, match="arm 'mine': ratios: 'qq' is not a block"):
        plan(arms=(ARMS[0], Arm.parse(f"mine=adamw:{file}")))
