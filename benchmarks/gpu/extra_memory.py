"""Extra bytes a parameter of each measurement: benchmarks/memory.py on this device."""

from __future__ import annotations

from memory import TOKENS, count, measure_all, shapes

from gpu.run_parts import Task


def measure(task: Task) -> None:
    """Measure every case and write after each."""
    settings = {"shapes": shapes(task.tiny), "parameters": count(task.tiny), "tokens": TOKENS}
    task.record.add(settings=settings)
    measure_all(
        task.device,
        quick=task.tiny,
        isolated=False,
        report=lambda measurements, ratios: task.record.add(measurements=measurements, ratios=ratios),
    )
