"""One bounded queue and the one thread that answers.

Whoever asks submits a job and is told later what became of it: exactly once for each accepted job, whatever happens.
A full queue refuses at once. A deadline counts from acceptance, waiting included; a job that is canceled or whose
deadline passes while it waits is answered then, not when its turn would have come.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from mobilevlm_ros.errors import BusyError, MobileVLMError, NotActiveError, StaleFrameError
from mobilevlm_ros.runtime.assistant import Assistant, AssistantSettings, Progress
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.types import Answer, Frame, Question, ResultCode, Timing

__all__ = ['Job', 'QuestionWorker', 'refusal']

_logger = logging.getLogger(__name__)


def _ignore_progress(progress: Progress) -> None:
    """The default listener."""


@dataclass(eq=False)
class Job:
    """One accepted question.

    :ivar take_frame: gives the frame when the question's turn comes; its errors become result codes.
    :ivar on_done: told the answer, once: on the worker's thread, or, for a job that never began, on the thread that
        canceled it.
    :ivar on_progress: told of stages and text, on the worker's thread.
    """

    question: Question
    take_frame: Callable[[], Frame]
    on_done: Callable[[Answer], None]
    on_progress: Callable[[Progress], None] = _ignore_progress
    settings: AssistantSettings | None = None
    cancel: CancelToken = field(default_factory=CancelToken)
    accepted_s: float = field(default_factory=time.monotonic)
    watches: ExitStack = field(default_factory=ExitStack)


def refusal(question: Question, error: MobileVLMError, timing: Timing | None = None, model_id: str = '') -> Answer:
    """The answer to a question that could not be asked because of ``error``."""
    answer = Answer(question, error.code, message=str(error), camera=question.camera, model_id=model_id)
    if isinstance(error, StaleFrameError):
        frame = error.frame
        answer = replace(
            answer, camera=frame.camera, frame_id=frame.frame_id, stamp_ns=frame.stamp_ns, age_s=frame.age_s
        )
    return answer if timing is None else replace(answer, timing=timing)


class QuestionWorker:
    """Answers jobs one after the other, in the order of acceptance.

    :param capacity: how many jobs may wait besides the one that runs.
    """

    def __init__(self, assistant: Assistant, *, capacity: int) -> None:
        self._assistant = assistant
        self._capacity = capacity
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name='question-worker', daemon=True)
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        """Accepted jobs that have not begun."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Accept a job, or refuse it at once.

        :raise BusyError: if ``capacity`` jobs wait already.
        :raise NotActiveError: if the worker was stopped.
        """
        with self._changed:
            if self._stopping:
                raise NotActiveError('questions are not answered at present: the node is not active')
            n_open = len(self._waiting) + (self._running is not None)
            if n_open > self._capacity:
                raise BusyError(
                    f'{n_open} questions are open already: ask again later, or raise queue_size ({self._capacity})'
                )
            # Before the thread can see the job: delivering its answer ends the watches.
            deadline_s = job.question.deadline_s
            job.watches.enter_context(job.cancel.on_set(lambda: self._answer_waiting(job)))
            job.watches.enter_context(job.cancel.deadline(None if deadline_s is None else job.accepted_s + deadline_s))
            self._waiting.append(job)
            self._changed.notify()
        if job.cancel.is_set:
            self._answer_waiting(job)

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Refuse new jobs, interrupt the running one, answer all with NOT_ACTIVE; may be called again.

        :return: whether the thread ended in time.
        """
        with self._changed:
            self._stopping = True
            open_jobs = [*self._waiting, *([self._running] if self._running else [])]
            self._changed.notify()
        for job in open_jobs:
            job.cancel.set(ResultCode.NOT_ACTIVE, 'the node left the active state while the question was open')
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _answer_waiting(self, job: Job) -> None:
        """Answer a job that was stopped before its turn; the running one is told by its token."""
        with self._changed:
            if job not in self._waiting:
                return
            self._waiting.remove(job)
        self._deliver(job, self._answer(job))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if not self._waiting:
                    return
                job = self._running = self._waiting.popleft()
            self._deliver(job, self._answer(job))

    def _deliver(self, job: Job, answer: Answer) -> None:
        job.watches.close()
        with self._changed:
            # Before the asker is told: whoever asks again at once must find the place free.
            if self._running is job:
                self._running = None
        try:
            job.on_done(answer)
        except Exception:  # the listener's fault must not end the worker
            _logger.exception('delivering the answer to question %r failed', job.question.id)

    def _answer(self, job: Job) -> Answer:
        timing = Timing(queue_s=time.monotonic() - job.accepted_s)
        try:
            job.cancel.raise_if_set()
            image_started_s = time.monotonic()
            frame = job.take_frame()
            timing.image_s = time.monotonic() - image_started_s
            return self._assistant.ask(
                job.question,
                frame,
                cancel=job.cancel,
                on_progress=job.on_progress,
                timing=timing,
                settings=job.settings,
            )
        except MobileVLMError as error:
            timing.total_s = time.monotonic() - job.accepted_s
            return refusal(job.question, error, timing, self._assistant.model_id)
        except Exception as error:  # a bug; the asker is told, the log has the traceback, the next question is answered
            _logger.exception('answering question %r failed', job.question.id)
            timing.total_s = time.monotonic() - job.accepted_s
            message = f'internal error ({type(error).__name__}: {error}); the log of the node has the details'
            return Answer(job.question, ResultCode.ENGINE_ERROR, message=message, timing=timing)
