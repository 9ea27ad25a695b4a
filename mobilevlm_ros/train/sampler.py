"""Puts dialogues of like length, and of one modality, into one batch, by the published grouping.

Batches with and without images do not mix, so no image slot is wasted on text; like lengths waste little padding. The
published sampler dies of data that has only images or only text, and shuffles by a generator that nobody seeds: this
one does neither, and is a function of seed and epoch.

Source: mobilevlm/train/trainer.py (``LengthGroupedSampler``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from mobilevlm_ros.errors import SettingsError

__all__ = ['ModalityLengthSampler']


class ModalityLengthSampler(Sampler[int]):
    """Each index once an epoch, in the order in which ``world_size`` processes take batches in turn.

    :param lengths: for each sample its length, negative for one without an image.
    :param batch_size: samples of one process's batch.
    :param world_size: processes; batch ``i`` of the order goes to process ``i % world_size``.
    :raise SettingsError: if a length is zero, or a size is below 1.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, world_size: int = 1, seed: int = 0) -> None:
        if batch_size < 1 or world_size < 1:
            raise SettingsError(f'a batch of {batch_size} on {world_size} processes: both must be 1 or more')
        if not all(lengths):
            raise SettingsError(f'sample {list(lengths).index(0)} has the length 0: leave out empty dialogues')
        self._lengths = lengths
        self._batch_size = batch_size
        self._world_size = world_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of the epoch that is read next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self._seed, self._epoch))
        with_images = [index for index, length in enumerate(self._lengths) if length > 0]
        text_only = [index for index, length in enumerate(self._lengths) if length < 0]
        groups: list[list[int]] = []
        rest: list[int] = []
        for indices in (with_images, text_only):
            grouped = self._grouped(indices, random)
            # As published, the last group of either modality is set aside, full or not.
            groups += grouped[:-1]
            rest += [index for group in grouped[-1:] for index in group]
        groups = [groups[position] for position in random.permutation(len(groups))]
        size = self._batch_size * self._world_size
        if len(rest) >= size:
            groups.insert(0, rest[:size])
            rest = rest[size:]
        return (index for group in [*groups, rest] for index in group)

    def _grouped(self, indices: Sequence[int], random: np.random.Generator) -> list[list[int]]:
        """Random groups of one batch for each process; in a group, batches of about the same sum of lengths."""
        size = self._batch_size * self._world_size
        shuffled = [indices[position] for position in random.permutation(len(indices))]
        groups = [shuffled[first : first + size] for first in range(0, len(shuffled), size)]
        return [self._dealt(sorted(group, key=lambda index: -abs(self._lengths[index]))) for group in groups]

    def _dealt(self, group: Sequence[int]) -> list[int]:
        """A group, longest first, as one batch for each process, one after the other."""
        n_batches = self._world_size
        if len(group) % n_batches:
            return [index for first in range(n_batches) for index in group[first::n_batches]]
        full = len(group) // n_batches
        batches: list[list[int]] = [[] for _ in range(n_batches)]
        sums = [0] * n_batches
        for index in group:
            open_batches = [number for number, batch in enumerate(batches) if len(batch) < full]
            shortest = min(open_batches, key=lambda number: sums[number])
            batches[shortest].append(index)
            sums[shortest] += abs(self._lengths[index])
        return [index for batch in batches for index in batch]
