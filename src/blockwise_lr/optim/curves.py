"""The learning rate of one block as a pure function of the step; needs no torch."""

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
    """Learning rate at `step` of the block whose peak is `ratio` times the base learning rate.

    Args:
        step: optimizer steps taken so far.
        peak: the block's largest learning rate.
        ratio: the block's ratio, so that peak / ratio is the base learning rate.
        shape: :func:`cosine` or :func:`wsd`.
        warmup_steps: warm-up of a block whose ratio is 1, in steps.
        total_steps: optimizer steps in the run.
        floor: final learning rate of a block whose ratio is 1.
        floor_mode: "shared": every block ends at min(floor, its peak), so that a block slower than the floor is not
            raised to it; "proportional": at ratio * floor.
        warmup: "shared": every block warms up over warmup_steps; "equal_slope": over ratio times as many.
        warmup_start: "above_zero": the first update has peak / warmup; "zero": it has 0, as in the authors' code.

    Raises:
        ValueError: a floor above the base learning rate, a warm-up that does not fit, or an unknown mode.

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
    if not 0 <= floor <= base * (1 + 1e-9):  # peak / ratio may be an ulp below the base it came from
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
    # With a proportional floor nothing makes the blocks meet, so a block's own peak stands in for the base.
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
    """Learning rate of one block at `step`: linear warm-up to `peak`, then cosine decay to `floor`.

        lr(t) = peak * min(1, (t + 1) / warmup)                       t < warmup
        lr(t) = floor + (peak - floor) * (1 + cos(pi * u)) / 2        u = (t - warmup) / (total - warmup)

    With ``warmup_start="zero"`` the warm-up is ``peak * t / warmup``, as in the authors' code. Its first update changes
    nothing, and a compiled ``optimizer.step`` turns a learning rate of exactly 0 into NaN.

    With one floor for all blocks the ratio between two blocks shrinks to 1 as training ends (METHOD section 3,
    the authors' schedule); a proportional floor is ``floor = peak * fraction``.

    Args:
        step: optimizer steps taken so far; beyond total_steps the learning rate stays at the floor.
        peak: the block's largest learning rate, ratio times base.
        warmup_steps: length of the warm-up in steps, 0 <= warmup_steps < total_steps.
        total_steps: optimizer steps in the run.
        floor: learning rate at total_steps, 0 <= floor <= peak.
        warmup_start: "above_zero" or "zero"; see above.

    Raises:
        ValueError: warmup_steps >= total_steps, or floor > peak (with the numbers, and what to change).

    Example:
        >>> cosine(1000, peak=6e-3, warmup_steps=1000, total_steps=50_000, floor=3e-5)
        0.006
        >>> [cosine(t, peak=4.0, warmup_steps=4, total_steps=9, floor=0.0) for t in range(4)]
        [1.0, 2.0, 3.0, 4.0]
    """
    _check(peak, warmup_steps, total_steps, floor)
    if step < warmup_steps:
        return _warming_up(step, peak, warmup_steps, warmup_start)
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
    """Learning rate of one block at `step` under the paper's warm-up, stable, decay schedule of three phases.

        peak                                      warm-up to T/3
        peak falls linearly to min(peak, base)    T/3 to 2T/3
        that falls linearly to floor              2T/3 to T

    So blocks above the base learning rate come down to it first, and then all decay together (METHOD section 3,
    read in the authors' code). A block whose ratio is below 1 keeps its peak until 2T/3: it has nowhere to come
    down from. With ratio 1 this is the ordinary WSD schedule that decays over the last third.

    Args:
        step: optimizer steps taken so far; beyond total_steps the learning rate stays at the floor.
        peak: the block's largest learning rate, ratio times base.
        base: the base learning rate.
        warmup_steps: length of the linear warm-up in steps, at most total_steps / 3.
        total_steps: T, optimizer steps in the run.
        floor: learning rate at T, at most min(peak, base).
        warmup_start: as for :func:`cosine`.

    Raises:
        ValueError: warm-up longer than T/3, or a floor above the learning rate it is to end.

    Example:
        >>> steps = (5, 100, 150, 200)
        >>> [wsd(t, peak=8.0, base=1.0, warmup_steps=10, total_steps=300, floor=0.1) for t in steps]
        [4.8, 8.0, 4.5, 1.0]
    """
    _check(min(peak, base), warmup_steps, total_steps, floor)
    if warmup_steps > total_steps / 3:
        raise ValueError(
            f"warm-up takes {warmup_steps:g} steps, but the wsd schedule starts to decay at a third of total_steps="
            f"{total_steps}: warm up for at most {total_steps // 3} steps, or train for longer"
        )
    if step < warmup_steps:
        return _warming_up(step, peak, warmup_steps, warmup_start)
    shoulder = min(peak, base)
    thirds = 3 * step / total_steps
    if thirds <= 1:
        return peak
    if thirds <= 2:
        return peak + (shoulder - peak) * (thirds - 1)
    return shoulder + (floor - shoulder) * (min(thirds, 3.0) - 2)


def _warming_up(step: float, peak: float, warmup_steps: float, start: WarmupStart) -> float:
    if start == "zero":
        return peak * step / warmup_steps
    return peak * min(1.0, (step + 1) / warmup_steps)


def _check(peak: float, warmup_steps: float, total_steps: int, floor: float) -> None:
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warm-up takes {warmup_steps:g} steps, but the run has total_steps={total_steps}: "
            f"expected 0 <= warm-up < total_steps; shorten the warm-up or train for longer"
        )
    if not 0 <= floor <= peak:
        raise ValueError(
            f"floor={floor:g} is not between 0 and the peak learning rate {peak:g}: lower the floor or raise the peak"
        )
