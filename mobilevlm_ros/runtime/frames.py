"""The newest frame of each camera, and the gate that lets no old one through.

A slot holds one undecoded image; a newer one replaces it. Decoding happens when a question takes the frame, once.
Ages are of the clock that is handed in (ROS time in the node, so that simulation and bags work). A frame's age is the
larger of the age by its stamp and the time since it arrived: a stamp in the future, from a camera whose clock is ahead,
cannot make an old frame look fresh.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import NoFrameError, StaleFrameError, UnknownCameraError
from mobilevlm_ros.types import Frame

__all__ = ['CameraStatus', 'FrameStore', 'PendingFrame']


@dataclass
class PendingFrame:
    """An image that has arrived and was not decoded yet.

    :ivar stamp_ns: by the camera's clock; 0: it has none, and only the time of arrival counts.
    :ivar received_ns: time of arrival, by the clock of the store.
    :ivar decode: makes ``rgb_hwc`` and ``frame_id``; raises ``BadImageError``.
    """

    stamp_ns: int
    received_ns: int
    decode: Callable[[], tuple[NDArray[np.uint8], str]]
    _epoch: int = -1
    _decoded: tuple[NDArray[np.uint8], str] | None = None

    def age_s(self, now_ns: int) -> float:
        """The age at ``now_ns``; see the module."""
        since_arrival_ns = now_ns - self.received_ns
        since_stamp_ns = now_ns - self.stamp_ns if self.stamp_ns else since_arrival_ns
        return max(since_arrival_ns, since_stamp_ns) / 1e9

    def frame(self, camera: str, age_s: float) -> Frame:
        """The decoded frame; decodes on the first call."""
        if self._decoded is None:
            self._decoded = self.decode()
        rgb_hwc, frame_id = self._decoded
        return Frame(rgb_hwc, camera=camera, frame_id=frame_id, stamp_ns=self.stamp_ns, age_s=age_s)


@dataclass(frozen=True)
class CameraStatus:
    """What is known of one camera.

    :ivar age_s: age of the newest frame; None before the first.
    :ivar stamp_offset_s: time of arrival minus stamp of the newest frame; negative: its clock is ahead.
    """

    camera: str
    n_frames: int
    age_s: float | None
    stamp_offset_s: float | None


class FrameStore:
    """One slot for each camera; safe to use from any thread.

    :param now_ns: the clock of ages.
    """

    def __init__(self, cameras: Sequence[str], now_ns: Callable[[], int]) -> None:
        self._now_ns = now_ns
        self._lock = threading.Lock()
        # Frames from before ``clear`` have another number: their ages mean nothing any more.
        self._epoch = 0
        self._slots: dict[str, PendingFrame | None] = dict.fromkeys(cameras)
        self._counts: dict[str, int] = dict.fromkeys(cameras, 0)

    @property
    def cameras(self) -> tuple[str, ...]:
        """The names of the cameras."""
        return tuple(self._slots)

    def put(self, camera: str, pending: PendingFrame) -> None:
        """Replace the camera's frame."""
        with self._lock:
            pending._epoch = self._epoch
            self._slots[camera] = pending
            self._counts[camera] += 1

    def clear(self) -> None:
        """Forget all frames, for example because time jumped back."""
        with self._lock:
            self._epoch += 1
            self._slots = dict.fromkeys(self._slots)

    def resolve(self, camera: str) -> str:
        """The camera that a question means: the named one, or the only one if none is named.

        :raise UnknownCameraError: if there is no such camera, or none was named while there are several.
        """
        names = ', '.join(self._slots) or 'none'
        if camera in self._slots:
            return camera
        if camera:
            raise UnknownCameraError(f'there is no camera {camera!r}; the cameras are: {names}')
        if len(self._slots) != 1:
            raise UnknownCameraError(f'name one of the cameras: {names}')
        return next(iter(self._slots))

    def newest(self, camera: str) -> PendingFrame | None:
        """The newest frame of one of ``cameras`` as it arrived; None before the first."""
        with self._lock:
            return self._slots[camera]

    def take(self, camera: str, max_age_s: float) -> Frame:
        """The newest frame of a camera, decoded, with its age.

        :raise UnknownCameraError: see ``resolve``.
        :raise NoFrameError: if none has arrived.
        :raise StaleFrameError: if it is older than ``max_age_s``.
        :raise BadImageError: if it cannot be decoded.
        """
        camera = self.resolve(camera)
        with self._lock:
            pending = self._slots[camera]
            n_frames = self._counts[camera]
        if pending is None:
            raise NoFrameError(
                f'no image of camera {camera!r} has arrived yet: check that it publishes (mobilevlm doctor)'
                if n_frames == 0
                else f'no image of camera {camera!r} has arrived since time jumped back'
            )
        return self.open(camera, pending, max_age_s)

    def open(self, camera: str, pending: PendingFrame, max_age_s: float) -> Frame:
        """A frame that ``newest`` gave, decoded, with its age; the same errors as ``take``."""
        decoded = pending.frame(camera, age_s=0.0)
        # After decoding: the age is that of the pixels at the moment they are used.
        now_ns = self._now_ns()
        if now_ns < pending.received_ns or pending._epoch != self._epoch:
            raise NoFrameError(f'no image of camera {camera!r} has arrived since time jumped back')
        frame = replace(decoded, age_s=pending.age_s(now_ns))
        if not frame.age_s <= max_age_s:  # a limit that is no number lets nothing through
            raise StaleFrameError(
                f'the newest image of camera {camera!r} is {frame.age_s:.3f} s old, the limit is {max_age_s:.3f} s: '
                'is the camera frozen, or the limit too tight?',
                frame,
            )
        return frame

    def status(self) -> list[CameraStatus]:
        """One entry for each camera."""
        now_ns = self._now_ns()
        with self._lock:
            slots, counts = dict(self._slots), dict(self._counts)
        result = []
        for camera, pending in slots.items():
            age_s = None if pending is None else pending.age_s(now_ns)
            offset_s = None
            if pending is not None and pending.stamp_ns:
                offset_s = (pending.received_ns - pending.stamp_ns) / 1e9
            result.append(CameraStatus(camera, counts[camera], age_s, offset_s))
        return result
