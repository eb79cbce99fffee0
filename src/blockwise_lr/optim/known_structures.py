"""How the parameters of groups are built, for optimizers that need more than ``param_groups`` writes into a group.

Adam-mini asks for the heads of each matrix, and Muon for the dimension that counts its outputs. AdamW needs neither, so
they are kept beside the groups and not in them, where every checkpoint would carry them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from blockwise_lr.blocks.block import Structure

_structures: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def remember_structures(parameters: Iterable[tuple[Tensor, Structure | None]]) -> None:
    """Remember how parameters are built, for as long as they live."""
    for parameter, structure in parameters:
        if structure is not None:
            _structures[parameter] = structure


def known_structures(parameters: Sequence[Tensor]) -> list[Structure] | None:
    """Return how each parameter is built; None if one of them did not come from ``param_groups``.

    Example:
        >>> from torch import nn
        >>> from blockwise_lr import param_groups
        >>> groups = param_groups(nn.Sequential(nn.Embedding(8, 4), nn.LayerNorm(4)), lr=1e-3)
        >>> known_structures(groups[1]["params"])
        [Structure(output_dim=0, partition=(8, 1))]
    """
    if not all(parameter in _structures for parameter in parameters):
        return None
    return [_structures[parameter] for parameter in parameters]
