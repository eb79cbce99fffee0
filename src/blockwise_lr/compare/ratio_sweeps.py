"""Sweeps over ratios: each ratio scaled up and down (robustness), and blocks switched on one by one (ablation)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch

from blockwise_lr.blocks import Block, classify
from blockwise_lr.compare.arms import Arm
from blockwise_lr.errors import UserError
from blockwise_lr.optim.block_values import digits
from blockwise_lr.optim.ratios import resolve_ratios, spell_ratios
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig
from blockwise_lr.train.ratio_text import parse_moving, parse_ratios

SCALES = (0.25, 0.5, 2.0, 4.0)
"""The factors of the robustness sweep."""

TOGETHER = "all together"
"""The curve of the robustness sweep in which every ratio is scaled at once."""

TOLERANCE = 0.01
"""The rise of the loss, in nats, that ends a valley."""

Kind = Literal["robustness", "ablation"]


@dataclass(frozen=True)
class Point:
    """One arm of a sweep.

    Args:
        curve: the curve that the point is on: a block, "all together", or an order of blocks. "" for a point that is
            on every curve.
        position: the factor of the ratio (robustness), or the number of blocks that are switched on (ablation).
        arm: the arm.
    """

    curve: str
    position: float
    arm: Arm


def blocks_of(config: ModelConfig) -> list[Block]:
    """Return the blocks of a preset's model that have parameters, without allocating the model."""
    with torch.device("meta"):
        counts = classify(build_model(config, seed=0)).counts()
    # The parts of a fused weight are split before training.
    parts = {Block.QKV: (Block.QK, Block.VO)}
    found = {part for block, count in counts.items() if count for part in parts.get(block, (block,))}
    return [block for block in Block if block in found]


def robustness_points(
    optimizer: str, ratios: str, blocks: Sequence[Block], scales: Sequence[float] = SCALES
) -> list[Point]:
    """Return the unscaled ratios, then every ratio scaled by each factor, one block at a time and all together.

    Args:
        optimizer: the optimizer of every arm.
        ratios: the ratios in the middle, in the form of ``--ratios``.
        blocks: the blocks of the model.
        scales: the factors.

    Example:
        >>> points = robustness_points("adamw", "emb=4", [Block.EMB, Block.VO], [2.0])
        >>> [(point.arm.name, point.arm.ratios) for point in points]
        [('unscaled', 'emb=4'), ('emb x2', 'emb=8'), ('vo x2', 'emb=4,vo=2'), ('all together x2', 'emb=8,vo=2')]
    """
    middle = {block: resolve_ratios(_fixed(ratios))[block] for block in blocks}
    points = [Point("", 1.0, Arm("unscaled", optimizer, ratios))]
    for curve, scaled in [*((block.value, {block}) for block in blocks), (TOGETHER, set(blocks))]:
        for scale in scales:
            moved = {block: ratio * (scale if block in scaled else 1) for block, ratio in middle.items()}
            points.append(
                Point(curve, scale, Arm(f"{curve} x{digits(scale)}", optimizer, spell_ratios(moved)))
            )
    return points


def ablation_points(optimizer: str, ratios: str, blocks: Sequence[Block]) -> list[Point]:
    """Return uniform ratios, then the blocks switched on one after another: largest ratio first, then smallest first.

    A block that is switched off has ratio 1. Blocks whose ratio is 1 anyway are left out.

    Args:
        optimizer, ratios, blocks: as in :func:`robustness_points`.

    Raises:
        UserError: all ratios are 1.

    Example:
        >>> points = ablation_points("adamw", "emb=4,vo=0.5", [Block.EMB, Block.VO, Block.FFN])
        >>> [(point.arm.name, point.arm.ratios) for point in points]
        [('none', 'uniform'), ('+emb', 'emb=4'), ('+vo', 'vo=0.5'), ('all', 'emb=4,vo=0.5')]
    """
    full = {block: resolve_ratios(_fixed(ratios))[block] for block in blocks}
    order = sorted((block for block in blocks if full[block] != 1), key=lambda block: -full[block])
    if not order:
        raise UserError(f"--ratios {ratios} has no block to switch on: give ratios that are not all 1")
    points = [Point("", 0.0, Arm("none", optimizer, "uniform"))]
    for curve, blocks_in_order in (("largest first", order), ("smallest first", order[::-1])):
        for count in range(1, len(order)):
            on = blocks_in_order[:count]
            name = "+" + "+".join(block.value for block in on)
            text = spell_ratios({block: full[block] for block in on})
            points.append(Point(curve, float(count), Arm(name, optimizer, text)))
    return [*points, Point("", float(len(order)), Arm("all", optimizer, ratios))]


def valley_width(costs: Mapping[float, float | None], tolerance: float) -> dict[str, Any]:
    """Return how far a ratio can move before the loss has risen by `tolerance`.

    The cost is interpolated linearly in log2 of the factor, between the factors that were run.

    Args:
        costs: rise of the loss in nats against the unscaled ratios, by factor; None for a run that diverged.
        tolerance: the rise that is tolerated, in nats.

    Returns:
        "low" and "high": the factors at which the rise reaches `tolerance`, or the outermost tolerable factor that was
        run. "low_bound" and "high_bound": "exact", or "at_most" and "at_least" if the valley is wider than the sweep
        or ends before a run that diverged.

    Example:
        >>> valley_width({0.5: 0.02, 2.0: 0.0, 4.0: 0.005}, 0.01)
        {'low': 0.7071067811865476, 'low_bound': 'exact', 'high': 4.0, 'high_bound': 'at_least'}
    """
    known = {1.0: 0.0, **costs}
    found: dict[str, Any] = {}
    for side, factors, bound in (
        ("low", sorted((f for f in known if f <= 1), reverse=True), "at_most"),
        ("high", sorted(f for f in known if f >= 1), "at_least"),
    ):
        edge, how = 1.0, bound
        for nearer, further in pairwise(factors):
            here, there = known[nearer], known[further]
            if here is None or there is None:
                break
            if there > tolerance:
                share = (tolerance - here) / (there - here)
                edge = 2 ** (math.log2(nearer) + share * (math.log2(further) - math.log2(nearer)))
                how = "exact"
                break
            edge = further
        found |= {side: edge, f"{side}_bound": how}
    return found


def _fixed(ratios: str) -> Mapping[Block, float]:
    """Return ratios that stay the same during a run.

    Raises:
        UserError: the ratios cannot be read, or a rule moves them during the run.
    """
    try:
        if parse_moving(ratios) is not None:
            raise UserError(
                f"--ratios {ratios} moves the ratios during the run; give ratios that stay, such as measured"
            )
        return parse_ratios(ratios)
    except ValueError as error:
        raise UserError(str(error)) from None
