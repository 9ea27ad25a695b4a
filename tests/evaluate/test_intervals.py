"""Intervals against published and hand-computed figures, what holds for any answers, and a simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.evaluate.intervals import share_of, wilson_interval

ANSWERS = st.lists(st.tuples(st.booleans(), st.integers(0, 8)), min_size=1, max_size=60)


def test_wilson_intervals_by_hand() -> None:
    """Wikipedia's and textbooks' figures: 10 of 20, none of 10 (z^2 / (n + z^2)), and nothing asked."""
    assert wilson_interval(10, 20) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


@given(st.integers(1, 500), st.data())
def test_wilson_intervals_hold_the_share_and_mirror(n: int, data: st.DataObject) -> None:
    n_right = data.draw(st.integers(0, n))
    low, high = wilson_interval(n_right, n)
    assert 0.0 <= low <= n_right / n <= high <= 1.0
    assert wilson_interval(n - n_right, n) == pytest.approx((1 - high, 1 - low))


@given(st.lists(st.booleans(), min_size=1, max_size=80))
def test_one_answer_a_frame_is_wilson_s_interval(right: list[bool]) -> None:
    share = share_of(right, range(len(right)))
    assert (share.low, share.high) == pytest.approx(wilson_interval(sum(right), len(right)))


@given(st.lists(st.booleans(), min_size=2, max_size=20), st.integers(2, 6))
def test_asking_the_same_again_about_a_frame_tells_nothing_new(right: list[bool], times: int) -> None:
    once = share_of(right, range(len(right)))
    again = share_of(right * times, list(range(len(right))) * times)
    assert again.value == pytest.approx(once.value)
    assert (again.low, again.high) == pytest.approx((once.low, once.high))


@given(ANSWERS)
def test_the_interval_holds_the_share_and_mirrors(answers: list[tuple[bool, int]]) -> None:
    right, groups = [hit for hit, _ in answers], [group for _, group in answers]
    share = share_of(right, groups)
    assert 0.0 <= share.low <= share.value <= share.high <= 1.0
    assert 1.0 - 1e-9 <= share.n_effective <= share.n + 1e-9
    other = share_of([not hit for hit in right], groups)
    assert (other.low, other.high) == pytest.approx((1 - share.high, 1 - share.low))


@given(ANSWERS)
def test_frames_never_narrow_an_interval(answers: list[tuple[bool, int]]) -> None:
    right, groups = [hit for hit, _ in answers], [group for _, group in answers]
    share, naive = share_of(right, groups), share_of(right, range(len(right)))
    assert share.low <= naive.low + 1e-9 and share.high >= naive.high - 1e-9


def test_one_frame_counts_as_one_answer() -> None:
    share = share_of([True] * 30, ['a'] * 30)
    assert (share.n, share.n_groups, share.n_effective) == (30, 1, 1.0)
    assert share.low == pytest.approx(wilson_interval(1, 1)[0])


def test_answers_that_all_hang_together_count_as_their_frames() -> None:
    share = share_of([True] * 30 + [False] * 30, [f'{n // 10}' for n in range(60)])
    assert share.n_effective == pytest.approx(6.0)


def test_nothing_asked_is_not_known() -> None:
    share = share_of([], [])
    assert (share.value, share.low, share.high) == (0.0, 0.0, 1.0)


def test_every_answer_needs_a_group() -> None:
    with pytest.raises(SettingsError, match='2 answers of 1 groups'):
        share_of([True, False], ['a'])


@pytest.mark.parametrize(('n_frames', 'per_frame', 'likeness'), [(10, 10, 0.3), (40, 5, 0.9), (20, 8, 0.0)])
def test_the_true_share_is_inside_as_often_as_is_said(n_frames: int, per_frame: int, likeness: float) -> None:
    """Frames that are easy or hard (beta-binomial): the naive interval misses a third of the time or more."""
    random, truth, n_runs = np.random.default_rng(0), 0.6, 200
    groups = np.repeat(np.arange(n_frames), per_frame).tolist()
    inside = 0
    for _ in range(n_runs):
        ease = np.full(n_frames, truth)
        if likeness:
            ease = random.beta(truth * (1 / likeness - 1), (1 - truth) * (1 / likeness - 1), n_frames)
        right = (random.random((n_frames, per_frame)) < ease[:, None]).ravel().tolist()
        share = share_of(right, groups)
        inside += share.low <= truth <= share.high
    assert inside >= 0.91 * n_runs
