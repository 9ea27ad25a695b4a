"""Which frames of a recording are meant: a stretch of time, all of it or now and then."""

from __future__ import annotations

import math

from mobilevlm_ros.errors import BagRangeError

__all__ = ['FrameFilter', 'check_range']


def check_range(start_s: float | None, end_s: float | None, every_s: float | None) -> None:
    """:raise BagRangeError: if the numbers make no sense."""
    for what, value in (('start_s', start_s), ('end_s', end_s), ('every_s', every_s)):
        if value is not None and not math.isfinite(value):
            raise BagRangeError(f'{what} is a number of seconds, found {value}')
    if every_s is not None and every_s <= 0:
        raise BagRangeError(f'every_s is above 0, found {every_s}')
    if start_s is not None and end_s is not None and end_s < start_s:
        raise BagRangeError(f'the range ends before it begins: {start_s} s to {end_s} s')


class FrameFilter:
    """Asked about frame after frame, in the order of recording.

    :param origin_ns: what the seconds count from.
    :param start_s: none before; ``end_s``: none after, that moment included.
    :param every_s: the first frame of each topic in every such interval, counted from ``start_s``.
    """

    def __init__(
        self,
        origin_ns: int,
        *,
        start_s: float | None = None,
        end_s: float | None = None,
        every_s: float | None = None,
    ) -> None:
        self._first_ns = None if start_s is None else origin_ns + round(start_s * 1e9)
        self._last_ns = None if end_s is None else origin_ns + round(end_s * 1e9)
        self._every_ns = None if every_s is None else max(1, round(every_s * 1e9))
        self._counted_from_ns = origin_ns if self._first_ns is None else self._first_ns
        self._due: dict[str, int] = {}

    def takes(self, topic: str, time_ns: int) -> bool:
        """Whether the next frame of a topic is meant."""
        if self._first_ns is not None and time_ns < self._first_ns:
            return False
        if self._last_ns is not None and time_ns > self._last_ns:
            return False
        if self._every_ns is not None:
            interval = (time_ns - self._counted_from_ns) // self._every_ns
            if interval < self._due.get(topic, interval):
                return False
            self._due[topic] = interval + 1
        return True
