"""What the benchmarks share: arms measured in turns, ratios of neighbours, a dated result file, a table."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.config import ModelConfig
from blockwise_lr.train.environment import describe_environment

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")

GPT2_SMALL = ModelConfig("gpt2", 768, 12, 12, vocab_size=50_257, context=1024, tied=True)
GPT2_TINY = ModelConfig("gpt2", 32, 2, 2, vocab_size=128, context=64, tied=True)


def argument_parser(description: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """The options that every benchmark has; the script's docstring is its help."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="measurements of each arm (default: %(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes: does it run? its ratios mean nothing"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder of the result file (default: benchmarks/results)",
    )
    return parser


def in_turns(arms: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Measure every arm `repeats` times, one after the other and back again: A B, B A, A B, ...

    Neighbours see the same state of the machine, and a drift of it favours neither arm.

    Args:
        arms: name -> function that runs the arm once and returns what it measured.
        repeats: measurements of each arm.

    Returns:
        name -> measurements, in order; those of one index are neighbours in time.

    Raises:
        ValueError: repeats below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; expected 1 or more")
    measured: dict[str, list[T]] = {name: [] for name in arms}
    names = list(arms)
    for repeat in range(repeats):
        for name in names if repeat % 2 == 0 else names[::-1]:
            measured[name].append(arms[name]())
    return measured


@dataclass(frozen=True)
class Ratio:
    """Quotients of two arms' neighbouring measurements, and what is expected of their median.

    Args:
        name: what is compared, e.g. "fp32: split / unsplit".
        values: one quotient a repeat.
        at_most: the median should not be above this; None: no such target.
        at_least: the median should not be below this; None: no such target.
    """

    name: str
    values: Sequence[float]
    at_most: float | None = None
    at_least: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the median is where it should be; None without a target."""
        if self.at_most is None and self.at_least is None:
            return None
        median = statistics.median(self.values)
        above = self.at_most is not None and median > self.at_most
        return not above and (self.at_least is None or median >= self.at_least)

    @property
    def target(self) -> str | None:
        """The target in words."""
        bounds = ((">=", self.at_least), ("<=", self.at_most))
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None) or None

    def to_dict(self) -> dict[str, Any]:
        return {**spread(self.values), "target": self.target, "met": self.met, "values": _round(self.values)}


def ratio(
    measured: Mapping[str, Sequence[float]],
    arm: str,
    against: str,
    *,
    what: str = "",
    at_most: float | None = None,
    at_least: float | None = None,
) -> Ratio:
    """`arm` divided by `against`, repeat by repeat; `what` tells apart ratios of the same two arms."""
    values = [a / b for a, b in zip(measured[arm], measured[against])]
    return Ratio(f"{what}: {arm} / {against}" if what else f"{arm} / {against}", values, at_most, at_least)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest and largest value, and the quartiles between which the middle half lies."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    low, median, high, quarter, three_quarters = _round(
        [min(values), quartiles[1], max(values), quartiles[0], quartiles[2]]
    )
    return {"median": median, "min": low, "max": high, "iqr": [quarter, three_quarters]}


def with_gradients(model: nn.Module) -> nn.Module:
    """The model with random gradients, for steps of an optimizer alone."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter).mul_(1e-3)
    return model


def synchronize() -> None:
    """Wait for the GPU, where there is one: what runs on it goes on after the call that began it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timed(work: Callable[[], Any], before: Callable[[], Any] | None = None) -> Callable[[], float]:
    """The seconds of some work, as :func:`in_turns` calls it; those of `before` do not count."""

    def run() -> float:
        if before is not None:
            before()
        synchronize()
        begin = time.perf_counter()
        work()
        synchronize()
        return time.perf_counter() - begin

    return run


def usage_of(*command: str) -> tuple[float, float]:
    """CPU seconds and peak memory in GiB of a command, its output dropped.

    A small process starts it: Linux counts the memory of the process that forks as the child's own.

    Raises:
        SystemExit: it failed.
    """
    code = (
        "import os, subprocess, sys; p = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL); "
        "_, status, u = os.wait4(p.pid, 0); print(status, u.ru_utime + u.ru_stime, u.ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    status, seconds, kilobytes = done.stdout.split()
    if int(status):
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return round(float(seconds), 2), round(float(kilobytes) / 2**20, 3)


def finish(
    script: str,
    arguments: argparse.Namespace,
    *,
    settings: Mapping[str, Any],
    measurements: Mapping[str, Mapping[str, Sequence[float]]],
    ratios: Sequence[Ratio],
) -> Path:
    """Write the benchmark's dated result file, print its table and return the file's path.

    Args:
        script: ``__file__`` of the benchmark; the result is called as it is.
        arguments: what :func:`argument_parser` gave.
        settings: shapes and the like, for the file.
        measurements: quantity with its unit, e.g. "fp32 step, s" -> arm -> measurements.
        ratios: what the benchmark is for.
    """
    from rich.console import Console

    name, environment = Path(script).stem, describe_environment(getattr(arguments, "device", "cpu"))
    if arguments.quick:  # neither in the place of a real result nor judged as one
        name, ratios = f"{name}-quick", [replace(r, at_most=None, at_least=None) for r in ratios]
    arguments.out.mkdir(parents=True, exist_ok=True)
    path: Path = arguments.out / f"{name}-{environment['date'][:10]}.json"
    result = {
        "benchmark": Path(script).stem,
        "command": " ".join(["python", f"benchmarks/{Path(script).name}", *sys.argv[1:]]),
        **environment,
        # Over 1 and 15 minutes: was the machine busy with something else?
        "load_average": [round(os.getloadavg()[i], 2) for i in (0, 2)] if hasattr(os, "getloadavg") else None,
        "quick": arguments.quick,
        "repeats": arguments.repeats,
        "settings": dict(settings),
        "measurements": {
            quantity: {arm: _round(values) for arm, values in arms.items()}
            for quantity, arms in measurements.items()
        },
        "ratios": {r.name: r.to_dict() for r in ratios},
    }
    write_json_atomic(path, result)
    console = Console(width=110)
    console.print(_table(name, measurements, ratios))
    console.print(str(path), highlight=False, soft_wrap=True)
    return path


def _table(
    title: str, measurements: Mapping[str, Mapping[str, Sequence[float]]], ratios: Sequence[Ratio]
) -> Table:
    from rich.table import Table

    table = Table("", "median", "min .. max", "target", title=title, title_justify="left")
    for quantity, arms in measurements.items():
        for arm, values in arms.items():
            s = spread(values)
            table.add_row(f"{quantity}: {arm}", f"{s['median']:.4g}", f"{s['min']:.4g} .. {s['max']:.4g}", "")
    table.add_section()
    for r in ratios:
        s = spread(r.values)
        verdict = "" if r.met is None else f"{r.target}: {'met' if r.met else 'MISSED'}"
        table.add_row(r.name, f"{s['median']:.3f}", f"{s['min']:.3f} .. {s['max']:.3f}", verdict)
    return table


def _round(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
