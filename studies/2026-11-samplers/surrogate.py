"""A Gaussian process of the tune loss over rates and warm-up, fitted to recorded runs of several models together.

The loss above the best recorded one of its setting, y, enters as S log(1 + y / S): this keeps its size near the optimum
and flattens the walls, where training is close to divergence. The inputs are log2 of every block's own learning rate
and of the warm-up. The covariance of two points of settings t and t' is

    matern52(x, x') (a^2 + [t = t'] b^2) + quadratic(x, x') (c^2 + [t = t'] d^2) + 1 + [t = t'] e^2

so a setting with few runs has the shape of the others where it has no data of its own, and a known uncertainty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from records import BLOCKS, Run
from torch import Tensor

SCALE = 0.3
"""S, in nats."""
NEAR = 0.3
"""Runs within so many nats of their setting's best are called near."""
WORST = 3.0
"""Nats above the best at which a drawn loss is cut off; no recorded run lies higher."""
CENTRE, UNIT = (-9.0, -6.0, -6.0, -6.0, -8.0, -10.0, -2.0), 4.0
"""Log2 of rates and warm-up around which the quadratic is written, and its unit."""
_FEATURES = 400  # random Fourier features of one drawn Matern process


def inputs(base_lr: float, warmup: float, ratios: Sequence[float]) -> list[float]:
    """Return the inputs of the process: log2 of the base rate, of the rates of BLOCKS without FFN, and of the warm-up.

    Example:
        >>> inputs(2**-10, 0.25, [8, 1, 1, 1, 0.5, 1])
        [-10.0, -7.0, -10.0, -10.0, -10.0, -11.0, -2.0]
    """
    base = math.log2(base_lr) + math.log2(ratios[BLOCKS.index("ffn")])
    rates = [math.log2(base_lr * ratio) for block, ratio in zip(BLOCKS, ratios) if block != "ffn"]
    return [base, *rates, math.log2(warmup)]


def flatten(y: Tensor) -> Tensor:
    """Return S log(1 + y / S)."""
    return SCALE * torch.log1p(y / SCALE)


def unflatten(z: Tensor) -> Tensor:
    """Return the inverse of :func:`flatten`, in nats above the best recorded run, at most WORST."""
    return (SCALE * torch.expm1(z / SCALE)).clamp(max=WORST)


@dataclass(frozen=True)
class Data:
    """The mean tune loss of every distinct point at seed 0, of all settings.

    Args:
        settings: names of the settings.
        x: inputs, a row a point.
        setting: index of each point's setting.
        above: tune loss above the best one of the setting, in nats.
        group: number of each point's set of ratios in its setting; points of one group differ in rate and warm-up.
    """

    settings: tuple[str, ...]
    x: Tensor
    setting: Tensor
    above: Tensor
    group: Tensor


def collect(runs: Mapping[str, Sequence[Run]], settings: Sequence[str]) -> Data:
    """Collect the points of these settings."""
    rows: dict[tuple[int, tuple[float, ...], float, float], list[float]] = {}
    for number, setting in enumerate(settings):
        for run in runs[setting]:
            if run.ratios is not None and run.seed == 0:
                place = (number, run.ratios, float(f"{run.base_lr:.3g}"), round(run.warmup, 3))
                rows.setdefault(place, []).append(run.tune_loss)
    groups: dict[tuple[int, tuple[float, ...]], int] = {}
    group = [groups.setdefault((number, ratios), len(groups)) for number, ratios, *_ in rows]
    setting = torch.tensor([number for number, *_ in rows])
    loss = torch.tensor([sum(each) / len(each) for each in rows.values()], dtype=torch.float64)
    best = torch.stack([loss[setting == number].min() for number in range(len(settings))])
    x = torch.tensor([inputs(rate, warmup, ratios) for _, ratios, rate, warmup in rows], dtype=torch.float64)
    return Data(tuple(settings), x, setting, loss - best[setting], torch.tensor(group))


class Surrogate:
    """The Gaussian process, with hyperparameters of the highest posterior density.

    Args:
        data: the points.
        iterations: most iterations of L-BFGS for the hyperparameters.
    """

    def __init__(self, data: Data, iterations: int = 150) -> None:
        self.data = data
        self._target = flatten(data.above)
        self._mean = self._target.mean()
        logs = {name: torch.tensor(math.log(0.1), dtype=torch.float64) for name in "abcde"}
        logs["noise"] = torch.tensor(math.log(0.02), dtype=torch.float64)
        logs["length"] = torch.full((data.x.shape[1],), math.log(4.0), dtype=torch.float64)
        self._logs = logs
        for log in logs.values():
            log.requires_grad_()
        optimizer = torch.optim.LBFGS(list(logs.values()), max_iter=iterations, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self._negative_log_density()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        for log in logs.values():
            log.requires_grad_(False)
        self._inverse = torch.linalg.inv(self._covariance_of_data())

    def left_out(self, *, by_group: bool) -> tuple[Tensor, Tensor]:
        """Predict each run from the others.

        Args:
            by_group: leave out all runs with the ratios of the predicted one, not only the run itself.

        Returns:
            The error of each prediction in nats, and the error over the standard deviation that the process gives it.
        """
        weights = self._inverse @ (self._target - self._mean)
        error, deviation = torch.empty_like(weights), torch.empty_like(weights)
        groups = self.data.group if by_group else torch.arange(len(weights))
        for group in groups.unique():
            own = (groups == group).nonzero()[:, 0]
            covariance = torch.linalg.inv(self._inverse[own][:, own])
            error[own], deviation[own] = covariance @ weights[own], covariance.diagonal().sqrt()
        return self.data.above - unflatten(self._target - error), error / deviation

    def mean(self, setting: str) -> Surface:
        """Return the posterior mean of a setting: smoother than any real surface, with no optimum that no run found."""
        weights = self._inverse @ (self._target - self._mean)
        return Surface(self, None, weights, self.data.settings.index(setting))

    def draw(self, setting: str, seed: int) -> Surface:
        """Draw one loss surface of a setting from the posterior (pathwise conditioning of a random-feature prior)."""
        generator = torch.Generator().manual_seed(seed)
        prior = _Prior(self._logs, len(self.data.settings), generator)
        noise = self._logs["noise"].exp() * torch.randn(
            len(self._target), generator=generator, dtype=torch.float64
        )
        known = prior(self.data.x, self.data.setting) + noise
        weights = self._inverse @ (self._target - self._mean - known)
        return Surface(self, prior, weights, self.data.settings.index(setting))

    def covariance(self, x: Tensor, setting: Tensor, other: Tensor, other_setting: Tensor) -> Tensor:
        """Return the covariance of two lists of points without noise."""
        own = (setting[:, None] == other_setting[None]).double()
        square = {name: log.exp() ** 2 for name, log in self._logs.items() if name != "length"}
        length = self._logs["length"].exp()
        distance = ((x / length)[:, None] - (other / length)[None]).pow(2).sum(-1).add(1e-12).sqrt()
        matern = (1 + math.sqrt(5) * distance + 5 / 3 * distance**2) * (-math.sqrt(5) * distance).exp()
        quadratic = _quadratic(x) @ _quadratic(other).T
        return (
            matern * (square["a"] + own * square["b"])
            + quadratic * (square["c"] + own * square["d"])
            + 1
            + own * square["e"]
        )

    def _covariance_of_data(self) -> Tensor:
        x, setting = self.data.x, self.data.setting
        noise = self._logs["noise"].exp() ** 2 + 1e-8
        return self.covariance(x, setting, x, setting) + noise * torch.eye(len(x), dtype=torch.float64)

    def _negative_log_density(self) -> Tensor:
        factor = torch.linalg.cholesky(self._covariance_of_data())
        target = self._target - self._mean
        likelihood = (
            target @ torch.cholesky_solve(target[:, None], factor)[:, 0] / 2 + factor.diagonal().log().sum()
        )
        prior = sum((self._logs[name] - math.log(0.1)) ** 2 / 8 for name in "abcde")
        prior += (self._logs["noise"] - math.log(0.02)) ** 2 / 2
        return likelihood + prior + ((self._logs["length"] - math.log(4.0)) ** 2 / 2).sum()


class Surface:
    """One loss surface of one setting."""

    def __init__(self, surrogate: Surrogate, prior: _Prior | None, weights: Tensor, setting: int) -> None:
        self._surrogate, self._prior, self._weights, self._setting = surrogate, prior, weights, setting

    def __call__(self, x: Tensor) -> Tensor:
        """Return nats above the best recorded run of the setting at each row of inputs."""
        data = self._surrogate.data
        setting = torch.full((len(x),), self._setting)
        z = self._surrogate.covariance(x, setting, data.x, data.setting) @ self._weights
        if self._prior is not None:
            z = z + self._prior(x, setting)
        return unflatten(self._surrogate._mean + z)


class _Prior:
    """A function drawn from the prior, of all settings together."""

    def __init__(self, logs: Mapping[str, Tensor], settings: int, generator: torch.Generator) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self._scale = {name: log.exp() for name, log in logs.items()}
        dimensions = len(self._scale["length"])
        # The spectral density of Matern 5/2 is a Student t of 5 degrees of freedom.
        chi = normal(_FEATURES, 5).pow(2).sum(1, keepdim=True)
        self._frequency = normal(_FEATURES, dimensions) * (5 / chi).sqrt() / self._scale["length"]
        self._phase = 2 * math.pi * torch.rand(_FEATURES, generator=generator, dtype=torch.float64)
        quadratics = _quadratic(torch.zeros(1, dimensions, dtype=torch.float64)).shape[1]
        self._wave, self._waves = normal(_FEATURES), normal(settings, _FEATURES)
        self._square, self._squares = normal(quadratics), normal(settings, quadratics)
        self._level, self._levels = normal(1), normal(settings)

    def __call__(self, x: Tensor, setting: Tensor) -> Tensor:
        scale = self._scale
        waves = math.sqrt(2 / _FEATURES) * torch.cos(x @ self._frequency.T + self._phase)
        wave = scale["a"] * self._wave + scale["b"] * self._waves[setting]
        square = scale["c"] * self._square + scale["d"] * self._squares[setting]
        level = self._level + scale["e"] * self._levels[setting]
        return (waves * wave).sum(1) + (_quadratic(x) * square).sum(1) + level


def _quadratic(x: Tensor) -> Tensor:
    """Return the monomials of first and second degree around CENTRE."""
    z = (x - torch.tensor(CENTRE, dtype=torch.float64)) / UNIT
    first, second = torch.triu_indices(z.shape[1], z.shape[1])
    return torch.cat([z, z[:, first] * z[:, second]], dim=1)
