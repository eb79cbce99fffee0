"""AutoRatios in BlockwiseTrainer: the guard watches the loss that is trained, and nothing works on after train()."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from blockwise_lr import AutoRule
from blockwise_lr.experimental.auto import auto_of
from blockwise_lr.integrations.transformers import BlockwiseTrainer, SharpnessCallback
from integrations.guarded_training import STEPS, Padded, llama, trained
from integrations.test_transformers import arguments
from support.processes import run_ranks

SCRIPT = Path(__file__).with_name("guarded_training.py")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 1},
        {"by_tokens": False},
        {"label_smoothing_factor": 0.2},
        {"own_loss": True},
        {"average_tokens_across_devices": False},
    ],
    ids=str,
)
def test_the_guard_watches_the_loss_of_the_whole_step(tmp_path, settings):
    trainer = trained(tmp_path, **settings)
    assert len(trainer.true) == STEPS
    assert trainer.watched == pytest.approx(trainer.true, rel=1e-5)
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert trainer.watched == pytest.approx(logged, abs=1e-4)


def test_micro_batches_of_unequal_length_back_nothing_off(tmp_path, caplog):
    trained(tmp_path, steps=40, rule=AutoRule(start=0.0, guard=0.5), logging_steps=40)
    assert "ratios backed off" not in caplog.text


def test_two_processes_watch_the_mean_over_the_tokens_of_both(tmp_path):
    done = run_ranks(SCRIPT, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (watched, true, logged) in json.loads((tmp_path / "found.json").read_text()).items():
        assert len(true) == STEPS
        assert watched == pytest.approx(true, rel=1e-4), name
        assert watched == pytest.approx(logged, abs=1e-3), name


# Hooks
# ---------------------------------------------------------------------------------------------------------------


class Ratios(TrainerCallback):
    """The ratios after each step, by the number of steps taken; stops the first training as it is told."""

    def __init__(self, error=None, at=5):
        self.error, self.at = error, at
        self.found = {}

    def on_step_end(self, args, state, control, **kwargs):
        groups = kwargs["optimizer"].param_groups
        self.found[state.global_step] = [group["lr_ratio"] for group in groups]
        if self.error is not None and state.global_step == self.at:
            error, self.error = self.error, None
            raise error


def auto_trainer(folder, callback, **changes):
    settings = arguments(folder, max_steps=20, per_device_train_batch_size=4, **changes)
    rule = AutoRule(start=0.0, stop=0.5, gain=20.0, guard=100.0)
    return BlockwiseTrainer(llama(), settings, train_dataset=Padded(), ratios=rule, callbacks=[callback])


def autos(trainer):
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return [hook for hook in optimizer._optimizer_step_pre_hooks.values() if "AutoRatios" in str(hook)]


def at_rest(found):
    return {tuple(ratios) for step, ratios in found.items() if step >= 11}


def test_the_hook_is_removed_at_the_end_of_training(tmp_path):
    trainer = auto_trainer(tmp_path, Ratios())
    trainer.train()
    assert trainer.auto.closed
    assert autos(trainer) == []
    assert len(set(trainer.auto.ratios.values())) > 2  # still to be read


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a fault")], ids=repr)
def test_a_training_that_was_cut_short_leaves_nothing_that_moves_the_ratios_of_the_next(tmp_path, error):
    ratios = Ratios(error)
    trainer = auto_trainer(tmp_path, ratios)
    with pytest.raises(type(error)):
        trainer.train()
    assert trainer.auto.closed
    assert autos(trainer) == []
    ratios.found.clear()
    trainer.train()
    assert len(at_rest(ratios.found)) == 1
    assert autos(trainer) == []


@pytest.mark.slow
def test_a_retry_after_out_of_memory_has_one_auto(tmp_path):
    ratios = Ratios(torch.OutOfMemoryError("CUDA out of memory."))
    trainer = auto_trainer(tmp_path, ratios, auto_find_batch_size=True)
    first = []
    make = trainer.create_scheduler
    trainer.create_scheduler = lambda *args, **kwargs: (make(*args, **kwargs), first.append(trainer.auto))[0]
    trainer.train()
    assert len(first) == 2
    assert first[0] is not first[1]
    assert len(at_rest(ratios.found)) == 1
    assert all(auto.closed for auto in first)


def test_while_it_trains_the_optimizer_has_the_trainers_auto(tmp_path):
    class During(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(auto_of(trainer.optimizer.optimizer) is trainer.auto)

    seen = []
    trainer = auto_trainer(tmp_path, During())
    trainer.train()
    assert seen == [True] * 20


def test_a_sharpness_callback_goes_from_one_trainer_to_the_next(tmp_path):
    """BlockwiseTrainer calls it with gradients; a plain Trainer's event has to do so afterwards."""
    from transformers import Trainer

    callback = SharpnessCallback(
        every=1, estimators="empirical", tokens_per_step=20, path=tmp_path / "s.jsonl"
    )
    auto_trainer(tmp_path, callback).train()
    logs = []
    callback._given_log = None
    (tmp_path / "s.jsonl").unlink()
    settings = arguments(tmp_path, max_steps=2, max_grad_norm=0.0)
    trainer = Trainer(llama(), settings, train_dataset=Padded(), callbacks=[callback])
    trainer.train()
    assert logs == []
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 2
