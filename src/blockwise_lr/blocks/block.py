"""Block and BlockMap: the block type of every parameter, as plain immutable data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

# torch.compile, FSDP and activation checkpointing insert these names anywhere; DDP prepends "module". Further inside,
# "module" is an attribute of the model itself and must stay.
_WRAPPER_PARTS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_LEADING_MODULE = re.compile(r"^(?:module\.)+")


class Block(StrEnum):
    """A block type of a Transformer.

    The first five are those of the paper (The Sharpness Disparity Principle in Transformers, arXiv 2502.19002,
    Figure 1). A value is a ``str``, so it works in JSON, ``torch.load(weights_only=True)`` and on command lines.

    Example:
        >>> Block("qk") is Block.QK, Block.QK == "qk"
        (True, True)
    """

    EMB = "emb"
    """Token embedding, also when the output head shares its weight: ``model.embed_tokens.weight``."""
    QK = "qk"
    """Query and key projections: ``model.layers.0.self_attn.q_proj.weight``."""
    VO = "vo"
    """Value and output projections, and output gates: ``model.layers.0.self_attn.o_proj.weight``."""
    FFN = "ffn"
    """Feed-forward layers: ``model.layers.0.mlp.up_proj.weight``."""
    NORM = "norm"
    """Normalization layers: ``model.layers.0.input_layernorm.weight``."""
    HEAD = "head"
    """Output head with a weight of its own: ``lm_head.weight``."""
    POS = "pos"
    """Position embeddings: ``transformer.wpe.weight``."""
    QKV = "qkv"
    """Fused attention weight that is not split: ``transformer.h.0.attn.c_attn.weight``."""
    ROUTER = "router"
    """Routers that choose experts, such as ``model.layers.0.mlp.gate.weight``, and indexers that choose keys."""
    SSM = "ssm"
    """State-space layers, recurrences and other mixers without attention: ``layers.0.mixer.in_proj.weight``."""
    CONV = "conv"
    """Convolutions: ``patch_embed.proj.weight``."""
    OTHER = "other"
    """Everything else, at the base learning rate, such as nanochat's ``resid_lambdas``."""


class PartSlice(NamedTuple):
    """The position of one part (q, k, v ...) in a fused parameter.

    Args:
        dim: the dimension along which the parts are arranged.
        start: where the part starts within one repeat.
        length: the length of the part within one repeat.
        repeats: number of equal stretches along `dim`, each with all parts in it. 1 if the parts are adjacent, the
            number of heads if they alternate head by head. Default: 1.
    """

    dim: int
    start: int
    length: int
    repeats: int = 1


class Structure(NamedTuple):
    """How the matrices of one parameter are stored.

    Args:
        output_dim: the dimension that counts outputs: 0 for a Linear's weight, 1 for Conv1D's.
        partition: number of equal pieces along each dimension. Adam-mini keeps one second moment for each piece.
            Queries and keys have one piece per head, every other matrix one per output. A norm's gain is one piece, and
            biases and other vectors have one per element. None if it is unknown: the parameter is a fused weight
            that is not split, or its attention has no number of heads.

    Source of the partition: Adam-mini, arXiv 2406.16793, algorithm 3, one second moment for each smallest dense block
    of the Hessian.
    """

    output_dim: int
    partition: tuple[int, ...] | None


@dataclass(frozen=True)
class Assignment:
    """The entry of one parameter in a :class:`BlockMap`.

    Args:
        block: the block type.
        reason: why the parameter is in this block, in words.
        numel: number of elements.
        parts: for a fused weight that is not split, the block of each part,
            e.g. ``{"q": Block.QK, "k": Block.QK, "v": Block.VO}``; otherwise None.
        slices: the position of each part; None if the parameter is not fused or its layout is unknown.
        structure: how the matrices of the parameter are stored; None in an entry made by hand.
    """

    block: Block
    reason: str
    numel: int
    parts: Mapping[str, Block] | None = None
    slices: Mapping[str, PartSlice] | None = None
    structure: Structure | None = None


def canonical_name(name: str) -> str:
    """Return a parameter's name without the prefixes that wrappers add.

    Args:
        name: a name from `named_parameters()`.

    Example:
        >>> canonical_name("module._orig_mod.h.0._checkpoint_wrapped_module.attn.c_attn.weight")
        'h.0.attn.c_attn.weight'
    """
    return _LEADING_MODULE.sub("", _WRAPPER_PARTS.sub("", name))


class BlockMap(Mapping[str, Block]):
    """An immutable mapping from parameter name to :class:`Block`, with a reason for every entry.

    The keys are the names of ``model.named_parameters()`` at the time of :func:`classify`. Look-ups ignore the
    prefixes of wrappers. So a map made before DDP or ``torch.compile`` also works after it, and vice versa.

    Args:
        assignments: the entry of each parameter.

    Example:
        >>> blocks = BlockMap({"wte.weight": Assignment(Block.EMB, "an nn.Embedding", 8)})
        >>> blocks["module.wte.weight"], blocks.counts()
        (<Block.EMB: 'emb'>, {<Block.EMB: 'emb'>: 8})
    """

    def __init__(self, assignments: Mapping[str, Assignment]) -> None:
        self._assignments = dict(assignments)
        self._canonical = {canonical_name(name): a for name, a in self._assignments.items()}

    def assignment(self, name: str) -> Assignment:
        """Return the whole entry of a parameter.

        Raises:
            KeyError: no parameter of this name was classified.
        """
        found = self._assignments.get(name) or self._canonical.get(canonical_name(name))
        if found is None:
            raise KeyError(
                f"no parameter named {name!r} was classified; expected the name of a trainable parameter, one of "
                "list(blocks)"
            )
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
        """Return why the parameter is in its block, in words."""
        return self.assignment(name).reason

    def counts(self) -> dict[Block, int]:
        """Return the number of elements of each block, in the order of :class:`Block`, without empty blocks."""
        sizes = dict.fromkeys(Block, 0)
        for assignment in self._assignments.values():
            sizes[assignment.block] += assignment.numel
        return {block: n for block, n in sizes.items() if n}
