"""What measuring the sharpness costs a training, and what bf16 does to it.

    python benchmarks/sharpness_cost.py

Cost: one `measure_sharpness` call on one micro-batch against forward and backward of that micro-batch, in turns; and
`empirical` read off the gradients of a training step (forward, backward, clipping, fused AdamW) against that step.
fp32; GPT-2 small on 1 x 512 tokens, which needs about 5 GB, and the quickstart model on its batch.

Precision: `fisher` on the same batch with the same seeds, under bf16 autocast and of a bf16 copy of the model, divided
by fp32's, on a GPT-2 that was trained for some steps. One value a seed; they scatter since a few of the sampled labels
come out differently. Writes results/sharpness_cost-<date>.json.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from _curvature import Subject, trained
from _measure import GPT2_SMALL, GPT2_TINY, Ratio, argument_parser, finish, in_turns, ratio
from torch import Tensor, nn

from blockwise_lr import SharpnessReport, measure_sharpness, param_groups, split_fused
from blockwise_lr.pretrain.config import ModelConfig
from blockwise_lr.pretrain.models import build_model
from blockwise_lr.pretrain.presets import get_preset
from blockwise_lr.sharpness.gradients import gradient_report, squared_gradients
from blockwise_lr.sharpness.parts import Parts

TRAINED = ModelConfig("gpt2", 256, 4, 4, vocab_size=3072, context=128, tied=True)


def against_a_step(
    name: str, model: nn.Module, ids: Tensor, repeats: int
) -> tuple[dict[str, list[float]], list[Ratio]]:
    """Seconds of each arm, and their ratios."""
    batch = {"input_ids": ids, "labels": ids}
    parts = Parts(model, None, distributed=False)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-5), lr=1e-5, fused=True)

    def forward_and_backward() -> None:
        model(**batch).loss.backward()

    def whole_step() -> None:
        forward_and_backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def read_gradients() -> None:
        gradient_report(parts, squared_gradients(parts), samples=ids[:, 1:].numel())

    def timed(work: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> Callable[[], float]:
        def run() -> float:
            model.zero_grad(set_to_none=True)
            before()
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin

        return run

    arms = {
        "forward and backward": timed(forward_and_backward),
        "fisher": timed(lambda: measure_sharpness(model, batch)),
        "empirical": timed(lambda: measure_sharpness(model, batch, estimator="empirical")),
        "whole step": timed(whole_step),
        "empirical from its gradients": timed(read_gradients, before=forward_and_backward),
    }
    in_turns(arms, 1)  # the first step makes the optimizer's moments
    seconds = in_turns(arms, repeats)
    return seconds, [
        ratio(seconds, "fisher", "forward and backward", what=name, at_most=1.2),
        ratio(seconds, "empirical", "forward and backward", what=name),
        ratio(seconds, "empirical from its gradients", "whole step", what=name, at_most=0.02),
    ]


def precision(subject: Subject, seeds: int) -> list[Ratio]:
    """Of each block: bf16's fisher over fp32's, a value a seed."""
    half = copy.deepcopy(subject.model).bfloat16()

    def measured(model: nn.Module, seed: int, autocast: bool = False) -> SharpnessReport:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return measure_sharpness(model, subject.batch, seed=seed)

    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        exact = measured(subject.model, seed)
        for name, report in {
            "bf16 autocast": measured(subject.model, seed, autocast=True),
            "bf16 model": measured(half, seed),
        }.items():
            for block in report:
                name_of_ratio = f"{block.value}: {name} / fp32"
                found.setdefault(name_of_ratio, []).append(report[block].mean / exact[block].mean)
    return [Ratio(name, found[name]) for name in sorted(found, key=lambda name: name.split(": ")[1])]


def main() -> None:
    parser = argument_parser(__doc__, repeats=9)
    parser.add_argument("--steps", type=int, default=200, help="trained for (default: %(default)s)")
    arguments = parser.parse_args()
    quickstart, tiny = get_preset("quickstart"), replace(GPT2_TINY, context=32)
    cases = {
        "GPT-2 small": (tiny if arguments.quick else replace(GPT2_SMALL, context=512), 1),
        "quickstart": (tiny if arguments.quick else quickstart.model, quickstart.batch_size),
    }
    measurements, ratios = {}, []
    torch.manual_seed(0)
    for name, (shape, sequences) in cases.items():
        model = split_fused(build_model(shape, seed=0)).train()
        ids = torch.randint(shape.vocab_size, (sequences, shape.context))
        seconds, found = against_a_step(name, model, ids, arguments.repeats)
        measurements[f"{name}, s"] = seconds
        ratios += found
        del model
    shape, steps = (tiny, 3) if arguments.quick else (TRAINED, arguments.steps)
    subject = trained(shape, sequences=8, steps=steps, text=not arguments.quick)
    ratios += precision(subject, arguments.repeats)
    settings = {
        "batches": {name: [sequences, shape.context] for name, (shape, sequences) in cases.items()},
        "precision": {"trained_steps": steps, "batch": list(subject.ids.shape)},
    }
    finish(__file__, arguments, settings=settings, measurements=measurements, ratios=ratios)


if __name__ == "__main__":
    main()
