"""Do blockwise learning rates help a vision Transformer on images, and does its sharpness have the paper's order?

    python studies/2026-11-vit/images.py runs/fashion-mnist               # fetches the images
    python studies/2026-11-vit/run.py --images runs/fashion-mnist
    python studies/2026-11-vit/run.py --list

One process trains one arm after another on one thread, in the order of plan.py, and writes each result to data/runs.
Start as many as there are cores. A run that is cut off is made again. A run of 780 steps takes about a
core-minute. The whole queue has about 130 runs and takes some four core-hours, of which the 36 runs of 3 120 steps, at
its end, take more than half. --shapes vit vit-timm adds about 36 runs of 780 steps.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from arms import SHAPES, Arm
from filelock import FileLock, Timeout
from images import Images, read
from plan import SHORT, queue
from training import run
from tuning import Results

from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.allocator import keep_freed_memory
from blockwise_lr.train.environment import describe_environment

RESULTS = Path(__file__).parent / "data" / "runs"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="the folder of the four files; not needed with --list")
    parser.add_argument("--results", type=Path, default=RESULTS, help="one JSON file a run")
    parser.add_argument("--locks", type=Path, default=Path("runs/vit"), help="which process trains what")
    parser.add_argument("--shapes", nargs="*", default=["vit"], choices=sorted(SHAPES), help="the models")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after so long")
    parser.add_argument("--list", action="store_true", help="show the queue and train nothing")
    arguments = parser.parse_args()
    if arguments.list:
        listing(load(arguments.results), arguments.shapes)
        return
    if arguments.images is None:
        parser.error("--images is missing: a folder with the four files that images.py fetches")
    torch.set_num_threads(1)
    keep_freed_memory()
    arguments.locks.mkdir(parents=True, exist_ok=True)
    arguments.results.mkdir(parents=True, exist_ok=True)
    images = read(arguments.images)
    end = time.monotonic() + 60 * arguments.minutes
    while time.monotonic() < end and (arms := queue(load(arguments.results), arguments.shapes)):
        if not any(claimed(arm, images, arguments) for arm in arms):
            time.sleep(10)  # another process has what is known to be needed


def load(folder: Path) -> Results:
    """Read every run that has ended."""
    return Results({path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))})


def claimed(arm: Arm, images: Images, arguments: argparse.Namespace) -> bool:
    """Train an arm and write its result, unless another process has it; return whether this process did."""
    path = arguments.results / f"{arm.name}.json"
    try:
        with FileLock(arguments.locks / f"{arm.name}.lock", timeout=0):
            if path.exists():  # it has ended since the queue was made
                return True
            result: dict[str, Any] = run(arm, images)
            write_json_atomic(path, {**result, **describe_environment("cpu")})
    except Timeout:
        return False
    print(*(result[key] for key in ("tune_loss", "val_loss", "val_accuracy", "seconds")), end=" ")
    print(json.dumps(arm.to_dict()), flush=True)
    return True


def listing(results: Results, shapes: list[str]) -> None:
    """Print the queue, how many runs have ended, and an estimate of what the queue takes."""
    arms = queue(results, shapes)
    for arm in arms:
        print(arm.name, json.dumps(arm.to_dict()))
    minutes = sum(arm.steps / SHORT * (5 if arm.watched else 1) for arm in arms)
    spent = sum(float(run["seconds"]) for run in results.runs.values()) / 60
    print(f"{len(results.runs)} runs have ended, in {spent:.0f} core-minutes.")
    print(
        f"{len(arms)} runs are known to be needed, about {minutes:.0f} core-minutes; others follow from them."
    )


if __name__ == "__main__":
    main()
