"""Waits for a quiet machine, and says how quiet it really was while something was measured.

Two cores with one busy neighbour make a language model three to eight times slower: a figure without this is noise.
Foreign load is what the whole machine's processors did, stolen time included, less what this process and its children
did, in cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

from mobilevlm_ros.bench.series import BUSY_CORES

__all__ = ['LoadWatch', 'QuietMachine']

_WINDOW_S = 0.5
"""Shorter windows than this say little: the kernel counts processor time in hundredths of a second."""


@dataclass(frozen=True)
class _Reading:
    at_s: float
    machine_s: float
    own_s: float


def _read() -> _Reading:
    times = psutil.cpu_times()
    # Guest time is part of user time already.
    busy = ('user', 'nice', 'system', 'irq', 'softirq', 'steal')
    machine_s = sum(float(getattr(times, name, 0.0)) for name in busy)
    me = psutil.Process()
    own = me.cpu_times()
    own_s = own.user + own.system + own.children_user + own.children_system
    for child in me.children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            spent = child.cpu_times()
            own_s += spent.user + spent.system + spent.children_user + spent.children_system
    return _Reading(time.monotonic(), machine_s, own_s)


def _foreign_cores(before: _Reading, after: _Reading) -> float:
    passed_s = max(after.at_s - before.at_s, 1e-3)
    return max(0.0, (after.machine_s - before.machine_s) - (after.own_s - before.own_s)) / passed_s


@dataclass
class LoadWatch:
    """Foreign load while a block ran; complete when the block has ended."""

    foreign_cores: float = 0.0


class QuietMachine:
    """Waits before, and watches during, a measurement.

    :param longest_wait_s: how long to wait in all for one quiet moment before measuring anyway.
    :param on_wait: told the foreign load, in cores, while waiting.
    """

    def __init__(self, longest_wait_s: float, on_wait: Callable[[float], None] = lambda cores: None) -> None:
        self._longest_wait_s = longest_wait_s
        self._on_wait = on_wait
        self._last_seen = 0.0

    def wait(self) -> float:
        """Wait until others are quiet, or the time is over; returns the foreign load last seen, in cores."""
        end_s = time.monotonic() + self._longest_wait_s
        while time.monotonic() < end_s:
            before = _read()
            time.sleep(min(_WINDOW_S, max(end_s - time.monotonic(), 0.01)))
            self._last_seen = _foreign_cores(before, _read())
            if self._last_seen <= BUSY_CORES:
                break
            self._on_wait(self._last_seen)
        return self._last_seen

    @contextmanager
    def watch(self) -> Iterator[LoadWatch]:
        """Note the foreign load of the block; of a block too short to tell, that of the wait before it."""
        load = LoadWatch(self._last_seen)
        before = _read()
        try:
            yield load
        finally:
            after = _read()
            if after.at_s - before.at_s >= _WINDOW_S:
                load.foreign_cores = _foreign_cores(before, after)
