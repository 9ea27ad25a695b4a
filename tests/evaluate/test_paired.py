"""Exact tests against SciPy and hand-computed figures, and what holds for any two runs."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.evaluate.paired import compare_pairs, holm, mcnemar, sign_flip

PAIRS = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 6)), max_size=50)


def test_mcnemar_by_hand() -> None:
    """One lost of six that changed: 2 (1 + 6) / 64."""
    assert mcnemar(5, 1) == pytest.approx(14 / 64)
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_binomial_test_and_symmetric(n_gained: int, n_lost: int) -> None:
    p = mcnemar(n_gained, n_lost)
    assert p == mcnemar(n_lost, n_gained)
    if n_gained + n_lost:
        assert p == pytest.approx(binomtest(n_gained, n_gained + n_lost).pvalue)


def test_thousands_of_answers_are_no_trouble() -> None:
    assert mcnemar(20_000, 20_000) == 1.0
    assert mcnemar(2_600, 2_400) == pytest.approx(binomtest(2_600, 5_000).pvalue)
    assert sign_flip([1] * 2_600 + [-1] * 2_400) == pytest.approx(mcnemar(2_600, 2_400))


@given(st.integers(0, 200), st.integers(0, 200))
def test_one_question_a_frame_is_mcnemar_s_test(n_gained: int, n_lost: int) -> None:
    assert sign_flip([1] * n_gained + [-1] * n_lost) == pytest.approx(mcnemar(n_gained, n_lost))


@given(st.lists(st.integers(-5, 5), max_size=9))
def test_flipping_is_counting_all_signs(differences: list[int]) -> None:
    sums = [
        sum(sign * abs(one) for sign, one in zip(signs, differences, strict=True))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    expected = sum(abs(one) >= abs(sum(differences)) for one in sums) / len(sums)
    assert sign_flip(differences) == pytest.approx(expected)


def test_ten_answers_about_one_frame_prove_nothing() -> None:
    paired = compare_pairs([True] * 10, [False] * 10, ['a'] * 10)
    assert (paired.n_lost, paired.n_groups, paired.difference) == (10, 1, -1.0)
    assert paired.p_answers == pytest.approx(2 / 1024) and paired.p == 1.0


@given(PAIRS)
def test_the_other_way_round_is_the_same_with_the_other_sign(pairs: list[tuple[bool, bool, int]]) -> None:
    first, second, groups = ([pair[place] for pair in pairs] for place in range(3))
    there, back = compare_pairs(first, second, groups), compare_pairs(second, first, groups)
    assert (there.n_gained, there.n_lost) == (back.n_lost, back.n_gained)
    assert there.difference == -back.difference
    assert there.p == pytest.approx(back.p) and there.p_answers == back.p_answers
    assert 0.0 < there.p <= 1.0


def test_equal_runs_do_not_differ() -> None:
    paired = compare_pairs([True, False], [True, False], ['a', 'b'])
    assert (paired.difference, paired.p, paired.p_answers) == (0.0, 1.0, 1.0)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_runs_of_different_length_are_refused() -> None:
    with pytest.raises(SettingsError, match='2 and 1 answers'):
        compare_pairs([True, False], [True], ['a', 'b'])
