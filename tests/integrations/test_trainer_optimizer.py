"""Which optimizers BlockwiseTrainer takes, and what it sets for those that keep their state in 8 bits."""

import re

import pytest
import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from blockwise_lr import split_fused
from blockwise_lr.integrations.transformers import BlockwiseTrainer
from support.stand_ins import prepare_bitsandbytes
from support.tiny_models import gpt2

OWN_GROUPS = [name.value for name in OptimizerNames if re.match("galore_|apollo_|lomo|adalomo", name.value)]
IN_8_BITS = ("adamw_bnb_8bit", "paged_adamw_8bit", "lion_8bit", "ademamix_8bit", "rmsprop_bnb_8bit")


def trainer(folder, optim="adamw_torch", kind=BlockwiseTrainer, **options):
    settings = TrainingArguments(
        output_dir=str(folder), optim=optim, optim_target_modules=["mlp"], use_cpu=True, report_to="none"
    )
    return kind(split_fused(gpt2()), settings, **options)


@pytest.mark.parametrize("optim", IN_8_BITS)
def test_an_8_bit_optimizer_keeps_the_embeddings_in_32_bits(monkeypatch, tmp_path, optim):
    overrides = prepare_bitsandbytes(monkeypatch)
    made = trainer(tmp_path, optim)
    made.create_optimizer()
    body = made.model.transformer
    assert overrides == [(each, "weight", {"optim_bits": 32}) for each in (body.wte, body.wpe)]


def test_a_class_of_your_own_in_8_bits_does_too(monkeypatch, tmp_path):
    overrides = prepare_bitsandbytes(monkeypatch)
    from bitsandbytes.optim import AdamW

    trainer(tmp_path, optimizer_cls_and_kwargs=(AdamW, {"lr": 1e-3, "optim_bits": 8})).create_optimizer()
    assert len(overrides) == 2


@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_32bit", "lion_32bit"])
def test_other_optimizers_need_no_override(monkeypatch, tmp_path, optim):
    overrides = prepare_bitsandbytes(monkeypatch)
    trainer(tmp_path, optim).create_optimizer()
    assert overrides == []


@pytest.mark.parametrize("optim", OWN_GROUPS)
def test_an_optimizer_with_groups_of_its_own_is_refused_at_once(tmp_path, optim):
    with pytest.raises(
        ValueError, match=f'optim is "{optim}", which makes its own .* choose another optim, such'
    ):
        trainer(tmp_path, optim)


@pytest.mark.parametrize("key", ["params", "model", "optimizer_dict"])
def test_keyword_arguments_that_replace_the_groups_are_refused_at_once(tmp_path, key):
    with pytest.raises(
        ValueError, match=f"optimizer_cls_and_kwargs has `{key}`, .* give it without `{key}`, or"
    ):
        trainer(tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {key: []}))


def test_a_factory_is_refused_at_once(tmp_path):
    def factory():
        return lambda model, **kwargs: torch.optim.SGD(model.parameters(), **kwargs)

    with pytest.raises(
        ValueError, match=r"factory at .* expected a subclass of torch\.optim\.Optimizer, .* give"
    ):
        trainer(tmp_path, optimizer_cls_and_kwargs=(factory, {"lr": 0.1}))


@pytest.mark.parametrize("choice", [(torch.optim.SGD, {"model": None}), (lambda: None, {})])
def test_a_named_optimizer_that_turns_out_to_make_its_groups_is_refused(tmp_path, choice):
    class Renamed(BlockwiseTrainer):
        get_optimizer_cls_and_kwargs = staticmethod(lambda args, model=None: choice)

    with pytest.raises(ValueError, match='optim is "sgd", which makes its own parameter groups; expected'):
        trainer(tmp_path, "sgd", Renamed).create_optimizer()
