"""Which part of a prompt need not be computed again.

Bookkeeping only: the segments that the working sequence holds, and a small LRU of saved states, each named by the
segments that it covers. States are matched by whole segments, never by part of one: a prompt then runs through the
same batches whether warm or cold, so that warm and cold answers are identical to the bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mobilevlm_ros.runtime.language.interface import Segment, SegmentKey

__all__ = ['PrefixCache', 'SavedState']


@dataclass(frozen=True)
class SavedState:
    """A copy of a sequence's keys and values."""

    data: Any
    n_segments: int
    n_positions: int


class PrefixCache:
    """Remembers what a sequence holds, and up to ``capacity`` earlier states of it."""

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise ValueError(f'capacity must not be negative, found {capacity}')
        self._capacity = capacity
        self._resident: list[tuple[SegmentKey, int]] = []
        self._saved: OrderedDict[tuple[SegmentKey, ...], SavedState] = OrderedDict()

    @property
    def capacity(self) -> int:
        """How many states are kept."""
        return self._capacity

    @property
    def n_saved(self) -> int:
        """How many states are held now."""
        return len(self._saved)

    @property
    def n_resident(self) -> int:
        """Positions of the segments that the working sequence holds."""
        return sum(n for _, n in self._resident)

    def match_resident(self, segments: Sequence[Segment]) -> int:
        """How many leading segments the working sequence holds already."""
        matched = 0
        for (key, _), segment in zip(self._resident, segments, strict=False):
            if key != segment.key:
                break
            matched += 1
        return matched

    def match_saved(self, segments: Sequence[Segment], more_than: int = 0) -> SavedState | None:
        """The saved state that covers most leading segments, if it covers more than ``more_than``; now newest."""
        keys = tuple(segment.key for segment in segments)
        for n in range(len(keys), more_than, -1):
            state = self._saved.get(keys[:n])
            if state is not None:
                self._saved.move_to_end(keys[:n])
                return state
        return None

    def resident_is(self, segments: Sequence[Segment]) -> None:
        """Note that the working sequence now holds exactly ``segments``."""
        self._resident = [(segment.key, segment.n_positions) for segment in segments]

    def truncate(self, n_segments: int) -> int:
        """Note that only ``n_segments`` remain in the working sequence; returns their positions."""
        del self._resident[n_segments:]
        return self.n_resident

    def has(self, segments: Sequence[Segment]) -> bool:
        """Whether a saved state covers exactly ``segments``."""
        return tuple(segment.key for segment in segments) in self._saved

    def save(self, segments: Sequence[Segment], data: Any) -> None:
        """Keep ``data`` as the state after ``segments``; the state used longest ago goes."""
        if self._capacity == 0:
            return
        keys = tuple(segment.key for segment in segments)
        self._saved[keys] = SavedState(data, len(keys), sum(segment.n_positions for segment in segments))
        self._saved.move_to_end(keys)
        while len(self._saved) > self._capacity:
            self._saved.popitem(last=False)

    def drop(self, segments: Sequence[Segment]) -> None:
        """Forget the state that covers exactly ``segments``."""
        self._saved.pop(tuple(segment.key for segment in segments), None)

    def clear(self) -> None:
        """Forget everything."""
        self._resident.clear()
        self._saved.clear()
