"""Vision engines: pixels in, visual tokens out."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.runtime.cancel import CancelToken

__all__ = ['VisionEngine']


class VisionEngine(Protocol):
    """Vision tower and projector in one; used by one thread at a time."""

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        ...

    @property
    def n_tokens(self) -> int:
        """Visual tokens of an image."""
        ...

    @property
    def n_embd(self) -> int:
        """Width of a visual token; the language model's."""
        ...

    @property
    def description(self) -> str:
        """Backend and device, for people."""
        ...

    def encode(self, pixels_nchw: NDArray[np.float32], cancel: CancelToken) -> NDArray[np.float32]:
        """Visual tokens of one image.

        :param pixels_nchw: float32 ``[1, 3, image_size, image_size]``, as ``preprocess`` makes it.
        :return: float32 ``[n_tokens, n_embd]``.
        :raise InterruptedAnswerError: if ``cancel`` was set meanwhile.
        :raise EngineError: if the engine fails.
        """
        ...

    def close(self) -> None:
        """Free everything; may be called again."""
        ...
