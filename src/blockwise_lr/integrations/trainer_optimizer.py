"""The optimizer of BlockwiseTrainer: which optimizers it refuses, and what Trainer sets for those in 8 bits."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

Choice = tuple[type[Optimizer], dict[str, Any]]

_NAMES = ("galore_", "apollo_", "lomo", "adalomo")
"""How the names of the optimizers in ``args.optim`` begin that make their own groups."""

_OWN_GROUPS = ("params", "model", "optimizer_dict")
"""Keyword arguments that replace the parameter groups in Trainer."""


def check_optimizer(args: TrainingArguments, given: Choice | None) -> None:
    """Check, before training, that the optimizer takes parameter groups.

    Args:
        args: the arguments of Trainer, whose `optim` is used if there is no other choice.
        given: Trainer's ``optimizer_cls_and_kwargs``.

    Raises:
        ValueError: the optimizer makes its own groups, or is not a class. The message says what to do.
    """
    if given is None:
        if args.optim.startswith(_NAMES):
            raise _makes_groups(args)
        return
    optimizer_cls, kwargs = given
    if own := [name for name in _OWN_GROUPS if name in kwargs]:
        named = " and ".join(f"`{name}`" for name in own)
        raise ValueError(
            f"optimizer_cls_and_kwargs has {named}, but BlockwiseTrainer makes the parameter groups itself: give it "
            f"without {named}, or pass blockwise_optimizer(...) to transformers.Trainer"
        )
    if not _is_class(optimizer_cls):
        raise ValueError(
            f"optimizer_cls_and_kwargs has {optimizer_cls!r}, which Trainer takes for a factory; expected a subclass "
            "of torch.optim.Optimizer, because BlockwiseTrainer makes the parameter groups itself: give the class and "
            "its keyword arguments, or pass the factory to transformers.Trainer"
        )


def choose_optimizer(trainer: Trainer, model: nn.Module) -> Choice:
    """Return the optimizer's class and its keyword arguments. Raises ValueError as :func:`check_optimizer`."""
    given = trainer.optimizer_cls_and_kwargs
    check_optimizer(trainer.args, given)
    if given is not None:
        return given
    optimizer_cls, kwargs = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)  # type: ignore[arg-type]
    if not _is_class(optimizer_cls) or any(name in kwargs for name in _OWN_GROUPS):
        raise _makes_groups(trainer.args)
    return optimizer_cls, kwargs


def keep_embeddings_in_32_bits(choice: Choice, model: nn.Module) -> None:
    """Let an 8-bit optimizer of bitsandbytes keep the state of embeddings in 32 bits, as Trainer does.

    Args:
        choice: the optimizer's class and its keyword arguments. Other optimizers are left alone.
        model: the model that the optimizer trains.
    """
    optimizer_cls, kwargs = choice
    if "bitsandbytes" not in str(optimizer_cls) or kwargs.get("optim_bits") != 8:
        return
    manager = importlib.import_module("bitsandbytes").optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


def _is_class(optimizer_cls: Any) -> bool:
    return isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)


def _makes_groups(args: TrainingArguments) -> ValueError:
    name = getattr(args.optim, "value", args.optim)
    return ValueError(
        f'optim is "{name}", which makes its own parameter groups; expected an optimizer that takes the groups of '
        'BlockwiseTrainer, with a learning rate per block: choose another optim, such as "adamw_torch", or use '
        "transformers.Trainer"
    )
