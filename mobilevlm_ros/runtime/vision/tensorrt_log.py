"""TensorRT's log: sent to Python's logging, and its last complaints kept for error messages.

TensorRT keeps the first logger that a process gives it for ever, whatever later ones are passed. So there is one for
each module (``tensorrt``, or ``tensorrt_rtx`` in tests), and it lives as long as the process.
"""

from __future__ import annotations

import logging
from collections import deque
from functools import cache
from typing import Any

__all__ = ['TensorRtLog', 'log_of']

_logger = logging.getLogger('mobilevlm_ros.tensorrt')
_WARNING = 2  # INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE count from 0


class TensorRtLog:
    """See the module.

    :ivar native: what TensorRT wants where it asks for a logger.
    """

    def __init__(self, trt: Any) -> None:
        tail: deque[str] = deque(maxlen=4)

        class Native(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                """Called by TensorRT from any of its threads."""
                if int(severity) > _WARNING:
                    _logger.debug('%s', message)
                    return
                tail.append(' '.join(message.split()))
                _logger.warning('%s', message)

        self.native: Any = Native()
        self._tail = tail

    def forget(self) -> None:
        """Before something is tried, so that an error message does not tell of what was tried earlier."""
        self._tail.clear()

    @property
    def has_complaints(self) -> bool:
        """Whether there were warnings or errors since ``forget``."""
        return bool(self._tail)

    def last_lines(self) -> str:
        """The last warnings and errors, for an error message."""
        return '; '.join(self._tail) or 'TensorRT gave no reason'

    @property
    def is_out_of_memory(self) -> bool:
        """Whether they tell of too little memory."""
        text = self.last_lines().lower().replace(' ', '')
        return 'outofmemory' in text or 'cudaerrormemoryallocation' in text


@cache
def log_of(trt: Any) -> TensorRtLog:
    """The log of the module ``trt``."""
    return TensorRtLog(trt)
