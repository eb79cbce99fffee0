"""What one parameter of an attention module makes: a part, or several parts and how they lie in it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from blockwise_lr.blocks.block import Block, Piece

PART_BLOCKS = {
    "q": Block.QK,
    "k": Block.QK,
    "v": Block.VO,
    "o": Block.VO,
    "gate": Block.VO,
    # Serves keys and values: the sharper block of the two, so the lower ratio.
    "latent": Block.VO,
    "kv": Block.VO,
}
PART_WORDS = {
    "q": "queries",
    "k": "keys",
    "v": "values",
    "o": "output",
    "gate": "output gate",
    "latent": "latent of keys and values",
    "kv": "keys and values, which are the same,",
}


@dataclass(frozen=True)
class Projection:
    """What one parameter of an attention module makes.

    Args:
        attention: the attention module's path.
        parts: (part, width) in the order in which they lie in the parameter; parts are keys of `PART_BLOCKS`, and
            widths are those of the whole part, over all repeats.
        dim: the dimension along which the parts follow one another.
        repeats: how often they follow one another: 1 where all of a part lies in one piece, the number of heads where
            parts lie head by head; None where the layout is not known.
    """

    attention: str
    parts: tuple[tuple[str, int], ...]
    dim: int
    repeats: int | None = 1

    @property
    def fused(self) -> bool:
        return len(self.parts) > 1

    @property
    def slices(self) -> dict[str, Piece] | None:
        """part -> where it lies; None where that is not known."""
        if self.repeats is None:
            return None
        lengths = [width // self.repeats for _, width in self.parts]
        starts = accumulate(lengths, initial=0)
        return {
            part: Piece(self.dim, start, length, self.repeats)
            for (part, _), start, length in zip(self.parts, starts, lengths)
        }
