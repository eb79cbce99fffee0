"""One arm of the study: a model, a text order, and the learning rate and decay of every block at every step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from blockwise_lr.blocks import Block
from blockwise_lr.optim.curves import cosine
from blockwise_lr.optim.ratios import MEASURED_RATIOS, PAPER_RATIOS


def power(ratios: Mapping[Block, float], exponent: float) -> dict[str, float]:
    """Return every ratio to a power: 1/2 is half way to uniform on a logarithmic scale."""
    return {block.value: float(f"{ratio**exponent:.4g}") for block, ratio in ratios.items()}


RULES: Mapping[str, Mapping[str, float]] = {
    "uniform": {},
    "paper": power(PAPER_RATIOS, 1),
    "measured": power(MEASURED_RATIOS, 1),
    "half": power(MEASURED_RATIOS, 0.5),
}
"""Ratios by name; a block that is not named has ratio 1."""


@dataclass(frozen=True)
class Arm:
    """One training run.

    Args:
        shape: a name of shapes.SHAPES.
        steps: optimizer steps.
        ratios: learning-rate ratio by block; a block that is not named has 1.
        base_lr: peak learning rate of a block whose ratio is 1.
        warmup: linear warm-up as a share of the steps.
        seed: of the initial weights and of the order of the text.
        weight_decay, beta2, clip: AdamW's and the whole gradient's.
        decay: "coupled": lr * weight_decay, so a block's decay grows with its ratio; "constant": every block decays as
            at the base learning rate; "matrices": coupled, and only on QK, VO and FFN.
        floor: "shared": every block ends at base_lr / 20; "proportional": at ratio * base_lr / 20; or the ratios that
            the blocks end at, over base_lr / 20.
        shrink: the ratios' exponent at the last step, reached linearly from 1 at the first step.
    """

    shape: str
    steps: int
    base_lr: float
    ratios: Mapping[str, float] = field(default_factory=dict)
    warmup: float = 0.15
    seed: int = 0
    weight_decay: float = 0.03
    beta2: float = 0.95
    clip: float = 0.3
    decay: Literal["coupled", "constant", "matrices"] = "coupled"
    floor: Literal["shared", "proportional"] | Mapping[str, float] = "shared"
    shrink: float = 1.0

    @property
    def name(self) -> str:
        """A name that is the same for the same run: the arm's hash."""
        values = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(values.encode()).hexdigest()[:12]

    def lr(self, block: str, step: int) -> float:
        """The learning rate of a block for the update after `step` others: warm-up from above 0, then cosine."""
        ratio = float(self.ratios.get(block, 1.0))
        peak = ratio * self.base_lr
        lowest = self.base_lr / 20
        if self.floor == "proportional":
            lowest *= ratio
        elif not isinstance(self.floor, str):
            lowest *= float(self.floor.get(block, 1.0))
        warmup = round(self.warmup * self.steps)
        lr = cosine(step, peak=peak, warmup_steps=warmup, total_steps=self.steps, floor=min(lowest, peak))
        return lr * float(ratio ** ((self.shrink - 1) * step / self.steps))

    def weight_decay_of(self, block: str, step: int) -> float:
        """The decoupled weight decay of a block for that update, as torch's AdamW takes it (times the block's lr)."""
        if self.decay == "matrices":
            return self.weight_decay if block in ("qk", "vo", "ffn") else 0.0
        if self.decay == "constant":
            return self.weight_decay * self.lr("", step) / self.lr(block, step)
        return self.weight_decay

    def to_dict(self) -> dict[str, Any]:
        """Return the arm as JSON holds it."""
        return asdict(self)
