"""Shuffling without a list: every index comes once, orders differ by key, and nothing depends on the size."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilevlm_ros.train.permutation import Permutation


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), key=st.tuples(st.integers(-(2**70), 2**70), st.integers(0, 2**40)))
def test_every_index_comes_once(n: int, key: tuple[int, int]) -> None:
    order = Permutation(n, key)
    assert sorted(order(i) for i in range(n)) == list(range(n))


@settings(max_examples=100, deadline=None)
@given(n=st.integers(10**9, 10**13), start=st.integers(0, 10**9 - 300))
def test_indices_of_a_huge_set_stay_inside_and_apart(n: int, start: int) -> None:
    order = Permutation(n, (1,))
    found = [order(start + i) for i in range(200)]
    assert len(set(found)) == 200
    assert all(0 <= index < n for index in found)


def test_a_huge_set_takes_no_memory() -> None:
    tracemalloc.start()
    order = Permutation(10**12, (1, 2, 3))
    for i in range(100):
        order(i * 10**9)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 20_000


def test_the_same_key_gives_the_same_order_everywhere() -> None:
    """Golden: an order that changed would break the resuming of every run that was begun before."""
    order = Permutation(1000, (7, 0, 2))
    assert [order(i) for i in range(8)] == [152, 929, 609, 611, 50, 782, 178, 345]


def test_another_key_or_size_gives_another_order() -> None:
    orders = [Permutation(n, key) for n, key in ((500, (1, 0)), (500, (1, 1)), (500, (2, 0)), (501, (1, 0)))]
    assert len({tuple(order(i) for i in range(500)) for order in orders}) == 4


def test_neighbours_are_torn_apart() -> None:
    """As in a uniformly random order: positions say nothing of indices, nor do those of another epoch."""
    n = 20_000
    first, second = (np.array([Permutation(n, (3, epoch))(i) for i in range(n)]) for epoch in (0, 1))
    places = np.arange(n)
    for left, right in ((places, first), (first, second), (first[:-1], first[1:])):
        assert abs(np.corrcoef(left, right)[0, 1]) < 4 / np.sqrt(n)
    assert np.mean(np.abs(np.diff(first))) == pytest.approx(n / 3, rel=0.02)


def test_small_sets_are_shuffled_evenly() -> None:
    """Over many keys each of 5 indices stands first about as often: chi-square, 4 degrees, far tail."""
    n_keys = 5000
    counts = Counter(Permutation(5, (key,))(0) for key in range(n_keys))
    chi_square = sum((counts[i] - n_keys / 5) ** 2 / (n_keys / 5) for i in range(5))
    assert chi_square < 25


@pytest.mark.parametrize('position', [-1, 10])
def test_a_position_outside_is_refused(position: int) -> None:
    with pytest.raises(IndexError, match=r'outside the 10'):
        Permutation(10, (0,))(position)


def test_nothing_cannot_be_shuffled() -> None:
    with pytest.raises(ValueError, match='1 or more, found 0'):
        Permutation(0, (0,))
