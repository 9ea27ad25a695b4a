"""What ``/diagnostics`` says: REP 107 statuses from plain numbers.

``Health`` collects answers and errors from the worker's thread; ``statuses`` turns it and the state of cameras, queue
and model into diagnostic statuses, the level by meaning: OK, WARN (answers suffer), ERROR (no answers).
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

from mobilevlm_ros.runtime.ahead import AheadCounts
from mobilevlm_ros.runtime.frames import CameraStatus
from mobilevlm_ros.types import Answer, ResultCode

__all__ = ['Health', 'NodeState', 'statuses']

_KEPT_ANSWERS = 256
_CLOCK_TOLERANCE_S = 0.1
_PERCENTILES = (50, 95, 99)


class Health:
    """Counts and latencies of recent answers; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._codes: Counter[str] = Counter()
        self._latencies_s: deque[tuple[float, float]] = deque(maxlen=_KEPT_ANSWERS)
        self.last_error = ''

    def add(self, answer: Answer) -> None:
        """Count one answer; latencies only of those that a model gave."""
        with self._lock:
            self._codes[answer.result_code.name] += 1
            if answer.result_code in (ResultCode.OK, ResultCode.UNKNOWN, ResultCode.INCOMPLETE):
                self._latencies_s.append((answer.timing.first_text_s, answer.timing.total_s))
            elif answer.result_code is ResultCode.ENGINE_ERROR:
                self.last_error = answer.message

    def note_error(self, message: str) -> None:
        """Keep an error for the diagnostics."""
        self.last_error = message

    def values(self) -> dict[str, str]:
        """Counts by result code, and percentiles of the time to the first text and to the end."""
        with self._lock:
            codes, latencies = dict(self._codes), list(self._latencies_s)
        result = {f'answers {name}': str(count) for name, count in sorted(codes.items())}
        if latencies:
            for column, name in enumerate(('first text', 'total')):
                points = np.percentile([row[column] for row in latencies], _PERCENTILES)
                for percentile, seconds in zip(_PERCENTILES, points, strict=False):
                    result[f'{name} p{percentile} (s)'] = f'{seconds:.3f}'
        return result


@dataclass(frozen=True)
class NodeState:
    """What the node knows of itself when it reports.

    :ivar camera_rates_hz: one for each of ``cameras``, since the last report.
    :ivar camera_losses: images lost in transport since the last report, one for each of ``cameras``.
    :ivar camera_problems: one text for each of ``cameras``; empty if there is none.
    :ivar ahead: what encoding ahead has done since the node became active.
    """

    active: bool
    model_id: str
    warning: str
    n_waiting: int
    queue_size: int
    max_frame_age_s: float
    cameras: Sequence[CameraStatus]
    camera_rates_hz: Sequence[float]
    camera_losses: Sequence[int]
    camera_problems: Sequence[str]
    ahead: AheadCounts = field(default_factory=AheadCounts)


def statuses(node_name: str, state: NodeState, health: Health) -> list[DiagnosticStatus]:
    """One status for the model and one for each camera."""
    result = [_model_status(node_name, state, health)]
    rows = zip(state.cameras, state.camera_rates_hz, state.camera_losses, state.camera_problems, strict=False)
    result += [_camera_status(node_name, state, *row) for row in rows]
    return result


def _status(name: str, level: bytes, message: str, values: dict[str, str]) -> DiagnosticStatus:
    pairs = [KeyValue(key=key, value=value) for key, value in values.items()]
    return DiagnosticStatus(name=name, level=level, message=message, values=pairs)


def _model_status(node_name: str, state: NodeState, health: Health) -> DiagnosticStatus:
    if not state.active:
        level, message = DiagnosticStatus.WARN, 'not active: questions are refused'
    elif state.n_waiting >= state.queue_size:
        level, message = DiagnosticStatus.WARN, 'the queue is full: questions are refused'
    elif health.last_error:
        level, message = DiagnosticStatus.WARN, f'last error: {health.last_error}'
    else:
        level, message = DiagnosticStatus.OK, 'answering'
    values = {
        'model': state.model_id or 'none',
        'warning': state.warning,
        'queue': f'{state.n_waiting} of {state.queue_size}',
        'memory (MiB)': str(psutil.Process().memory_info().rss >> 20),
        'last error': health.last_error,
        'frames encoded ahead': str(state.ahead.n_encoded),
        'frames encoded ahead, interrupted': str(state.ahead.n_interrupted),
        'questions about them': str(state.ahead.n_hits),
        'time for them (s)': f'{state.ahead.busy_s:.1f}',
        **health.values(),
    }
    return _status(f'{node_name}: model', level, message, values)


def _camera_status(
    node_name: str, state: NodeState, camera: CameraStatus, rate_hz: float, n_lost: int, problem: str
) -> DiagnosticStatus:
    values = {
        'frames': str(camera.n_frames),
        'rate (Hz)': f'{rate_hz:.1f}',
        'lost': str(n_lost),
        'age (s)': '' if camera.age_s is None else f'{camera.age_s:.3f}',
        'arrival minus stamp (s)': '' if camera.stamp_offset_s is None else f'{camera.stamp_offset_s:.3f}',
    }
    if not state.active:
        level, message = DiagnosticStatus.WARN, 'not active: not listening'
    elif camera.age_s is None:
        level, message = DiagnosticStatus.ERROR, problem or 'no image has arrived yet'
    elif camera.age_s > state.max_frame_age_s:
        level = DiagnosticStatus.ERROR
        message = f'frozen: the newest image is {camera.age_s:.1f} s old' + (f'; {problem}' if problem else '')
    elif camera.stamp_offset_s is not None and camera.stamp_offset_s < -_CLOCK_TOLERANCE_S:
        level = DiagnosticStatus.WARN
        message = f'stamps are {-camera.stamp_offset_s:.1f} s in the future: clocks differ'
    elif problem:
        level, message = DiagnosticStatus.WARN, problem
    elif n_lost:
        level = DiagnosticStatus.WARN
        message = f'{n_lost} images were lost in transport: give DDS larger buffers (config/fastdds.xml)'
    else:
        level, message = DiagnosticStatus.OK, 'fresh images arrive'
    return _status(f'{node_name}: camera {camera.camera}', level, message, values)
