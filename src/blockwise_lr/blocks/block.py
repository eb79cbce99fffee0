"""Block and BlockMap: which block type a parameter belongs to, as plain immutable data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

# What torch.compile, FSDP and activation checkpointing put into a parameter's name, and what DDP puts in front of it.
# Only in front: "module" further in is somebody's own attribute.
_WRAPPER_PARTS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_LEADING_MODULE = re.compile(r"^(?:module\.)+")


class Block(StrEnum):
    """A block type of a Transformer (METHOD section 1; the paper's Figure 1 names the first five).

    A ``str``, so that a value survives JSON, ``torch.load(weights_only=True)`` and command lines.

    Example:
        >>> Block("qk") is Block.QK, Block.QK == "qk"
        (True, True)
    """

    EMB = "emb"
    QK = "qk"
    VO = "vo"
    FFN = "ffn"
    NORM = "norm"
    HEAD = "head"
    POS = "pos"
    QKV = "qkv"
    ROUTER = "router"
    SSM = "ssm"
    CONV = "conv"
    OTHER = "other"


class Piece(NamedTuple):
    """Where one logical part of a fused parameter lies.

    Args:
        dim: the dimension that the parts share.
        start, length: of the part within one repeat, for ``torch.narrow``.
        repeats: into how many equal stretches the dimension falls, each with all parts in it; 1 where the parts lie one
            after another, the number of heads where they lie head by head.
    """

    dim: int
    start: int
    length: int
    repeats: int = 1


Partition = tuple[int, ...]
"""Into how many equal pieces each dimension of a parameter is cut."""


class Structure(NamedTuple):
    """How one parameter is built.

    Args:
        output_dim: the dimension that counts the outputs of its matrices: 0 for a Linear's weight, 1 for Conv1D's.
        partition: into how many pieces Adam-mini cuts each dimension, one second moment for a piece. Queries and keys
            are cut by head along the outputs, whichever dimension that is. Every other matrix is cut by output, the
            matrices of experts and embeddings too. A norm's gain is not cut at all, and biases and other vectors are
            cut by element. None where it cannot be known: a fused weight that was not split, or an attention that
            does not say how many heads it has.

    Source of the partition: Adam-mini, arXiv 2406.16793, algorithm 3, one second moment for each smallest dense block
    of the Hessian.
    """

    output_dim: int
    partition: Partition | None


@dataclass(frozen=True)
class Assignment:
    """One parameter's block, why it got it, and its size.

    Args:
        block: the block type.
        reason: one sentence in plain words.
        numel: number of elements.
        parts: for a fused weight that was not split, the logical parts in it and their blocks,
            e.g. ``{"q": Block.QK, "k": Block.QK, "v": Block.VO}``; otherwise None.
        slices: where these parts lie; None for a parameter that is not fused, or of an unknown layout.
        structure: which dimension counts outputs, and where its heads lie; None in an entry made by hand.
    """

    block: Block
    reason: str
    numel: int
    parts: Mapping[str, Block] | None = None
    slices: Mapping[str, Piece] | None = None
    structure: Structure | None = None


def canonical_name(name: str) -> str:
    """A parameter's name without the parts that wrappers add.

    Example:
        >>> canonical_name("module._orig_mod.h.0._checkpoint_wrapped_module.attn.c_attn.weight")
        'h.0.attn.c_attn.weight'
    """
    return _LEADING_MODULE.sub("", _WRAPPER_PARTS.sub("", name))


class BlockMap(Mapping[str, Block]):
    """An immutable mapping from parameter name to :class:`Block`, with a reason for every entry.

    Keys are the names of ``model.named_parameters()`` as they were when the model was classified.
    Look-ups tolerate wrapper prefixes on either side, so a map made before DDP or ``torch.compile``
    serves after it, and the other way round.

    Example:
        >>> blocks = BlockMap({"wte.weight": Assignment(Block.EMB, "an nn.Embedding", 8)})
        >>> blocks["module.wte.weight"], blocks.counts()
        (<Block.EMB: 'emb'>, {<Block.EMB: 'emb'>: 8})
    """

    def __init__(self, assignments: Mapping[str, Assignment]) -> None:
        self._assignments = dict(assignments)
        self._canonical = {canonical_name(name): a for name, a in self._assignments.items()}

    def assignment(self, name: str) -> Assignment:
        """The whole entry of a parameter. Raises KeyError, naming the parameter, if there is none."""
        found = self._assignments.get(name) or self._canonical.get(canonical_name(name))
        if found is None:
            raise KeyError(f"no parameter named {name!r} was classified")
        return found

    def __getitem__(self, name: str) -> Block:
        return self.assignment(name).block

    def __iter__(self) -> Iterator[str]:
        return iter(self._assignments)

    def __len__(self) -> int:
        return len(self._assignments)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{block.value}: {n:,}" for block, n in self.counts().items())
        return f"BlockMap({len(self)} parameters; {sizes})"

    def reason(self, name: str) -> str:
        """Why the parameter is in its block, in words."""
        return self.assignment(name).reason

    def counts(self) -> dict[Block, int]:
        """Number of elements by block, in the order of :class:`Block`; blocks without any are left out."""
        sizes = dict.fromkeys(Block, 0)
        for assignment in self._assignments.values():
            sizes[assignment.block] += assignment.numel
        return {block: n for block, n in sizes.items() if n}
