"""One switch that stops an answer: turned by the asker, by a deadline, or by the node going down.

Whoever works checks the token between steps (``raise_if_set``); whoever runs inside a native call that Python cannot
interrupt registers a callback that makes the native side stop (``on_set``). The first reason wins and is kept.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mobilevlm_ros.errors import InterruptedAnswerError
from mobilevlm_ros.types import ResultCode

__all__ = ['CancelToken']


class CancelToken:
    """A one-way switch, safe to turn from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._code: ResultCode | None = None
        self._message = ''
        self._callbacks: list[Callable[[], None]] = []

    @property
    def is_set(self) -> bool:
        """Whether the work should stop."""
        return self._code is not None

    @property
    def code(self) -> ResultCode | None:
        """Why the work should stop; None while it should not."""
        return self._code

    @property
    def message(self) -> str:
        """The reason, for people."""
        return self._message

    def set(self, code: ResultCode = ResultCode.CANCELED, message: str = 'the question was canceled') -> bool:
        """Stop the work.

        :return: whether this call was the first, so that its reason is the one that is told.
        """
        with self._lock:
            if self._code is not None:
                return False
            self._code, self._message = code, message
            callbacks = list(self._callbacks)
        for callback in callbacks:
            callback()
        return True

    def raise_if_set(self) -> None:
        """:raise InterruptedAnswerError: if the work should stop."""
        if self._code is not None:
            raise InterruptedAnswerError(self._code, self._message)

    @contextmanager
    def on_set(self, callback: Callable[[], None]) -> Iterator[None]:
        """Call ``callback`` (once, from any thread, at once if already set) as long as the block runs."""
        with self._lock:
            already_set = self._code is not None
            if not already_set:
                self._callbacks.append(callback)
        try:
            if already_set:
                callback()
            yield
        finally:
            with self._lock:
                if callback in self._callbacks:
                    self._callbacks.remove(callback)

    @contextmanager
    def deadline(self, at_s: float | None) -> Iterator[None]:
        """Set the token with TIMEOUT when ``time.monotonic()`` reaches ``at_s``, as long as the block runs."""
        if at_s is None:
            yield
            return
        # Longer waits than a thread can be told of are as good as none.
        remaining_s = min(at_s - time.monotonic(), threading.TIMEOUT_MAX)
        if not remaining_s > 0:
            self.set(ResultCode.TIMEOUT, 'the deadline passed')
            yield
            return
        timer = threading.Timer(remaining_s, self.set, (ResultCode.TIMEOUT, 'the deadline passed'))
        timer.daemon = True
        timer.name = 'deadline'
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
