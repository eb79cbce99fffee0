"""An optimizer factory with blockwise learning rates for a plain transformers Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast, overload

import torch
from torch import nn
from torch.optim import Optimizer

from blockwise_lr.arguments import check_model, check_number, check_options
from blockwise_lr.integrations.scales_at_start import Blocks, ScalesAtStart, resolve_blocks
from blockwise_lr.integrations.trainable import FirstStepCheck
from blockwise_lr.optim import DEFAULT_RATIOS, Ratios, param_groups
from blockwise_lr.optim.decay import (
    WEIGHT_DECAY,
    Decay,
    NoDecay,
    WeightDecay,
    resolve_decay,
    resolve_no_decay,
)
from blockwise_lr.optim.initial_scales import RelativeTo
from blockwise_lr.optim.load_hooks import compare_when_loading
from blockwise_lr.optim.ratios import resolve_ratios

Groups = list[dict[str, Any]]


class LazyGroups(Sequence[dict[str, Any]]):
    """Parameter groups that are rebuilt from the model on each access.

    Args:
        model: the model.
        make: builds the groups of a model.
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
    """A callable that Trainer uses in place of an optimizer class.

    transformers first calls a factory without arguments, and then with the model that it trains. That model may differ
    from the one given here: it may be an adapter around it, or the model that ``model_init`` built. Called with groups
    or with ``params=``, as an optimizer class is, the factory builds the optimizer from those groups.

    Args:
        optimizer_cls: the class of the optimizer.
        model: the model to build the groups from, if Trainer passes none.
        make: builds the groups of a model.
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
        # Trainer would silently restore the saved settings.
        compare_when_loading(optimizer, remedy='with BlockwiseTrainer(..., on_change="use_new")')
        return optimizer

    def __repr__(self) -> str:
        return (
            f"blockwise_optimizer of {self.optimizer_cls!r}"  # Trainer searches the repr for "bitsandbytes"
        )


def blockwise_optimizer(
    model: nn.Module,
    *,
    lr: float,
    ratios: Ratios = DEFAULT_RATIOS,
    weight_decay: WeightDecay = WEIGHT_DECAY,
    no_decay: NoDecay = (),
    decay: Decay = "coupled",
    relative_to: RelativeTo = None,
    blocks: Blocks = None,
    optimizer_cls: type[Optimizer] = torch.optim.AdamW,
    **optimizer_kwargs: Any,
) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return the argument ``optimizer_cls_and_kwargs`` of transformers' Trainer, with a learning rate per block.

    The groups are built when Trainer creates the optimizer, from the model that it trains. They therefore contain the
    adapters that TRL adds for its ``peft_config``.

    Trainer's own schedulers scale the peaks of all blocks by one factor, so the ratios stay constant to the end. The
    paper's schedule, in which all blocks decay to one floor, needs ``BlockwiseTrainer``.

    The plain Trainer logs the learning rate of the first group only, as ``learning_rate``. That is NORM's: by default
    6 times the base learning rate. ``BlockwiseTrainer`` logs the base learning rate and that of every block.

    Args:
        model: the model that is passed to Trainer; call ``split_fused(model)`` before training.
        lr, ratios, weight_decay, no_decay, decay: as in :func:`blockwise_lr.param_groups`.
        relative_to: as in :func:`blockwise_lr.param_groups`. "init" measures the model during this call. When a run
            resumes, the scales that its checkpoint holds are used.
        blocks: a BlockMap, if the model needs overrides. If adapters are added later, give a function that builds the
            BlockMap from the model that Trainer trains: ``lambda model: classify(model, overrides={...})``.
        optimizer_cls: any torch optimizer. Default: AdamW.
        optimizer_kwargs: passed to the optimizer (``betas``, ``fused`` ...).

    Returns:
        A pair of an optimizer factory and its keyword arguments. The factory builds the optimizer as its class would.

    Raises:
        ValueError: as :func:`blockwise_lr.param_groups`; problems of the model are found when Trainer creates the
            optimizer. At the first step, also if the optimizer's parameters are not the trainable ones of the model,
            because some were frozen, added or replaced after the optimizer was created.

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
    scales = ScalesAtStart(relative_to, model, blocks)

    def make(model: nn.Module) -> Groups:
        own = resolve_blocks(model, blocks)
        return param_groups(
            model,
            lr,
            ratios,
            weight_decay=weight_decay,
            no_decay=no_decay,
            decay=decay,
            relative_to=scales.of(model),
            blocks=own,
        )

    factory = cast("type[Optimizer]", OptimizerFactory(optimizer_cls, model, make))  # Trainer's annotation
    return factory, {"params": LazyGroups(model, make), "lr": lr, **optimizer_kwargs}
