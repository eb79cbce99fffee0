"""The parts of the GPU checks, most important first, and how many of them fit into a time. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gpu import paper_runs

LIMIT = 120
"""A part is cut off after this many seconds."""
START = 25
"""Seconds that the process takes before its first part: imports, and the first use of the card."""


@dataclass(frozen=True)
class Part:
    """One part of the checks.

    Args:
        name: what the command line calls it.
        module: the module of this package whose `measure` runs it. It is imported when the part begins.
        seconds: estimate for one H100 or H200.
        what: what it measures.
        limit: the part is cut off after this many seconds; None: it ends by itself in the time that is left.
    """

    name: str
    module: str
    seconds: int
    what: str
    limit: int | None = LIMIT


PARTS = (
    Part("costs", "costs", 40, "sharpness, clipping, Adam-mini and AutoRatios over a step"),
    Part(
        "correctness", "correctness", 80, "bf16, compiled, fused and split against fp32: losses of 20 steps"
    ),
    Part("throughput", "throughput", 90, "tokens/s and MFU of train and of a bare loop, same compiled model"),
    Part("optimizers", "optimizer_steps", 50, "steps and state of Adam-mini and Muon over AdamW's"),
    Part("fsdp2", "fsdp2", 20, "losses and sharpness under FSDP2 on one card against one plain process"),
    Part("memory", "extra_memory", 30, "extra bytes a parameter of each measurement"),
    Part(
        "paper-scale",
        "paper_scale",
        paper_runs.SECONDS,
        "LLaMA-134M over 1 000 and 2 000 steps: half, the embedding alone, uniform",
        None,
    ),
)
BY_NAME = {part.name: part for part in PARTS}


def least_seconds(part: Part) -> int:
    """Return the estimate for the shortest result of a part: of the paper's size, that is one run."""
    return part.seconds if part.limit else paper_runs.LEAST_SECONDS


def fitting(parts: Iterable[Part], seconds: float) -> list[tuple[Part, int, bool]]:
    """Return (part, seconds at which it ends, whether it fits) for each part in turn.

    A part that does not fit is left out, and later ones that are shorter may still fit.
    """
    rows, now = [], START
    for part in parts:
        fits = now + least_seconds(part) <= seconds
        end = now + part.seconds
        if fits:
            now = end
        rows.append((part, end, fits))
    return rows


def plan(parts: Iterable[Part], seconds: float) -> str:
    """Return a table of the parts and of what fits into `seconds`."""
    lines = [f"{'part':<12} {'seconds':>7} {'ends at':>7}  in {seconds:g} s  what"]
    for part, end, fits in fitting(parts, seconds):
        if not fits:
            word, at = "no", ""
        elif end <= seconds:
            word, at = "yes", str(end)
        else:  # the paper's size: as many runs as there is time for
            start = end - part.seconds
            runs, seconds_of_runs = paper_runs.that_fit(seconds - start)
            word, at = f"{runs} of {len(paper_runs.RUNS)} runs", str(start + seconds_of_runs)
        lines.append(f"{part.name:<12} {part.seconds:>7} {at:>7}  {word:<12}  {part.what}")
    lines.append(
        f"Estimates for an H100 or H200; the first {START} s are imports. A part is cut off after {LIMIT} s."
    )
    return "\n".join(lines)
