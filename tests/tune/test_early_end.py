"""A lost run ends, and one that may still overtake does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockwise_lr.tune.early_end import EarlyEnd

RULE = EarlyEnd(share=0.5, margin=0.4, rows=2)
BEST = {step: 5.0 - 0.03 * step for step in range(10, 101, 10)}


def behind(gap: float, until: int) -> dict[int, float]:
    return {step: loss + gap for step, loss in BEST.items() if step <= until}


def test_a_run_behind_by_more_than_the_margin_ends_from_the_share_on():
    assert [RULE.lost(behind(0.5, until), BEST, 100) for until in (20, 40, 50, 90)] == [
        False,
        False,
        True,
        True,
    ]


@given(st.floats(-1.0, 0.399), st.sampled_from([10, 50, 90]))
def test_a_run_within_the_margin_goes_on(gap, until):
    assert not RULE.lost(behind(gap, until), BEST, 100)


def test_one_bad_row_is_not_enough():
    losses = behind(0.0, 60) | {60: BEST[60] + 0.7}
    assert RULE.gap(losses, BEST) == pytest.approx(0.35)
    assert not RULE.lost(losses, BEST, 100)


@pytest.mark.parametrize("best", [{}, {55: 1.0, 65: 1.0}])
def test_without_steps_in_common_nothing_ends(best):
    assert RULE.gap(behind(9.0, 90), best) is None
    assert not RULE.lost(behind(9.0, 90), best, 100)
    assert not RULE.lost({}, BEST, 100)


@pytest.mark.parametrize("settings", [{"share": 0.0}, {"share": 1.1}, {"margin": 0.0}, {"rows": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="expected a share above 0 and up to 1"):
        EarlyEnd(**settings)
