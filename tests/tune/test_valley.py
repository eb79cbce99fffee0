"""The fit recovers parabolas that are there, and claims none that are not."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwise_lr.tune.space import Point, Space
from blockwise_lr.tune.valley import ALLOWED, Valley, block_vector, fit_valleys, paired_noise, valley_names

SPACE = Space(["emb", "norm", "vo"])
CENTRE = Point(2e-3, 0.2, {"emb": 4.0, "norm": 8.0, "vo": 0.5})
CURVATURE = np.array([0.04, 0.01, 0.02, 0.01, 0.015])


def trials(count, *, noise=0.0, curvature=CURVATURE, seed=0):
    """Points around the centre, whose loss is a sum of parabolas in the learning rate of each block."""
    rng = np.random.default_rng(seed)
    centre = SPACE.vector(CENTRE)
    points = [CENTRE] + [SPACE.point(centre + rng.uniform(-1.5, 1.5, len(centre))) for _ in range(count)]
    moves = [block_vector(SPACE, point) - block_vector(SPACE, CENTRE) for point in points]
    return points, [3.0 + float(curvature @ move**2) + noise * rng.normal() for move in moves]


def test_exact_parabolas_are_recovered():
    points, losses = trials(60)
    fitted = fit_valleys(SPACE, points, losses, CENTRE, noise=1e-4)
    assert tuple(fitted) == valley_names(SPACE) == ("ffn", "warmup", "emb", "norm", "vo")
    for valley, q in zip(fitted.values(), CURVATURE):
        assert valley.curvature == pytest.approx(q, rel=0.1)
        low, high = valley.moves
        assert (high - low) / 2 == pytest.approx(math.sqrt(ALLOWED / q), rel=0.05)
        assert low < 0 < high


@pytest.mark.parametrize("seed", range(5))
def test_a_flat_direction_is_not_bounded(seed):
    flat = CURVATURE * np.array([1, 1, 1, 0, 1])
    points, losses = trials(40, noise=0.003, curvature=flat, seed=seed)
    fitted = fit_valleys(SPACE, points, losses, CENTRE, noise=0.003)
    assert fitted["norm"].moves is None or np.ptp(fitted["norm"].moves) > 1.5
    assert fitted["emb"].is_bounded


def test_the_curvature_is_within_its_error_as_often_as_it_should_be():
    inside = 0
    for seed in range(40):
        points, losses = trials(40, noise=0.004, seed=seed)
        emb = fit_valleys(SPACE, points, losses, CENTRE, noise=0.004)["emb"]
        inside += abs(emb.curvature - CURVATURE[2]) <= 2 * math.sqrt(emb.covariance[1][1])
    assert inside >= 34  # 38 of 40 on average, if the error is right


def test_few_trials_bound_nothing():
    points, losses = trials(3)
    fitted = fit_valleys(SPACE, points, losses, CENTRE, noise=0.01)
    assert all(valley.moves is None for valley in fitted.values())


def test_runs_that_diverged_or_are_far_above_do_not_count():
    points, losses = trials(40)
    far = [
        *points,
        Point(0.05, 0.2),
        Point(1e-3, 0.2),
        Point(2e-3, 0.2, {"emb": 30.0, "norm": 8.0, "vo": 0.5}),
    ]
    a = fit_valleys(SPACE, points, losses, CENTRE, noise=0.01)
    b = fit_valleys(SPACE, far, [*losses, 9.0, math.inf, 3.01], CENTRE, noise=0.01)
    assert a == b
    with pytest.raises(ValueError, match="no trial near the best point has a finite loss"):
        fit_valleys(SPACE, points, [math.inf] * len(points), CENTRE, noise=0.01)


@given(st.floats(-0.05, 0.05), st.floats(0.002, 0.2))
@settings(max_examples=50)
def test_at_the_ends_of_a_valley_the_loss_is_the_allowed_one_above_its_lowest(slope, curvature):
    valley = Valley("emb", slope, curvature, ((0.0, 0.0), (0.0, 0.0)))
    lowest = -slope * slope / (4 * curvature)
    for move in valley.moves:
        assert valley.cost(move)[0] == pytest.approx(lowest + ALLOWED, abs=1e-9)


def test_the_error_of_a_cost_is_that_of_slope_and_curvature():
    valley = Valley("emb", 0.0, 0.1, ((0.04, 0.01), (0.01, 0.09)))
    assert valley.cost(-2.0)[1] == pytest.approx(math.sqrt(4 * 0.04 - 2 * 8 * 0.01 + 16 * 0.09))


@given(st.lists(st.floats(-5.0, 5.0), min_size=4, max_size=4))
def test_what_a_seed_adds_to_both_points_is_no_noise(seeds):
    first, second = [3.0, 3.1, 3.3, 3.2], [2.9, 3.1, 3.0, 3.1]
    shifted = [[loss + seed for loss, seed in zip(losses, seeds)] for losses in (first, second)]
    assert paired_noise(*shifted) == pytest.approx(paired_noise(first, second), abs=1e-6)


def test_noise_needs_two_seeds_that_differ():
    assert paired_noise([3.0], [2.0]) is None
    assert paired_noise([3.0, math.inf], [2.0, 2.5]) is None
    assert paired_noise([3.0, 4.0], [3.0, 4.0]) is None


def test_the_noise_is_that_of_one_run():
    rng = np.random.default_rng(0)
    common, own = rng.normal(0, 1.0, 400), rng.normal(0, 0.02, (2, 400))
    assert paired_noise(*(common + own)) == pytest.approx(0.02, rel=0.15)
