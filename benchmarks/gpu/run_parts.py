"""Run parts one after the other in this process."""

from __future__ import annotations

import argparse
import gc
import importlib
import math
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from gpu.made_up_text import write_text
from gpu.parts import Part, least_seconds
from gpu.record import Record


class CutOffError(Exception):
    """A part took longer than its limit."""


@dataclass(frozen=True)
class Task:
    """What a part is given.

    Args:
        device: "cuda" or "cpu".
        tiny: use tiny shapes.
        repeats: measurements of each arm.
        data: folder with train.bin and val.bin.
        real_text: False if the text in `data` is made up.
        out: folder of the results.
        seconds: time that is left; None: no limit.
        record: the part's result file.
    """

    device: str
    tiny: bool
    repeats: int
    data: Path
    real_text: bool
    out: Path
    seconds: float | None
    record: Record


def run_parts(
    parts: Sequence[Part], options: argparse.Namespace, *, end: float | None, folder: Path
) -> list[str]:
    """Run parts and return the names of those that failed.

    Args:
        parts: in this order.
        options: the command line.
        end: no part begins that would end after this time of `time.monotonic`; None: no limit.
        folder: for made-up text.
    """
    failed = []
    data = options.data or write_text(folder, tiny=options.tiny)
    for part in parts:
        record = Record(part.name, options.out, device=options.device, tiny=options.tiny)
        left = None if end is None else end - time.monotonic()
        if record.is_done() and not options.again:
            print(f"{part.name}: done before", flush=True)
            continue
        if left is not None and not options.tiny and left < least_seconds(part):
            print(f"{part.name}: left out, {left:.0f} s are too short", flush=True)
            continue
        task = Task(
            options.device,
            options.tiny,
            options.repeats,
            data,
            options.data is not None,
            options.out,
            left,
            record,
        )
        if not run_part(part, task):
            failed.append(part.name)
    return failed


def run_part(part: Part, task: Task) -> bool:
    """Run one part and return whether it finished. Its error is written and printed."""
    record = task.record
    print(f"{part.name}: begins", flush=True)
    torch.manual_seed(0)
    try:
        with time_limit(part.limit and math.ceil(min(part.limit, task.seconds or part.limit))):
            importlib.import_module(f"gpu.{part.module}").measure(task)
        record.add(finished=True)
    except (Exception, SystemExit) as error:
        record.add(error="".join(traceback.format_exception(error))[-4000:])
        print(f"{part.name}: FAILED: {type(error).__name__}: {error}", flush=True)
        return False
    finally:
        gc.collect()
        if task.device == "cuda":
            torch.cuda.empty_cache()
    print(f"{part.name}: {record.values['seconds']} s, {record.path}", flush=True)
    for name, ratio in record.values.get("ratios", {}).items():
        verdict = (
            "" if ratio["met"] is None else f" ({ratio['target']}: {'met' if ratio['met'] else 'MISSED'})"
        )
        print(f"  {name}: {ratio['median']:.3g}{verdict}", flush=True)
    return True


@contextmanager
def time_limit(seconds: int | None) -> Iterator[None]:
    """Raise CutOffError in the block of code once it has run for `seconds`."""
    if seconds is None:
        yield
        return

    def cut_off(*_: object) -> None:
        raise CutOffError(f"cut off after {seconds} s; what was measured by then is in the file")

    before = signal.signal(signal.SIGALRM, cut_off)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
