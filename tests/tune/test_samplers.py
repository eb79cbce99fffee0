"""Every sampler stays in its box, starts where it is told to, and continues as if it had never stopped."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwise_lr.errors import UserError
from blockwise_lr.tune.samplers import NAMES, make_sampler
from blockwise_lr.tune.space import Point, Space
from blockwise_lr.tune.trust_region import TrustRegion
from blockwise_lr.tune.uniform_ladder import UniformLadder

SPACE = Space(["emb", "norm", "vo"])
START = [Point(2e-3, 0.15), Point(1e-3, 0.2, {"emb": 4.0, "norm": 6.0, "vo": 0.7})]
BEST = np.array([-9.5, -3.0, 2.0, 3.0, -1.0])


def loss(point: Point) -> float:
    return 3.0 + 0.02 * float(np.sum((SPACE.vector(point) - BEST) ** 2))


def searched(sampler, trials, known=()):
    """The points and losses of a search that first hears of `known`."""
    for point, value in known:
        sampler.tell(point, value)
    found = list(known)
    while len(found) < trials:
        point = sampler.ask()
        found.append((point, loss(point)))
        sampler.tell(*found[-1])
    return found


@pytest.fixture(params=NAMES)
def name(request):
    if request.param != "trust-region":
        pytest.importorskip("optuna" if request.param == "tpe" else "cmaes")
    return request.param


def test_a_resumed_search_goes_on_as_an_uninterrupted_one(name):
    whole = searched(make_sampler(name, SPACE, START, seed=3), 24)
    for stop in (1, 2, 9, 20):
        assert searched(make_sampler(name, SPACE, START, seed=3), 24, whole[:stop]) == whole


def test_the_start_points_come_first_and_only_once(name):
    points = [point for point, _ in searched(make_sampler(name, SPACE, START), 6)]
    assert points[:2] == START
    assert not [point for point in points[2:] if point in START]


def test_every_proposal_is_inside_the_box(name):
    sampler = make_sampler(name, SPACE, START)
    for _ in range(12):
        point = sampler.ask()
        vector = SPACE.vector(point)
        assert (SPACE.low - 1e-3 <= vector).all()
        assert (vector <= SPACE.high + 1e-3).all()
        sampler.tell(point, -float(vector.sum()))  # the best is a corner


def test_runs_that_diverged_do_no_harm(name):
    sampler = make_sampler(name, SPACE, START)
    for i in range(12):
        sampler.tell(sampler.ask(), math.inf if i % 2 else 3.0 - 0.01 * i)
    assert sampler.best.loss == pytest.approx(2.9)
    only_bad = make_sampler(name, SPACE, START)
    for _ in range(12):
        only_bad.tell(only_bad.ask(), math.inf)
    assert only_bad.best is None


def test_points_in_parallel_differ(name):
    sampler = make_sampler(name, SPACE, START)
    points = [sampler.ask() for _ in range(8)]
    assert len({str(point) for point in points}) == 8
    for point in reversed(points):
        sampler.tell(point, loss(point))
    assert not sampler.running


def test_a_restored_point_is_running_and_not_asked_again(name):
    sampler = make_sampler(name, SPACE, START)
    sampler.restore(START[0])
    assert len(sampler.running) == 1
    assert sampler.ask() == START[1]


@pytest.mark.parametrize("seed", range(4))
def test_the_trust_region_finds_the_bottom_of_a_bowl(seed):
    found = searched(make_sampler("trust-region", SPACE, START, seed=seed), 60)
    assert min(value for _, value in found) < 3.02 < min(loss(point) for point in START)


@given(st.lists(st.floats(1.0, 9.0) | st.just(math.inf), max_size=30))
@settings(max_examples=50)
def test_the_radius_is_a_function_of_the_successes(losses):
    """Against a literal walk through the trials."""
    search = TrustRegion(
        SPACE, START[:1], radius=1.0, smallest=0.25, largest=2.0, grow=1.5, shrink=0.5, patience=2
    )
    search.tell(START[0], 5.0)
    radius, best, failures = 1.0, 5.0, 0
    for value in losses:
        search.tell(START[1], value)
        if value < best:
            best, failures, radius = value, 0, min(2.0, radius * 1.5)
        else:
            failures += 1
            if failures % 2 == 0:
                radius = max(0.25, radius * 0.5)
    assert search.radius == pytest.approx(radius)


@given(st.integers(0, 1000))
@settings(max_examples=30)
def test_a_proposal_of_the_trust_region_lies_within_its_radius(seed):
    search = TrustRegion(SPACE, START, seed=seed)
    for point in START:
        search.tell(point, loss(point))
    move = np.abs(SPACE.vector(search.ask()) - search.best.vector)
    assert (move[:2] <= 0.5 + 1e-3).all()
    assert (move[2:] <= 1.0 + 1e-3).all()
    assert move.max() > 0


def test_trials_of_an_earlier_search_change_the_centre_and_not_the_radius():
    search = TrustRegion(SPACE, START)
    for i in range(20):
        search.tell(Point(1e-3 * (1 + i), 0.1), 9.0 - i, prior=True)
    assert search.radius == 1.0
    assert search.best.loss == -10.0
    assert search.ask() == START[0]


class TestLadder:
    SPACE = Space([])

    def climb(self, best, trials):
        ladder = UniformLadder(self.SPACE, [Point(1e-3, 0.15)])
        tried = []
        for _ in range(trials):
            point = ladder.ask()
            tried.append(point)
            x = self.SPACE.vector(point) - np.array(best)
            ladder.tell(point, float(x @ x))
        return ladder, tried

    @given(st.floats(-13.0, -7.0), st.floats(-4.5, -1.0))
    @settings(max_examples=30)
    def test_it_brackets_the_best_and_ends_within_a_factor_of_sqrt_2(self, rate, warmup):
        ladder, _ = self.climb((rate, warmup), 20)
        rates = [trial.vector[0] for trial in ladder.trials]
        assert min(rates) < ladder.best.vector[0] < max(rates)
        assert np.abs(ladder.best.vector - (rate, warmup)).max() <= 0.51

    def test_it_doubles_the_rate_while_that_helps(self):
        _, tried = self.climb((-7.0, math.log2(0.15)), 4)
        assert [point.base_lr for point in tried] == [1e-3, 2e-3, 4e-3, 8e-3]

    def test_it_repeats_the_step_that_helped(self):
        # The quickstart's uniform learning rate wants four times the first warm-up: eight trials find it.
        ladder, tried = self.climb((math.log2(1e-3), math.log2(0.6)), 8)
        assert ladder.best.vector == pytest.approx((math.log2(1e-3), math.log2(0.6)))
        assert [point.warmup for point in tried[:4]] == [0.15, 0.15, 0.3, 0.6]


def test_an_unknown_sampler_is_refused_by_name():
    with pytest.raises(UserError, match="no sampler 'grid'; expected one of trust-region, tpe, cma-es"):
        make_sampler("grid", SPACE)


def test_a_loss_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="expected infinity for a run that diverged"):
        make_sampler("trust-region", SPACE).tell(START[0], math.nan)


def test_a_start_point_of_another_space_is_refused():
    with pytest.raises(ValueError, match="has a ratio for qk"):
        make_sampler("trust-region", SPACE, [Point(1e-3, 0.1, {"qk": 2.0})])
