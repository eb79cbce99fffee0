"""The samplers by name: our trust-region search, and TPE and CMA-ES from optuna's and cmaes' packages."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from blockwise_lr.errors import UserError
from blockwise_lr.extras import check
from blockwise_lr.tune.ask_tell import Sampler, Trial
from blockwise_lr.tune.space import SHARED, Point, Space, Vector
from blockwise_lr.tune.trust_region import TrustRegion

NAMES = ("trust-region", "tpe", "cma-es")
"""The samplers that :func:`make_sampler` knows."""

AUTO = "trust-region"
"""What "auto" stands for.

Near the start points, `measured` and half of it, most of the box is bad: on real runs, TPE has spent whole searches of
about 30 trials far from them and found nothing better, where the trust-region search has (studies/2026-11-samplers).
"""


def make_sampler(
    name: str, space: Space, start: Sequence[Point] = (), seed: int = 0, **settings: Any
) -> Sampler:
    """Return a sampler.

    Args:
        name: one of :data:`NAMES`.
        space: the space to search.
        start: the points to try first.
        seed: seed of all random choices.
        settings: further settings of the sampler, such as the trust region's `radius`.

    Raises:
        UserError: the name is unknown, or the sampler's package is not installed.

    Example:
        >>> make_sampler("trust-region", Space([]), [Point(0.001, 0.1)]).ask()
        Point(base_lr=0.001, warmup=0.1, ratios={})
    """
    kinds: dict[str, tuple[type[Sampler], tuple[str, ...]]] = {
        "trust-region": (TrustRegion, ()),
        "tpe": (Tpe, ("optuna",)),
        "cma-es": (CmaEs, ("cmaes",)),
    }
    if name not in kinds:
        raise UserError(f"no sampler {name!r}; expected one of {', '.join(NAMES)}")
    kind, packages = kinds[name]
    try:
        check(f"the sampler {name} needs", packages, "tune")
    except ImportError as error:
        raise UserError(f"{error}, or use --sampler trust-region") from None
    return kind(space, start, seed, **settings)


class Tpe(Sampler):
    """The tree-structured Parzen estimator of optuna, over all dimensions together.

    Args:
        space: the space to search.
        start: the points to try first.
        seed: seed of all random choices.
        startup: trials before the model of good and bad points is used; until then, points are drawn at random.
    """

    def __init__(self, space: Space, start: Sequence[Point] = (), seed: int = 0, *, startup: int = 5) -> None:
        super().__init__(space, start, seed)
        self._startup = startup

    def _propose(self, generator: np.random.Generator) -> Vector:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = self.space
        distributions: dict[str, optuna.distributions.BaseDistribution] = {
            name: optuna.distributions.FloatDistribution(low, high)
            for name, low, high in zip(space.names, space.low.tolist(), space.high.tolist())
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=int(generator.integers(2**31)),
                n_startup_trials=self._startup,
                multivariate=True,
                constant_liar=True,
            )
        study = optuna.create_study(sampler=sampler)

        def add(vector: Vector, state: optuna.trial.TrialState, value: float | None) -> None:
            # The study accepts no point outside its distributions.
            values = space.clip(vector).tolist()
            study.add_trial(
                optuna.trial.create_trial(
                    state=state,
                    value=value,
                    params=dict(zip(space.names, values)),
                    distributions=distributions,
                )
            )

        for trial, loss in zip(self.trials, _finite(self.trials)):
            add(trial.vector, optuna.trial.TrialState.COMPLETE, loss)
        for vector in self.running:
            add(vector, optuna.trial.TrialState.RUNNING, None)
        proposed = study.ask(distributions).params
        return np.array([proposed[name] for name in space.names])


class CmaEs(Sampler):
    """The covariance matrix adaptation evolution strategy of the package cmaes, started at the best start point.

    Args:
        space: the space to search.
        start: the points to try first.
        seed: seed of all random choices.
        sigma: first standard deviation of the ratios, in log2 units. Base learning rate and warm-up use half of it.
        population: trials of one generation. Default: that of the package, 4 + 3 ln(dimensions).
    """

    def __init__(
        self,
        space: Space,
        start: Sequence[Point] = (),
        seed: int = 0,
        *,
        sigma: float = 0.7,
        population: int | None = None,
    ) -> None:
        super().__init__(space, start, seed)
        self._sigma, self._population = sigma, population
        self._scale = np.array([0.5 if name in SHARED else 1.0 for name in space.names])

    def _propose(self, generator: np.random.Generator) -> Vector:
        from cmaes import CMA

        scale = self._scale
        known = [trial for trial in self.trials if trial.prior and math.isfinite(trial.loss)]
        mean = min(known, key=lambda trial: trial.loss).vector if known else self.centre
        bounds = np.stack([self.space.low, self.space.high], axis=1) / scale[:, None]
        strategy = CMA(
            mean=self.space.clip(mean) / scale,
            sigma=self._sigma,
            bounds=bounds,
            seed=int(generator.integers(2**31)),
            population_size=self._population,
        )
        # The strategy is rebuilt from the trials, generation by generation: resuming needs no other state.
        trials = list(zip(self.proposed, _finite(self.proposed)))
        size = strategy.population_size
        for begin in range(0, len(trials) - size + 1, size):
            strategy.tell([(trial.vector / scale, loss) for trial, loss in trials[begin : begin + size]])
        return np.asarray(strategy.ask() * scale)


def _finite(trials: Sequence[Trial]) -> list[float]:
    """Return the losses, with that of a diverged run replaced by one above all others."""
    finite = [trial.loss for trial in trials if math.isfinite(trial.loss)]
    worst = max(finite, default=0.0) + 1.0
    return [trial.loss if math.isfinite(trial.loss) else worst for trial in trials]
