"""Run samplers on loss surfaces drawn from the surrogate, and keep the loss of their incumbents after every trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from records import BLOCKS, Run, in_order
from surrogate import Surface, Surrogate, inputs

from blockwise_lr.optim.ratios import MEASURED_RATIOS
from blockwise_lr.tune.ask_tell import Sampler
from blockwise_lr.tune.samplers import make_sampler
from blockwise_lr.tune.space import Point, Space, Vector

WARMUP = 0.15
"""The warm-up of the start points with ratios."""
BOXES: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "recorded": {"base_lr": (-12.0, -6.0), "warmup": (math.log2(0.05), math.log2(0.8)), "ratio": (-3.0, 6.0)},
    "wide": {"base_lr": (-13.0, -3.0), "warmup": (-6.0, -0.5), "ratio": (-7.0, 7.0)},
}
"""Bounds in log2. "recorded" is about where runs were recorded; outside it, the surrogate is a guess."""


class RandomSearch(Sampler):
    """Uniform draws from the whole box: what a sampler must beat."""

    def _propose(self, generator: np.random.Generator) -> Vector:
        return np.asarray(generator.uniform(self.space.low, self.space.high))


MakeSampler = Callable[[Space, Sequence[Point], int], Sampler]


def _named(name: str, **settings: Any) -> MakeSampler:
    return lambda space, start, seed: make_sampler(name, space, start, seed, **settings)


SAMPLERS: Mapping[str, MakeSampler] = {
    "trust-region": _named("trust-region"),
    "tpe": _named("tpe"),
    "cma-es": _named("cma-es"),
    "random": RandomSearch,
}
"""The samplers that are compared, with the settings of `blockwise-lr tune`."""
VARIANTS: Mapping[str, MakeSampler] = {
    "trust-region, all dimensions at once": _named("trust-region", moved=7.0),
    "trust-region, two dimensions at once": _named("trust-region", moved=2.0),
    "trust-region, first radius a factor of 4": _named("trust-region", radius=2.0),
    "trust-region, first radius a factor of 1.4": _named("trust-region", radius=0.5),
    "cma-es, first deviation a factor of 2.8": _named("cma-es", sigma=1.5),
    "cma-es, first deviation a factor of 1.3": _named("cma-es", sigma=0.35),
    "tpe, 10 random trials first": _named("tpe", startup=10),
}
"""Other settings of the same samplers."""


def start_points(runs: Sequence[Run]) -> list[Point]:
    """Return the start of every search: the best uniform run, and `measured` and half of it at the rates for it.

    Half, `measured` to the power 1/2, has the uniform rate over sqrt 2. `measured` has a quarter of the uniform rate.
    """
    uniform = min(
        (run for run in runs if run.ratios == (1.0,) * len(BLOCKS) and run.seed == 0),
        key=lambda run: run.tune_loss,
    )
    measured = {
        block.value: float(ratio) for block, ratio in MEASURED_RATIOS.items() if block.value in BLOCKS[:-1]
    }
    half = {block: ratio**0.5 for block, ratio in measured.items()}
    return [
        Point(uniform.base_lr, uniform.warmup),
        Point(uniform.base_lr / math.sqrt(2), WARMUP, half),
        Point(uniform.base_lr / 4, WARMUP, measured),
    ]


def race(
    make: MakeSampler,
    surface: Surface,
    start: Sequence[Point],
    *,
    box: str,
    trials: int,
    noise: float,
    seed: int,
) -> list[float]:
    """Search one surface.

    Args:
        make: builds the sampler.
        surface: the loss surface.
        start: the points to try first.
        box: a name of BOXES.
        trials: number of trials, the start points included.
        noise: standard deviation of what is added to each loss that the sampler sees.
        seed: of the sampler and of the noise. Samplers with one seed see the same noise at the same trial.

    Returns:
        After each trial, the true loss of the point with the lowest observed loss so far.
    """
    sampler = make(Space(BLOCKS, **BOXES[box]), start, seed)
    errors = np.random.default_rng([seed, 1]).normal(0, noise, trials)
    observed, incumbent, true = math.inf, math.nan, []
    for error in errors:
        point = sampler.ask()
        x = torch.tensor([inputs(point.base_lr, point.warmup, in_order(point.ratios))], dtype=torch.float64)
        loss = float(surface(x)[0])
        sampler.tell(point, loss + error)
        if loss + error < observed:
            observed, incumbent = loss + error, loss
        true.append(incumbent)
    return true


def races(
    surrogate: Surrogate,
    starts: Mapping[str, Sequence[Point]],
    samplers: Mapping[str, MakeSampler],
    *,
    box: str,
    trials: int,
    repeats: int,
    noise: float,
    mean: bool = False,
) -> dict[str, dict[str, list[list[float]]]]:
    """Run every sampler on the same `repeats` surfaces of every setting.

    Args:
        surrogate: where the surfaces come from.
        starts: the start points of every setting.
        samplers: the samplers by name.
        box, trials, noise: as in :func:`race`.
        repeats: number of surfaces, seeds and noises of every setting.
        mean: every surface of a setting is the posterior mean. Otherwise, each is drawn.

    Returns:
        By setting and sampler: for each repeat, the true loss of the incumbent after each trial, in nats below the
        uniform start point. More is better.
    """
    found: dict[str, dict[str, list[list[float]]]] = {}
    for setting, start in starts.items():
        found[setting] = {name: [] for name in samplers}
        for repeat in range(repeats):
            surface = surrogate.mean(setting) if mean else surrogate.draw(setting, repeat)
            for name, make in samplers.items():
                true = race(make, surface, start, box=box, trials=trials, noise=noise, seed=repeat)
                found[setting][name].append([round(true[0] - loss, 4) for loss in true])
    return found
