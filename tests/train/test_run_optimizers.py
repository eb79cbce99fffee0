"""Runs and comparisons with an optimizer by name: from the configuration to a resumed run."""

from __future__ import annotations

import inspect
import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from blockwise_lr.analysis.measure_slopes import load_optimizer
from blockwise_lr.compare.arms import Arm, resolve_arm
from blockwise_lr.compare.plan import Plan
from blockwise_lr.errors import UserError
from blockwise_lr.optimizers.registry import OPTIMIZERS, optimizer_entry
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import OptimConfig, config_from_dict, identity
from blockwise_lr.train.metrics import read_metrics
from blockwise_lr.train.run import train
from support.commands import call

IN_TRAIN = [name for name in OPTIMIZERS if not optimizer_entry(name).own_loop]


def rows(out: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(out / "metrics.jsonl")]


def short(config: Any, optimizer: str, **optim: Any) -> Any:
    return replace(
        config, steps=8, log_every=4, eval_every=0, optim=replace(config.optim, optimizer=optimizer, **optim)
    )


@pytest.mark.parametrize("name", ["muon", "lion"])
def test_a_run_by_name_starts_resumes_to_the_bit_and_says_what_it_ran_with(tiny, tmp_path, name):
    if name == "lion":
        pytest.importorskip("pytorch_optimizer")
    config, out = short(tiny, name, base_lr=1e-3), tmp_path / "run"
    says = Console(record=True)
    result = train(config, out, console=says)
    whole = rows(out)
    assert whole[-1]["lr"]["qk"] == pytest.approx(8 * whole[-1]["lr"]["norm"], rel=0.5)
    expected = "lion: its base learning rate is usually about 0.1 times AdamW's; this run's is 0.001"
    assert (expected in says.export_text()) == (name == "lion")
    optim = json.loads((out / "config.json").read_text())["train"]["optim"]
    entry = optimizer_entry(name)
    assert (optim["beta1"], optim["eps"], optim["weight_decay"]) == (
        entry.beta1,
        entry.eps,
        entry.weight_decay,
    )

    # As if it had been killed after step 4.
    (out / "result.json").unlink()
    shutil.rmtree(out / "checkpoint-8")
    assert train(config, out)["terminal_val_loss"] == result["terminal_val_loss"]
    assert rows(out) == whole
    optimizer = load_optimizer(config, build_model(config.model, seed=0), out / "checkpoint-8")
    assert type(optimizer) is entry.load()


def test_what_is_not_set_is_the_optimizers_own_and_the_same_run_as_if_it_were_set(tiny):
    unset = short(tiny, "adamw")
    spelled = short(tiny, "adamw", beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    assert identity(unset) == identity(spelled)  # so runs from before there was None are found again
    assert identity(unset) != identity(short(tiny, "adamw", weight_decay=0.2))
    assert config_from_dict(unset.to_dict()) == unset
    lion = OptimConfig(optimizer="lion", beta2=0.99).resolved()
    assert (lion.beta1, lion.beta2, lion.eps, lion.weight_decay) == (0.95, 0.99, None, 1.0)
    assert OptimConfig(optimizer="sgd").resolved().beta1 is None


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"optimizer": "sgd", "beta1": 0.9}, r"--optimizer sgd takes no beta1 \(it is 0.9\): leave it out"),
        ({"optimizer": "torch.optim:Rprop", "weight_decay": 0.1}, "--optimizer torch.optim:Rprop takes no weight_d"),
        ({"optimizer": "torch.nn:Linear"}, "--optimizer torch.nn:Linear is the class Linear; expected a subclass of"),
        ({"optimizer": "torch.optim:Muon"}, "--optimizer torch.optim:Muon on this model: Muon only supports 2D"),
        ({"optimizer": "torch.optim:LBFGS"}, "--optimizer torch.optim:LBFGS on this model: LBFGS doesn't support"),
        ({"optimizer": "sophia"}, r"--optimizer sophia cannot be trained by this command: .*create_graph=True"),
        ({"optimizer": "muon", "ratios": "auto"}, "Adam-mini; --optimizer is muon: give it ratios"),
        ({"optimizer": "lion", "beta1": -1.0}, "--beta1 is -1.0; expected 0 or more and below 1"),
    ],
)  # fmt: skip
def test_bad_input_gives_one_line(tiny, tmp_path, optim, message):
    with pytest.raises(UserError, match=message) as error:
        train(short(tiny, **optim), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_command_line_says_it_in_one_line_with_exit_code_2(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pytorch_optimizer", None)
    for arguments in (
        ("train", "quickstart", "--optimizer", "lion"),
        ("compare", "quickstart", "--arms", "adamw:uniform", "lion:uniform", "--base-lrs", "1e-3"),
    ):
        code, _, err = call(capsys, *arguments)
        assert code == 2
        assert err.count("\n") == 1
        assert "pip install '.[optimizers]' in a clone of blockwise-lr" in err
    code, _, err = call(capsys, "train", "quickstart", "--optimizer", "torch.optim:Adamm")
    assert code == 2
    assert "expected module:Class" in err


@pytest.mark.parametrize(
    ("text", "arm"),
    [
        ("muon:uniform", Arm("muon:uniform", "muon", "uniform")),
        ("lion:emb=4,vo=0.5", Arm("lion:emb=4,vo=0.5", "lion", "emb=4,vo=0.5")),
        ("torch.optim:RAdam:paper", Arm("torch.optim:RAdam:paper", "torch.optim:RAdam", "paper")),
        ("mine=torch.optim:RAdam:emb=4", Arm("mine", "torch.optim:RAdam", "emb=4")),
    ],
)
def test_an_arm_takes_any_optimizer(text, arm):
    assert Arm.parse(text) == arm
    if "lion" not in text:
        assert resolve_arm(Arm.parse(text)) == arm


def test_every_arm_of_a_comparison_runs_with_its_own_settings(tiny):
    pytest.importorskip("pytorch_optimizer")
    arms = tuple(Arm.parse(f"{name}:uniform") for name in IN_TRAIN)
    plan = Plan(base=tiny, arms=arms, seeds=(0,), base_lrs=(1e-3,))
    for run in plan.tuning_runs():
        settings, entry = run.config.optim.resolved(), optimizer_entry(run.series.arm.optimizer)
        assert (settings.beta1, settings.weight_decay) == (entry.beta1, entry.weight_decay)
    assert len({run.folder for run in plan.tuning_runs()}) == len(IN_TRAIN) + 1
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize(
    ("arm", "optim", "message"),
    [
        ("sgd:uniform", {"beta1": 0.9}, "arm 'sgd:uniform': --optimizer sgd takes no beta1"),
        ("sophia:uniform", {}, "arm 'sophia:uniform': --optimizer sophia cannot be trained by this command"),
        ("adamm:uniform", {}, "arm 'adamm:uniform': no optimizer named 'adamm'; there are"),
    ],
)
def test_an_arm_that_cannot_run_is_refused_before_the_first_run(tiny, arm, optim, message):
    if "sophia" in arm:
        pytest.importorskip("pytorch_optimizer")
    base = replace(tiny, optim=replace(tiny.optim, **optim))
    with pytest.raises(UserError, match=message):
        Plan(base=base, arms=(Arm.parse("adamw:uniform"), Arm.parse(arm)), seeds=(0,))


def test_a_run_with_an_optimizer_by_import_path(tiny, tmp_path):
    config = short(tiny, "torch.optim:RAdam", beta2=0.95)
    train(config, tmp_path / "run")
    optimizer = load_optimizer(config, build_model(config.model, seed=0), tmp_path / "run" / "checkpoint-8")
    assert type(optimizer) is torch.optim.RAdam
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def test_a_presets_weight_decay_can_be_taken_back(monkeypatch, tmp_path):
    from blockwise_lr.cli.entry import main
    from blockwise_lr.train import run

    ran = []

    def record(config, out, command):
        ran.append(config.optim)
        return {"steps": 0, "terminal_val_loss": 0.0, "terminal_tune_loss": 0.0, "seconds": 0.0}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "train", record)
    main(["train", "quickstart", "--optimizer", "muon", "--weight-decay", "None"])
    main(["train", "quickstart", "--optimizer", "muon"])
    assert [optim.resolved().weight_decay for optim in ran] == [0.1, 0.03]


def test_the_help_names_every_optimizer_that_train_can_run():
    listed = inspect.getsource(OptimConfig).split("Name of the optimizer (")[1].split(")")[0]
    assert listed.replace("\n", " ").replace("  ", " ").split(", ") == IN_TRAIN
