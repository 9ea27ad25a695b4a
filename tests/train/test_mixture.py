"""Mixtures: the proportions of every prefix, the counts of each source, and weights that cannot be used."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.train.mixture import Mixture

TABLE_12 = (67.7, 15.0, 4.5, 4.5, 4.5, 2.5, 2.0)
"""CommonCrawl, C4, GitHub, Wikipedia, Books, ArXiv, StackExchange (arXiv 2312.16886); they sum to 100.7."""

WEIGHTS = st.lists(st.integers(1, 60), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(weights=WEIGHTS, more=st.integers(0, 50))
def test_every_prefix_has_its_proportions_within_one_sequence(weights: list[int], more: int) -> None:
    mixture = Mixture(weights)
    given_so_far = [0] * len(weights)
    for i in range(mixture.period + more):
        source, _ = mixture.at(i)
        given_so_far[source] += 1
        for count, share in zip(given_so_far, mixture.shares, strict=True):
            assert abs(count - (i + 1) * share) < 1


@settings(max_examples=100, deadline=None)
@given(weights=WEIGHTS, start=st.integers(0, 10**12))
def test_what_was_read_before_is_counted_without_reading_it(weights: list[int], start: int) -> None:
    mixture = Mixture(weights)
    counts = list(mixture.counts(start))
    assert sum(counts) == start
    for i in range(start, start + 40):
        source, before = mixture.at(i)
        assert before == counts[source]
        counts[source] += 1


def test_the_papers_mixture_is_normalised_and_exact() -> None:
    mixture = Mixture(TABLE_12)
    assert mixture.shares[0] == Fraction(677, 1007)
    assert mixture.period == 1007
    assert mixture.counts(10_070) == (6770, 1500, 450, 450, 450, 250, 200)


def test_the_unit_of_the_weights_does_not_matter() -> None:
    ours, theirs, parts = Mixture((0.6, 0.3, 0.1)), Mixture((60, 30, 10)), Mixture((6e-7, 3e-7, 1e-7))
    order = [ours.at(i) for i in range(30)]
    assert order == [theirs.at(i) for i in range(30)] == [parts.at(i) for i in range(30)]


def test_a_single_source_is_read_from_its_start() -> None:
    assert [Mixture((0.25,)).at(i) for i in range(3)] == [(0, 0), (0, 1), (0, 2)]


def test_a_rare_source_comes_in_every_period() -> None:
    mixture = Mixture((99_999, 1))
    assert Counter(mixture.at(i)[0] for i in range(200_000)) == {0: 199_998, 1: 2}


@pytest.mark.parametrize('weight', [0, -1, float('nan'), float('inf'), True, '2', None])
def test_a_weight_that_is_no_positive_number_is_refused(weight: object) -> None:
    with pytest.raises(SettingsError, match='a number above zero, found'):
        Mixture([1.0, weight])  # type: ignore[list-item]


def test_weights_without_a_coarse_unit_are_refused_with_the_way_out() -> None:
    with pytest.raises(SettingsError, match=r'in steps of 1/\d+; expected.*fewer digits'):
        Mixture((0.7182818, 0.2817182))


@pytest.mark.parametrize('n', [0, 257])
def test_the_number_of_sources_is_bounded(n: int) -> None:
    with pytest.raises(SettingsError, match=f'found {n}'):
        Mixture([1.0] * n)


def test_no_sequence_is_before_the_first() -> None:
    with pytest.raises(IndexError, match='no sequence -1'):
        Mixture((1, 1)).at(-1)
