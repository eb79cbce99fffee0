"""One arm of the study: a vision Transformer, an order of the images, and how it is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from images import CLASSES, SIZE
from torch import nn
from torchvision_repair import repair_torchvision

from blockwise_lr import split_fused
from blockwise_lr.optim.ratios import NAMED_RATIOS


@dataclass(frozen=True)
class Shape:
    """The size of a vision Transformer, and the library that builds it."""

    library: str
    width: int = 64
    layers: int = 4
    heads: int = 2
    patch: int = 7


SHAPES: Mapping[str, Shape] = {
    "vit": Shape("transformers"),
    "vit-timm": Shape("timm"),
    # For trials of the code.
    "tiny": Shape("transformers", width=16, layers=2, patch=14),
    "tiny-timm": Shape("timm", width=16, layers=2, patch=14),
}

RULES: Mapping[str, Mapping[str, float]] = {
    name: {block.value: float(ratio) for block, ratio in NAMED_RATIOS[name].items()}
    for name in ("uniform", "half", "measured", "paper")
}
"""Ratios by name; a block that is not named has ratio 1. `half` is the library's default."""

ROWS = 64
"""Images in one step."""


@dataclass(frozen=True)
class Arm:
    """One training run.

    Args:
        shape: a name of SHAPES.
        steps: optimizer steps.
        base_lr: peak learning rate of a block whose ratio is 1. Every block ends at a twentieth of it.
        ratios: learning-rate ratio by block; a block that is not named has 1.
        warmup: linear warm-up as a share of the steps.
        seed: of the initial weights and of the order of the images.
        weight_decay, beta2, clip: AdamW's and the whole gradient's.
        watched: whether sharpness is measured along the run. This changes nothing in its training.
    """

    shape: str
    steps: int
    base_lr: float
    ratios: Mapping[str, float] = field(default_factory=dict)
    warmup: float = 0.15
    seed: int = 0
    weight_decay: float = 0.05
    beta2: float = 0.95
    clip: float = 1.0
    watched: bool = False

    @property
    def name(self) -> str:
        """A name that is the same for the same run: the arm's hash."""
        values = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(values.encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Return the arm as JSON holds it."""
        return asdict(self)


def build(shape: Shape, seed: int) -> nn.Module:
    """Return the model of a shape with the initial weights of its library. Fused weights are split.

    Args:
        shape: the model's size and library.
        seed: of the initial weights.

    Raises:
        ModuleNotFoundError: the shape's library is not installed.
    """
    repair_torchvision()
    torch.manual_seed(seed)
    if shape.library == "timm":
        return split_fused(_timm(shape))
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=SIZE,
            num_channels=1,
            num_labels=CLASSES,
            patch_size=shape.patch,
            hidden_size=shape.width,
            intermediate_size=4 * shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
        )
    )


def _timm(shape: Shape) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=SIZE,
        in_chans=1,
        num_classes=CLASSES,
        patch_size=shape.patch,
        embed_dim=shape.width,
        depth=shape.layers,
        num_heads=shape.heads,
    )
    return model
