"""The command line: `plan` and `run`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from gpu.parts import BY_NAME, PARTS, Part, plan

DESCRIPTION = """Checks for a GPU that is available for minutes only.

    python benchmarks/gpu plan --seconds 600
    python benchmarks/gpu run all --seconds 600 --data TOKENS --out results
    python benchmarks/gpu run costs memory
    python benchmarks/gpu run all --device cpu --tiny        tries every part without a GPU

One process runs the parts one after the other. Each writes OUT/gpu-PART-DATE.json as soon as it has a number, and is
cut off after 120 s. If a part fails, its error is in that file and the next part begins. Call the same command again:
parts that finished on this card, with this commit, within a day are skipped. Exit codes: 0 all done, 1 a part failed,
2 bad arguments or no GPU.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = parse(arguments)
    if options.command == "plan":
        print(plan(chosen_parts(options.parts or ["all"]), options.seconds))
        return 0
    import torch

    from gpu.run_parts import run_parts

    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: --device cpu --tiny tries the parts without one", file=sys.stderr)
        return 2
    end = time.monotonic() + options.seconds if options.seconds else None
    with tempfile.TemporaryDirectory() as folder:
        failed = run_parts(chosen_parts(options.parts), options, end=end, folder=Path(folder))
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("plan", help="list the parts and what fits into the time")
    shown.add_argument("parts", nargs="*", type=known_part, metavar="PART", help="default: all")
    shown.add_argument("--seconds", type=float, default=600, help="time there is (default: %(default)s)")
    run = commands.add_parser("run", help="run parts")
    run.add_argument("parts", nargs="+", type=known_part, metavar="PART", help=", ".join([*BY_NAME, "all"]))
    run.add_argument("--seconds", type=float, help="begin no part that would end later; default: no limit")
    run.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    run.add_argument("--tiny", action="store_true", help="tiny shapes: does it run? its numbers mean nothing")
    run.add_argument("--repeats", type=int, help="measurements of each arm (default: 7; tiny: 1)")
    run.add_argument(
        "--data", type=Path, help="folder with nanoGPT's train.bin and val.bin; default: made-up text"
    )
    run.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    run.add_argument("--again", action="store_true", help="also run parts that are done")
    options = parser.parse_args(arguments)
    if options.command == "run":
        options.repeats = options.repeats or (1 if options.tiny else 7)
        if options.repeats < 1:
            parser.error(f"--repeats is {options.repeats}; expected 1 or more")
        for name in ("train.bin", "val.bin") if options.data else ():
            if not (options.data / name).is_file():
                parser.error(
                    f"--data: {options.data} has no {name}; expected nanoGPT's train.bin and val.bin"
                )
    return options


def known_part(name: str) -> str:
    """Return the name if there is such a part."""
    if name not in BY_NAME and name != "all":
        raise argparse.ArgumentTypeError(f"no part {name!r}; there are {', '.join(BY_NAME)} and all")
    return name


def chosen_parts(names: Sequence[str]) -> list[Part]:
    """Return the parts of these names in the order of importance."""
    return [part for part in PARTS if part.name in names or "all" in names]
