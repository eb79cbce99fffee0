"""Trainers with ratios over the initial scale: measured before training, and kept by a resumed run."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from blockwise_lr import MEASURED_RATIOS
from blockwise_lr.integrations.scales_at_start import ScalesAtStart
from blockwise_lr.integrations.transformers import BlockwiseTrainer, blockwise_optimizer
from support import tiny_models

LR = 1e-3


class Tokens(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        ids = torch.randint(40, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def model(factor=1.0):
    """A LLaMA whose embedding starts at 1.0; with `factor`, one whose embedding has grown."""
    made = tiny_models.llama()
    nn.init.normal_(made.get_input_embeddings().weight, std=factor)
    return made


def blockwise(made, args):
    return BlockwiseTrainer(
        made, args, train_dataset=Tokens(), ratios="measured", relative_to="init", schedule="cosine"
    )


def plain(made, args):
    pair = blockwise_optimizer(made, lr=LR, ratios="measured", relative_to="init")
    return Trainer(made, args, train_dataset=Tokens(), optimizer_cls_and_kwargs=pair)


@pytest.mark.parametrize("build", [blockwise, plain])
def test_a_run_resumed_with_trained_weights_keeps_the_scales_at_start(tmp_path, build):
    args = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=LR, logging_steps=1,
        report_to="none", use_cpu=True, disable_tqdm=True, save_steps=2, max_grad_norm=0, weight_decay=0.1,
    )  # fmt: skip
    whole = build(model(), args)
    whole.train()
    emb = next(g for g in whole.optimizer.param_groups if g["block"] == "emb")
    ffn = next(g for g in whole.optimizer.param_groups if g["block"] == "ffn")
    ratio = MEASURED_RATIOS["emb"] * emb["init_rms"] / ffn["init_rms"]
    assert emb["init_rms"] == pytest.approx(1.0, rel=0.1)
    assert emb["initial_lr"] == pytest.approx(LR * ratio)

    resumed = build(model(3.0), args)  # what a user gets who loads a checkpoint first
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for old, new in zip(whole.optimizer.param_groups, resumed.optimizer.param_groups, strict=True):
        assert {k: v for k, v in old.items() if k != "params"} == {
            k: v for k, v in new.items() if k != "params"
        }
    same = [
        (row["step"], row["loss"])
        for trainer in (whole, resumed)
        for row in trainer.state.log_history
        if row.get("step") == 4 and "loss" in row
    ]
    assert same[0] == same[1]


def test_parameters_that_were_added_later_were_not_measured():
    made = model()
    scales = ScalesAtStart("init", made)
    assert scales.of(made)
    made.extra = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="measured the model before it got extra.weight and 1 more") as error:
        scales.of(made)
    assert "relative_to={'ffn': 0.02, 'emb': 0.02, ...}" in str(error.value)
    assert ScalesAtStart({"ffn": 0.02}, made).of(made) == {"ffn": 0.02}
    assert ScalesAtStart(None, made).of(made) is None
