"""Seconds of a step and bytes of state of Adam-mini and Muon, over AdamW's."""

from __future__ import annotations

from typing import Any

from _measure import GPT2_SMALL, GPT2_TINY, Ratio

from gpu.run_parts import Task
from optimizers import compare


def measure(task: Task) -> None:
    """Measure each optimizer on GPT-2 small and write after each."""
    shape = GPT2_TINY if task.tiny else GPT2_SMALL
    task.record.add(settings={"shape": vars(shape)})
    # Last the one that compiles.
    for name in ("adam-mini", "muon") if task.tiny else ("adam-mini", "muon", "adam-mini, compiled"):
        measurements: dict[str, Any] = {}
        ratios: list[Ratio] = []
        compare(name, "GPT-2", shape, task.repeats, measurements, ratios, device=task.device, reference=False)
        task.record.add(measurements=measurements, ratios=ratios)
