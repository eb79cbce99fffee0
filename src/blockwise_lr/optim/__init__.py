"""What does each block get?"""

from blockwise_lr.optim.adam_mini import AdamMini
from blockwise_lr.optim.adopt import adopt_state
from blockwise_lr.optim.auto import AutoRatios
from blockwise_lr.optim.auto_rule import AutoRule
from blockwise_lr.optim.clipping import clip_grad_norm_by_block
from blockwise_lr.optim.curves import block_lr, cosine, wsd
from blockwise_lr.optim.directional import measure_directional
from blockwise_lr.optim.directional_report import DirectionalReport
from blockwise_lr.optim.groups import param_groups
from blockwise_lr.optim.measured import MeasuredRatios, ratios_from_sharpness
from blockwise_lr.optim.muon import Muon
from blockwise_lr.optim.nonfinite import nonfinite_gradients
from blockwise_lr.optim.ratios import MEASURED_RATIOS, PAPER_RATIOS, UNIFORM_RATIOS, Ratios, resolve_ratios
from blockwise_lr.optim.registry import OPTIMIZERS, build_optimizer, optimizer_entry
from blockwise_lr.optim.saved_groups import load_optimizer_state
from blockwise_lr.optim.scaled import scale_by_block
from blockwise_lr.optim.schedules import BlockwiseSchedule, cosine_schedule, wsd_schedule
from blockwise_lr.optim.set_lr import set_lr
from blockwise_lr.optim.slope import Slope

__all__ = [
    "MEASURED_RATIOS",
    "OPTIMIZERS",
    "PAPER_RATIOS",
    "UNIFORM_RATIOS",
    "AdamMini",
    "AutoRatios",
    "AutoRule",
    "BlockwiseSchedule",
    "DirectionalReport",
    "MeasuredRatios",
    "Muon",
    "Ratios",
    "Slope",
    "adopt_state",
    "block_lr",
    "build_optimizer",
    "clip_grad_norm_by_block",
    "cosine",
    "cosine_schedule",
    "load_optimizer_state",
    "measure_directional",
    "nonfinite_gradients",
    "optimizer_entry",
    "param_groups",
    "ratios_from_sharpness",
    "resolve_ratios",
    "scale_by_block",
    "set_lr",
    "wsd",
    "wsd_schedule",
]
