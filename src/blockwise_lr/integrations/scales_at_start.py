"""The blocks of the model that a trainer trains, and their scales when training starts."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from blockwise_lr.blocks import Block, BlockMap, canonical_name
from blockwise_lr.optim.initial_scales import RelativeTo, resolve_relative_to

Blocks = BlockMap | Callable[[nn.Module], BlockMap] | None
"""A BlockMap, or a function that builds one from the model that Trainer trains; None stands for ``classify``."""


def resolve_blocks(model: nn.Module, blocks: Blocks) -> BlockMap | None:
    """Return the BlockMap of the model as it is now.

    Args:
        model: the model to train.
        blocks: a BlockMap, or a function that builds one.

    Returns:
        The BlockMap, or None if `blocks` is None.

    Raises:
        ValueError: the BlockMap lacks trainable parameters that the model got later; the message names them.
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


class ScalesAtStart:
    """The initial scales of a model, measured before a trainer loads a checkpoint into it.

    Args:
        relative_to: as in :func:`blockwise_lr.param_groups`.
        model: the model before training.
        blocks: a BlockMap, or a function that builds one.

    Raises:
        ValueError: as :func:`blockwise_lr.optim.initial_scales.resolve_relative_to`.
    """

    def __init__(self, relative_to: RelativeTo, model: nn.Module, blocks: Blocks = None) -> None:
        self._measured = relative_to == "init"
        own = resolve_blocks(model, blocks) if self._measured else None
        self._scales = resolve_relative_to(relative_to, model, own)
        self._names = set(_trainable(model)) if self._measured else set()

    def of(self, model: nn.Module) -> dict[Block, float] | None:
        """Return the scales for the groups of a model, which may be the measured one after further changes.

        Raises:
            ValueError: the model has trainable parameters that were not measured, such as those of adapters.
        """
        added = [name for name in _trainable(model) if name not in self._names]
        if self._measured and added:
            more = f" and {len(added) - 1} more" if len(added) > 1 else ""
            raise ValueError(
                f'relative_to="init" measured the model before it got {added[0]}{more}: give the scales yourself, '
                "relative_to={'ffn': 0.02, 'emb': 0.02, ...} with the RMS of each block at start, or leave it out"
            )
        return self._scales


def _trainable(model: nn.Module) -> list[str]:
    return [canonical_name(name) for name, p in model.named_parameters() if p.requires_grad]
