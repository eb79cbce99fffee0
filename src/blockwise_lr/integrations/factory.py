"""An optimizer with a learning rate per block that is made when transformers' Trainer asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

from torch import nn
from torch.optim import Optimizer

from blockwise_lr.blocks import BlockMap
from blockwise_lr.integrations.trainable import FirstStepCheck

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
        return optimizer

    def __repr__(self) -> str:
        return f"blockwise_optimizer of {self.optimizer_cls!r}"  # Trainer looks for "bitsandbytes" in it
