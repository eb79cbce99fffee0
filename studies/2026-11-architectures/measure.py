"""How sharp is each block of these models along a uniform run?

    python studies/2026-11-architectures/measure.py --text TEXT.jsonl[.xz] --out runs/architectures

Trains each model at a quarter of its tuned uniform learning rate and measures sharpness by `fisher`, and along the
optimizer's update, at the steps POINTS, on text that nothing else uses. Writes data/sharpness/MODEL.json, once. The
rule `own` follows from it, so run.py has more to train afterwards.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "_support"))

import models
from arms import Arm
from plain import train_plain
from plan import DENSE, IN_PARTS, measured_along, searched_model
from shapes import CONTEXT, VOCABULARY, blocks_of
from stacked import Text
from text_runs import load, tokens
from torch.optim import Optimizer
from transformers import PreTrainedModel

from blockwise_lr import measure_directional, measure_sharpness
from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.prepare import prepare_data
from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.allocator import keep_freed_memory
from blockwise_lr.train.environment import describe_environment
from blockwise_lr.train.run_sharpness import measure_batches

DATA = Path(__file__).parent / "data"
POINTS = (0, 15, 30, 60, 120, 180, 240, 300)
SHAPES = (*(name for name in models.NAMES if name not in IN_PARTS), DENSE)  # in parts, a model says more


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/architectures"), help="tokens")
    parser.add_argument(
        "--data", type=Path, default=DATA, help="where the runs are, and where the results go"
    )
    parser.add_argument("--shapes", nargs="*", default=SHAPES, choices=SHAPES, help="only these models")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    arguments.out.mkdir(parents=True, exist_ok=True)
    text, about = tokens(arguments.text, arguments.out)
    config = DataConfig(data=str(arguments.text), cache=str(arguments.out / "cache"))
    data = prepare_data(config, vocab_size=VOCABULARY, context=CONTEXT, progress=False)
    batches = measure_batches(data.measure, CONTEXT, batches=4, batch_size=16)
    results = load(arguments.data / "runs")
    for shape in arguments.shapes:
        path = arguments.data / "sharpness" / f"{shape}.json"
        if path.exists():
            continue
        arm = measured_along(searched_model(shape), results)
        if arm is None:
            print(f"{shape}: uniform is not tuned yet; run run.py first", flush=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, {**measure(arm, text, batches), "text": about, **describe_environment("cpu")})


def measure(
    arm: Arm, text: Text, batches: list[dict[str, torch.Tensor]], *, rows: int = 16
) -> dict[str, Any]:
    """Train one learning rate for all blocks, and measure at every point of POINTS within the run.

    Returns:
        ``{"arm", "sharpness": [{"step", "report"}], "directional": [...]}``; the latter from the first update on.
    """
    sharpness: list[dict[str, Any]] = []
    directional: list[dict[str, Any]] = []

    def watch(step: int, model: PreTrainedModel, optimizer: Optimizer) -> None:
        if step not in POINTS:
            return
        blocks = blocks_of(arm.shape, model)
        report = measure_sharpness(model, batches, blocks=blocks, step=step)
        sharpness.append({"step": step, "report": report.to_dict()})
        if step:
            along = measure_directional(model, optimizer, batches, blocks=blocks, step=step)
            directional.append({"step": step, "report": along.to_dict()})
        print(f"{arm.shape}: measured at step {step}", flush=True)

    train_plain(arm, text, adamw, rows=rows, watch=watch)
    return {"arm": arm.to_dict(), "sharpness": sharpness, "directional": directional}


def adamw(arm: Arm, model: PreTrainedModel) -> Optimizer:
    """Return torch's AdamW with one learning rate for all blocks."""
    group = {"params": list(model.parameters()), "block": "all"}
    return torch.optim.AdamW([group], lr=arm.base_lr, betas=(0.9, arm.beta2), weight_decay=arm.weight_decay)


if __name__ == "__main__":
    main()
