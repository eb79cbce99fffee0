"""Resumes of BlockwiseTrainer: longer and shorter runs, other settings, checkpoints of a plain Trainer and back."""

from __future__ import annotations

import math
import warnings
from functools import partial

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from blockwise_lr import DEFAULT_RATIOS, AutoRule, split_fused
from blockwise_lr.integrations.transformers import BlockwiseTrainer, blockwise_optimizer
from blockwise_lr.optim import block_lr
from support import tiny_models

LR = 1e-3


class Tokens(Dataset):
    def __len__(self):
        return 256

    def __getitem__(self, i):
        ids = torch.randint(40, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


gpt2 = partial(tiny_models.gpt2, n_layer=1)


def arguments(folder, steps=6, **changes):
    values = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 2, "learning_rate": LR,
        "weight_decay": 0.1, "warmup_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip
    return TrainingArguments(**{**values, **changes})


def blockwise(folder, steps=6, arguments_=None, **options):
    arguments_ = arguments_ or {}
    return BlockwiseTrainer(
        split_fused(gpt2()), arguments(folder, steps, **arguments_), train_dataset=Tokens(), **options
    )


def resume(trainer, checkpoint):
    """The texts of the warnings about what has changed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=str(checkpoint))
    return [
        str(w.message)
        for w in caught
        if "other settings" in str(w.message) or "new settings" in str(w.message)
    ]


def rates(trainer, block):
    return {row["step"]: row[key] for row in trainer.state.log_history if (key := f"lr/{block}") in row}


def asked(block, step, *, steps, shape="cosine", base=LR, ratio=None):
    ratio = DEFAULT_RATIOS.get(block, 1.0) if ratio is None else ratio
    floor = base / 20
    return block_lr(
        step, peak=ratio * base, ratio=ratio, shape=shape, warmup_steps=2, total_steps=steps, floor=floor
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of 6 steps by each schedule, with checkpoints at 3 and 6."""
    folders = {}
    for shape in ("cosine", "wsd"):
        folders[shape] = tmp_path_factory.mktemp(shape)
        blockwise(folders[shape], schedule=shape).train()
    return folders


@pytest.mark.parametrize("shape", ["cosine", "wsd"])
@pytest.mark.parametrize("done", [3, 6])
def test_a_longer_run_goes_on_by_the_schedule_of_its_new_length(runs, tmp_path, shape, done):
    trainer = blockwise(tmp_path, steps=18, schedule=shape)
    told = resume(trainer, runs[shape] / f"checkpoint-{done}")
    assert told == [
        f"the schedule goes on at step {done} with other settings than it was saved with: total_steps 6 -> 18"
    ]
    for block in ("emb", "qk", "norm"):
        found = rates(trainer, block)
        for step in range(done, 18):
            assert found[step + 1] == pytest.approx(asked(block, step, steps=18, shape=shape))
    assert trainer.state.global_step == 18
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])


def test_a_shorter_run_goes_on_by_its_schedule_and_one_that_is_too_short_is_an_error(runs, tmp_path):
    trainer = blockwise(tmp_path / "a", steps=5)
    resume(trainer, runs["cosine"] / "checkpoint-3")
    assert rates(trainer, "emb")[5] == pytest.approx(asked("emb", 4, steps=5))
    trainer = blockwise(tmp_path / "b", steps=5)
    with pytest.raises(ValueError, match="6 steps are done, and the schedule was made for total_steps=5"):
        trainer.train(resume_from_checkpoint=str(runs["cosine"] / "checkpoint-6"))


def test_other_ratios_or_another_base_rate_are_an_error_that_names_both(runs, tmp_path):
    trainer = blockwise(tmp_path, arguments_={"learning_rate": 2e-3}, ratios={"emb": 3.0})
    with pytest.raises(
        ValueError,
        match=r"base learning rate is 0.001 there and 0.002 here; ratio of norm is 6 there and 1 here; .*"
        r'on_change="use_new"',
    ):
        trainer.train(resume_from_checkpoint=str(runs["cosine"] / "checkpoint-3"))


def test_a_run_of_an_earlier_versions_default_is_an_error_with_the_argument_that_goes_on_with_it(tmp_path):
    blockwise(tmp_path / "old", ratios="paper").train()
    checkpoint = tmp_path / "old" / "checkpoint-3"
    with pytest.raises(
        ValueError, match=r'ratio of norm is 1 there and 6 here; .* \(ratios="paper"\), or go on'
    ):
        blockwise(tmp_path / "new").train(resume_from_checkpoint=str(checkpoint))
    resumed = blockwise(tmp_path / "again", ratios="paper")
    assert resume(resumed, checkpoint) == []
    assert rates(resumed, "emb")[6] == pytest.approx(asked("emb", 5, steps=6, ratio=10))


def test_use_new_goes_on_with_the_new_ratios_and_the_old_moments(runs, tmp_path):
    trainer = blockwise(
        tmp_path, arguments_={"learning_rate": 2e-3}, ratios={"emb": 3.0}, on_change="use_new"
    )
    told = resume(trainer, runs["cosine"] / "checkpoint-3")
    assert len(told) == 2
    assert told[1].endswith("than it was saved with: floor 5e-05 -> 0.0001")  # a twentieth of the base rate
    assert "goes on with new settings: base learning rate is 0.001 there and 0.002 here" in told[0]
    for step in range(3, 6):
        assert rates(trainer, "emb")[step + 1] == pytest.approx(
            asked("emb", step, steps=6, base=2e-3, ratio=3.0)
        )
    state = next(iter(trainer.optimizer.state.values()))
    assert float(state["step"]) == 6


class TransformersSchedule(BlockwiseTrainer):
    """One of transformers' own schedules in the place of ours, as a subclass may make it."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        return Trainer.create_scheduler(self, num_training_steps, optimizer or self.optimizer)


def test_other_settings_are_compared_whatever_the_schedule_is(tmp_path):
    def trainer(folder, **options):
        return TransformersSchedule(
            split_fused(gpt2()), arguments(folder, warmup_steps=0), train_dataset=Tokens(), **options
        )

    trainer(tmp_path / "a").train()
    checkpoint = tmp_path / "a" / "checkpoint-3"
    with pytest.raises(ValueError, match=r"ratio of emb is 4 there and 3 here"):
        trainer(tmp_path / "b", ratios={**DEFAULT_RATIOS, "emb": 3.0}).train(
            resume_from_checkpoint=str(checkpoint)
        )
    new = trainer(tmp_path / "c", ratios={**DEFAULT_RATIOS, "emb": 3.0}, on_change="use_new")
    assert len(resume(new, checkpoint)) == 1
    for step in range(3, 6):
        assert rates(new, "emb")[step + 1] == pytest.approx(3 * LR * (1 - step / 6))


def test_other_groups_are_an_error_that_names_them_or_carried_over_by_name(runs, tmp_path):
    trainer = blockwise(tmp_path / "a", no_decay="1d")
    with pytest.raises(ValueError, match=r"the saved optimizer has other groups: .*on_change=\"use_new\""):
        trainer.train(resume_from_checkpoint=str(runs["cosine"] / "checkpoint-3"))
    trainer = blockwise(tmp_path / "b", no_decay="1d", on_change="use_new")
    resume(trainer, runs["cosine"] / "checkpoint-3")
    assert {float(state["step"]) for state in trainer.optimizer.state.values()} == {6.0}


def test_ratios_of_an_auto_run_are_resumed_by_auto_and_refused_by_fixed_ones(tmp_path):
    rule = AutoRule(begin="uniform", signal="cosine", start=0.0, stop=1.0, gain=50.0)
    first = blockwise(tmp_path / "auto", ratios=rule)
    first.train()
    checkpoint = tmp_path / "auto" / "checkpoint-3"
    resumed = blockwise(tmp_path / "b", ratios=rule)
    assert resume(resumed, checkpoint) == []
    assert resumed.auto.ratios == pytest.approx(first.auto.ratios)
    fixed = blockwise(tmp_path / "c")
    with pytest.raises(ValueError, match="ratios were moved by AutoRatios, and the ratios here are fixed"):
        fixed.train(resume_from_checkpoint=str(checkpoint))
    fixed = blockwise(tmp_path / "d", on_change="use_new")
    assert "ratio of emb" in resume(fixed, checkpoint)[0]
    assert rates(fixed, "emb")[5] == pytest.approx(asked("emb", 4, steps=6))


# Between a plain Trainer and BlockwiseTrainer -----------------------------------------------------------


def test_a_plain_trainers_checkpoint_goes_on_by_block_with_its_moments(tmp_path):
    plain = Trainer(gpt2(), arguments(tmp_path / "plain"), train_dataset=Tokens())
    plain.train()
    checkpoint = tmp_path / "plain" / "checkpoint-3"
    trainer = blockwise(tmp_path / "ours", steps=12)
    kept = {}
    trainer.add_callback(_AtBegin(lambda optimizer: kept.update(_moments(optimizer))))
    resume(trainer, checkpoint)
    for block in ("emb", "qk"):
        for step in range(3, 12):
            assert rates(trainer, block)[step + 1] == pytest.approx(asked(block, step, steps=12))
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    # c_attn's moment, in the plain Trainer's first group, is now that of its three parts.
    fused = next(s["exp_avg"] for s in saved["state"].values() if tuple(s["exp_avg"].shape) == (8, 24))
    parts = [value for name, value in kept.items() if "c_attn" in name and value.ndim == 2]
    assert torch.equal(torch.cat(parts, dim=1), fused)
    assert {float(s["step"]) for s in trainer.optimizer.state.values()} == {12.0}


def test_checkpoints_of_a_plain_trainer_on_groups_by_block_are_taken_by_each_other(tmp_path):
    def plain(folder, steps=6):
        model = split_fused(gpt2())
        factory = blockwise_optimizer(model, lr=LR)
        return Trainer(
            model, arguments(folder, steps), train_dataset=Tokens(), optimizer_cls_and_kwargs=factory
        )

    plain(tmp_path / "plain").train()
    ours = blockwise(tmp_path / "ours", steps=12)
    resume(ours, tmp_path / "plain" / "checkpoint-3")
    assert rates(ours, "emb")[12] == pytest.approx(asked("emb", 11, steps=12))

    back = plain(tmp_path / "back", steps=12)
    back.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-6"))
    assert back.state.global_step == 12
    lrs = {g["block"]: g["initial_lr"] for g in back.optimizer.param_groups}
    assert lrs["emb"] == pytest.approx(4 * LR)
    assert {float(s["step"]) for s in back.optimizer.state.values()} == {12.0}


class _AtBegin(TrainerCallback):
    def __init__(self, look):
        self.look = look

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.look(getattr(optimizer, "optimizer", optimizer))


def _moments(optimizer):
    return {
        name: optimizer.state[parameter]["exp_avg"].clone()
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"])
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ratios": {"emb": 3.0}}, r"ratio of emb is 4 there and 3 here"),
        ({"lr": 2 * LR}, r"base learning rate is .* there and .* here"),
    ],
)
def test_a_plain_trainer_on_groups_by_block_refuses_a_checkpoint_of_other_rates(tmp_path, changed, message):
    def plain(folder, steps, **settings):
        model = split_fused(gpt2())
        factory = blockwise_optimizer(model, **{"lr": LR, **settings})
        return Trainer(
            model, arguments(folder, steps), train_dataset=Tokens(), optimizer_cls_and_kwargs=factory
        )

    plain(tmp_path / "first", 6).train()
    second = plain(tmp_path / "second", 12, **changed)
    with pytest.raises(ValueError, match=rf"{message}.*BlockwiseTrainer\(\.\.\., on_change=\"use_new\"\)"):
        second.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-3"))
