"""Race the samplers on real training runs: which finds the lowest loss with so many runs of 100 steps?

    python studies/2026-11-samplers/real_race.py --text TEXT.jsonl[.xz] --out runs/real-race

The model is the LLaMA of 0.6M parameters of the horizon study, with its text and settings. Every search begins at the
tuned uniform rate and at the two start points that `tune` derives from it. Results go to data/real_race.json after
every run, and a run that has ended is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "_support"))

from arms import RULES, Arm
from stacked import Stack, Text
from text_runs import tokens
from tuning import Results, bracket, point_of

from blockwise_lr.files import write_json_atomic
from blockwise_lr.train.allocator import keep_freed_memory
from blockwise_lr.train.environment import describe_environment
from blockwise_lr.tune.samplers import make_sampler
from blockwise_lr.tune.space import Point, Space

DATA = Path(__file__).parent / "data" / "real_race.json"
SHAPE, STEPS = "llama-600k", 100
BLOCKS = ("emb", "qk", "vo", "norm", "head")
TRIALS, SEEDS = 32, (0, 1)
REACH = 2.0
"""How far "near" boxes reach beyond the start points, in log2."""

RACERS: Mapping[str, tuple[str, str]] = {
    "tpe, wide box": ("tpe", "wide"),
    "trust-region": ("trust-region", "wide"),
    "tpe, near box": ("tpe", "near"),
    "cma-es": ("cma-es", "wide"),
}
"""By name: the sampler and the box."""


def space_of(box: str, start: Sequence[Point]) -> Space:
    """Return the space of a search: "wide" as `tune` had it, or "near", REACH beyond the start points."""
    middle = math.log2(start[0].base_lr)
    if box == "wide":
        return Space(BLOCKS, base_lr=(middle - 6, middle + 6))
    ratios = [math.log2(point.ratios.get(block, 1.0)) for point in start for block in BLOCKS]
    rates = [math.log2(point.base_lr) for point in start]
    return Space(
        BLOCKS,
        base_lr=(min(rates) - REACH, max(rates) + REACH),
        warmup=(math.log2(0.02), math.log2(0.6)),
        ratio=(min(ratios) - REACH, max(ratios) + REACH),
    )


class Runs:
    """The runs that have ended, in one file, and how to make others."""

    def __init__(self, path: Path, text: Text, about: Mapping[str, Any]) -> None:
        self.path, self.text = path, text
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": {}}
        self.content |= {"text": dict(about), **describe_environment("cpu")}

    def loss(self, arm: Arm) -> float:
        """Return the tune loss of an arm, which is trained if it is new; infinite if it diverged."""
        if arm.name not in self.content["runs"]:
            stack = Stack([arm], self.text)
            while stack.step < arm.steps:
                stack.advance()
            (loss,) = stack.evaluate(self.text.tune, 512)
            finite = round(loss, 5) if math.isfinite(loss) else None
            self.content["runs"][arm.name] = {"arm": arm.to_dict(), "tune_loss": finite}
            write_json_atomic(self.path, self.content)
        return self.results.loss(arm) or math.inf

    @property
    def results(self) -> Results:
        return Results(self.content["runs"])


def start_points(runs: Runs) -> list[Point]:
    """Tune one learning rate for all blocks, and return it with the two start points of `tune`."""
    best = None
    while best is None:
        arms, best = bracket(Arm(SHAPE, STEPS, 8e-3), runs.results)
        for arm in arms:
            runs.loss(arm)
    wide = Space(BLOCKS)
    measured = {block: ratio for block, ratio in RULES["measured"].items() if block in BLOCKS}
    half = {block: ratio**0.5 for block, ratio in measured.items()}
    return [
        point_of(best, wide),
        wide.from_ratios(best.base_lr / math.sqrt(2), 0.15, half),
        wide.from_ratios(best.base_lr / 4, 0.15, measured),
    ]


def race(name: str, seed: int, start: Sequence[Point], runs: Runs) -> list[float]:
    """Return the loss of every trial of one search, after the start points'."""
    sampler, box = RACERS[name]
    search = make_sampler(sampler, space_of(box, start), (), seed)
    losses = []
    for point in start:
        losses.append(runs.loss(_arm(point)))
        search.tell(point, losses[-1])
    for _ in range(TRIALS - len(start)):
        point = search.ask()
        losses.append(runs.loss(_arm(point)))
        search.tell(point, losses[-1])
    return losses


def _arm(point: Point) -> Arm:
    return Arm(SHAPE, STEPS, point.base_lr, point.ratios, point.warmup)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/real-race"), help="tokens")
    parser.add_argument("--results", type=Path, default=DATA)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = Runs(arguments.results, *tokens(arguments.text, arguments.out))
    start = start_points(runs)
    for seed in SEEDS:
        for name in RACERS:
            losses = race(name, seed, start, runs)
            runs.content.setdefault("races", {})[f"{name}, seed {seed}"] = losses
            write_json_atomic(arguments.results, runs.content)
            print(
                f"{name}, seed {seed}: best {min(losses):.4f}, start {min(losses[: len(start)]):.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
