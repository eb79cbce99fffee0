"""Layout and Projection: which parts one parameter of an attention makes, and how they lie in it.

These notions describe a fused weight:

- A *part* is what some outputs of the weight make: queries, keys, values, and so on (the keys of `PART_BLOCKS`).
- A :class:`Layout` lists the parts of a weight in order, with their widths. It is independent of a model.
- A :class:`Projection` is a parameter of one attention in one model: its attention, its layout, and its dimension.
- A :class:`~blockwise_lr.blocks.block.PartSlice` is the position of a single part, as arguments of `torch.narrow`.
- A :class:`~blockwise_lr.blocks.weight_parts.FusedWeight` computes a split weight from its parts in forward passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from blockwise_lr.blocks.block import Block, PartSlice

PART_BLOCKS = {
    "q": Block.QK,
    "k": Block.QK,
    "v": Block.VO,
    "o": Block.VO,
    "gate": Block.VO,
    # These two make keys and values. They get the block with the lower ratio, which is VO.
    "latent": Block.VO,
    "kv": Block.VO,
}
"""The block of every part of an attention."""
PART_WORDS = {
    "q": "queries",
    "k": "keys",
    "v": "values",
    "o": "output",
    "gate": "output gate",
    "latent": "latent of keys and values",
    "kv": "keys and values, which are the same,",
}
"""The name of every part in messages."""


class Layout(NamedTuple):
    """The parts of an attention weight in the order of its outputs.

    Args:
        parts: (part, width) pairs. A part is a key of `PART_BLOCKS`. Its width counts outputs over all repeats.
        repeats: how often the sequence of parts repeats. 1: all outputs of a part are adjacent. Number of heads: the
            parts alternate head by head. None: the layout is unknown. Default: 1.

    Example:
        >>> Layout((("q", 8), ("k", 4), ("v", 4)), repeats=2)  # q q q q k k v v q q q q k k v v
        Layout(parts=(('q', 8), ('k', 4), ('v', 4)), repeats=2)
    """

    parts: tuple[tuple[str, int], ...]
    repeats: int | None = 1


@dataclass(frozen=True)
class Projection:
    """A parameter of an attention module, with the parts that it makes.

    Args:
        attention: path of the attention module.
        layout: the parts in the parameter. A parameter that is not fused has one part.
        dim: the dimension along which the parts are arranged.
    """

    attention: str
    layout: Layout
    dim: int

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """(part, width) pairs in the order of the layout."""
        return self.layout.parts

    @property
    def repeats(self) -> int | None:
        """How often the sequence of parts repeats; None if the layout is unknown."""
        return self.layout.repeats

    @property
    def fused(self) -> bool:
        """Whether the parameter makes several parts."""
        return len(self.parts) > 1

    @property
    def slices(self) -> dict[str, PartSlice] | None:
        """The position of every part; None if the layout is unknown."""
        if self.repeats is None:
            return None
        lengths = [width // self.repeats for _, width in self.parts]
        starts = accumulate(lengths, initial=0)
        return {
            part: PartSlice(self.dim, start, length, self.repeats)
            for (part, _), start, length in zip(self.parts, starts, lengths)
        }
