"""What a tiny model with the block of every parameter written out by hand is, in the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

VOCAB, CONTEXT, WIDTH = 40, 12, 8
QKV_PARTS = ["qk", "qk", "vo"]
NORM_PAIR = {"weight": "norm", "bias": "norm"}


@dataclass(frozen=True)
class Case:
    """One model.

    Args:
        name: what it is called in a test's id.
        build: makes the model, seeded.
        blocks: name of every trainable parameter -> its block's value, before splitting, in order.
        split: name of every parameter that split_fused replaces -> blocks of its parts.
        run: the model's output for seeded inputs; None: token ids in, `.logits` or a tensor out.
    """

    name: str
    build: Callable[[], nn.Module]
    blocks: dict[str, str]
    split: dict[str, list[str]] = field(default_factory=dict)
    run: Callable[[nn.Module], Tensor] | None = None

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()

    def output(self, model: nn.Module) -> Tensor:
        """The model's output for inputs that are always the same."""
        torch.manual_seed(1)
        if self.run is not None:
            return self.run(model)
        out = model(torch.randint(VOCAB, (2, CONTEXT - 1)))
        return out if isinstance(out, Tensor) else out.logits

    def split_blocks(self) -> dict[str, str]:
        """The blocks of the split model's parameters."""
        found = {name: block for name, block in self.blocks.items() if name not in self.split}
        for name, parts in self.split.items():
            path, _, leaf = name.rpartition(".")
            prefix = f"{path}.parametrizations.{leaf}" if path else f"parametrizations.{leaf}"
            found |= {f"{prefix}.original{i}": block for i, block in enumerate(parts)}
        return found


def prefixed(prefix: str, blocks: dict[str, str]) -> dict[str, str]:
    """The same blocks, of parameters that are inside a module."""
    return {f"{prefix}.{name}": block for name, block in blocks.items()}
