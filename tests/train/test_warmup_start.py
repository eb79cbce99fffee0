"""The warm-up's start in a run's configuration: above 0 for new runs, at 0 for those of earlier versions."""

from __future__ import annotations

import json
from dataclasses import replace

from blockwise_lr.compare.arms import Arm
from blockwise_lr.compare.plan import Plan, run_folder
from blockwise_lr.train.config import OptimConfig, TrainConfig, config_from_dict, identity
from blockwise_lr.train.metrics import read_metrics
from blockwise_lr.train.run import train


def earlier(values: dict) -> dict:
    """What an earlier version would have saved."""
    values = json.loads(json.dumps(values))
    del values["optim"]["warmup_start"]
    return values


def from_zero(config: TrainConfig) -> TrainConfig:
    return replace(config, optim=replace(config.optim, warmup_start="zero"))


def test_a_saved_configuration_without_the_field_began_at_zero():
    assert config_from_dict(earlier(TrainConfig().to_dict())).optim.warmup_start == "zero"
    # One written by hand, with a field or two, is of a new run.
    by_hand = {"steps": 7, "optim": {"warmup": "equal_slope"}}
    assert config_from_dict(by_hand).optim.warmup_start == "above_zero"
    assert OptimConfig().warmup_start == "above_zero"


def test_earlier_runs_keep_their_folders_and_new_ones_get_others():
    new = TrainConfig()
    assert "optim.warmup_start" not in identity(from_zero(new))
    assert run_folder(config_from_dict(earlier(new.to_dict()))) == run_folder(from_zero(new))
    assert run_folder(new) != run_folder(from_zero(new))


def test_the_plan_of_an_earlier_comparison_began_at_zero():
    arms = (Arm.parse("adamw:uniform"), Arm.parse("adamw:paper"))
    plan = Plan(base=TrainConfig(), arms=arms, seeds=(0,))
    stored = plan.to_dict()
    stored["base"] = earlier(stored["base"])
    assert Plan.from_dict(json.loads(json.dumps(stored))).base == from_zero(TrainConfig())


def test_the_first_update_of_a_run_is_logged_above_zero_or_at_zero(tiny, tmp_path):
    tiny = replace(tiny, steps=4, log_every=1, eval_every=0, save_every=0)
    tiny = replace(tiny, optim=replace(tiny.optim, warmup_steps=2))
    train(tiny, tmp_path / "above")
    train(from_zero(tiny), tmp_path / "zero")
    above, zero = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("above", "zero"))
    assert [row["lr"]["norm"] for row in above[:3]] == [0.005, 0.01, 0.01]
    assert [row["lr"]["norm"] for row in zero[:3]] == [0.0, 0.005, 0.01]


def test_an_unfinished_run_of_an_earlier_version_goes_on_to_the_bit(tiny, tmp_path, capsys):
    tiny = replace(tiny, steps=8)
    train(from_zero(tiny), tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    content["train"] = earlier(content["train"])
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    for name in ("result.json", "checkpoint-8/manifest.json"):
        (tmp_path / "run" / name).unlink()

    train(tiny, tmp_path / "run")  # the same command as then, with today's default
    said = " ".join(capsys.readouterr().err.split())
    assert "holds a run of an earlier version, whose warm-up began at 0: it keeps --warmup-start zero" in said
    assert "resuming from" in said
    again = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(r["train_loss"], r["lr"]) for r in again] == [(r["train_loss"], r["lr"]) for r in rows]
    assert "warmup_start" not in json.loads((tmp_path / "run" / "config.json").read_text())["train"]["optim"]
