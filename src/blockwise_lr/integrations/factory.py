"""An optimizer with a learning rate per block that is made when transformers' Trainer asks for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast, overload

import torch
from torch import nn
from torch.optim import Optimizer

from blockwise_lr.arguments import check_model, check_number, check_options
from blockwise_lr.blocks import BlockMap
from blockwise_lr.integrations.trainable import FirstStepCheck
from blockwise_lr.optim import PAPER_RATIOS, Ratios, param_groups
from blockwise_lr.optim.decay import (
    WEIGHT_DECAY,
    Decay,
    NoDecay,
    WeightDecay,
    resolve_decay,
    resolve_no_decay,
)
from blockwise_lr.optim.load_hooks import is_attached
from blockwise_lr.optim.ratios import resolve_ratios
from blockwise_lr.optim.saved_groups import reconcile

Groups = list[dict[str, Any]]
Blocks = BlockMap | Callable[[nn.Module], BlockMap] | None
"""A BlockMap, or what makes one from the model that is trained in the end; None: ``classify``."""


def resolve_blocks(model: nn.Module, blocks: Blocks) -> BlockMap | None:
    """The BlockMap of the model as it is now.

    Raises:
        ValueError: a BlockMap that was made before the model got other trainable parameters; names them.
    """
    if blocks is None or not isinstance(blocks, BlockMap):
        return None if blocks is None else blocks(model)
    new = [name for name, p in model.named_parameters() if p.requires_grad and name not in blocks]
    if new:
        more = f" and {len(new) - 1} more" if len(new) > 1 else ""
        raise ValueError(
            f"`blocks` has no entry for {new[0]}{more}: it was made before the model got these parameters, such as "
            "adapters. Leave it out, or give a function, blocks=lambda model: classify(model, overrides={...}), which "
            "is called with the model that is trained"
        )
    return blocks


class LazyGroups(Sequence[dict[str, Any]]):
    """Parameter groups that are made each time they are read, from the model as it is then.

    Args:
        model: the model.
        make: makes the groups of a model.
    """

    def __init__(self, model: nn.Module, make: Callable[[nn.Module], Groups]) -> None:
        self._model = model
        self._make = make

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> Groups: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | Groups:
        return self._make(self._model)[index]

    def __len__(self) -> int:
        return len(self._make(self._model))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._make(self._model))


class OptimizerFactory:
    """What Trainer calls in the place of an optimizer's class.

    transformers calls a factory without arguments first and then with the model that it trains, which may be another
    than the one given here: an adapter around it, or what ``model_init`` made. Called as the class is, with groups or
    ``params=``, it makes the optimizer from those.

    Args:
        optimizer_cls: the class of the optimizer.
        model: the model to take the groups from, if Trainer does not give one.
        make: makes the groups of a model.
    """

    def __init__(
        self, optimizer_cls: type[Optimizer], model: nn.Module, make: Callable[[nn.Module], Groups]
    ) -> None:
        self.optimizer_cls = optimizer_cls
        self._model = model
        self._make = make

    def __call__(self, target: Any = None, /, **kwargs: Any) -> Any:
        if target is None and not kwargs:
            return self
        params = kwargs.pop("params", None)
        model = target if isinstance(target, nn.Module) else self._model
        if target is not None and model is not target:
            params = target
        lazy = params is None or isinstance(params, LazyGroups)
        optimizer = self.optimizer_cls(self._make(model) if lazy else params, **kwargs)
        FirstStepCheck(optimizer, model)
        _compare_when_loading(optimizer)
        return optimizer

    def __repr__(self) -> str:
        return f"blockwise_optimizer of {self.optimizer_cls!r}"  # Trainer looks for "bitsandbytes" in it


def _compare_when_loading(optimizer: Optimizer) -> None:
    """Refuse a checkpoint of other ratios or another base learning rate: Trainer would go on with the checkpoint's."""

    def before_loading(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        if is_attached(optimizer):  # a schedule of this library compares them
            return None
        try:
            return dict(reconcile(state, optimizer.param_groups, "error"))
        except ValueError as error:
            text = str(error).replace(
                'by on_change="use_new"', 'with BlockwiseTrainer(..., on_change="use_new")'
            )
            raise ValueError(text) from None

    optimizer.register_load_state_dict_pre_hook(before_loading)


def blockwise_optimizer(
    model: nn.Module,
    *,
    lr: float,
    ratios: Ratios = PAPER_RATIOS,
    weight_decay: WeightDecay = WEIGHT_DECAY,
    no_decay: NoDecay = (),
    decay: Decay = "coupled",
    blocks: Blocks = None,
    optimizer_cls: type[Optimizer] = torch.optim.AdamW,
    **optimizer_kwargs: Any,
) -> tuple[type[Optimizer], dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes, with a learning rate per block.

    The groups are made when Trainer asks for the optimizer, from the model that it trains: adapters that TRL adds for
    its ``peft_config`` are in them. The first of the two values makes the optimizer as its class would.

    Trainer's own schedulers scale every block's peak by one factor, so the ratios hold to the end. The paper's
    schedule, in which the blocks meet at one floor, needs ``BlockwiseTrainer``.

    Args:
        model: the model that Trainer gets; call ``split_fused(model)`` before training.
        lr, ratios, weight_decay, no_decay, decay: as in :func:`blockwise_lr.param_groups`.
        blocks: a BlockMap, where the model needs overrides; or a function that makes one from the model that Trainer
            trains, where adapters are added later: ``lambda model: classify(model, overrides={...})``.
        optimizer_cls: any torch optimizer. Default AdamW.
        optimizer_kwargs: passed on to it (``betas``, ``fused`` ...).

    Raises:
        ValueError: as :func:`blockwise_lr.param_groups`; of the model, when Trainer makes the optimizer. At the first
            step, if the optimizer's parameters are not the model's trainable ones, since some were frozen, added or
            replaced after the optimizer was made.

    Example:
        >>> Trainer(model, args, optimizer_cls_and_kwargs=blockwise_optimizer(model, lr=6e-4))  # doctest: +SKIP
    """
    check_options(optimizer_kwargs, "blockwise_optimizer")
    check_model(model, "blockwise_optimizer")
    lr = check_number(lr, "lr", "1e-3")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr is {lr}; expected a finite number above 0")
    resolve_decay(weight_decay, decay)
    resolve_ratios(ratios)
    resolve_no_decay(no_decay)

    def make(model: nn.Module) -> Groups:
        own = resolve_blocks(model, blocks)
        return param_groups(
            model, lr, ratios, weight_decay=weight_decay, no_decay=no_decay, decay=decay, blocks=own
        )

    factory = cast("type[Optimizer]", OptimizerFactory(optimizer_cls, model, make))  # as Trainer annotates it
    return factory, {"params": LazyGroups(model, make), "lr": lr, **optimizer_kwargs}
