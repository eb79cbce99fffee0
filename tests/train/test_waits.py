"""Waits for the device in a run: at logged steps, and in no other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate.utils import DistributedType

from blockwise_lr.train import pretrain_trainer
from blockwise_lr.train.assembly import make_trainer, training_arguments
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.deferred_guard import DeferredGuard, can_defer
from blockwise_lr.train.evaluate_loss import evaluate_loss
from blockwise_lr.train.pretrain_trainer import PretrainTrainer
from blockwise_lr.train.run import train
from blockwise_lr.train.settings import Settings
from blockwise_lr.train.unmasked_attention import use_unmasked_attention
from support.device_work import counted_work


def as_on_a_gpu(monkeypatch):
    """The run treats the CPU as a device that is worth not waiting for."""

    def allowed(optimizer, device, distributed):
        return can_defer(optimizer, torch.device("cuda"), distributed)

    monkeypatch.setattr(pretrain_trainer, "can_defer", allowed)


def waits_by_step(config, out, monkeypatch) -> dict[int, int]:
    """Train, and count the waits of each step. Forward passes are counted too, and backward passes are not.

    What is read before training, such as the initial scales, is not counted.

    Copies by ``Tensor.to`` are left out: the run's device is the CPU, so every ``to(device)`` looks like one to the
    host.
    """
    found, before = {}, 0
    end_of_step, training = PretrainTrainer._maybe_log_save_evaluate, PretrainTrainer.train

    def count():
        return work.waits - work.waits_of["to"]

    def noted(self, *args, **kwargs):
        nonlocal before
        end_of_step(self, *args, **kwargs)
        if self.state.global_step not in found:  # Trainer calls this once more at the end of the epoch
            found[self.state.global_step] = count() - before
            before = count()

    def begun(self, *args, **kwargs):
        nonlocal before
        before = count()
        return training(self, *args, **kwargs)

    def synchronized(*args):
        work.waits_of["synchronize"] += 1

    with monkeypatch.context() as patch, counted_work() as work:
        patch.setattr(PretrainTrainer, "_maybe_log_save_evaluate", noted)
        patch.setattr(PretrainTrainer, "train", begun)
        patch.setattr(torch.cuda, "synchronize", synchronized)
        # The loader draws its seed on the host before the first step.
        patch.setattr("torch.utils.data.dataloader._BaseDataLoaderIter.__init__", seeded(work))
        train(config, out)
    return found


def seeded(work):
    """The loader's constructor without what it counts: it draws a seed on the host."""
    make = torch.utils.data.dataloader._BaseDataLoaderIter.__init__

    def made(self, *args, **kwargs):
        before = work.waits_of.copy()
        make(self, *args, **kwargs)
        work.waits_of = before

    return made


@pytest.mark.parametrize("layers", [2, 12])
@pytest.mark.parametrize("family", ["tiny", pytest.param("tiny_gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("optim", [{}, {"clip_by_block": "1.0"}, {"on_nonfinite": "skip"}], ids=str)
def test_a_run_waits_at_logged_steps_alone_and_as_often_whatever_the_depth(
    request, family, optim, layers, tmp_path, monkeypatch
):
    tiny = request.getfixturevalue(family)
    as_on_a_gpu(monkeypatch)
    config = replace(
        tiny, steps=12, log_every=4, eval_every=0, save_every=0, precision="fp32",
        model=replace(tiny.model, layers=layers), optim=replace(tiny.optim, **optim),
    )  # fmt: skip
    waits = waits_by_step(config, tmp_path / "run", monkeypatch)
    assert {step for step, n in waits.items() if n} == {4, 8, 12}
    # The guard's record of the steps, the loss, the norm; and with clipping by block the norms of at most 6 blocks.
    assert 3 <= waits[4] == waits[8] <= 3 + 6 * ("clip_by_block" in optim)
    assert waits[12] == waits[8] + 1  # the loss of the evaluation


@pytest.mark.parametrize("layers", [2, 12])
def test_an_optimizer_that_cannot_skip_on_the_device_costs_one_wait_a_step(
    tiny, layers, tmp_path, monkeypatch
):
    as_on_a_gpu(monkeypatch)
    config = replace(
        tiny, steps=4, log_every=4, eval_every=0, save_every=0,
        model=replace(tiny.model, layers=layers), optim=replace(tiny.optim, optimizer="sgd"),
    )  # fmt: skip
    waits = waits_by_step(config, tmp_path / "run", monkeypatch)
    assert [waits[step] for step in (1, 2, 3)] == [1, 1, 1]


def test_only_a_fused_optimizer_of_whole_parameters_on_a_gpu_defers_the_check():
    weight = [torch.nn.Parameter(torch.zeros(2))]
    fused, plain = (torch.optim.AdamW(weight, fused=fused) for fused in (True, False))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert can_defer(fused, gpu, DistributedType.NO)
    assert can_defer(fused, gpu, DistributedType.MULTI_GPU)
    assert not can_defer(fused, gpu, DistributedType.FSDP)
    assert not can_defer(fused, cpu, DistributedType.NO)
    assert not can_defer(plain, gpu, DistributedType.NO)


@pytest.mark.parametrize("windows", [3, 24])
def test_an_evaluation_waits_once(tiny, windows):
    model = build_model(tiny.model, seed=0)
    use_unmasked_attention(model)
    ids = torch.randint(tiny.model.vocab_size, (windows, 16))
    with counted_work() as work:
        evaluate_loss(model, [{"input_ids": row, "labels": row} for row in ids], batch_size=2)
    assert work.waits - work.waits_of["to"] == 2  # one of them is the loader's seed, on the host


# Batches
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_come_from_pinned_memory_without_waiting_on_a_gpu_alone(tiny, tmp_path, device):
    from blockwise_lr.data.prepare import prepare_data

    # The settings of a run on a GPU, of which this machine needs none: torch pins memory only where there is one.
    settings = replace(Settings.of(tiny), device=device)
    arguments = training_arguments(tiny, settings, tmp_path)
    data = prepare_data(tiny.data, vocab_size=tiny.model.vocab_size, context=tiny.model.context)
    guard = DeferredGuard("stop", print)
    trainer = make_trainer(tiny, settings, tmp_path, arguments, data, None, None, guard)
    loader = trainer.get_train_dataloader()
    assert loader.base_dataloader.pin_memory is (device == "cuda")
    assert loader._non_blocking is (device == "cuda")
