"""One recorded image: what is known without decoding it, and its pixels on demand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import BadImageError
from mobilevlm_ros.runtime.camera_message import decode_message
from mobilevlm_ros.types import Frame

__all__ = ['BagFrame', 'Clock']

Clock = Literal['header', 'receive']
"""Whose time counts: the camera's, as stamped into the message, or that of the recorder when it arrived."""


@dataclass(frozen=True)
class BagFrame:
    """See the module.

    :ivar topic: where it was published.
    :ivar index: how many messages of the topic were recorded before it.
    :ivar stamp_ns: stamp of the message; 0 if the camera gave none.
    :ivar received_ns: when the recorder got it.
    :ivar message_type: one of ``IMAGE_TYPES``.
    """

    topic: str
    index: int
    stamp_ns: int
    received_ns: int
    message_type: str
    serialized: bytes = field(repr=False)

    def time_ns(self, clock: Clock) -> int:
        """By the given clock; a message without a stamp counts from its arrival, as it does in the node."""
        return self.stamp_ns if clock == 'header' and self.stamp_ns else self.received_ns

    def decode(self) -> NDArray[np.uint8]:
        """The pixels, uint8 ``[height, width, 3]``, RGB; decoded anew at every call.

        :raise BadImageError: if the message is damaged, or its image cannot be decoded.
        """
        return self.frame().rgb_hwc

    def frame(self) -> Frame:
        """The decoded frame as the runtime takes it; the camera is the topic. Raises as ``decode`` does."""
        try:
            rgb_hwc, frame_id = decode_message(self.serialized, self.message_type)
        except BadImageError as error:
            raise BadImageError(f'message {self.index} of {self.topic}: {error}') from error
        return Frame(rgb_hwc, camera=self.topic, frame_id=frame_id, stamp_ns=self.stamp_ns)
