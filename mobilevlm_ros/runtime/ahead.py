"""Encodes the newest frames while nobody asks, so that a question meets a warm one.

A frame costs the vision engine and most of a prompt; a question about a frame that is encoded already costs its own
tokens. The price is computing frames that nobody asks about, so that it has a bound: after each encoding comes a rest,
such that encoding takes no more than a given share of the time from one start to the next. Off, it does nothing and
holds nothing. A picture that did not change is not encoded again.

All methods but ``settings`` are called by the worker's thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from mobilevlm_ros.errors import InterruptedAnswerError, MobileVLMError, NoFrameError, StaleFrameError
from mobilevlm_ros.runtime.assistant import Assistant
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.frames import FrameStore, PendingFrame
from mobilevlm_ros.types import Frame

__all__ = ['AheadCounts', 'AheadEncoder', 'AheadSettings']

_POLL_S = 0.02
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AheadSettings:
    """What may be spent on frames that nobody has asked about.

    :ivar duty: largest share of the time, 0 (off) to 1.
    :ivar max_lag_s: a question without an image of its own takes the encoded frame instead of the newest one if that
        arrived at most this much later; 0: only if the encoded frame is the newest one.
    :ivar cameras: whose frames.
    """

    duty: float = 0.0
    max_lag_s: float = 0.0
    cameras: tuple[str, ...] = ()

    @property
    def is_on(self) -> bool:
        """Whether anything may be done at all."""
        return self.duty > 0 and bool(self.cameras)


@dataclass
class AheadCounts:
    """What it has done.

    :ivar n_encoded: frames.
    :ivar n_interrupted: encodings that a question interrupted.
    :ivar n_hits: questions that took an encoded frame.
    :ivar busy_s: time spent.
    """

    n_encoded: int = 0
    n_interrupted: int = 0
    n_hits: int = 0
    busy_s: float = 0.0


@dataclass
class _Ready:
    """The encoded frame of a camera."""

    pending: PendingFrame
    key: str
    was_asked: bool = False


class AheadEncoder:
    """See the module.

    :param now_s: a steady clock, for the share of the time.
    """

    def __init__(
        self,
        assistant: Assistant,
        frames: FrameStore,
        settings: AheadSettings | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings or AheadSettings()
        self.counts = AheadCounts()
        self._assistant = assistant
        self._frames = frames
        self._now_s = now_s
        self._rest_until_s = now_s()
        self._seen: dict[str, PendingFrame] = {}
        self._ready: dict[str, _Ready] = {}
        self._last_camera = ''
        self._last_problem = ''

    def wait_s(self) -> float | None:
        """Seconds until there may be a frame to encode; None: not before the settings change."""
        if not self.settings.is_on:
            return 0.0 if self._ready else None
        rest_s = self._rest_until_s - self._now_s()
        if rest_s > 0:
            return rest_s
        return 0.0 if self._next() is not None else _POLL_S

    def work(self, cancel: CancelToken) -> None:
        """Encode one frame, if there is a new one; stops soon after ``cancel`` is set."""
        settings = self.settings
        if not settings.is_on:
            for camera in list(self._ready):
                self._let_go(camera)
            self._seen.clear()
            return
        found = self._next()
        if found is None:
            return
        camera, pending = found
        self._last_camera = camera
        started_s = self._now_s()
        try:
            key, computed = self._assistant.encode(self._frames.open(camera, pending, float('inf')), cancel)
            self.counts.n_encoded += computed
            self._is_ready(camera, pending, key)
        except InterruptedAnswerError:
            self.counts.n_interrupted += 1
            return
        except MobileVLMError as error:
            if str(error) != self._last_problem:
                _logger.warning('an image of camera %s cannot be encoded ahead: %s', camera, error)
            self._last_problem = str(error)
        finally:
            ended_s = self._now_s()
            self.counts.busy_s += ended_s - started_s
            self._rest_until_s = ended_s + (ended_s - started_s) * (1 / settings.duty - 1)
        self._seen[camera] = pending

    def take(self, camera: str, max_age_s: float) -> Frame:
        """The frame for a question: the encoded one if the settings let it pass for the newest, else the newest.

        The errors of ``FrameStore.take``.
        """
        camera = self._frames.resolve(camera)
        ready = self._ready.get(camera)
        if ready is not None and self._passes_for_newest(camera, ready) and self._assistant.is_warm(ready.key):
            try:
                frame = self._frames.open(camera, ready.pending, max_age_s)
            except (NoFrameError, StaleFrameError):
                return self._frames.take(camera, max_age_s)
            ready.was_asked = True
            self.counts.n_hits += 1
            return frame
        return self._frames.take(camera, max_age_s)

    def _passes_for_newest(self, camera: str, ready: _Ready) -> bool:
        newest, settings = self._frames.newest(camera), self.settings
        if newest is ready.pending:
            return True
        if newest is None or not settings.is_on or settings.max_lag_s == 0:
            return False
        return newest.received_ns - ready.pending.received_ns <= settings.max_lag_s * 1e9

    def _next(self) -> tuple[str, PendingFrame] | None:
        """The next camera in turn that has a new frame, and that frame."""
        cameras = self.settings.cameras
        first = cameras.index(self._last_camera) + 1 if self._last_camera in cameras else 0
        for camera in (*cameras[first:], *cameras[:first]):
            pending = self._frames.newest(camera) if camera in self._frames.cameras else None
            if pending is not None and pending is not self._seen.get(camera):
                return camera, pending
        return None

    def _is_ready(self, camera: str, pending: PendingFrame, key: str) -> None:
        before = self._ready.get(camera)
        if before is not None and before.key != key:
            self._let_go(camera)
        was_asked = before is not None and before.key == key and before.was_asked
        self._ready[camera] = _Ready(pending, key, was_asked)

    def _let_go(self, camera: str) -> None:
        """Nobody asked about it: its state need not take a place from those that were asked about."""
        ready = self._ready.pop(camera)
        if not ready.was_asked and all(other.key != ready.key for other in self._ready.values()):
            self._assistant.drop(ready.key)
