"""Calibration against figures computed by hand, and what holds for any answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.evaluate.calibration import (
    Bin,
    brier_score,
    calibrate,
    calibration_error,
    choose_threshold,
    falls_in_first_half,
    reliability,
    risk_coverage,
)

ANSWERS = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40)


def split(answers: list[tuple[float, bool]]) -> tuple[list[float], list[bool]]:
    return [confidence for confidence, _ in answers], [right for _, right in answers]


def test_reliability_by_hand() -> None:
    bins = reliability([0.55, 0.65, 0.95, 1.0], [True, False, True, True], n_bins=2, lowest=0.5)
    assert bins == [
        Bin(0.5, 0.75, 2, pytest.approx(0.6), pytest.approx(0.5)),
        Bin(0.75, 1.0, 2, pytest.approx(0.975), pytest.approx(1.0)),
    ]
    assert calibration_error(bins) == pytest.approx((2 * 0.1 + 2 * 0.025) / 4)


def test_a_confidence_on_an_edge_is_in_the_upper_bin() -> None:
    (bin_,) = reliability([0.5], [True], n_bins=2)
    assert (bin_.low, bin_.high) == (0.5, 1.0)


def test_brier_score_by_hand() -> None:
    assert brier_score([0.8, 0.6], [True, False]) == pytest.approx((0.2**2 + 0.6**2) / 2)
    assert brier_score([0.5, 0.5], [True, False]) == 0.25


def test_risk_and_coverage_by_hand() -> None:
    limits, coverages, risks = risk_coverage([0.9, 0.6, 0.8, 0.7], [True, False, False, True])
    assert limits.tolist() == [0.9, 0.8, 0.7, 0.6]
    assert coverages.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risks.tolist() == pytest.approx([0.0, 1 / 2, 1 / 3, 1 / 2])


def test_equal_confidences_come_in_together() -> None:
    limits, coverages, risks = risk_coverage([0.9, 0.7, 0.7], [True, False, True])
    assert limits.tolist() == [0.9, 0.7]
    assert coverages.tolist() == pytest.approx([1 / 3, 1.0])
    assert risks.tolist() == pytest.approx([0.0, 1 / 3])


@pytest.mark.parametrize(('max_risk', 'expected'), [(0.0, 0.9), (0.34, 0.7), (0.49, 0.7), (0.5, 0.6)])
def test_the_limit_answers_as_much_as_the_risk_allows(max_risk: float, expected: float) -> None:
    assert choose_threshold([0.9, 0.6, 0.8, 0.7], [True, False, False, True], max_risk) == expected


def test_no_limit_where_the_most_confident_answer_is_wrong_already() -> None:
    assert choose_threshold([0.9, 0.8], [False, False], 0.1) is None


@given(ANSWERS, st.integers(1, 20))
def test_bins_hold_every_answer_once(answers: list[tuple[float, bool]], n_bins: int) -> None:
    confidences, right = split(answers)
    bins = reliability(confidences, right, n_bins=n_bins)
    assert sum(one.n for one in bins) == len(answers)
    assert sum(one.n * one.accuracy for one in bins) == pytest.approx(sum(right))
    assert sum(one.n * one.confidence for one in bins) == pytest.approx(sum(confidences))
    assert 0.0 <= calibration_error(bins) <= 1.0


@given(ANSWERS)
def test_the_error_is_at_least_that_of_one_bin(answers: list[tuple[float, bool]]) -> None:
    """The gap of the means: finer bins can only show more."""
    confidences, right = split(answers)
    gap = abs(np.mean(confidences) - np.mean(right))
    assert calibration_error(reliability(confidences, right)) >= gap - 1e-9


@given(ANSWERS, st.floats(0, 1))
def test_the_limit_keeps_the_risk_on_what_it_was_chosen_on(answers: list[tuple[float, bool]], max_risk: float) -> None:
    confidences, right = split(answers)
    limit = choose_threshold(confidences, right, max_risk)
    shares = {
        value: np.mean([not hit for confidence, hit in answers if confidence >= value])
        for value in sorted(set(confidences))
    }
    allowed = [value for value, share in shares.items() if share <= max_risk]
    assert limit == (min(allowed) if allowed else None)


@given(ANSWERS)
def test_full_coverage_has_the_risk_of_all(answers: list[tuple[float, bool]]) -> None:
    confidences, right = split(answers)
    limits, coverages, risks = risk_coverage(confidences, right)
    assert coverages[-1] == 1.0 and risks[-1] == pytest.approx(1 - np.mean(right))
    assert (np.diff(limits) < 0).all() and (np.diff(coverages) > 0).all()


def names(*, first: bool, n: int) -> list[str]:
    """Names of pictures that fall into one half."""
    return [name for name in (f'{number}.jpg' for number in range(10 * n)) if falls_in_first_half(name) is first][:n]


def test_the_limit_is_chosen_on_one_half_and_tried_on_the_other() -> None:
    groups = names(first=True, n=2) + names(first=False, n=4)
    confidences = [0.9, 0.7, 0.95, 0.92, 0.91, 0.8]
    right = [True, False, True, False, True, True]
    threshold = calibrate(confidences, right, groups, max_risk=0.1).threshold
    assert threshold.value == 0.9
    assert threshold.coverage == pytest.approx(3 / 4)
    assert threshold.risk == pytest.approx(1 / 3)


def test_halves_are_about_even() -> None:
    share = np.mean([falls_in_first_half(f'{number}.jpg') for number in range(1000)])
    assert 0.45 < share < 0.55


def test_without_a_limit_nothing_is_answered() -> None:
    groups = names(first=True, n=1) + names(first=False, n=1)
    threshold = calibrate([0.9, 0.9], [False, True], groups).threshold
    assert (threshold.value, threshold.coverage, threshold.risk) == (None, 0.0, 0.0)


@pytest.mark.parametrize('confidences', [[], [0.5], [1.5, 0.5], [float('nan'), 0.5], [-0.1, 0.5]])
def test_what_is_no_confidence_is_refused(confidences: list[float]) -> None:
    with pytest.raises(SettingsError):
        brier_score(confidences, [True, False] if confidences else [])


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(SettingsError, match='risk'):
        choose_threshold([0.5], [True], 1.1)
    with pytest.raises(SettingsError, match='bin'):
        reliability([0.5], [True], n_bins=0)
    with pytest.raises(SettingsError, match='groups'):
        calibrate([0.5], [True], [])
