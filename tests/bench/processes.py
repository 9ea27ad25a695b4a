"""Waiting for processes, for tests that must not sleep for a fixed time."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import psutil


def wait_for(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Fail unless the condition comes true in time."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, 'timed out'
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether the process exists and has not ended."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
