"""One bounded queue and the one thread that answers.

Whoever asks submits a job and is told later what became of it: exactly once for each accepted job, whatever happens.
A full queue refuses at once. A deadline counts from acceptance, waiting included; a job that is canceled or whose
deadline passes while it waits is answered then, not when its turn would have come.

Closed questions about the same camera that wait one after the other are answered together, in one batch. While nobody
asks, the thread does other work if there is any, and drops it at once when somebody does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Protocol

from mobilevlm_ros.errors import BusyError, MobileVLMError, NotActiveError, StaleFrameError
from mobilevlm_ros.runtime.asking import Asked, AssistantSettings, Progress, ignore_progress
from mobilevlm_ros.runtime.assistant import Assistant
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.types import Answer, AnswerFormat, Frame, Question, ResultCode, Timing

__all__ = ['IdleWork', 'Job', 'QuestionWorker', 'refusal']

_logger = logging.getLogger(__name__)
_CLOSED = (AnswerFormat.YES_NO, AnswerFormat.CHOICE)


class IdleWork(Protocol):
    """What the thread may do while nobody asks."""

    def wait_s(self) -> float | None:
        """Seconds until there may be something to do; None: nothing until ``QuestionWorker.wake``."""
        ...

    def work(self, cancel: CancelToken) -> None:
        """Do some of it; return soon after ``cancel`` is set."""
        ...


@dataclass(eq=False)
class Job:
    """One accepted question.

    :ivar take_frame: gives the frame when the question's turn comes; its errors become result codes.
    :ivar on_done: told the answer, once: on the worker's thread, or, for a job that never began, on the thread that
        canceled it.
    :ivar on_progress: told of stages and text, on the worker's thread.
    :ivar group: jobs with equal groups are about the same frame, if they are taken up together; None: never.
    """

    question: Question
    take_frame: Callable[[], Frame]
    on_done: Callable[[Answer], None]
    on_progress: Callable[[Progress], None] = ignore_progress
    settings: AssistantSettings | None = None
    group: Hashable | None = None
    cancel: CancelToken = field(default_factory=CancelToken)
    accepted_s: float = field(default_factory=time.monotonic)
    watches: ExitStack = field(default_factory=ExitStack)
    is_answered: bool = False

    def goes_with(self, other: Job) -> bool:
        """Whether the two can be answered in one batch."""
        return (
            self.group is not None
            and self.group == other.group
            and self.question.format in _CLOSED
            and other.question.format in _CLOSED
        )


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

    :param capacity: how many jobs may wait besides the one, or those, that run.
    :param idle: what to do while nobody asks.
    """

    def __init__(self, assistant: Assistant, *, capacity: int, idle: IdleWork | None = None) -> None:
        self._assistant = assistant
        self._capacity = capacity
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._stopping = False
        self._idle = idle
        self._idle_cancel = CancelToken()
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
            if len(self._waiting) + bool(self._running) > self._capacity:
                n_open = len(self._waiting) + len(self._running)
                raise BusyError(
                    f'{n_open} questions are open already: ask again later, or raise queue_size ({self._capacity})'
                )
            # Before the thread can see the job: delivering its answer ends the watches.
            deadline_s = job.question.deadline_s
            job.watches.enter_context(job.cancel.on_set(lambda: self._answer_waiting(job)))
            job.watches.enter_context(job.cancel.deadline(None if deadline_s is None else job.accepted_s + deadline_s))
            self._waiting.append(job)
            self._interrupt_idle_work()
        if job.cancel.is_set:
            self._answer_waiting(job)

    def wake(self) -> None:
        """Look again whether there is something to do while nobody asks."""
        with self._changed:
            self._changed.notify()

    def _interrupt_idle_work(self) -> None:
        self._idle_cancel.set(ResultCode.CANCELED, 'a question came')
        self._changed.notify()

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Refuse new jobs, interrupt the running one, answer all with NOT_ACTIVE; may be called again.

        :return: whether the thread ended in time.
        """
        with self._changed:
            self._stopping = True
            open_jobs = [*self._waiting, *self._running]
            self._interrupt_idle_work()
        for job in open_jobs:
            job.cancel.set(ResultCode.NOT_ACTIVE, 'the node left the active state while the question was open')
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _answer_waiting(self, job: Job) -> None:
        """Answer a job that was stopped before its turn, or that others are answered with; one alone has its token."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
            elif job not in self._running or len(self._running) == 1:
                return
        self._deliver(job, self._answer(job))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = []
                has_idle_work = self._wait_for_work()
                if not self._waiting and self._stopping:
                    return
                jobs = self._take_jobs()
                idle, cancel = self._idle, CancelToken()
                self._idle_cancel = cancel
            if jobs:
                self._answer_jobs(jobs)
            elif has_idle_work and idle is not None:
                try:
                    idle.work(cancel)
                except Exception:  # a bug there must not end the answering of questions
                    _logger.exception('the work while nobody asks failed, and is given up')
                    self._idle = None

    def _wait_for_work(self) -> bool:
        """Returns whether it is work for when nobody asks; the lock is held."""
        while not (self._waiting or self._stopping):
            wait_s = self._idle.wait_s() if self._idle is not None else None
            if wait_s is not None and wait_s <= 0:
                return True
            self._changed.wait(wait_s)
        return False

    def _take_jobs(self) -> list[Job]:
        """The next job, and those right behind it that can be answered with it; the lock is held."""
        jobs: list[Job] = []
        while self._waiting and (not jobs or jobs[0].goes_with(self._waiting[0])):
            jobs.append(self._waiting.popleft())
        self._running = list(jobs)
        return jobs

    def _answer_jobs(self, jobs: list[Job]) -> None:
        if len(jobs) > 1:
            try:
                answers = self._answer_together(jobs)
            except Exception:  # a bug, perhaps of one listener: alone, each job is told of its own
                _logger.exception('answering %d questions together failed', len(jobs))
            else:
                for job, answer in zip(jobs, answers, strict=True):
                    self._deliver(job, answer)
                return
        for job in jobs:
            if not job.is_answered:
                self._deliver(job, self._answer(job))

    def _deliver(self, job: Job, answer: Answer) -> None:
        job.watches.close()
        with self._changed:
            if job.is_answered:
                return
            job.is_answered = True
            # Before the asker is told: whoever asks again at once must find the place free.
            if job in self._running:
                self._running.remove(job)
        try:
            job.on_done(answer)
        except Exception:  # the listener's fault must not end the worker
            _logger.exception('delivering the answer to question %r failed', job.question.id)

    def _answer_together(self, jobs: list[Job]) -> list[Answer]:
        """One answer for each job, in order; in two batches if a newer frame arrived between taking two of them."""
        answers: dict[Job, Answer] = {}
        taken: list[tuple[Job, Frame, Timing]] = []
        for job in jobs:
            timing = Timing(queue_s=time.monotonic() - job.accepted_s)
            try:
                taken.append((job, self._take_frame(job, timing), timing))
            except MobileVLMError as error:
                answers[job] = self._refusal(job, error, timing)
        while taken:
            frame = taken[0][1]
            batch = [one for one in taken if one[1].rgb_hwc is frame.rgb_hwc]
            taken = [one for one in taken if one[1].rgb_hwc is not frame.rgb_hwc]
            asked = [Asked(job.question, job.cancel, job.on_progress, timing, job.settings) for job, _, timing in batch]
            for (job, own, _), answer in zip(batch, self._assistant.ask_many(asked, frame), strict=True):
                answers[job] = replace(answer, age_s=own.age_s)
        return [answers[job] for job in jobs]

    @staticmethod
    def _take_frame(job: Job, timing: Timing) -> Frame:
        job.cancel.raise_if_set()
        started_s = time.monotonic()
        frame = job.take_frame()
        timing.image_s = time.monotonic() - started_s
        return frame

    def _refusal(self, job: Job, error: MobileVLMError, timing: Timing) -> Answer:
        timing.total_s = time.monotonic() - job.accepted_s
        return refusal(job.question, error, timing, self._assistant.model_id)

    def _answer(self, job: Job) -> Answer:
        timing = Timing(queue_s=time.monotonic() - job.accepted_s)
        try:
            return self._assistant.ask(
                job.question,
                self._take_frame(job, timing),
                cancel=job.cancel,
                on_progress=job.on_progress,
                timing=timing,
                settings=job.settings,
            )
        except MobileVLMError as error:
            return self._refusal(job, error, timing)
        except Exception as error:  # a bug; the asker is told, the log has the traceback, the next question is answered
            _logger.exception('answering question %r failed', job.question.id)
            timing.total_s = time.monotonic() - job.accepted_s
            message = f'internal error ({type(error).__name__}: {error}); the log of the node has the details'
            return Answer(job.question, ResultCode.ENGINE_ERROR, message=message, timing=timing)
