"""Learning rates by block: parameter groups, ratios, schedules, weight decay and gradient clipping."""

from blockwise_lr.optim.blockwise_schedule import BlockwiseSchedule
from blockwise_lr.optim.clipping import clip_grad_norm_by_block
from blockwise_lr.optim.curves import block_lr, cosine, wsd
from blockwise_lr.optim.groups import param_groups
from blockwise_lr.optim.initial_scales import REFERENCE_SCALES, initial_scales
from blockwise_lr.optim.nonfinite_report import nonfinite_gradients
from blockwise_lr.optim.ratios import (
    DEFAULT_RATIOS,
    MEASURED_RATIOS,
    PAPER_RATIOS,
    UNIFORM_RATIOS,
    Ratios,
    resolve_ratios,
)
from blockwise_lr.optim.saved_groups import load_optimizer_state
from blockwise_lr.optim.scheduler_scaling import scale_by_block
from blockwise_lr.optim.schedules import cosine_schedule, wsd_schedule
from blockwise_lr.optim.set_lr import set_lr

__all__ = [
    "DEFAULT_RATIOS",
    "MEASURED_RATIOS",
    "PAPER_RATIOS",
    "REFERENCE_SCALES",
    "UNIFORM_RATIOS",
    "BlockwiseSchedule",
    "Ratios",
    "block_lr",
    "clip_grad_norm_by_block",
    "cosine",
    "cosine_schedule",
    "initial_scales",
    "load_optimizer_state",
    "nonfinite_gradients",
    "param_groups",
    "resolve_ratios",
    "scale_by_block",
    "set_lr",
    "wsd",
    "wsd_schedule",
]
