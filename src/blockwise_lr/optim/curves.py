"""The learning rate of one block as a pure function of the step. This module does not need torch."""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["cosine", "wsd"]
FloorMode = Literal["shared", "proportional"]
WarmupMode = Literal["shared", "equal_slope"]
WarmupStart = Literal["above_zero", "zero"]


def block_lr(
    step: float,
    *,
    peak: float,
    ratio: float,
    shape: Shape,
    warmup_steps: float,
    total_steps: int,
    floor: float,
    floor_mode: FloorMode = "shared",
    warmup: WarmupMode = "shared",
    warmup_start: WarmupStart = "above_zero",
) -> float:
    """Return the learning rate at `step` of a block whose peak is `ratio` times the base learning rate.

    Args:
        step: number of optimizer steps taken so far.
        peak: largest learning rate of the block.
        ratio: learning-rate ratio of the block; the base learning rate is peak / ratio.
        shape: "cosine" for :func:`cosine`, "wsd" for :func:`wsd`.
        warmup_steps: length of the warm-up of a block whose ratio is 1, in steps.
        total_steps: number of optimizer steps in the run.
        floor: final learning rate of a block whose ratio is 1.
        floor_mode: "shared": every block ends at min(floor, its peak), so a block whose peak is below the floor is not
            raised to it. "proportional": each block ends at ratio * floor.
        warmup: "shared": every block warms up over warmup_steps. "equal_slope": over ratio * warmup_steps.
        warmup_start: "above_zero": the first update has learning rate peak / warmup. "zero": it has 0, as in the
            authors' code.

    Raises:
        ValueError: the floor is above the base learning rate, the warm-up does not fit, or a mode is unknown.

    Example:
        >>> block_lr(50, peak=8.0, ratio=8.0, shape="cosine", warmup_steps=0, total_steps=100, floor=0.0)
        4.0
    """
    if floor_mode not in ("shared", "proportional"):
        raise ValueError(f'floor_mode is {floor_mode!r}; expected "shared" or "proportional"')
    if warmup not in ("shared", "equal_slope"):
        raise ValueError(f'warmup is {warmup!r}; expected "shared" or "equal_slope"')
    if warmup_start not in ("above_zero", "zero"):
        raise ValueError(f'warmup_start is {warmup_start!r}; expected "above_zero" or "zero"')
    base = peak / ratio
    if not 0 <= floor <= base * (1 + 1e-9):  # peak / ratio can be one ulp below the true base
        raise ValueError(
            f"floor={floor:g} is not between 0 and the base learning rate {base:g}: "
            f"lower the floor or raise the base learning rate"
        )
    own_floor = min(ratio * floor if floor_mode == "proportional" else floor, peak)
    own_warmup = warmup_steps * (ratio if warmup == "equal_slope" else 1.0)
    if shape == "cosine":
        return cosine(
            step,
            peak=peak,
            warmup_steps=own_warmup,
            total_steps=total_steps,
            floor=own_floor,
            warmup_start=warmup_start,
        )
    # With a proportional floor the blocks never share a learning rate, so each skips the decay from peak to base.
    base = peak if floor_mode == "proportional" else base
    floor = min(own_floor, base)
    return wsd(
        step,
        peak=peak,
        base=base,
        warmup_steps=own_warmup,
        total_steps=total_steps,
        floor=floor,
        warmup_start=warmup_start,
    )


def cosine(
    step: float,
    *,
    peak: float,
    warmup_steps: float,
    total_steps: int,
    floor: float,
    warmup_start: WarmupStart = "above_zero",
) -> float:
    """Return the learning rate of one block at `step`: linear warm-up to `peak`, then cosine decay to `floor`.

        lr(t) = peak * min(1, (t + 1) / warmup)                       t < warmup
        lr(t) = floor + (peak - floor) * (1 + cos(pi * u)) / 2        u = (t - warmup) / (total - warmup)

    With ``warmup_start="zero"`` the warm-up is ``peak * t / warmup``, as in the authors' code. Its first update then
    changes nothing. A compiled ``optimizer.step`` turns a learning rate of exactly 0 into NaN.

    If all blocks have the same floor, the ratio between two blocks shrinks to 1 at the end of training. This is the
    schedule of the paper's authors (arXiv 2502.19002). For a proportional floor, pass ``floor = peak * fraction``.

    Args:
        step: number of optimizer steps taken so far. Beyond total_steps the learning rate stays at the floor.
        peak: largest learning rate of the block, which is ratio times base.
        warmup_steps: length of the warm-up in steps, 0 <= warmup_steps < total_steps.
        total_steps: number of optimizer steps in the run.
        floor: learning rate at total_steps, 0 <= floor <= peak.
        warmup_start: "above_zero" (default) or "zero", as described above.

    Raises:
        ValueError: warmup_steps >= total_steps, or floor > peak. The message gives the numbers and what to change.

    Example:
        >>> cosine(1000, peak=6e-3, warmup_steps=1000, total_steps=50_000, floor=3e-5)
        0.006
        >>> [cosine(t, peak=4.0, warmup_steps=4, total_steps=9, floor=0.0) for t in range(4)]
        [1.0, 2.0, 3.0, 4.0]
    """
    _check_arguments(peak, warmup_steps, total_steps, floor)
    if step < warmup_steps:
        return _warmup_lr(step, peak, warmup_steps, warmup_start)
    progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def wsd(
    step: float,
    *,
    peak: float,
    base: float,
    warmup_steps: float,
    total_steps: int,
    floor: float,
    warmup_start: WarmupStart = "above_zero",
) -> float:
    """Return the learning rate of one block at `step` under the paper's warm-up-stable-decay (WSD) schedule.

    The schedule has three phases of equal length:

        0 to T/3       linear warm-up to peak, then constant
        T/3 to 2T/3    linear decay from peak to min(peak, base)
        2T/3 to T      linear decay from min(peak, base) to floor

    Blocks above the base learning rate first decay to it; then all blocks decay together. The three phases are those of
    the authors' code (arXiv 2502.19002). A block whose ratio is below 1 keeps its peak until 2T/3, because its peak is
    already below the base learning rate. With ratio 1 this is the usual WSD schedule that decays over the last third.

    Args:
        step: number of optimizer steps taken so far. Beyond total_steps the learning rate stays at the floor.
        peak: largest learning rate of the block, which is ratio times base.
        base: the base learning rate.
        warmup_steps: length of the linear warm-up in steps, at most total_steps / 3.
        total_steps: T, the number of optimizer steps in the run.
        floor: learning rate at T, at most min(peak, base).
        warmup_start: as in :func:`cosine`.

    Raises:
        ValueError: the warm-up is longer than T/3, or the floor is above min(peak, base).

    Example:
        >>> steps = (5, 100, 150, 200)
        >>> [wsd(t, peak=8.0, base=1.0, warmup_steps=10, total_steps=300, floor=0.1) for t in steps]
        [4.8, 8.0, 4.5, 1.0]
    """
    _check_arguments(min(peak, base), warmup_steps, total_steps, floor)
    if warmup_steps > total_steps / 3:
        raise ValueError(
            f"warm-up takes {warmup_steps:g} steps, but the wsd schedule starts to decay at a third of total_steps="
            f"{total_steps}: warm up for at most {total_steps // 3} steps, or train for longer"
        )
    if step < warmup_steps:
        return _warmup_lr(step, peak, warmup_steps, warmup_start)
    shoulder = min(peak, base)
    thirds = 3 * step / total_steps
    if thirds <= 1:
        return peak
    if thirds <= 2:
        return peak + (shoulder - peak) * (thirds - 1)
    return shoulder + (floor - shoulder) * (min(thirds, 3.0) - 2)


def _warmup_lr(step: float, peak: float, warmup_steps: float, start: WarmupStart) -> float:
    if start == "zero":
        return peak * step / warmup_steps
    return peak * min(1.0, (step + 1) / warmup_steps)


def _check_arguments(peak: float, warmup_steps: float, total_steps: int, floor: float) -> None:
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warm-up takes {warmup_steps:g} steps, but the run has total_steps={total_steps}: "
            f"expected 0 <= warm-up < total_steps; shorten the warm-up or train for longer"
        )
    if not 0 <= floor <= peak:
        raise ValueError(
            f"floor={floor:g} is not between 0 and the peak learning rate {peak:g}: lower the floor or raise the peak"
        )
