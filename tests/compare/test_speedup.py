import math
from statistics import mean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockwise_lr.compare.over_seeds import SpeedUpOverSeeds, loss_gap, speedup_over_seeds
from blockwise_lr.compare.speedup import SpeedUp, decayed_speedup, paper_speedup

N = 100
STEPS = [50, 100, 150, 200]


def test_the_papers_speedup_is_the_interpolated_step_of_the_first_crossing_over_n():
    assert paper_speedup(STEPS, [5.0, 4.0, 3.0, 2.0], 2.5, N) == SpeedUp(1.75, "exact")


def test_a_loss_reached_at_an_evaluated_step_is_reached_exactly_there():
    assert paper_speedup(STEPS, [5.0, 4.0, 3.0, 2.0], 3.0, N) == SpeedUp(1.5, "exact")


def test_of_several_crossings_the_first_counts():
    assert paper_speedup(STEPS, [5.0, 3.0, 4.0, 2.0], 3.5, N).value == pytest.approx(0.875)


def test_a_loss_that_the_2n_run_never_reaches_is_a_speedup_of_at_least_two():
    assert paper_speedup(STEPS, [5.0, 4.0, 3.0, 2.0], 1.9, N) == SpeedUp(2.0, "at_least")


def test_a_loss_already_reached_at_the_first_evaluation_gives_an_upper_bound():
    assert paper_speedup(STEPS, [5.0, 4.0, 3.0, 2.0], 5.0, N) == SpeedUp(0.5, "at_most")
    assert paper_speedup([200], [2.0], 2.5, N) == SpeedUp(2.0, "at_most")


def test_a_diverged_arm_has_no_speedup_of_either_kind():
    assert paper_speedup(STEPS, [5.0, 4.0, 3.0, 2.0], math.inf, N) == SpeedUp(None, None)
    assert decayed_speedup({100: 3.0, 200: 2.0}, math.inf, N) == SpeedUp(None, None)


def test_the_decayed_speedup_is_linear_in_the_logarithm_of_the_horizon():
    assert decayed_speedup({100: 3.0, 200: 2.0}, 2.75, N).value == pytest.approx(2**0.25)


def test_the_baselines_own_loss_is_a_decayed_speedup_of_exactly_one():
    assert decayed_speedup({100: 3.0, 200: 2.0}, 3.0, N) == SpeedUp(1.0, "exact")


def test_beyond_the_horizons_the_decayed_speedup_is_a_bound():
    assert decayed_speedup({100: 3.0, 200: 2.0}, 3.1, N) == SpeedUp(1.0, "at_most")
    assert decayed_speedup({100: 3.0, 200: 2.0}, 1.9, N) == SpeedUp(2.0, "at_least")


def test_a_shorter_horizon_turns_a_losing_arms_bound_into_a_number():
    speedup = decayed_speedup({50: 4.0, 100: 3.0, 200: 2.0}, 3.5, N)
    assert speedup.bound == "exact"
    assert speedup.value == pytest.approx(math.sqrt(0.5))


def test_the_decayed_speedup_recovers_a_power_law_in_log_steps():
    losses = {steps: 5 - 0.3 * math.log(steps) for steps in (50, 100, 200, 400)}
    assert decayed_speedup(losses, 5 - 0.3 * math.log(170), N).value == pytest.approx(1.7)


curves = st.lists(st.floats(0.01, 1), min_size=2, max_size=12).map(
    lambda falls: (
        [10 * (i + 1) for i in range(len(falls))],
        [10 - sum(falls[: i + 1]) for i in range(len(falls))],
    )
)


@given(curves, st.floats(0, 11), st.floats(0, 11))
def test_a_lower_loss_never_has_a_smaller_speedup(curve, first, second):
    low, high = sorted((first, second))
    for speedup in (paper_speedup, lambda s, y, target, n: decayed_speedup(dict(zip(s, y)), target, n)):
        assert speedup(*curve, low, N).value >= speedup(*curve, high, N).value


@given(curves, st.floats(0, 1))
def test_on_a_falling_curve_an_exact_speedup_reads_back_the_loss(curve, share):
    steps, losses = curve
    target = losses[-1] + share * (losses[0] - losses[-1])
    speedup = paper_speedup(steps, losses, target, N)
    if speedup.bound == "exact":
        step = speedup.value * N
        k = max(i for i, s in enumerate(steps[:-1]) if s <= step + 1e-9)
        read = losses[k] + (step - steps[k]) / (steps[k + 1] - steps[k]) * (losses[k + 1] - losses[k])
        assert read == pytest.approx(target)


@given(curves, st.floats(0, 11))
def test_both_speedups_stay_within_the_runs_that_exist(curve, target):
    steps, losses = curve
    for speedup in (
        paper_speedup(steps, losses, target, N),
        decayed_speedup(dict(zip(steps, losses)), target, N),
    ):
        assert steps[0] / N <= speedup.value * (1 + 1e-12)
        assert speedup.value <= steps[-1] / N * (1 + 1e-12)


def test_exact_speedups_average_with_a_t_interval():
    over = speedup_over_seeds([SpeedUp(v, "exact") for v in (1.5, 1.7, 1.9)])
    half = 4.302652729911275 * stdev([1.5, 1.7, 1.9]) / math.sqrt(3)  # t(0.975, 2 degrees of freedom)
    assert over.bound == "exact"
    assert over.value == pytest.approx(1.7)
    assert over.ci95 == pytest.approx((1.7 - half, 1.7 + half))


def test_one_seed_has_no_interval():
    assert speedup_over_seeds([SpeedUp(1.5, "exact")]) == SpeedUpOverSeeds(1.5, "exact", None)
    assert loss_gap([3.0], [2.9]).ci95 is None
    assert loss_gap([3.0], [2.9]).significant is None


@pytest.mark.parametrize(
    ("seeds", "expected"),
    [
        ([SpeedUp(2.0, "at_least"), SpeedUp(1.5, "exact")], SpeedUpOverSeeds(1.75, "at_least", None)),
        ([SpeedUp(1.0, "at_most"), SpeedUp(1.5, "exact")], SpeedUpOverSeeds(1.25, "at_most", None)),
        ([SpeedUp(1.0, "at_most"), SpeedUp(2.0, "at_least")], SpeedUpOverSeeds(1.0, "at_least", None)),
        ([SpeedUp(None, None), SpeedUp(2.0, "at_least")], SpeedUpOverSeeds(None, None, None)),
    ],
)
def test_bounded_seeds_give_a_bounded_mean_without_an_interval(seeds, expected):
    assert speedup_over_seeds(seeds) == expected


def seen_from_runs_between(low: float, high: float, truth: float) -> SpeedUp:
    if truth > high:
        return SpeedUp(high, "at_least")
    return SpeedUp(low, "at_most") if truth < low else SpeedUp(truth, "exact")


@given(st.lists(st.floats(0.1, 4), min_size=1, max_size=6))
def test_the_mean_over_bounded_seeds_truly_bounds_the_mean(truths):
    over = speedup_over_seeds([seen_from_runs_between(0.5, 2.0, truth) for truth in truths])
    if over.bound == "at_least":
        assert over.value <= mean(truths) + 1e-9
    elif over.bound == "at_most":
        assert over.value >= mean(truths) - 1e-9
    else:
        assert over.value == pytest.approx(mean(truths))


def test_the_loss_gap_is_a_paired_t_test():
    gap = loss_gap([3.0, 3.2, 3.4], [2.9, 3.0, 3.1])
    assert gap.mean == pytest.approx(0.2)
    assert gap.ci95 == pytest.approx((0.2 - 0.2484, 0.2 + 0.2484), abs=1e-4)
    assert gap.p_value == pytest.approx(0.0742, abs=1e-4)
    assert gap.significant is False


def test_pairing_finds_what_the_spread_between_seeds_hides():
    baseline = [3.0, 3.5, 4.0]
    assert loss_gap(baseline, [b - 0.1 - 1e-3 * i for i, b in enumerate(baseline)]).significant is True


def test_a_worse_arm_has_a_negative_gap():
    assert loss_gap([3.0, 3.0], [3.1, 3.1]).mean == pytest.approx(-0.1)


def test_identical_runs_are_no_difference_at_all():
    gap = loss_gap([3.0, 3.1], [3.0, 3.1])
    assert (gap.mean, gap.ci95, gap.p_value, gap.significant) == (0.0, (0.0, 0.0), 1.0, False)


def test_a_diverged_run_leaves_no_loss_gap():
    gap = loss_gap([3.0, 3.1], [2.9, math.inf])
    assert (gap.mean, gap.ci95, gap.significant) == (None, None, None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paper_speedup([], [], 2.0, N), "got 0 steps and 0 losses"),
        (lambda: paper_speedup([1, 2], [3.0], 2.0, N), "got 2 steps and 1 losses"),
        (lambda: paper_speedup([2, 1], [3.0, 2.0], 2.0, N), r"must be positive and increasing; got \[2, 1\]"),
        (lambda: paper_speedup([1, 2], [3.0, math.nan], 2.0, N), "must be finite"),
        (lambda: speedup_over_seeds([]), "expected at least one speed-up"),
        (lambda: loss_gap([3.0], [3.0, 2.0]), "got 1 baseline and 2 arm losses"),
    ],
)
def test_input_that_is_no_curve_or_no_pair_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# A baseline that rises, and seeds that are equal -----------------------------------------------------


def test_a_baseline_that_rises_with_more_steps_gives_no_decayed_speedup():
    speedup = decayed_speedup({100: 3.0, 200: 3.1}, 2.9, N)
    assert speedup == SpeedUp(None, None)
    assert speedup.reason == "the baseline ends higher after 200 steps than after 100"
    assert (
        decayed_speedup({50: 3.5, 100: 3.0, 200: 3.0001}, 2.5, N).reason
        == "the baseline ends higher after 200 steps than after 100"
    )


def test_what_a_rising_baseline_reaches_before_it_rises_is_a_number():
    assert decayed_speedup({50: 4.0, 100: 3.0, 200: 3.1}, 3.5, N).bound == "exact"
    assert decayed_speedup({100: 3.0, 200: 3.1}, 3.0, N) == SpeedUp(1.0, "exact")
    assert decayed_speedup({100: 3.0, 200: 3.1}, 3.2, N) == SpeedUp(1.0, "at_most")


def test_a_baseline_that_rises_only_in_between_or_stays_level_bounds_the_speedup():
    assert decayed_speedup({100: 3.0, 200: 3.1, 400: 2.8}, 2.9, N).bound == "exact"
    assert decayed_speedup({100: 3.0, 200: 3.1, 400: 2.8}, 2.7, N) == SpeedUp(4.0, "at_least")
    assert decayed_speedup({100: 3.0, 200: 3.0}, 2.9, N) == SpeedUp(2.0, "at_least")


def test_between_equal_losses_nothing_is_interpolated():
    decayed = decayed_speedup({50: 4.0, 100: 3.0, 200: 3.0, 400: 2.0}, 3.0, N)
    assert (decayed.value, decayed.bound) == (pytest.approx(1.0), "exact")
    assert paper_speedup(STEPS, [5.0, 3.0, 3.0, 2.0], 3.0, N) == SpeedUp(1.0, "exact")


@given(st.lists(st.floats(1, 9), min_size=2, max_size=5), st.floats(0.5, 9.5))
def test_a_decayed_speedup_is_a_number_only_where_the_baseline_bounds_it(losses, target):
    horizons = {50 * 2**i: loss for i, loss in enumerate(losses)}
    speedup = decayed_speedup(horizons, target, N)
    reached = min(losses) <= target
    rises = losses[-1] > min(losses)
    assert (speedup.value is None) == (rises and not reached)
    assert (speedup.reason is None) == (speedup.value is not None)


def test_seeds_without_a_number_leave_the_mean_without_one_and_say_how_many():
    rising = decayed_speedup({100: 3.0, 200: 3.1}, 2.9, N)
    over = speedup_over_seeds([rising, SpeedUp(1.5, "exact"), rising])
    assert over == SpeedUpOverSeeds(None, None, None)
    assert over.reason == "the baseline ends higher after 200 steps than after 100 (2 of 3 seeds)"
    assert speedup_over_seeds([rising]).reason == rising.reason
    diverged = paper_speedup(STEPS, [5.0, 4.0, 3.0, 2.0], math.inf, N)
    assert speedup_over_seeds([rising, diverged]).reason == "a run diverged (2 of 2 seeds)"


EQUAL_GAPS = [
    ([3.0, 3.0, 3.0], [2.9, 2.9, 2.9]),
    ([3.0, 3.1, 3.2], [2.9, 3.0, 3.1]),  # equal but for rounding
    ([3.0, 3.1], [3.2, 3.3]),
    ([3.0, 3.0], [2.9, 2.9 + 1e-8]),  # closer than float32 can tell
]


@pytest.mark.parametrize(("baseline", "arm"), EQUAL_GAPS)
def test_equal_gaps_have_no_interval_and_say_why(baseline, arm):
    gap = loss_gap(baseline, arm)
    assert gap.mean == pytest.approx(baseline[0] - arm[0])
    assert (gap.ci95, gap.p_value, gap.significant) == (None, None, None)
    assert gap.reason.startswith("all seeds are equal to the precision of the losses")


def test_gaps_that_float32_tells_apart_have_an_interval():
    gap = loss_gap([3.0, 3.0, 3.0], [2.9, 2.9001, 2.9])
    assert gap.ci95[0] < gap.mean < gap.ci95[1]
    assert gap.reason is None


def test_equal_speedups_have_no_interval():
    over = speedup_over_seeds([SpeedUp(1.5, "exact")] * 3)
    assert over == SpeedUpOverSeeds(1.5, "exact", None)
    assert over.reason.startswith("all seeds are equal")
    assert speedup_over_seeds([SpeedUp(1.5, "exact")]).reason is None


@given(st.lists(st.tuples(st.floats(1, 9), st.floats(1, 9)), min_size=2, max_size=6))
def test_an_interval_has_a_width_or_is_not_there(pairs):
    gap = loss_gap([b for b, _ in pairs], [a for _, a in pairs])
    if any(b != a for b, a in pairs):
        assert gap.ci95 is None or gap.ci95[0] < gap.ci95[1]
        assert (gap.ci95 is None) == (gap.p_value is None) == (gap.reason is not None)


def test_one_diverged_seed_says_so():
    assert loss_gap([3.0, math.nan], [2.9, 2.9]).reason == "a run diverged"
