"""Blockwise learning rates in transformers' Trainer, as a user would run it."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from blockwise_lr import Block, classify, split_fused
from blockwise_lr.integrations.transformers import BlockwiseTrainer, blockwise_optimizer
from blockwise_lr.optim import cosine
from support.tiny_models import gpt2

STEPS, LR = 8, 1e-3


class Tokens(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        ids = torch.randint(40, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def arguments(folder, **changes):
    values = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": LR,
        "weight_decay": 0.1, "warmup_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    return TrainingArguments(**{**values, **changes})


def logged(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


def test_the_two_lines_train_every_block_at_its_own_rate_and_log_it(tmp_path):
    trainer = BlockwiseTrainer(split_fused(gpt2()), arguments(tmp_path), train_dataset=Tokens())
    trainer.train()
    rows = logged(trainer)
    assert len(rows) == STEPS
    for row in rows:
        for block, ratio in {"norm": 6, "vo": 0.7, "ffn": 1, "qk": 2, "emb": 4, "pos": 1}.items():
            expected = cosine(
                row["step"] - 1, peak=ratio * LR, warmup_steps=2, total_steps=STEPS, floor=LR / 20
            )
            assert row[f"lr/{block}"] == pytest.approx(expected)
        # The rate that the user gave, by its schedule: Trainer alone would log that of group 0, NORM's.
        assert row["learning_rate"] == pytest.approx(row["lr/ffn"])


def test_the_settings_reach_the_optimizer(tmp_path):
    trainer = BlockwiseTrainer(
        split_fused(gpt2()),
        arguments(tmp_path, adam_beta2=0.9),
        train_dataset=Tokens(),
        ratios={"emb": 3},
        schedule="wsd",
        floor=1e-4,
        floor_mode="proportional",
        no_decay="1d",
        decay="constant",
    )
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(STEPS)
    emb = next(g for g in optimizer.param_groups if g["block"] == "emb")
    assert emb["initial_lr"] == pytest.approx(3e-3)
    assert emb["peak_weight_decay"] == pytest.approx(0.1 / 3)
    assert emb["betas"] == (0.9, 0.9)
    assert (scheduler.shape, scheduler.floor, scheduler.floor_mode) == ("wsd", 1e-4, "proportional")


def test_a_resumed_trainer_ends_with_the_same_weights_to_the_bit(tmp_path):
    whole = BlockwiseTrainer(split_fused(gpt2()), arguments(tmp_path / "a"), train_dataset=Tokens())
    whole.train()
    saving = arguments(tmp_path / "b", save_strategy="steps", save_steps=4)
    BlockwiseTrainer(split_fused(gpt2()), saving, train_dataset=Tokens()).train()
    resumed = BlockwiseTrainer(split_fused(gpt2()), saving, train_dataset=Tokens())
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())
    assert [row["loss"] for row in logged(resumed)][4:] == [row["loss"] for row in logged(whole)][4:]


def test_the_factory_gives_the_plain_trainer_blockwise_groups(tmp_path):
    model = split_fused(gpt2())
    factory = blockwise_optimizer(model, lr=LR, betas=(0.9, 0.95))
    trainer = Trainer(model, arguments(tmp_path), train_dataset=Tokens(), optimizer_cls_and_kwargs=factory)
    trainer.train()
    lrs = {g["block"]: g["initial_lr"] for g in trainer.optimizer.param_groups}
    assert lrs == pytest.approx(
        {"norm": 6 * LR, "emb": 4 * LR, "qk": 2 * LR, "vo": 0.7 * LR, "ffn": LR, "pos": LR}
    )
    # A plain Trainer logs the rate of group 0, which is NORM's.
    assert max(row["learning_rate"] for row in logged(trainer)) == pytest.approx(6 * LR)


def test_a_fused_model_that_was_not_split_is_refused_before_training(tmp_path):
    trainer = BlockwiseTrainer(gpt2(), arguments(tmp_path), train_dataset=Tokens())
    with pytest.raises(
        ValueError, match=r"c_attn\.weight is a fused QKV weight .* call split_fused\(model\) first"
    ):
        trainer.train()


def test_an_optimizer_of_your_own_is_refused(tmp_path):
    model = split_fused(gpt2())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="BlockwiseTrainer makes the optimizer and the scheduler itself"):
        BlockwiseTrainer(model, arguments(tmp_path), optimizers=(optimizer, None))


def test_a_block_map_of_your_own_decides(tmp_path):
    model = split_fused(gpt2())
    blocks = classify(model, overrides={r"wpe": Block.EMB})
    trainer = BlockwiseTrainer(model, arguments(tmp_path), train_dataset=Tokens(), blocks=blocks)
    assert "pos" not in [g["block"] for g in trainer.create_optimizer().param_groups]


def test_parameter_groups_of_your_own_are_refused(tmp_path):
    model = split_fused(gpt2())
    factory = blockwise_optimizer(model, lr=LR)
    with pytest.raises(
        ValueError,
        match="has `params`, but BlockwiseTrainer makes the parameter groups itself: give it without",
    ):
        BlockwiseTrainer(model, arguments(tmp_path), optimizer_cls_and_kwargs=factory)
