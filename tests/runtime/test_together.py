"""Closed questions that wait for the same camera are answered in one batch; nothing else about the queue changes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from mobilevlm_ros.errors import BusyError, NoFrameError
from mobilevlm_ros.runtime.asking import Asked, Progress
from mobilevlm_ros.runtime.assistant import Assistant
from mobilevlm_ros.runtime.loading import fake_assistant
from mobilevlm_ros.runtime.worker import Job, QuestionWorker
from mobilevlm_ros.types import Answer, AnswerFormat, Frame, Question, ResultCode

PIXELS = np.zeros((4, 4, 3), np.uint8)
WAIT_S = 10.0


class Desk:
    """Hands in questions behind one that holds the worker up, and records what is asked together."""

    def __init__(self, assistant: Assistant, capacity: int = 8) -> None:
        self.assistant = assistant
        self.answers: queue.Queue[Answer] = queue.Queue()
        self.batches: list[list[str]] = []
        self.open = threading.Event()
        self.entered = threading.Event()
        ask_many = assistant.ask_many

        def recorded(asked: Any, frame: Frame, **options: Any) -> list[Answer]:
            self.batches.append([one.question.id for one in asked if isinstance(one, Asked)])
            return ask_many(asked, frame, **options)

        assistant.ask_many = recorded  # type: ignore[method-assign]
        self.worker = QuestionWorker(assistant, capacity=capacity)

    def hold(self) -> None:
        """Keep the worker busy until ``release``."""

        def take() -> Frame:
            self.entered.set()
            assert self.open.wait(WAIT_S)
            return Frame(PIXELS)

        self.ask('hold', AnswerFormat.TEXT, take_frame=take)
        assert self.entered.wait(WAIT_S)

    def release(self) -> None:
        self.open.set()

    def ask(self, identity: str, answer_format: AnswerFormat = AnswerFormat.YES_NO, **options: Any) -> Job:
        choices = ('a', 'b') if answer_format is AnswerFormat.CHOICE else ()
        question = Question(
            f'is it {identity}?', answer_format, choices, id=identity, deadline_s=options.pop('deadline_s', None)
        )
        defaults = {'take_frame': lambda: Frame(PIXELS), 'on_done': self.answers.put, 'group': 'front'}
        job = Job(question, **{**defaults, **options})
        self.worker.submit(job)
        return job

    def answered(self, n: int) -> list[Answer]:
        return [self.answers.get(timeout=WAIT_S) for _ in range(n)]


@pytest.fixture
def make_desk() -> Iterator[Callable[..., Desk]]:
    with ExitStack() as stack:

        def make(assistant: Assistant | None = None, capacity: int = 8) -> Desk:
            desk = Desk(assistant or fake_assistant(token_s=0.0), capacity)
            stack.callback(desk.worker.stop)
            stack.callback(desk.release)
            return desk

        yield make


@pytest.fixture
def desk(make_desk: Callable[..., Desk]) -> Desk:
    desk = make_desk()
    desk.hold()
    return desk


def test_waiting_closed_questions_about_a_camera_are_asked_together_in_order(desk: Desk) -> None:
    for identity in 'abc':
        desk.ask(identity)
    desk.ask('d', AnswerFormat.CHOICE)
    desk.release()

    answers = desk.answered(5)

    assert [answer.question.id for answer in answers] == ['hold', *'abcd']
    assert {answer.result_code for answer in answers} <= {ResultCode.OK, ResultCode.UNKNOWN}
    assert desk.batches == [['hold'], [*'abcd']]


def test_nothing_is_asked_out_of_order_for_the_sake_of_a_batch(desk: Desk) -> None:
    desk.ask('a')
    desk.ask('b', AnswerFormat.TEXT)
    desk.ask('c')
    desk.ask('d', group='rear')
    desk.ask('e', group=None)
    desk.ask('f', group=None)
    desk.ask('g')
    desk.ask('h')
    desk.release()

    assert [answer.question.id for answer in desk.answered(9)] == ['hold', *'abcdefgh']
    assert desk.batches == [['hold'], ['a'], ['b'], ['c'], ['d'], ['e'], ['f'], ['g', 'h']]


def test_a_question_that_comes_alone_does_not_wait_for_others(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk()

    desk.ask('a')

    assert desk.answered(1)[0].question.id == 'a'


def test_a_newer_frame_between_two_questions_makes_two_batches(desk: Desk) -> None:
    newer = np.ones((4, 4, 3), np.uint8)
    for identity, pixels in zip('abcd', (PIXELS, PIXELS, newer, newer), strict=True):
        desk.ask(identity, take_frame=lambda pixels=pixels: Frame(pixels, stamp_ns=int(pixels[0, 0, 0])))
    desk.release()

    answers = desk.answered(5)[1:]

    assert [answer.question.id for answer in answers] == [*'abcd']
    assert [answer.stamp_ns for answer in answers] == [0, 0, 1, 1]
    assert desk.batches[1:] == [['a', 'b'], ['c', 'd']]


def test_a_question_without_a_frame_does_not_spoil_the_others(desk: Desk) -> None:
    def fail() -> Frame:
        raise NoFrameError('none yet')

    desk.ask('a')
    desk.ask('b', take_frame=fail)
    desk.ask('c')
    desk.release()

    codes = {answer.question.id: answer.result_code for answer in desk.answered(4)}

    assert codes['b'] is ResultCode.NO_FRAME
    assert {codes['a'], codes['c']} <= {ResultCode.OK, ResultCode.UNKNOWN}


def test_each_answer_tells_its_own_age_of_the_frame(desk: Desk) -> None:
    desk.ask('a', take_frame=lambda: Frame(PIXELS, age_s=0.5))
    desk.ask('b', take_frame=lambda: Frame(PIXELS, age_s=0.75))
    desk.release()

    assert [answer.age_s for answer in desk.answered(3)[1:]] == [0.5, 0.75]


def test_a_bug_of_one_listener_is_told_to_its_asker_alone(desk: Desk) -> None:
    def fail(progress: Progress) -> None:
        raise ZeroDivisionError('progress')

    desk.ask('a')
    desk.ask('b', on_progress=fail)
    desk.ask('c')
    desk.release()

    codes = {answer.question.id: answer.result_code for answer in desk.answered(4)}

    assert codes['b'] is ResultCode.ENGINE_ERROR
    assert {codes['a'], codes['c']} <= {ResultCode.OK, ResultCode.UNKNOWN}


class Computing:
    """Stops an assistant in the middle of a batch."""

    def __init__(self, assistant: Assistant) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        branch = assistant.language.branch

        def slow(paths: Any, cancel: Any) -> Any:
            self.begun.set()
            while not (self.go_on.wait(0.002) or cancel.is_set):
                pass
            return branch(paths, cancel)

        assistant.language.branch = slow  # type: ignore[method-assign]


@pytest.fixture
def computing(desk: Desk) -> Computing:
    return Computing(desk.assistant)


def test_canceled_in_a_batch_is_answered_at_once_and_the_others_go_on(desk: Desk, computing: Computing) -> None:
    jobs = [desk.ask(identity) for identity in 'abc']
    desk.release()
    assert computing.begun.wait(WAIT_S)
    desk.answered(1)

    jobs[1].cancel.set()

    (answer,) = desk.answered(1)
    assert (answer.question.id, answer.result_code) == ('b', ResultCode.CANCELED)
    assert not computing.go_on.is_set()
    computing.go_on.set()
    assert [answer.question.id for answer in desk.answered(2)] == ['a', 'c']


def test_a_deadline_in_a_batch_is_met_and_the_others_go_on(desk: Desk, computing: Computing) -> None:
    desk.ask('a')
    desk.ask('b', deadline_s=0.2)
    desk.release()
    desk.answered(1)

    (answer,) = desk.answered(1)

    assert (answer.question.id, answer.result_code) == ('b', ResultCode.TIMEOUT)
    computing.go_on.set()
    assert desk.answered(1)[0].question.id == 'a'


def test_when_all_of_a_batch_are_canceled_it_stops(desk: Desk, computing: Computing) -> None:
    jobs = [desk.ask(identity) for identity in 'ab']
    desk.release()
    assert computing.begun.wait(WAIT_S)
    desk.answered(1)

    for job in jobs:
        job.cancel.set()

    assert {answer.result_code for answer in desk.answered(2)} == {ResultCode.CANCELED}
    desk.ask('c', AnswerFormat.TEXT)
    assert desk.answered(1)[0].question.id == 'c'  # although nobody let the batch go on


def test_stopping_answers_a_batch_once(desk: Desk, computing: Computing) -> None:
    for identity in 'abc':
        desk.ask(identity)
    desk.release()
    assert computing.begun.wait(WAIT_S)
    desk.answered(1)

    assert desk.worker.stop()

    assert {answer.result_code for answer in desk.answered(3)} == {ResultCode.NOT_ACTIVE}
    assert desk.answers.empty()


def test_a_batch_takes_the_place_of_one(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk(capacity=2)
    desk.hold()
    computing = Computing(desk.assistant)
    desk.ask('a')
    desk.ask('b')
    with pytest.raises(BusyError):
        desk.ask('c')
    desk.release()
    assert computing.begun.wait(WAIT_S)

    desk.ask('c')
    desk.ask('d')
    with pytest.raises(BusyError, match='4 questions are open'):
        desk.ask('e')

    computing.go_on.set()
    assert len(desk.answered(5)) == 5


def test_a_rush_with_cancels_and_deadlines_gets_one_answer_for_each(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk(capacity=64)
    accepted: list[str] = []
    lock = threading.Lock()

    def client(name: int) -> None:
        random = np.random.default_rng(name)
        for number in range(40):
            try:
                job = desk.ask(f'{name}/{number}', deadline_s=float(random.choice([0.0, 0.002, 30.0])) or None)
            except BusyError:
                continue
            with lock:
                accepted.append(job.question.id)
            if random.random() < 0.3:
                job.cancel.set()

    threads = [threading.Thread(target=client, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert desk.worker.stop()

    answered = []
    while not desk.answers.empty():
        answered.append(desk.answers.get_nowait().question.id)
    assert sorted(answered) == sorted(accepted)
    assert max(len(batch) for batch in desk.batches) > 1


def test_on_real_engines(make_desk: Callable[..., Desk], tiny_assistant: Assistant) -> None:
    desk = make_desk(tiny_assistant)
    desk.hold()
    for identity in 'abcd':
        desk.ask(identity)
    desk.release()

    answers = desk.answered(5)[1:]

    assert all(sum(answer.probabilities) == pytest.approx(1.0) for answer in answers)
    assert desk.batches[-1] == [*'abcd']
