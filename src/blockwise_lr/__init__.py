"""Give each block type of a Transformer its own learning rate.

The method is from "The Sharpness Disparity Principle in Transformers", arXiv 2502.19002 (ICML 2025).

Example::

    from blockwise_lr import param_groups, split_fused

    optimizer = torch.optim.AdamW(param_groups(split_fused(model), lr=6e-4), lr=6e-4)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockwise_lr.blocks import (
        Block,
        BlockMap,
        Layout,
        classify,
        merge_fused,
        register_layout,
        register_rule,
        split_fused,
    )
    from blockwise_lr.directional import DirectionalReport, measure_directional, ratios_from_sharpness
    from blockwise_lr.experimental import AutoRatios, AutoRule
    from blockwise_lr.optim import (
        DEFAULT_RATIOS,
        MEASURED_RATIOS,
        PAPER_RATIOS,
        clip_grad_norm_by_block,
        cosine_schedule,
        initial_scales,
        param_groups,
        scale_by_block,
        set_lr,
        wsd_schedule,
    )
    from blockwise_lr.optimizers import AdamMini, Muon, adopt_state, build_optimizer
    from blockwise_lr.sharpness import SharpnessReport, measure_sharpness

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_RATIOS",
    "MEASURED_RATIOS",
    "PAPER_RATIOS",
    "AdamMini",
    "AutoRatios",
    "AutoRule",
    "Block",
    "BlockMap",
    "DirectionalReport",
    "Layout",
    "Muon",
    "SharpnessReport",
    "adopt_state",
    "build_optimizer",
    "classify",
    "clip_grad_norm_by_block",
    "cosine_schedule",
    "initial_scales",
    "measure_directional",
    "measure_sharpness",
    "merge_fused",
    "param_groups",
    "ratios_from_sharpness",
    "register_layout",
    "register_rule",
    "scale_by_block",
    "set_lr",
    "split_fused",
    "wsd_schedule",
]

# Imported at first use: they import torch, which takes seconds, and --help of the commands does not need it.
_PACKAGES = ("blocks", "sharpness", "optim", "directional", "optimizers", "experimental", "export")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        for package in _PACKAGES:
            module = importlib.import_module(f"{__name__}.{package}")
            if hasattr(module, name):
                return globals().setdefault(name, getattr(module, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
