"""Percentiles, rates and ratios of measured seconds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilevlm_ros.bench.series import Series, ratio_of_medians

SECONDS = st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=9)


def test_seconds_are_the_figure_unless_there_is_an_amount() -> None:
    series = Series('x', (1.0, 2.0, 4.0), bound_s=0.5)
    assert (series.unit, series.median, series.best) == ('s', 2.0, 1.0)
    assert series.share == 0.25


def test_a_rate_is_that_of_the_run_at_the_percentile_of_time() -> None:
    series = Series('x', (1.0, 2.0, 4.0), amount=8, bound_s=1.0)
    assert (series.unit, series.median, series.best) == ('tok/s', 4.0, 8.0)
    assert series.p90 == pytest.approx(8 / 3.6)
    assert series.as_record()['bound'] == 8.0


@given(SECONDS, st.sampled_from([0.0, 10.0]))
def test_the_slow_end_is_never_better_than_the_fast_end(seconds: list[float], amount: float) -> None:
    series = Series('x', tuple(seconds), amount)
    slow, middle, fast = series.p90, series.median, series.best
    if amount:
        slow, fast = -slow, -fast
        middle = -middle
    assert slow >= fast * (1 + 1e-9) - 1e-9 or slow == pytest.approx(fast)
    assert middle >= fast or middle == pytest.approx(fast)


def test_what_no_clock_shows_is_refused() -> None:
    for seconds in ((), (float('nan'),), (-1.0,)):
        with pytest.raises(ValueError, match='expected measured seconds'):
            Series('x', seconds)


def test_a_series_is_busy_above_the_limit() -> None:
    assert not Series('x', (1.0,), foreign_cores=0.1).busy
    assert Series('x', (1.0,), foreign_cores=0.5).busy


@given(SECONDS, SECONDS)
def test_the_interval_of_a_ratio_lies_within_the_ratios_of_single_runs(theirs: list[float], ours: list[float]) -> None:
    ratio = ratio_of_medians(theirs, ours)
    least, greatest = min(theirs) / max(ours), max(theirs) / min(ours)
    assert least * (1 - 1e-9) <= ratio.low <= ratio.high <= greatest * (1 + 1e-9)
    assert least * (1 - 1e-9) <= ratio.value <= greatest * (1 + 1e-9)


def test_equal_runs_have_a_certain_ratio() -> None:
    ratio = ratio_of_medians([6.0] * 3, [2.0] * 3)
    assert (ratio.value, ratio.low, ratio.high) == (3.0, 3.0, 3.0)


@given(SECONDS, st.sampled_from([0.0, 10.0]))
def test_the_interval_of_a_median_lies_within_the_runs_and_around_the_median(
    seconds: list[float], amount: float
) -> None:
    series = Series('x', tuple(seconds), amount)
    low, high = series.interval
    ends = sorted(amount / one if amount else one for one in (min(seconds), max(seconds)))
    assert ends[0] * (1 - 1e-9) <= low <= series.median * (1 + 1e-9)
    assert series.median * (1 - 1e-9) <= high <= ends[1] * (1 + 1e-9)


def test_positions_are_recorded_of_questions_only() -> None:
    assert Series('x', (1.0,), n_prompt=9, n_reused=4).as_record()['reused_tokens'] == 4
    assert 'reused_tokens' not in Series('x', (1.0,)).as_record()
