"""Plays a bag at recorded speed to what the node consists of, so that what would be late or old on the robot is.

Frames arrive in the slots of their cameras when they arrived at the recorder. A question is put when its frame arrives,
through the node's queue, under the node's limits: it is refused when the queue is full, stopped at its deadline, and
answered about the newest frame at its turn. No code of the node is repeated here: slots, queue and the encoding ahead
are the runtime's.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.bags import Bag, BagFrame
from mobilevlm_ros.errors import BadImageError, EvaluationError, MobileVLMError
from mobilevlm_ros.evaluate.answerer import Reply
from mobilevlm_ros.evaluate.plan import Plan
from mobilevlm_ros.evaluate.questions import BagQuestion
from mobilevlm_ros.evaluate.record import RunRecord
from mobilevlm_ros.evaluate.results import RESULTS, ResultsWriter, read_results
from mobilevlm_ros.evaluate.rows import FIRST_FAILURE, Pictures, row_of
from mobilevlm_ros.evaluate.runner import OnProgress, decoded
from mobilevlm_ros.runtime.ahead import AheadEncoder, AheadSettings
from mobilevlm_ros.runtime.assistant import Assistant, AssistantSettings
from mobilevlm_ros.runtime.frames import FrameStore, PendingFrame
from mobilevlm_ros.runtime.loading import warm_up
from mobilevlm_ros.runtime.worker import Job, QuestionWorker, refusal
from mobilevlm_ros.types import Answer, Frame, ResultCode

__all__ = ['RealtimeSettings', 'check_unplayed', 'run_realtime']

_REMEMBERED_FRAMES = 64
_LONGEST_WAIT_S = 0.05


@dataclass(frozen=True)
class RealtimeSettings:
    """The parameters of the node that matter here, with its defaults.

    :ivar queue_size: questions that may wait besides the one being answered.
    :ivar deadline_s: of questions that name none; None: none.
    :ivar max_frame_age_s: the oldest frame that is asked about, of questions that name no limit.
    :ivar encode_ahead_duty: largest share of the time for encoding frames that nobody has asked about.
    :ivar encode_ahead_max_lag_s: see ``AheadSettings``.
    """

    queue_size: int = 4
    deadline_s: float | None = 30.0
    max_frame_age_s: float = 2.0
    encode_ahead_duty: float = 0.0
    encode_ahead_max_lag_s: float = 1.0


@dataclass
class _Counts:
    """What ``run.json`` tells of the play.

    :ivar n_frames_dropped: that arrived and were never asked about.
    :ivar n_reused: answers about the frame that the camera's answer before was about.
    :ivar n_deadline: questions with a deadline; ``n_met`` of these were answered in time.
    :ivar most_behind_s: how much later than recorded a frame was played, at worst.
    """

    n_frames_played: int = 0
    n_frames_used: int = 0
    n_frames_dropped: int = 0
    n_reused: int = 0
    n_stale: int = 0
    n_asked: int = 0
    n_deadline: int = 0
    n_met: int = 0
    n_busy: int = 0
    n_timeout: int = 0
    most_behind_s: float = 0.0


@dataclass
class _Asked:
    """One question on its way.

    :ivar trigger: the frame that it was put at.
    :ivar used: message and pixels of the frame that it was answered about, if it came to that.
    """

    question: BagQuestion
    trigger: BagFrame
    asked_s: float
    deadline_s: float | None
    used: tuple[BagFrame, Frame] | None = None
    answer: Answer | None = None
    done_s: float = 0.0


def check_unplayed(out: Path) -> None:
    """That a play can be recorded in a folder; reads no more than its results, so ask before a model is loaded.

    :raise EvaluationError: if there are answers already: half a play cannot be gone on with.
    """
    n_rows = sum(1 for _ in read_results(out)) if (out / RESULTS).exists() else 0
    if n_rows:
        raise EvaluationError(
            f'{out} holds {n_rows} answers; a play in real time cannot go on in the middle: give another --out'
        )


def run_realtime(
    bag: Bag,
    plan: Plan,
    assistant: Assistant,
    out: Path,
    record: RunRecord,
    settings: RealtimeSettings,
    *,
    on_progress: OnProgress,
) -> None:
    """Play the whole bag once; takes as long as it was recorded, and to the last answer.

    :raise EvaluationError: see ``check_unplayed``.
    :raise BagError: if the bag is damaged, or a question has no frame.
    :raise DiskSpaceError: if the disk is full; what was answered is kept.
    """
    check_unplayed(out)
    n_expected = record.fields['n_expected'] = sum(plan.count().values())
    with ResultsWriter(out) as results:
        player = _Player(bag, plan, assistant, out, settings)

        def write(row: dict[str, Any]) -> None:
            results.add(row)
            on_progress(results.n_rows, n_expected)
            record.fields['realtime'] = player.counted()
            record.save_now_and_then(results.n_rows)

        record.save(0)
        try:
            player.play(write)
            results.sync()
            record.fields['realtime'] = player.counted()
            record.save(results.n_rows, finished=True)
        except BaseException:
            with suppress(MobileVLMError):  # a second error would hide the first
                record.save(results.n_rows)
            raise


@dataclass
class _Player:
    """See the module."""

    bag: Bag
    plan: Plan
    assistant: Assistant
    out: Path
    settings: RealtimeSettings
    counts: _Counts = field(default_factory=_Counts)

    def __post_init__(self) -> None:
        topics = sorted(set(self.plan.topics.values()))
        self._origin_ns = min(self.bag.topic(topic).first_ns for topic in topics)
        self._started_s = time.monotonic()
        self._store = FrameStore(topics, self._now_ns)
        self._pictures = Pictures(self.out, [topic.name for topic in self.bag.topics])
        self._answered: SimpleQueue[_Asked] = SimpleQueue()
        # Which message pixels came from: the runtime hands on the very array that it was given.
        self._messages: OrderedDict[int, BagFrame] = OrderedDict()
        self._used: dict[str, int] = {}
        self._ahead = AheadEncoder(
            self.assistant,
            self._store,
            AheadSettings(self.settings.encode_ahead_duty, self.settings.encode_ahead_max_lag_s, tuple(topics)),
        )

    def _now_s(self) -> float:
        return time.monotonic() - self._started_s

    def _now_ns(self) -> int:
        """The recorder's clock, as it stood at this moment of the play."""
        return self._origin_ns + round(self._now_s() * 1e9)

    def counted(self) -> dict[str, Any]:
        """For the description of the run."""
        counts = self.counts
        return asdict(counts) | {'n_frames_dropped': counts.n_frames_played - counts.n_frames_used}

    def play(self, write: Callable[[dict[str, Any]], None]) -> None:
        """Play, and hand over the lines as answers come."""
        warm_up(self.assistant)
        worker = QuestionWorker(self.assistant, capacity=self.settings.queue_size, idle=self._ahead)
        n_open = 0
        try:
            self._started_s = time.monotonic()
            for message, questions in self.plan.all_frames():
                due_s = (message.received_ns - self._origin_ns) / 1e9
                while (wait_s := due_s - self._now_s()) > 0:
                    n_open -= self._written(write, min(wait_s, _LONGEST_WAIT_S))
                self.counts.most_behind_s = max(self.counts.most_behind_s, -wait_s)
                self._arrives(message)
                for question in questions:
                    self._ask(question, message, worker)
                    n_open += 1
            while n_open:
                n_open -= self._written(write, _LONGEST_WAIT_S)
        finally:
            worker.stop()

    def _arrives(self, message: BagFrame) -> None:
        def decode() -> tuple[NDArray[np.uint8], str]:
            frame = decoded(self.bag, message)
            if frame is None:
                raise BadImageError(f'message {message.index} of {message.topic} is broken')
            self._messages[id(frame.rgb_hwc)] = replace(message, serialized=b'')
            while len(self._messages) > _REMEMBERED_FRAMES:
                self._messages.popitem(last=False)
            return frame.rgb_hwc, frame.frame_id

        self._store.put(message.topic, PendingFrame(message.stamp_ns, self._now_ns(), decode))
        self.counts.n_frames_played += 1

    def _ask(self, question: BagQuestion, message: BagFrame, worker: QuestionWorker) -> None:
        deadline_s = question.deadline_s or self.settings.deadline_s
        asked = _Asked(question, message, self._now_s(), deadline_s)
        plain = replace(question.asked(), camera=message.topic, deadline_s=deadline_s)
        max_age_s = question.max_frame_age_s or self.settings.max_frame_age_s

        def take_frame() -> Frame:
            frame = self._ahead.take(message.topic, max_age_s)
            asked.used = self._messages[id(frame.rgb_hwc)], frame
            return frame

        def on_done(answer: Answer) -> None:
            asked.answer, asked.done_s = answer, self._now_s()
            self._answered.put(asked)

        unlimited = AssistantSettings(min_confidence=0.0)
        job = Job(plain, take_frame, on_done, settings=unlimited, group=message.topic)
        self.counts.n_asked += 1
        try:
            worker.submit(job)
        except MobileVLMError as error:
            on_done(refusal(plain, error, model_id=self.assistant.model_id))

    def _written(self, write: Callable[[dict[str, Any]], None], wait_s: float) -> int:
        """Write the answers that come within a while; returns how many."""
        n_written = 0
        deadline_s = time.monotonic() + wait_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            try:
                asked = self._answered.get(timeout=left_s)
            except Empty:
                break
            write(self._row(asked))
            n_written += 1
        return n_written

    def _row(self, asked: _Asked) -> dict[str, Any]:
        answer, counts = asked.answer, self.counts
        assert answer is not None
        topic = asked.trigger.topic
        in_time = answer.result_code < FIRST_FAILURE
        image, reused, used_index = '', False, None
        if asked.used is not None:
            message, frame = asked.used
            used_index = message.index
            image = self._pictures.save(message, frame.rgb_hwc)
            reused = self._used.get(topic) == used_index
            counts.n_frames_used += self._used.get(topic, -1) < used_index
            self._used[topic] = max(used_index, self._used.get(topic, -1))
        counts.n_reused += reused
        counts.n_stale += answer.result_code is ResultCode.STALE
        counts.n_busy += answer.result_code is ResultCode.BUSY
        counts.n_timeout += answer.result_code is ResultCode.TIMEOUT
        counts.n_deadline += asked.deadline_s is not None
        counts.n_met += asked.deadline_s is not None and in_time
        realtime = {
            'deadline_s': asked.deadline_s,
            'met': in_time,
            'age_s': answer.age_s,
            'reused': reused,
            'stale': answer.result_code is ResultCode.STALE,
            'asked_s': asked.asked_s,
            'done_s': asked.done_s,
            'used_frame_index': used_index,
            'used_stamp_ns': answer.stamp_ns,
        }
        reply = Reply.of(answer)
        frame_id = answer.frame_id
        return row_of(
            'seen', asked.question, asked.trigger, reply, self.assistant.model_id,
            frame_id=frame_id, image=image, realtime=realtime,
        )  # fmt: skip
