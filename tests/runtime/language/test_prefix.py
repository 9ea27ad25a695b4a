"""Bookkeeping of what need not be computed again, against a plain model of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilevlm_ros.runtime.language import TokenSegment
from mobilevlm_ros.runtime.language.prefix import PrefixCache

A, B, C = TokenSegment((1,)), TokenSegment((2, 2)), TokenSegment((3, 3, 3))
SEGMENTS = st.lists(st.sampled_from([A, B, C]), max_size=4)


def test_nothing_matches_at_first() -> None:
    cache = PrefixCache(2)

    assert cache.match_resident([A, B]) == 0
    assert cache.match_saved([A, B]) is None
    assert not cache.has([A])


@given(SEGMENTS, SEGMENTS)
def test_resident_matches_the_common_start(resident: list[TokenSegment], wanted: list[TokenSegment]) -> None:
    cache = PrefixCache(1)
    cache.resident_is(resident)

    n = cache.match_resident(wanted)

    assert wanted[:n] == resident[:n]
    assert n == min(len(wanted), len(resident)) or wanted[n] != resident[n]


def test_truncating_tells_the_positions_that_remain() -> None:
    cache = PrefixCache(1)
    cache.resident_is([A, B, C])

    assert cache.truncate(2) == 3
    assert cache.match_resident([A, B, C]) == 2


def test_the_longest_saved_state_is_found() -> None:
    cache = PrefixCache(3)
    cache.save([A], 'a')
    cache.save([A, B], 'ab')

    assert cache.match_saved([A, B, C]).data == 'ab'  # type: ignore[union-attr]
    assert cache.match_saved([A, C]).data == 'a'  # type: ignore[union-attr]
    assert cache.match_saved([A, C], more_than=1) is None


def test_a_state_knows_its_size() -> None:
    cache = PrefixCache(1)
    cache.save([A, B], 'ab')

    state = cache.match_saved([A, B])

    assert state is not None
    assert (state.n_segments, state.n_positions) == (2, 3)


def test_using_a_state_keeps_it_longer() -> None:
    cache = PrefixCache(2)
    cache.save([A], 'a')
    cache.save([B], 'b')

    cache.match_saved([A])
    cache.save([C], 'c')

    assert (cache.has([A]), cache.has([B]), cache.has([C])) == (True, False, True)


@given(st.integers(0, 3), st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=30))
def test_what_is_kept_is_what_was_used_last(capacity: int, steps: list[tuple[bool, int]]) -> None:
    cache = PrefixCache(capacity)
    used: list[int] = []  # oldest first
    for save, number in steps:
        segment = TokenSegment((number,))
        if save and capacity:
            cache.save([segment], number)
            used = [*(n for n in used if n != number), number][-capacity:]
        elif save:
            cache.save([segment], number)
        else:
            found = cache.match_saved([segment])
            assert (found is not None) == (number in used)
            if found is not None:
                assert found.data == number
                used = [*(n for n in used if n != number), number]
    assert cache.n_saved == len(used)


def test_clearing_forgets_everything() -> None:
    cache = PrefixCache(1)
    cache.resident_is([A])
    cache.save([A], 'a')

    cache.clear()

    assert (cache.n_resident, cache.n_saved) == (0, 0)


def test_a_negative_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match='-1'):
        PrefixCache(-1)
