"""A loss or a gradient that is not finite never reaches the weights: the run stops, or leaves the step out."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blockwise_lr.checkpoints.manifest import checkpoints, problem_with
from blockwise_lr.errors import NonFiniteLossError
from blockwise_lr.experimental.auto import AutoRatios
from blockwise_lr.optim.groups import param_groups
from blockwise_lr.optim.schedules import cosine_schedule
from blockwise_lr.train import assembly
from blockwise_lr.train import nonfinite_guard as nonfinite
from blockwise_lr.train.config import TrainConfig, identity
from blockwise_lr.train.metrics import read_metrics
from blockwise_lr.train.pretrain_trainer import PretrainTrainer
from blockwise_lr.train.run import train
from faults.processes import report
from support import poisoned
from support.commands import run_script

NAMED = rf"gradients that are not finite: ffn: {poisoned.POISONED} \(3 nan, 0 inf of 1,024\)"


def spoil(monkeypatch, *steps, **how):
    monkeypatch.setattr(assembly, "build_model", poisoned.poisoned_model(steps, **how))


def of(config: TrainConfig, **optim) -> TrainConfig:
    return replace(config, optim=replace(config.optim, **optim))


def rows(out: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(out / "metrics.jsonl")]


def weights(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(checkpoints(out)[-1] / "model.safetensors")


@pytest.mark.parametrize("clip", [{}, {"clip": 0.0}, {"clip_by_block": "emb=0.01"}], ids=str)
def test_it_stops_at_the_step_itself_with_block_and_parameter_and_keeps_what_was_saved(
    tiny, tmp_path, monkeypatch, record_property, clip
):
    spoil(monkeypatch, 7)
    config = of(tiny, **clip)
    message = rf"the gradient was no longer finite at step 7: the run diverged; .*; {NAMED}$"
    for _ in range(2):  # asked again, it says so again
        with pytest.raises(NonFiniteLossError, match=message):
            train(config, tmp_path / "run")
    assert [c.name for c in checkpoints(tmp_path / "run")] == ["checkpoint-4"]
    assert problem_with(tmp_path / "run" / "checkpoint-4") is None
    assert rows(tmp_path / "run")[-1]["step"] == 6
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["diverged"], result["diverged_at_step"]) == (True, 7)
    report(
        record_property,
        f"NaN in a gradient ({', '.join(f'{name} {value}' for name, value in clip.items()) or 'clipped as a whole'})",
        1,
        "stops at that step and names block and parameter; the last complete checkpoint stays",
    )


def test_a_loss_that_is_not_finite_is_told_apart_from_a_gradient(tiny, tmp_path, monkeypatch):
    compute_loss = PretrainTrainer.compute_loss

    def infinite(self, *args, **kwargs):
        return compute_loss(self, *args, **kwargs) + (math.inf if self.state.global_step == 4 else 0)

    monkeypatch.setattr(PretrainTrainer, "compute_loss", infinite)
    spoil(monkeypatch, 5)
    with pytest.raises(NonFiniteLossError, match="the loss was no longer finite at step 5"):
        train(tiny, tmp_path / "run")


@pytest.mark.parametrize("clip", [{}, {"clip": 0.0}, {"clip_by_block": "emb=0.01"}], ids=str)
def test_skipped_steps_are_counted_and_told_and_change_nothing_but_their_own_update(
    tiny, tmp_path, monkeypatch, capsys, clip
):
    config = of(tiny, on_nonfinite="skip", **clip)
    train(of(tiny, **clip), tmp_path / "whole")
    capsys.readouterr()
    spoil(monkeypatch, 7, 9, 10)
    train(config, tmp_path / "run")
    told = [line for line in capsys.readouterr().err.splitlines() if "not finite" in line]
    assert len(told) == 3
    assert told[0].startswith(
        "step 7: the gradient was not finite, its update is skipped (1 so far); gradients"
    )
    assert poisoned.POISONED in told[0]
    found = rows(tmp_path / "run")
    assert {row["step"]: row["skipped"] for row in found if "skipped" in row} == {8: 1, 10: 2}
    assert found[:3] == rows(tmp_path / "whole")[:3]
    # The data goes on: of steps 7 and 8, the row of step 8 is the loss of step 8, on its own batch.
    assert found[4]["train_loss"] is None
    assert found[4]["lr"] == rows(tmp_path / "whole")[4]["lr"]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["skipped_steps"] == 3
    assert found[-1]["val_loss"] < found[1]["val_loss"]


def test_the_loss_of_a_row_is_the_mean_over_the_steps_that_were_not_skipped(tiny, tmp_path, monkeypatch):
    config = replace(of(tiny, on_nonfinite="skip"), steps=4, save_every=0, eval_every=0)
    spoil(monkeypatch, 3)
    train(replace(config, log_every=1), tmp_path / "each")
    train(replace(config, log_every=4), tmp_path / "four")
    each = [row["train_loss"] for row in rows(tmp_path / "each")]
    assert each[2] is None
    mean = (each[0] + each[1] + each[3]) / 3
    assert rows(tmp_path / "four")[0]["train_loss"] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize(
    "optimizer", ["adamw", "adam-mini", "muon", "sgd", "lion", "soap", "adan", "ademamix"]
)
def test_a_skipped_step_moves_no_weight_whatever_the_optimizer(tiny, tmp_path, monkeypatch, optimizer):
    config = replace(
        of(tiny, optimizer=optimizer, on_nonfinite="skip", warmup_steps=0, base_lr=1e-3),
        log_every=1, eval_every=0, save_every=1, keep_checkpoints=10, steps=3,
    )  # fmt: skip
    spoil(monkeypatch, 3)
    train(config, tmp_path / "run")
    before, after = (checkpoints(tmp_path / "run")[i] / "model.safetensors" for i in (-2, -1))
    assert before.read_bytes() == after.read_bytes()
    earliest = checkpoints(tmp_path / "run")[0] / "model.safetensors"
    assert earliest.read_bytes() != before.read_bytes()


def test_weights_that_are_not_finite_stop_a_run_that_would_skip(tiny, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        model = build_model(*args, **kwargs)
        with torch.no_grad():
            model.get_parameter(poisoned.POISONED).view(-1)[0] = math.inf
        return model

    build_model = assembly.build_model
    monkeypatch.setattr(assembly, "build_model", broken)
    message = f"at step 1: .*; weights that are not finite: ffn: {poisoned.POISONED}$"
    with pytest.raises(NonFiniteLossError, match=message):
        train(of(tiny, on_nonfinite="skip"), tmp_path / "run")


def test_too_many_skipped_steps_in_a_row_stop_a_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(nonfinite, "_IN_A_ROW", 4)
    spoil(monkeypatch, 3, 4, 5, 9, 10, 11, 12, 13)
    with pytest.raises(
        NonFiniteLossError, match="no longer finite at step 12: .*; 4 steps in a row were not finite"
    ):
        train(of(tiny, on_nonfinite="skip"), tmp_path / "run")


def test_a_gradient_too_large_for_its_norm_is_said_to_be_that(tiny, tmp_path, monkeypatch):
    spoil(monkeypatch, 3, value=1e38, elements=1024)
    with pytest.raises(
        NonFiniteLossError, match="ffn: every element is finite, but the norm of order 2 overflows"
    ):
        train(replace(tiny, precision="fp32"), tmp_path / "run")


def test_the_guard_of_auto_leaves_out_a_loss_that_is_not_finite():
    model = torch.nn.ModuleDict({"wte": torch.nn.Embedding(8, 4), "ln_f": torch.nn.LayerNorm(4)})
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3))
    auto = AutoRatios(optimizer, cosine_schedule(optimizer, warmup_steps=1, total_steps=10))
    auto.watch(2.0)
    assert not auto.watch(math.nan)
    assert optimizer.param_groups[0]["auto_loss"] == 2.0


def test_two_processes_skip_the_same_step_though_one_alone_saw_it(tiny, tmp_path, record_property):
    config = replace(of(tiny, on_nonfinite="skip"), steps=8, batch_size=2)
    (tmp_path / "tiny.json").write_text(json.dumps(config.to_dict()))
    done = run_script(
        poisoned.__file__, "3,5", "1", "train", tmp_path / "tiny.json", "--out", tmp_path / "run", processes=2
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {row["step"]: row.get("skipped") for row in rows(tmp_path / "run")} == {
        2: None,
        4: 1,
        6: 1,
        8: None,
    }
    assert "step 3: the gradient was not finite, its update is skipped (1 so far)" in done.stderr
    assert all(row["train_loss"] for row in rows(tmp_path / "run"))
    report(
        record_property,
        "NaN in the gradient of one of two processes, --on-nonfinite skip",
        1,
        "both skip the step, name block and parameter, and count it",
    )


def test_runs_from_before_this_setting_are_the_same_runs():
    assert not any("nonfinite" in name for name in identity(TrainConfig()))
    assert identity(of(TrainConfig(), on_nonfinite="skip"))["optim.on_nonfinite"] == "skip"


def test_a_step_that_was_cut_short_is_not_given_back_to_the_next_training(tmp_path):
    guard = nonfinite.NonFiniteGuard("skip", print)
    guard.before_micro_batch(torch.tensor(3.0))  # then Ctrl-C
    guard.begin()
    model = torch.nn.LayerNorm(4)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3))
    model.weight.grad = torch.full((4,), math.nan)
    loss = torch.tensor(1.0)
    guard.before_micro_batch(loss)
    loss += math.nan
    guard.stop_or_skip(model, optimizer.param_groups, loss, 1)
    assert float(loss) == 1.0
