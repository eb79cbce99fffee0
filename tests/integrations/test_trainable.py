"""An optimizer that does not train what is trainable in its model is found at the first step."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from blockwise_lr import param_groups, split_fused
from blockwise_lr.integrations.trainable import check_trainable
from blockwise_lr.integrations.transformers import BlockwiseTrainer, blockwise_optimizer
from integrations.test_transformers import LR, Tokens, arguments, gpt2
from support.cases import llama

ADVICE = r"set trainer\.optimizer = None so that train\(\) makes a new one"


class AtTheBeginning(TrainerCallback):
    """Changes the model after the optimizer was made."""

    def __init__(self, change):
        self.change = change

    def on_train_begin(self, args, state, control, **kwargs):
        self.change(kwargs["model"])


def freeze(model):
    model.transformer.wte.weight.requires_grad_(False)


def thaw(model):
    model.transformer.wpe.weight.requires_grad_(True)


def replace(model):
    model.transformer.ln_f.weight = nn.Parameter(model.transformer.ln_f.weight.detach().clone())


def add(model):
    model.transformer.h[0].ln_3 = nn.LayerNorm(8)


def remove(model):
    del model.transformer.h[0].ln_2.bias
    model.transformer.h[0].ln_2.register_parameter("bias", None)


def untie(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def resize(model):
    model.resize_token_embeddings(48)


CHANGES = [
    (freeze, r"model\. Frozen \(requires_grad=False\): transformer\.wte\.weight\. The model changed"),
    (thaw, r"model\. Trainable and not in the optimizer: transformer\.wpe\.weight\. The model changed"),
    (replace, r"model\. Replaced by another tensor: transformer\.ln_f\.weight\. The model changed"),
    (
        add,
        r"model\. Trainable and not in the optimizer: transformer\.h\.0\.ln_3\.weight, \S+ln_3\.bias\. The",
    ),
    (remove, r"model\. No longer in the model: transformer\.h\.0\.ln_2\.bias\. The model changed"),
    (untie, r"model\. Trainable and not in the optimizer: lm_head\.weight\. The model changed"),
]


def plain(model, settings, **options):
    factory = blockwise_optimizer(model, lr=LR)
    return Trainer(model, settings, train_dataset=Tokens(), optimizer_cls_and_kwargs=factory, **options)


def blockwise(model, settings, **options):
    return BlockwiseTrainer(model, settings, train_dataset=Tokens(), **options)


def model_of(change):
    model = split_fused(gpt2())
    if change is thaw:
        model.transformer.wpe.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("make", [plain, blockwise])
@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_change_after_the_optimizer_was_made_is_an_error_with_a_remedy_that_works(
    tmp_path, make, change, message
):
    trainer = make(
        model_of(change), arguments(tmp_path, max_steps=2, warmup_steps=0), callbacks=[AtTheBeginning(change)]
    )
    with pytest.raises(ValueError, match=message) as raised:
        trainer.train()
    assert raised.match(ADVICE)
    assert trainer.state.global_step == 0
    trainer.pop_callback(AtTheBeginning)
    trainer.optimizer = None
    trainer.train()
    assert trainer.state.global_step == 2
    groups = trainer.optimizer.param_groups
    held = {id(p) for group in groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters() if p.requires_grad}


def test_a_change_between_two_trainings_is_found_too(tmp_path):
    trainer = blockwise(split_fused(gpt2()), arguments(tmp_path, max_steps=1, warmup_steps=0))
    trainer.train()
    freeze(trainer.model)
    with pytest.raises(ValueError, match="Frozen"):
        trainer.train()


def test_a_change_before_the_optimizer_is_made_is_none(tmp_path):
    for make in (plain, blockwise):
        for change in (freeze, resize):
            trainer = make(split_fused(gpt2()), arguments(tmp_path, max_steps=1, warmup_steps=0))
            change(trainer.model)
            trainer.train()


def test_tensors_that_are_resized_in_place_are_none(tmp_path):
    """As transformers resizes embeddings: the optimizer holds the same parameter."""
    trainer = plain(split_fused(gpt2()), arguments(tmp_path, max_steps=1, warmup_steps=0))
    trainer.create_optimizer()
    resize(trainer.model)
    trainer.train()


def test_model_init_gives_every_model_its_own_groups(tmp_path):
    """hyperparameter_search and train() again make a new model each time."""
    factory = blockwise_optimizer(split_fused(gpt2()), lr=LR)
    trainer = Trainer(
        model_init=lambda: split_fused(gpt2()),
        args=arguments(tmp_path, max_steps=2, warmup_steps=0),
        train_dataset=Tokens(),
        optimizer_cls_and_kwargs=factory,
    )
    for _ in range(2):
        trainer.train()
        assert len(trainer.optimizer.param_groups) == 6


def test_the_factory_is_called_as_the_class_is():
    model = split_fused(gpt2())
    kind, kwargs = blockwise_optimizer(model, lr=LR, betas=(0.8, 0.9))
    for optimizer in (kind(**kwargs), kind(kwargs["params"], lr=LR, betas=(0.8, 0.9))):
        assert type(optimizer) is torch.optim.AdamW
        assert [g["block"] for g in optimizer.param_groups] == ["norm", "emb", "qk", "vo", "ffn", "pos"]
        assert optimizer.defaults["betas"] == (0.8, 0.9)
    own = param_groups(model, LR, {})
    assert kind(own, lr=LR).param_groups[1]["lr"] == LR
    assert "AdamW" in str(kind)


def test_settings_out_of_range_are_refused_before_training():
    model = gpt2()
    for settings, message in [
        ({"lr": 0.0}, "lr is 0.0; expected"),
        ({"lr": LR, "ratios": {"embedding": 3}}, "embedding"),
        ({"lr": LR, "weight_decay": -1}, "-1"),
        ({"lr": LR, "no_decay": "2d"}, "2d"),
    ]:
        with pytest.raises(ValueError, match=message):
            blockwise_optimizer(model, **settings)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1, timeout=timedelta(seconds=60)
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "compile", "checkpointing", "tied"])
def test_wrappers_are_no_difference(one_process, way):
    model = llama(tie_word_embeddings=way == "tied")
    if way == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    groups = param_groups(model, LR)
    wrapped = model
    if way == "ddp":
        wrapped = DistributedDataParallel(model)
    elif way == "compile":
        wrapped = torch.compile(model, backend="eager")
    elif way == "checkpointing":
        model.gradient_checkpointing_enable()
    check_trainable(wrapped, groups)
    check_trainable(model, groups)


@pytest.mark.slow
def test_a_compiled_trainer_is_not_refused(tmp_path):
    settings = arguments(
        tmp_path, max_steps=1, warmup_steps=0, torch_compile=True, torch_compile_backend="eager"
    )
    for make in (plain, blockwise):
        make(split_fused(gpt2()), settings).train()
