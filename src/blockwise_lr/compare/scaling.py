"""Compute the content of scaling.json: power laws over sizes, with intervals from a bootstrap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blockwise_lr.compare.over_seeds import loss_gap
from blockwise_lr.compare.power_law import ALPHAS, Array, PowerLaws, fit_power_laws
from blockwise_lr.compare.scaling_sizes import Counted, Size, by_count, shared_seeds
from blockwise_lr.compare.scaling_wording import answer, warnings_about
from blockwise_lr.compare.speedup import decayed_speedup

DRAWS = 2000
"""Draws of the bootstrap."""


@dataclass(frozen=True)
class Noise:
    """The uncertainty of the mean losses.

    Args:
        covariance: covariance of one run's losses between arms.
        degrees: degrees of freedom of the covariance.
        source: "seeds": pooled over the sizes. "residuals": from what the fits leave, for sizes of one seed.
    """

    covariance: Array
    degrees: int
    source: str


def scaling_content(
    sizes: Sequence[Size],
    arms: Sequence[str],
    *,
    counted: Counted = "all",
    draws: int = DRAWS,
    command: str,
    date: str,
) -> dict[str, Any]:
    """Return the content of scaling.json.

    The intervals come from a parametric bootstrap. The noise of a run is pooled over all sizes, as a covariance between
    arms, since their runs are paired by seed. Each draw moves every mean loss by this noise, and fits the laws again.

    Args:
        sizes: the losses of the sizes, in any order.
        arms: the arms, the baseline first.
        counted: which parameters count as the size.
        draws: number of draws of the bootstrap.
        command: the command line, for the report.
        date: the date of the report, ISO 8601.

    Returns:
        A dictionary. Infinite values are None. The main keys are:

        - "sizes": for each size, smallest first, "parameters", "non_embedding", "steps", "tokens", "folders", and by
          arm "losses" by seed, their "mean", "setting" and "tuned" (false if known not to be, otherwise true or null).
        - "fits": by arm "E", "A" and "alpha" of L(N) = E + A N^-alpha, each with "ci95", "rms" of the residuals, and
          "at_bound": the numbers that are at the edge of their range.
        - "comparisons": for each arm against the baseline, by size the "loss_gap" and the "factor": how many times as
          many parameters the baseline needs for the arm's loss. "value" is by the baseline's law, with "ci95" and
          whether the number needed is "outside" the range of sizes. "interpolated" is without a law, on straight lines
          between neighbouring sizes, with a "bound". "gap_per_doubling": the change of the gap with every doubling of
          the parameters.
        - "curves": the laws on a grid of sizes, with "ci95", as drawn.
        - "noise", "draws": the bootstrap. "answer" and "warnings": the results and their limits, in words.

    Raises:
        UserError: two sizes have the same number of counted parameters.
    """
    sizes = by_count(sizes, counted)
    n = np.array([size.count(counted) for size in sizes], dtype=float)
    losses = [
        np.array([[size.losses[arm][seed] for seed in shared_seeds(size, arms)] for arm in arms])
        for size in sizes
    ]  # by size: arms x seeds
    means = np.stack([each.mean(axis=1) for each in losses], axis=1)  # arms x sizes
    laws = [fit_power_laws(n, row) for row in means]
    noise = _noise(losses, laws)
    drawn = _draw(means, noise, [each.shape[1] for each in losses], draws)  # draws x arms x sizes
    drawn_laws = [fit_power_laws(n, drawn[:, arm]) for arm in range(len(arms))]
    grid = np.geomspace(n[0], n[-1] * (n[-1] / n[0]) ** 0.25, 60)
    content: dict[str, Any] = {
        "kind": "scaling", "arms": list(arms), "baseline": arms[0], "parameters": counted,
        "seeds": sorted({seed for size in sizes for seed in shared_seeds(size, arms)}),
        "sizes": [_size(size, arms) for size in sizes],
        "fits": {arm: _fit(law, many) for arm, law, many in zip(arms, laws, drawn_laws)},
        "comparisons": [
            _comparison(arms, i, n, losses, means, drawn, laws[0], drawn_laws[0]) for i in range(1, len(arms))
        ],
        "curves": {
            "parameters": grid.tolist(),
            "arms": {
                arm: {"loss": law.loss(grid)[0].tolist(), "ci95": _interval(many.loss(grid))}
                for arm, law, many in zip(arms, laws, drawn_laws)
            },
        },
        "noise": {
            "source": noise.source, "degrees": noise.degrees,
            "sd": {arm: float(np.sqrt(noise.covariance[i, i])) for i, arm in enumerate(arms)},
        },
        "draws": draws, "command": command, "date": date,
        "configs": [size.config.to_dict() for size in sizes],
    }  # fmt: skip
    content["warnings"] = warnings_about(content)
    content["answer"] = answer(content)
    return content


def _noise(losses: Sequence[Array], laws: Sequence[PowerLaws]) -> Noise:
    """Return the noise of one run: between seeds of one size, or of the residuals if no size has two seeds."""
    degrees = sum(each.shape[1] - 1 for each in losses)
    if degrees:
        around = np.concatenate([each - each.mean(axis=1, keepdims=True) for each in losses], axis=1)
        return Noise(around @ around.T / degrees, degrees, "seeds")
    left = np.concatenate([law.residuals for law in laws])
    return Noise(left @ left.T / (left.shape[1] - 3), left.shape[1] - 3, "residuals")


def _draw(means: Array, noise: Noise, seeds: Sequence[int], draws: int) -> Array:
    """Return mean losses drawn around those found: from a t distribution, since the noise itself is estimated."""
    generator = np.random.default_rng(0)
    values, vectors = np.linalg.eigh(noise.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    normal = generator.standard_normal((draws, *means.shape))
    scale = np.sqrt(noise.degrees / generator.chisquare(noise.degrees, draws))
    moved = np.einsum("ab,dbs->das", root, normal) / np.sqrt(np.array(seeds, dtype=float))
    drawn: Array = means + moved * scale[:, None, None]
    return drawn


def _size(size: Size, arms: Sequence[str]) -> dict[str, Any]:
    seeds = shared_seeds(size, arms)
    return {
        "parameters": size.parameters,
        "non_embedding": size.non_embedding,
        "steps": size.config.steps,
        "tokens": size.tokens,
        "folders": size.folders,
        "arms": {
            arm: {
                "losses": {str(seed): size.losses[arm][seed] for seed in seeds},
                "mean": float(np.mean([size.losses[arm][seed] for seed in seeds])),
                "rule": size.rules[arm],
                "setting": size.settings[arm],
                "tuned": False if arm in size.untuned else (True if size.baselines else None),
            }
            for arm in arms
        },
    }


def _fit(law: PowerLaws, drawn: PowerLaws) -> dict[str, Any]:
    alpha, floor, scale = float(law.alpha[0]), float(law.floor[0]), float(law.scale[0])
    at_bound = [
        name
        for name, reached in (
            ("E", floor == 0),
            ("A", scale == 0),
            ("alpha", not 1.02 * ALPHAS[0] < alpha < ALPHAS[1] / 1.02),
        )
        if reached
    ]
    return {
        "E": {"value": floor, "ci95": _interval(drawn.floor)},
        "A": {"value": _finite(float(law.amplitude[0])), "ci95": _interval(drawn.amplitude)},
        "alpha": {"value": alpha, "ci95": _interval(drawn.alpha)},
        "rms": float(np.sqrt((law.residuals**2).mean())),
        "at_bound": at_bound,
    }


def _comparison(
    arms: Sequence[str],
    arm: int,
    n: Array,
    losses: Sequence[Array],
    means: Array,
    drawn: Array,
    law: PowerLaws,
    drawn_law: PowerLaws,
) -> dict[str, Any]:
    baseline = {round(size): float(loss) for size, loss in zip(n, means[0])}
    per_size = []
    for i, size in enumerate(n):
        gap = loss_gap(losses[i][0].tolist(), losses[i][arm].tolist())
        needed = float(law.size_for(means[arm, i])[0])
        between = decayed_speedup(baseline, float(means[arm, i]), float(size))
        per_size.append({
            "parameters": round(size),
            "loss_gap": {"mean": gap.mean, "ci95": gap.ci95, "p_value": gap.p_value, "significant": gap.significant},
            "factor": {
                "value": _finite(needed / size),
                "ci95": _interval(drawn_law.size_for(drawn[:, arm, i]) / size),
                "outside": not n[0] <= needed <= n[-1],
                "interpolated": between.value,
                "bound": between.bound,
            },
        })  # fmt: skip
    doublings = np.log2(n) - np.log2(n).mean()
    weights = doublings / (doublings**2).sum()
    slopes = (drawn[:, 0] - drawn[:, arm]) @ weights
    return {
        "arm": arms[arm],
        "against": arms[0],
        "sizes": per_size,
        "gap_per_doubling": {
            "mean": float((means[0] - means[arm]) @ weights),
            "ci95": _interval(slopes),
        },
    }


def _interval(values: Array) -> Any:
    """Return the 2.5 and 97.5 percentiles of the first axis: two numbers, or two lists. Infinite values are None."""
    # Percentiles between two infinite values would be undefined.
    low, high = np.quantile(values, [0.025, 0.975], axis=0, method="nearest")
    if values.ndim > 1:
        return [low.tolist(), high.tolist()]
    return [_finite(float(low)), _finite(float(high))]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
