"""Do blockwise learning rates help a vision Transformer on images, and does its sharpness have the paper's order?

    python studies/2026-11-vit/images.py runs/fashion-mnist               # fetches the images
    python studies/2026-11-vit/run.py --images runs/fashion-mnist
    python studies/2026-11-vit/run.py --list

One process trains one arm after another on one thread, in the order of plan.py, and writes each result to data/runs.
Start as many as there are cores. A run that is cut off is made again. A run of 780 steps takes about a
core-minute. The whole queue has about 165 runs and takes some five core-hours, of which the 33 runs of 3 120 steps
take nearly half. timm's model needs timm and torchvision; --shapes vit leaves it out.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "_support"))

import training
from arms import SHAPES, Arm
from images import SHA256, Images, read
from plan import MODELS, SHORT, queue
from text_runs import Source, main

RESULTS = Path(__file__).parent / "data" / "runs"


def images_of(path: Path, arguments: argparse.Namespace) -> tuple[Images, dict[str, Any]]:
    """Return the images and what describes them.

    Raises:
        SystemExit: a library of the models that are to be trained is missing, or a file of the images.
    """
    for shape in arguments.shapes or MODELS:
        if importlib.util.find_spec(SHAPES[shape].library) is None:
            raise SystemExit(
                f"{SHAPES[shape].library} is not installed, which has the model {shape}: install it by `pip install "
                "timm torchvision`, or train transformers' model alone by --shapes vit"
            )
    return read(path), {"name": "Fashion-MNIST", "sha256": SHA256["train-images-idx3-ubyte.gz"]}


def train(arms: list[Arm], images: Images, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train arms one after another."""
    return [training.run(arm, images) for arm in arms]


def minutes(arm: Arm) -> float:
    """Return about how long an arm takes on a core of an AMD EPYC."""
    return arm.steps / SHORT * (5 if arm.watched else 1)


if __name__ == "__main__":
    main(
        __doc__,
        queue,
        list(MODELS),
        results=RESULTS,
        out=Path("runs/vit"),
        trainer=train,
        source=Source(
            "images",
            "the folder of the four files",
            "a folder with the files that images.py fetches",
            images_of,
        ),
        minutes=minutes,
    )
