"""One bounded queue and one thread: order, refusal, cancelling, deadlines, stopping; each job answered exactly once.

On fake engines with a gate in the way: what is tested is the worker, and when a question runs is the test's to say.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from mobilevlm_ros.errors import BusyError, NoFrameError, NotActiveError, StaleFrameError
from mobilevlm_ros.runtime.assistant import Progress
from mobilevlm_ros.runtime.loading import fake_assistant
from mobilevlm_ros.runtime.worker import Job, QuestionWorker, refusal
from mobilevlm_ros.types import Answer, Frame, Question, ResultCode, Timing

FRAME = Frame(np.zeros((4, 4, 3), np.uint8), camera='front')
WAIT_S = 10.0


class Desk:
    """Hands in questions and collects answers."""

    def __init__(self, worker: QuestionWorker) -> None:
        self.worker = worker
        self.answers: queue.Queue[Answer] = queue.Queue()

    def ask(self, number: int = 0, take_frame: Callable[[], Frame] = lambda: FRAME, **options: Any) -> Job:
        question = Question('what?', id=str(number), deadline_s=options.pop('deadline_s', None))
        job = Job(question, take_frame, **{'on_done': self.answers.put, **options})
        self.worker.submit(job)
        return job

    def answer(self) -> Answer:
        return self.answers.get(timeout=WAIT_S)

    def no_more_answers(self) -> bool:
        return self.answers.empty()


class Gate:
    """A frame source that blocks until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()

    def __call__(self) -> Frame:
        self.entered.set()
        assert self.open.wait(WAIT_S)
        return FRAME


@pytest.fixture
def make_desk() -> Iterator[Callable[[int], Desk]]:
    with ExitStack() as stack:

        def make(capacity: int = 4, token_s: float = 0.0) -> Desk:
            worker = QuestionWorker(fake_assistant(token_s=token_s), capacity=capacity)
            stack.callback(worker.stop)
            return Desk(worker)

        yield make


@pytest.fixture
def desk(make_desk: Callable[..., Desk]) -> Desk:
    return make_desk()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


def test_a_question_is_answered(desk: Desk) -> None:
    desk.ask(1)

    answer = desk.answer()

    assert answer.result_code is ResultCode.OK
    assert answer.text.startswith('fake answer')
    assert (answer.question.id, answer.camera) == ('1', 'front')


def test_questions_are_answered_in_order(desk: Desk, gate: Gate) -> None:
    desk.ask(0, gate)
    for number in range(1, 5):
        desk.ask(number)
    gate.open.set()

    assert [desk.answer().question.id for _ in range(5)] == list('01234')


def test_one_question_runs_at_a_time(desk: Desk, gate: Gate) -> None:
    second = threading.Event()

    def take() -> Frame:
        second.set()
        return FRAME

    desk.ask(0, gate)
    desk.ask(1, take)
    assert gate.entered.wait(WAIT_S)

    assert not second.is_set()
    assert desk.worker.n_waiting == 1
    gate.open.set()
    assert second.wait(WAIT_S)


@pytest.mark.parametrize('capacity', [0, 1, 3])
def test_a_full_queue_refuses_at_once_and_loses_nothing(
    make_desk: Callable[..., Desk], gate: Gate, capacity: int
) -> None:
    desk = make_desk(capacity)
    desk.ask(0, gate)
    assert gate.entered.wait(WAIT_S)
    for number in range(1, capacity + 1):
        desk.ask(number)

    times = []
    for _ in range(20):
        started_s = time.perf_counter()
        with pytest.raises(BusyError, match=rf'{capacity + 1} questions are open.*queue_size \({capacity}\)'):
            desk.ask(99)
        times.append(time.perf_counter() - started_s)

    assert sorted(times)[len(times) // 2] < 0.02
    gate.open.set()
    assert [desk.answer().question.id for _ in range(capacity + 1)] == [str(n) for n in range(capacity + 1)]


def test_a_refused_question_leaves_no_timer_behind(make_desk: Callable[..., Desk], gate: Gate) -> None:
    desk = make_desk(0)
    desk.ask(0, gate)
    before = set(threading.enumerate())

    with pytest.raises(BusyError):
        desk.ask(1, deadline_s=60.0)

    assert set(threading.enumerate()) <= before


def test_whoever_was_answered_can_ask_at_once(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk(0)
    refused: list[BusyError] = []
    done = threading.Event()

    def ask_again(answer: Answer) -> None:
        try:
            desk.ask(2)
        except BusyError as error:
            refused.append(error)
        done.set()

    desk.ask(1, on_done=ask_again)

    assert done.wait(WAIT_S)
    assert not refused
    assert desk.answer().question.id == '2'


def test_canceled_while_waiting_is_answered_at_once(desk: Desk, gate: Gate) -> None:
    desk.ask(0, gate)
    assert gate.entered.wait(WAIT_S)
    waiting = desk.ask(1)

    waiting.cancel.set()

    answer = desk.answer()
    assert (answer.question.id, answer.result_code) == ('1', ResultCode.CANCELED)
    assert not gate.open.is_set()
    assert desk.worker.n_waiting == 0


def test_canceled_before_it_was_submitted_is_answered_at_once(desk: Desk, gate: Gate) -> None:
    desk.ask(0, gate)
    job = Job(Question('what?', id='1'), lambda: FRAME, desk.answers.put)
    job.cancel.set()

    desk.worker.submit(job)

    assert desk.answer().result_code is ResultCode.CANCELED
    gate.open.set()
    assert desk.answer().question.id == '0'


def test_a_deadline_that_passes_while_waiting_is_answered_then(desk: Desk, gate: Gate) -> None:
    desk.ask(0, gate)
    desk.ask(1, deadline_s=0.02)

    answer = desk.answer()

    assert (answer.question.id, answer.result_code) == ('1', ResultCode.TIMEOUT)
    assert answer.timing.total_s >= 0.02
    assert not gate.open.is_set()


def test_a_deadline_counts_from_acceptance(desk: Desk) -> None:
    job = Job(Question('what?', id='1', deadline_s=5.0), lambda: FRAME, desk.answers.put)
    job.accepted_s -= 10.0

    desk.worker.submit(job)

    assert desk.answer().result_code is ResultCode.TIMEOUT


def test_a_running_answer_is_canceled_with_its_partial_text(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk(4, token_s=0.005)
    began = threading.Event()

    def on_progress(progress: Progress) -> None:
        if len(progress.text) >= 3:
            began.set()

    job = desk.ask(1, on_progress=on_progress)
    assert began.wait(WAIT_S)
    job.cancel.set()

    answer = desk.answer()
    assert answer.result_code is ResultCode.CANCELED
    assert 'fake answer'.startswith(answer.text[:11])
    assert len(answer.text) >= 3


def test_a_running_answer_meets_its_deadline_with_partial_text(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk(4, token_s=0.02)
    desk.ask(1, deadline_s=0.2)

    answer = desk.answer()

    assert answer.result_code is ResultCode.TIMEOUT
    assert 0.2 <= answer.timing.total_s < 2.0
    assert answer.text


def test_cancelling_twice_gives_one_answer(desk: Desk, gate: Gate) -> None:
    desk.ask(0, gate)
    waiting = desk.ask(1)

    waiting.cancel.set()
    waiting.cancel.set()
    gate.open.set()

    assert [desk.answer().question.id for _ in range(2)] == ['1', '0']
    assert desk.worker.stop()
    assert desk.no_more_answers()


def test_cancelling_an_answered_question_does_nothing(desk: Desk) -> None:
    job = desk.ask(1)
    desk.answer()

    job.cancel.set()
    desk.ask(2)

    assert desk.answer().question.id == '2'


@pytest.mark.parametrize('take', [NoFrameError('none yet'), StaleFrameError('old', FRAME)], ids=repr)
def test_a_frame_error_becomes_its_code_and_the_next_question_works(desk: Desk, take: Exception) -> None:
    def fail() -> Frame:
        raise take

    desk.ask(1, fail)
    desk.ask(2)

    first, second = desk.answer(), desk.answer()
    assert first.result_code is getattr(take, 'code', None)
    assert (first.message, first.text) == (str(take), '')
    assert second.result_code is ResultCode.OK


def test_a_bug_in_the_frame_source_is_told_and_the_next_question_works(desk: Desk) -> None:
    def fail() -> Frame:
        raise ZeroDivisionError('bug')

    desk.ask(1, fail)
    desk.ask(2)

    first, second = desk.answer(), desk.answer()
    assert first.result_code is ResultCode.ENGINE_ERROR
    assert 'ZeroDivisionError: bug' in first.message
    assert second.result_code is ResultCode.OK


def test_a_bug_in_the_listener_does_not_end_the_worker(desk: Desk) -> None:
    def fail(answer: Answer) -> None:
        raise ZeroDivisionError('listener')

    desk.ask(1, on_done=fail)
    desk.ask(2)

    assert desk.answer().question.id == '2'


def test_a_bug_in_a_progress_listener_is_told_and_the_next_question_works(desk: Desk) -> None:
    def fail(progress: Progress) -> None:
        raise ZeroDivisionError('progress')

    desk.ask(1, on_progress=fail)
    desk.ask(2)

    first, second = desk.answer(), desk.answer()
    assert first.result_code is ResultCode.ENGINE_ERROR
    assert second.result_code is ResultCode.OK


def test_stop_answers_all_open_questions_once(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk(4, token_s=0.02)
    began = threading.Event()
    desk.ask(0, on_progress=lambda progress: began.set() if progress.text else None)
    for number in range(1, 4):
        desk.ask(number)
    assert began.wait(WAIT_S)

    assert desk.worker.stop()

    answers = [desk.answers.get_nowait() for _ in range(4)]
    assert sorted(answer.question.id for answer in answers) == list('0123')
    assert {answer.result_code for answer in answers} == {ResultCode.NOT_ACTIVE}
    assert next(answer for answer in answers if answer.question.id == '0').text
    assert desk.no_more_answers()


def test_stop_may_be_called_again(desk: Desk) -> None:
    assert desk.worker.stop()
    assert desk.worker.stop()


def test_stop_may_be_called_by_a_listener(desk: Desk) -> None:
    stopped = threading.Event()

    def stop(answer: Answer) -> None:
        desk.worker.stop()
        stopped.set()

    desk.ask(1, on_done=stop)

    assert stopped.wait(WAIT_S)
    assert desk.worker.stop()


def test_stop_says_whether_the_thread_ended(desk: Desk, gate: Gate) -> None:
    desk.ask(0, gate)
    assert gate.entered.wait(WAIT_S)

    assert desk.worker.stop(timeout_s=0.01) is False
    gate.open.set()

    assert desk.worker.stop() is True


def test_a_stopped_worker_refuses(desk: Desk) -> None:
    desk.worker.stop()

    with pytest.raises(NotActiveError, match='not active'):
        desk.ask(1)


def test_waiting_time_is_part_of_the_timing(desk: Desk, gate: Gate) -> None:
    desk.ask(0, gate)
    assert gate.entered.wait(WAIT_S)
    started_s = time.monotonic()
    desk.ask(1)
    time.sleep(0.03)  # the time that is measured
    gate.open.set()
    desk.answer()

    timing = desk.answer().timing

    assert 0.03 <= timing.queue_s <= timing.total_s <= time.monotonic() - started_s + 0.01


def test_a_refusal_names_the_stale_frame() -> None:
    frame = Frame(FRAME.rgb_hwc, 'front', 'lens', stamp_ns=5, age_s=9.0)

    answer = refusal(Question('?'), StaleFrameError('old', frame), Timing(queue_s=1.0), 'model')

    assert (answer.result_code, answer.camera, answer.frame_id) == (ResultCode.STALE, 'front', 'lens')
    assert (answer.stamp_ns, answer.age_s, answer.model_id) == (5, 9.0, 'model')
    assert answer.timing.queue_s == 1.0


def test_many_threads_asking_and_cancelling_get_one_answer_for_each_accepted_question(
    make_desk: Callable[..., Desk],
) -> None:
    desk = make_desk(64, token_s=0.0)
    accepted: list[str] = []
    lock = threading.Lock()

    def client(name: int) -> None:
        random = np.random.default_rng(name)
        for number in range(40):
            identity = f'{name}/{number}'
            question = Question('what?', id=identity, deadline_s=float(random.choice([0.0, 0.001, 30.0])) or None)
            job = Job(question, lambda: FRAME, desk.answers.put)
            try:
                desk.worker.submit(job)
            except (BusyError, NotActiveError):
                continue
            with lock:
                accepted.append(identity)
            if random.random() < 0.4:
                job.cancel.set()

    threads = [threading.Thread(target=client, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert desk.worker.stop()

    answered = []
    while not desk.no_more_answers():
        answered.append(desk.answers.get_nowait().question.id)
    assert len(accepted) > 64
    assert sorted(answered) == sorted(accepted)


def test_stopping_in_the_middle_of_a_rush_answers_exactly_the_accepted(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk(4, token_s=0.0)
    accepted: list[str] = []
    rushing = threading.Barrier(5)

    def client(name: int) -> None:
        rushing.wait()
        for number in range(200):
            identity = f'{name}/{number}'
            try:
                desk.worker.submit(Job(Question('what?', id=identity), lambda: FRAME, desk.answers.put))
            except BusyError:
                continue
            except NotActiveError:
                return
            accepted.append(identity)

    threads = [threading.Thread(target=client, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    rushing.wait()
    desk.answer()
    assert desk.worker.stop()
    for thread in threads:
        thread.join(WAIT_S)

    answered = 1
    while not desk.no_more_answers():
        desk.answers.get_nowait()
        answered += 1
    assert answered == len(accepted)


def test_no_thread_is_left_after_stop(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk()
    for number in range(3):
        desk.ask(number, deadline_s=60.0)
    for _ in range(3):
        desk.answer()

    desk.worker.stop()

    left = [thread for thread in threading.enumerate() if thread.name == 'deadline']
    for thread in left:
        thread.join(WAIT_S)
    assert not any(thread.is_alive() for thread in left)
    assert not any(thread.name == 'question-worker' and thread.is_alive() for thread in threading.enumerate())
