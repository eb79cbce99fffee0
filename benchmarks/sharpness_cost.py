"""What measuring the sharpness costs a training, and what bf16 does to it.

    python benchmarks/sharpness_cost.py

Cost: one `measure_sharpness` call on one micro-batch against forward and backward of that micro-batch, in turns; and
`empirical` read off the gradients of a training step (forward, backward, clipping, fused AdamW) against that step.
fp32; GPT-2 small on 1 x 512 tokens, which needs about 5 GB, and the quickstart model on its batch.

Precision: `fisher` under bf16 autocast, and of a bf16 copy of the model, divided by fp32's, on one batch and a GPT-2
that was trained for some steps. `same labels`: with the labels that fp32 drew (the error of the gradients; a value a
draw). `own labels`: each draws its own, which differ in most places although the seeds are the same, since the last
bits of the logits decide on them; so these are ratios of means over many draws, the values bootstrap resamples of it.
Writes results/sharpness_cost-<date>.json.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from _measure import GPT2_SMALL, GPT2_TINY, Ratio, argument_parser, finish, in_turns, ratio, timed
from torch import Tensor, nn

from blockwise_lr import measure_sharpness, param_groups, split_fused
from blockwise_lr.sharpness import SharpnessMonitor
from blockwise_lr.sharpness.sampling import classes_at
from blockwise_lr.train.build_model import build_model
from blockwise_lr.train.config import ModelConfig
from blockwise_lr.train.presets import get_preset

if TYPE_CHECKING:
    from _curvature import Subject

TRAINED = ModelConfig("gpt2", 256, 4, 4, vocab_size=3072, context=128, tied=True)
RESAMPLES = 40


def against_a_step(
    name: str, model: nn.Module, ids: Tensor, repeats: int
) -> tuple[dict[str, list[float]], list[Ratio]]:
    """Seconds of each arm, and their ratios."""
    batch = {"input_ids": ids, "labels": ids}
    tokens = ids[:, 1:].numel()
    monitor = SharpnessMonitor(model, every=1, path=None, estimator="empirical", tokens_per_step=tokens)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-5), lr=1e-5, fused=True)

    def forward_and_backward() -> None:
        model(**batch).loss.backward()

    def whole_step() -> None:
        forward_and_backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def read_gradients() -> None:
        monitor.gradients(0)

    def forget() -> None:
        model.zero_grad(set_to_none=True)

    def forget_and_go() -> None:
        forget()
        forward_and_backward()

    arms = {
        "forward and backward": timed(forward_and_backward, forget),
        "fisher": timed(lambda: measure_sharpness(model, batch), forget),
        "empirical": timed(lambda: measure_sharpness(model, batch, estimator="empirical"), forget),
        "whole step": timed(whole_step, forget),
        "empirical from its gradients": timed(read_gradients, before=forget_and_go),
    }
    in_turns(arms, 1)  # the first step makes the optimizer's moments
    seconds = in_turns(arms, repeats)
    return seconds, [
        ratio(seconds, "fisher", "forward and backward", what=name, at_most=1.2),
        ratio(seconds, "empirical", "forward and backward", what=name),
        ratio(seconds, "empirical from its gradients", "whole step", what=name, at_most=0.02),
    ]


def precision(subject: Subject, draws: int) -> list[Ratio]:
    """Of each block: bf16's sharpness over fp32's."""
    half = copy.deepcopy(subject.model).bfloat16()
    kinds = {
        "fp32": (subject.model, False),
        "bf16 autocast": (subject.model, True),
        "bf16 model": (half, False),
    }
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)

    def measure(labels: str, batch: dict[str, Tensor], estimator: str, seed: int) -> None:
        for kind, (model, autocast) in kinds.items():
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                report = measure_sharpness(model, batch, estimator=estimator, seed=seed)
            for block in report:
                found[labels, kind, block.value].append(report[block].mean)

    with torch.no_grad():
        logits = subject.model(subject.ids).logits[:, :-1].flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    for draw in range(draws):
        labels = subject.ids.clone()
        u = torch.rand(len(logits), dtype=torch.float64, generator=generator)
        labels[:, 1:] = classes_at(logits, u).view_as(labels[:, 1:])  # the model itself shifts them
        measure("same labels", {"input_ids": subject.ids, "labels": labels}, "empirical", draw)
        measure("own labels", subject.batch, "fisher", draw)
    ratios = []
    for labels, kind, block in found:
        if kind != "fp32":
            values = zip(found[labels, kind, block], found[labels, "fp32", block])
            pairs = np.array(list(values))
            if labels == "own labels":
                chosen = np.random.default_rng(0).integers(draws, size=(RESAMPLES, draws))
                pairs = pairs[chosen].mean(1)
            ratios.append(Ratio(f"{block}, {labels}: {kind} / fp32", (pairs[:, 0] / pairs[:, 1]).tolist()))
    return sorted(ratios, key=lambda r: r.name.split(", ")[1])


def main() -> None:
    from _curvature import trained  # here, because it imports curvlinops, which the GPU checks do without

    parser = argument_parser(__doc__, repeats=9)
    parser.add_argument("--steps", type=int, default=200, help="trained for (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=40, help="of each precision (default: %(default)s)")
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
    draws = 2 if arguments.quick else arguments.draws
    ratios += precision(subject, draws)
    settings = {
        "batches": {name: [sequences, shape.context] for name, (shape, sequences) in cases.items()},
        "precision": {"trained_steps": steps, "batch": list(subject.ids.shape), "draws": draws},
    }
    finish(__file__, arguments, settings=settings, measurements=measurements, ratios=ratios)


if __name__ == "__main__":
    main()
