"""Does the gain last over model sizes, and how many parameters is it worth?

    python studies/2026-11-sizes/run.py --list     # number of runs and minutes; trains nothing
    python studies/2026-11-sizes/run.py            # four sizes of 0.15M to 1.8M parameters, 300 steps
    python studies/2026-11-sizes/run.py --sizes 0.15M 0.3M 0.6M 1.8M --steps 300 --seeds 0 1

Runs `blockwise-lr compare` for each size and `blockwise-lr scaling` over them. Finished runs are kept in
data/SIZE/runs.tar.gz, so the same command continues after an interruption, from a fresh clone too. Writes
data/SIZE/compare.json and data/scaling.json; report.py makes the pages from them.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from kept_runs import call, kept

from blockwise_lr.compare.comparison_progress import format_seconds
from blockwise_lr.compare.time_estimate import seconds_per_step
from blockwise_lr.train.build_model import count_parameters
from blockwise_lr.train.config import TrainConfig
from blockwise_lr.train.presets import get_preset

DATA = Path(__file__).parent / "data"
SIZES = {"0.15M": (20, 1), "0.3M": (36, 1), "0.6M": (64, 1), "1.8M": (128, 2), "4.7M": (224, 4)}
"""Width and heads of each size; all have four layers, as the preset `quickstart`."""
START_SECONDS = 12.0
"""Time of a run that is not training: imports, evaluation, saving."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--list", action="store_true", help="print the number of runs and minutes; train nothing"
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["0.15M", "0.3M", "0.6M", "1.8M"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--arms", nargs="+", default=["adamw:uniform", "adamw:half"], help="the baseline first"
    )
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument(
        "--base-lrs",
        nargs="+",
        default=["4e-3", "8e-3", "1.6e-2"],
        help="grid of every arm, refined by sqrt 2",
    )
    parser.add_argument("--warmups", nargs="+", default=["0.15", "0.6"])
    parser.add_argument("--parameters", choices=["all", "non-embedding"], default="all")
    parser.add_argument("--jobs", default="0", help="runs in parallel (default: one a core)")
    parser.add_argument("--data", help="another text, as of train")
    parser.add_argument("--out", type=Path, default=Path("runs") / "sizes-study")
    return parser.parse_args(arguments)


def config_of(size: str, steps: int) -> TrainConfig:
    """Return the configuration of a size, as `compare` makes it."""
    preset = get_preset("quickstart")
    width, heads = SIZES[size]
    model = replace(preset.model, hidden_size=width, heads=heads)
    return replace(preset, model=model, steps=steps, device="cpu")


def compare_command(size: str, given: argparse.Namespace) -> list[str]:
    """Return the arguments of `blockwise-lr` that compare the arms at one size."""
    width, heads = SIZES[size]
    return [
        "compare", "quickstart", "--hidden-size", str(width), "--heads", str(heads), "--steps", str(given.steps),
        "--device", "cpu", "--arms", *given.arms, "--seeds", *given.seeds, "--base-lrs", *given.base_lrs, "--refine",
        "--warmups", *given.warmups, "--jobs", given.jobs, *(["--data", given.data] if given.data else []),
        "--out", str(given.out / size),
    ]  # fmt: skip


def scaling_command(given: argparse.Namespace) -> list[str]:
    """Return the arguments of `blockwise-lr` that fit the laws."""
    folders = [str(given.out / size) for size in given.sizes]
    return ["scaling", *folders, "--parameters", given.parameters, "--out", str(given.out / "scaling")]


def runs_of(given: argparse.Namespace) -> tuple[int, int]:
    """Return the number of runs of one size, and how many times N steps they have: the baseline also runs for 2N.

    The run of the first seed at the chosen setting is one of the tuning runs.
    """
    tries = len(given.base_lrs) * len(given.warmups) + 2
    each = tries + len(given.seeds) - 1
    return each * (len(given.arms) + 1), each * (len(given.arms) + 2)


def main() -> None:
    given = parse()
    if given.list:
        show(given)
        return
    DATA.mkdir(exist_ok=True)
    for size in given.sizes:
        runs = given.out / size / "runs"
        runs.mkdir(parents=True, exist_ok=True)
        (DATA / size).mkdir(exist_ok=True)
        with kept(DATA / size / "runs.tar.gz", runs):
            call(compare_command(size, given))
        shutil.copyfile(given.out / size / "compare.json", DATA / size / "compare.json")
    call(scaling_command(given))
    shutil.copyfile(given.out / "scaling" / "scaling.json", DATA / "scaling.json")


def show(given: argparse.Namespace) -> None:
    """Print the commands, the number of runs and how long they take."""
    total = 0.0
    runs, horizons = runs_of(given)
    for size in given.sizes:
        config = config_of(size, given.steps)
        seconds = (
            horizons * given.steps * seconds_per_step(config, clock=time.process_time) + runs * START_SECONDS
        )
        total += seconds
        print(shlex.join(["blockwise-lr", *compare_command(size, given)]))
        print(
            f"  {count_parameters(config.model):,} parameters, {runs} runs: {format_seconds(seconds)} on one idle core"
        )
    print(shlex.join(["blockwise-lr", *scaling_command(given)]))
    print(f"In all {runs * len(given.sizes)} runs, about {format_seconds(total)} on one idle core.")


if __name__ == "__main__":
    main()
