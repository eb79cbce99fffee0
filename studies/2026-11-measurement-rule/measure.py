"""Measure along a uniform run what the rules of this study make ratios of.

    python studies/2026-11-measurement-rule/measure.py --text TEXT.jsonl[.xz] --out runs/rule

Trains the model for 300 steps at a quarter of its tuned uniform learning rate, as the documentation advises, and
measures at 20 points on 4 batches each. Writes data/measured/SHAPE.json, once. try_rule.py trains with the ratios.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from arms import Arm
from other_rules import by_exponent, exponents, signal_to_noise, undamped
from shapes import CONTEXT, LLAMAS, VOCABULARY
from stacked import Text
from text_runs import tokens

from blockwise_lr import measure_directional, param_groups
from blockwise_lr.data.data_config import DataConfig
from blockwise_lr.data.prepare import prepare_data
from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.allocator import keep_freed_memory
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.environment import describe_environment
from blockwise_lr.train.run_sharpness import measure_batches

MEASURED = Path(__file__).parent / "data" / "measured"
STEPS, POINTS = 300, 20
RATES = {"llama-600k": 2e-3, "llama-2m": 1.4e-3}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="the text of the horizon study")
    parser.add_argument("--out", type=Path, default=Path("runs/rule"), help="tokens")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="where the results go")
    parser.add_argument("--shapes", nargs="*", default=["llama-600k"], choices=sorted(RATES))
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    for folder in (arguments.out, arguments.measured):
        folder.mkdir(parents=True, exist_ok=True)
    text, about = tokens(arguments.text, arguments.out)
    config = DataConfig(data=str(arguments.text), cache=str(arguments.out / "cache"))
    data = prepare_data(config, vocab_size=VOCABULARY, context=CONTEXT, progress=False)
    batches = measure_batches(data.measure, CONTEXT, batches=4, batch_size=16)
    for shape in arguments.shapes:
        if not (path := arguments.measured / f"{shape}.json").exists():
            found = measure(Arm(shape, arguments.steps, RATES[shape]), text, batches)
            write_json_atomic(path, {**found, "text": about, **describe_environment("cpu")})


def measure(
    arm: Arm, text: Text, batches: list[dict[str, torch.Tensor]], *, rows: int = 16
) -> dict[str, Any]:
    """Train the arm, and measure along the update at POINTS points.

    Returns:
        The arm; of every point the report, the signal-to-noise ratio and the exponents; and the ratios that follow from
        the last two.
    """
    model = build_model(LLAMAS[arm.shape], seed=arm.seed)
    groups = param_groups(model, lr=arm.base_lr, ratios="uniform", weight_decay=arm.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=arm.base_lr, betas=(0.9, arm.beta2))
    order = text.order(arm.seed, arm.steps * rows).reshape(arm.steps, rows)
    reports, snr, alphas = [], [], []
    for step, chosen in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = arm.lr(group["block"], step)
        ids = torch.from_numpy(text.train[chosen].astype(np.int64))
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), arm.clip)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, arm.steps // POINTS) == 0:
            reports.append(measure_directional(model, optimizer, batches, step=step + 1).to_dict())
            snr.append(signal_to_noise(model, optimizer))
            alphas.append(exponents(model))
            print(f"{arm.shape}: measured at step {step + 1}", flush=True)
    return {
        "arm": arm.to_dict(),
        "reports": reports,
        "signal_to_noise": snr,
        "exponents": alphas,
        "after MoLS": undamped(snr),
        "after LLR": by_exponent(model, alphas),
    }


if __name__ == "__main__":
    main()
