"""A step that the device skips by itself ends as one that the host has looked at."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blockwise_lr.checkpoints.manifest import checkpoints
from blockwise_lr.errors import NonFiniteLossError
from blockwise_lr.optim.groups import param_groups
from blockwise_lr.train import assembly
from blockwise_lr.train import nonfinite_guard as nonfinite
from blockwise_lr.train.deferred_guard import _UNREAD, DeferredGuard
from blockwise_lr.train.run import train
from support import poisoned
from train.test_nonfinite_guard import of, rows, spoil
from train.test_waits import as_on_a_gpu

BEFORE_THE_NEXT_ROW = {"steps": 16, "log_every": 4, "eval_every": 0, "save_every": 4, "keep_checkpoints": 9}


def files(out: Path) -> list[bytes]:
    return [
        (checkpoint / name).read_bytes()
        for checkpoint in checkpoints(out)
        for name in ("model.safetensors", "optimizer.pt")
    ]


@pytest.mark.parametrize("clip", [{}, {"clip": 0.0}, {"clip_by_block": "emb=0.01"}], ids=str)
@pytest.mark.parametrize("steps", [(), (6, 9, 10, 13)], ids=str)
def test_a_run_that_skips_is_the_same_to_the_bit(tiny, tmp_path, monkeypatch, capsys, clip, steps):
    config = replace(of(tiny, on_nonfinite="skip", **clip), **BEFORE_THE_NEXT_ROW)
    told = {}
    for name in ("at the step", "deferred"):
        with monkeypatch.context() as patch:
            spoil(patch, *steps)
            if name == "deferred":
                as_on_a_gpu(patch)
            train(config, tmp_path / name)
        errors = capsys.readouterr().err.splitlines()
        told[name] = [line.partition(" (3 nan")[0] for line in errors if "not finite" in line]
    assert rows(tmp_path / "deferred") == rows(tmp_path / "at the step")
    assert files(tmp_path / "deferred") == files(tmp_path / "at the step")
    assert told["deferred"] == told["at the step"]
    assert len(told["deferred"]) == len(steps)


def test_a_run_stops_at_the_next_row_and_names_the_step_with_its_block_and_parameter(
    tiny, tmp_path, monkeypatch
):
    spoil(monkeypatch, 6)
    as_on_a_gpu(monkeypatch)
    named = f"gradients that are not finite: ffn: {poisoned.POISONED}"
    message = f"the gradient was no longer finite at step 6: .*; {named}$"
    with pytest.raises(NonFiniteLossError, match=message):
        train(replace(tiny, **BEFORE_THE_NEXT_ROW), tmp_path / "run")
    assert [c.name for c in checkpoints(tmp_path / "run")] == ["checkpoint-4"]
    assert rows(tmp_path / "run")[-1]["step"] == 4
    assert json.loads((tmp_path / "run" / "result.json").read_text())["diverged_at_step"] == 6


def test_weights_that_are_not_finite_stop_a_run_that_would_skip(tiny, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        model = build_model(*args, **kwargs)
        with torch.no_grad():
            model.get_parameter(poisoned.POISONED).view(-1)[0] = math.inf
        return model

    build_model = assembly.build_model
    monkeypatch.setattr(assembly, "build_model", broken)
    as_on_a_gpu(monkeypatch)
    message = f"at step 1: .*; weights that are not finite: ffn: {poisoned.POISONED}$"
    with pytest.raises(NonFiniteLossError, match=message):
        train(of(tiny, on_nonfinite="skip"), tmp_path / "run")


class Steps:
    """A model of two parameters with a fused optimizer, stepped with given gradients."""

    def __init__(self, policy: str) -> None:
        self.told: list[str] = []
        self.guard = DeferredGuard(policy, self.told.append)
        self.model = torch.nn.ModuleDict({"wte": torch.nn.Embedding(4, 4), "ln_f": torch.nn.LayerNorm(4)})
        self.groups = param_groups(self.model, 1e-2)
        self.optimizer = torch.optim.AdamW(self.groups, fused=True)
        self.taken = 0

    def step(self, gradient: float, loss: float = 1.0) -> torch.Tensor:
        self.taken += 1
        total = torch.tensor(2.0)
        self.guard.before_micro_batch(total)
        total += loss
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        self.guard.defer(self.optimizer, list(self.model.parameters()), total, self.taken)
        self.optimizer.step()
        return total

    def read(self) -> int:
        return self.guard.read(self.optimizer.param_groups)

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def test_after_the_first_bad_step_a_run_that_stops_changes_no_weight():
    run = Steps("stop")
    run.step(1.0)
    before = run.weights()
    run.step(math.nan)
    run.step(1.0)
    assert all(map(torch.equal, run.weights(), before))
    with pytest.raises(NonFiniteLossError, match="step 2"):
        run.read()
    run.guard.begin()  # the next training starts afresh
    run.step(1.0)
    assert not torch.equal(run.weights()[0], before[0])
    assert run.read() == 0


def test_a_skipped_step_takes_its_loss_out_of_the_sum():
    run = Steps("skip")
    assert run.step(1.0).item() == 3.0
    assert run.step(math.nan, loss=math.nan).item() == 2.0
    assert run.read() == 1
    assert run.told[0].startswith("step 2: the loss was not finite, its update is skipped (1 so far)")


def test_a_loss_that_is_not_finite_is_told_apart_from_a_gradient():
    run = Steps("stop")
    run.step(math.nan, loss=math.inf)
    with pytest.raises(NonFiniteLossError, match="the loss was no longer finite at step 1"):
        run.read()


def test_a_gradient_too_large_for_its_norm_is_said_to_be_that():
    run = Steps("stop")
    run.step(4e18)  # the square of every norm is finite, and their sum is not
    with pytest.raises(NonFiniteLossError, match="finite, but too large for the norm of all of them"):
        run.read()


def test_too_many_skipped_steps_in_a_row_stop_a_run(monkeypatch):
    monkeypatch.setattr(nonfinite, "_IN_A_ROW", 4)
    run = Steps("skip")
    for gradient in [1.0] + [math.nan] * 3 + [1.0] + [math.nan] * 2:
        run.step(gradient)
    assert run.read() == 5
    for gradient in [math.nan] * 5:
        run.step(gradient)
    with pytest.raises(NonFiniteLossError, match="at step 9: .*; 4 steps in a row were not finite"):
        run.read()


def test_a_run_that_never_logs_is_read_now_and_then():
    run = Steps("stop")
    for _ in range(_UNREAD - 1):
        run.step(1.0)
    assert not run.guard.is_full
    run.step(1.0)
    assert run.guard.is_full
    assert run.read() == 0
    assert not run.guard.is_full
