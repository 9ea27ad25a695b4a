"""A vision engine without a model: visual tokens are means of the image's cells, so that different images differ."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.runtime.cancel import CancelToken

__all__ = ['FakeVision']


class FakeVision:
    """See the module.

    :param image_size: side of the input in pixels; a multiple of ``side``.
    :param side: tokens a side; there are ``side * side``.
    :param run_s: how long an image takes, in seconds.
    """

    description = 'fake vision engine'

    def __init__(self, *, image_size: int = 16, side: int = 2, n_embd: int = 8, run_s: float = 0.0) -> None:
        self.image_size = image_size
        self.n_tokens = side * side
        self.n_embd = n_embd
        self._side = side
        self._run_s = run_s
        self.n_runs = 0
        self.closed = False

    def encode(self, pixels_nchw: NDArray[np.float32], cancel: CancelToken) -> NDArray[np.float32]:
        """Means of the cells, repeated to the width."""
        end_s = time.monotonic() + self._run_s
        cancel.raise_if_set()
        while (left_s := end_s - time.monotonic()) > 0:
            time.sleep(min(left_s, 0.005))
            cancel.raise_if_set()
        self.n_runs += 1
        cell = self.image_size // self._side
        cells = pixels_nchw.reshape(3, self._side, cell, self._side, cell).mean(axis=(0, 2, 4))
        return np.repeat(cells.reshape(-1, 1), self.n_embd, axis=1).astype(np.float32)

    def close(self) -> None:
        """Note that it was closed."""
        self.closed = True
