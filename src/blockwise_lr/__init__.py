"""A learning rate of its own for every block type of a Transformer.

from blockwise_lr import param_groups, split_fused

optimizer = torch.optim.AdamW(param_groups(split_fused(model), lr=6e-4), lr=6e-4)
"""

from blockwise_lr.blocks import Block, BlockMap, classify, merge_fused, split_fused
from blockwise_lr.optim import (
    MEASURED_RATIOS,
    PAPER_RATIOS,
    AdamMini,
    AutoRatios,
    AutoRule,
    DirectionalReport,
    Muon,
    adopt_state,
    build_optimizer,
    clip_grad_norm_by_block,
    cosine_schedule,
    measure_directional,
    param_groups,
    ratios_from_sharpness,
    scale_by_block,
    set_lr,
    wsd_schedule,
)
from blockwise_lr.sharpness import SharpnessReport, measure_sharpness

__version__ = "0.1.0"

__all__ = [
    "MEASURED_RATIOS",
    "PAPER_RATIOS",
    "AdamMini",
    "AutoRatios",
    "AutoRule",
    "Block",
    "BlockMap",
    "DirectionalReport",
    "Muon",
    "SharpnessReport",
    "adopt_state",
    "build_optimizer",
    "classify",
    "clip_grad_norm_by_block",
    "cosine_schedule",
    "measure_directional",
    "measure_sharpness",
    "merge_fused",
    "param_groups",
    "ratios_from_sharpness",
    "scale_by_block",
    "set_lr",
    "split_fused",
    "wsd_schedule",
]
