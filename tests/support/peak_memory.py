"""The peak memory of a call, from the records of torch's allocator: the same on every run and every machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile


class Allocated(NamedTuple):
    """Bytes that a call allocates on the CPU, temporaries inside of operators included.

    Args:
        peak: the most that exists at a time, above what existed before.
        left: what still exists at the end.
    """

    peak: int
    left: int


def allocated(work: Callable[[], Any]) -> Allocated:
    """Run `work`. Tensors that it frees count only if it made them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        work()
    events = [event for event in records.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # below 0 where memory is freed
        peak = max(peak, now)
    return Allocated(peak, now)
