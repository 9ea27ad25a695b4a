"""Grouping by modality and length: the published order, each sample once an epoch, the same for the same seed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.train.sampler import ModalityLengthSampler

_LENGTHS = st.lists(st.integers(1, 50) | st.integers(-50, -1), max_size=60)
_SIZES = st.integers(1, 4)


@given(lengths=_LENGTHS, batch_size=_SIZES, world_size=_SIZES, seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_an_epoch_takes_every_sample_once(
    lengths: list[int], batch_size: int, world_size: int, seed: int, epoch: int
) -> None:
    sampler = ModalityLengthSampler(lengths, batch_size, world_size, seed)
    sampler.set_epoch(epoch)

    assert sorted(sampler) == list(range(len(lengths)))
    assert len(sampler) == len(lengths)


@given(lengths=_LENGTHS, batch_size=_SIZES, world_size=_SIZES)
def test_only_what_is_left_over_mixes_modalities(lengths: list[int], batch_size: int, world_size: int) -> None:
    """Of each modality up to one group of batches is left over: they come first, as far as they fill one, and last."""
    order = list(ModalityLengthSampler(lengths, batch_size, world_size))
    size = batch_size * world_size
    groups = [order[first : first + size] for first in range(0, len(order), size)]

    mixed = [number for number, group in enumerate(groups) if len({lengths[index] > 0 for index in group}) > 1]

    assert set(mixed) <= {0, len(groups) - 1}


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), sign=st.sampled_from([1, -1]), world_size=_SIZES)
def test_images_only_and_text_only_are_ordered_alike(lengths: list[int], sign: int, world_size: int) -> None:
    one = ModalityLengthSampler(lengths, 2, world_size, seed=3)
    other = ModalityLengthSampler([sign * length for length in lengths], 2, world_size, seed=3)

    assert list(one) == list(other)


def test_seed_and_epoch_alone_decide() -> None:
    lengths = [(-1) ** n * (n % 7 + 1) for n in range(100)]

    def order(seed: int, epoch: int) -> list[int]:
        sampler = ModalityLengthSampler(lengths, 4, 2, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_an_epoch_can_be_read_twice() -> None:
    sampler = ModalityLengthSampler(list(range(1, 30)), 4)

    assert list(sampler) == list(sampler)


@pytest.mark.parametrize(
    ('lengths', 'batch_size', 'world_size', 'expected'),
    [
        # Longest first, each to the batch with the smaller sum that is not full: 5 | 4, then 2 to the second, 1 to the
        # first.
        ([5, 1, 4, 2], 2, 2, [0, 1, 2, 3]),
        # A group that cannot be halved is dealt out in turn.
        ([5, 4, 3, 2, 1], 4, 2, [0, 2, 4, 1, 3]),
        # The last group of either modality is set aside, though it is full.
        ([3, -2, 2, -1], 1, 2, [0, 2, 1, 3]),
    ],
)
def test_the_order_is_the_published_one(
    lengths: list[int], batch_size: int, world_size: int, expected: list[int]
) -> None:
    assert list(ModalityLengthSampler(lengths, batch_size, world_size)) == expected


def test_what_is_left_over_fills_the_first_group() -> None:
    """Three images in groups of two leave one over; with the only text it makes a group, and that comes first."""
    order = list(ModalityLengthSampler([9, 8, 7, -6], 2))

    assert 3 in order[:2]


def test_batches_hold_like_lengths() -> None:
    """In each group of two batches, longest first; so a process's batch has a descending order of lengths."""
    lengths = list(range(1, 65))

    order = list(ModalityLengthSampler(lengths, 4, 2))

    for first in range(0, 64, 4):
        batch = [lengths[index] for index in order[first : first + 4]]
        assert batch == sorted(batch, reverse=True)


def test_the_processes_get_batches_of_about_the_same_length() -> None:
    lengths = list(range(1, 65))

    order = list(ModalityLengthSampler(lengths, 4, 2))

    sums = [sum(lengths[index] for index in order[first : first + 4]) for first in range(0, 64, 4)]
    assert all(abs(one - other) <= 40 for one, other in zip(sums[::2], sums[1::2], strict=True))


def test_an_empty_sample_is_refused() -> None:
    with pytest.raises(SettingsError, match='sample 2 has the length 0'):
        ModalityLengthSampler([1, -1, 0], 1)


@pytest.mark.parametrize(('batch_size', 'world_size'), [(0, 1), (1, 0)])
def test_sizes_below_one_are_refused(batch_size: int, world_size: int) -> None:
    with pytest.raises(SettingsError, match='1 or more'):
        ModalityLengthSampler([1], batch_size, world_size)
