"""The structure of the parameters that ``param_groups`` has grouped.

Some optimizers need more than a group contains: Adam-mini needs the attention heads of each matrix, and Muon needs the
dimension that counts the outputs. AdamW needs neither. The structures are therefore stored outside the groups, because
every checkpoint would otherwise contain them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from blockwise_lr.blocks.block import Structure

_structures: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def remember_structures(parameters: Iterable[tuple[Tensor, Structure | None]]) -> None:
    """Store the structure of each parameter for as long as the parameter exists."""
    for parameter, structure in parameters:
        if structure is not None:
            _structures[parameter] = structure


def known_structures(parameters: Sequence[Tensor]) -> list[Structure] | None:
    """Return the structure of each parameter, or None if one of them did not come from ``param_groups``.

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
