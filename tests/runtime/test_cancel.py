"""The switch that stops an answer."""

from __future__ import annotations

import threading
import time

import pytest

from mobilevlm_ros.errors import InterruptedAnswerError
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.types import ResultCode


def test_a_new_token_stops_nothing() -> None:
    token = CancelToken()

    token.raise_if_set()

    assert not token.is_set
    assert token.code is None


def test_a_set_token_raises_its_reason() -> None:
    token = CancelToken()
    token.set(ResultCode.TIMEOUT, 'too late')

    with pytest.raises(InterruptedAnswerError, match='too late') as caught:
        token.raise_if_set()

    assert caught.value.code is ResultCode.TIMEOUT


def test_the_first_reason_wins() -> None:
    token = CancelToken()

    assert token.set(ResultCode.CANCELED, 'first') is True
    assert token.set(ResultCode.TIMEOUT, 'second') is False

    assert (token.code, token.message) == (ResultCode.CANCELED, 'first')


def test_a_callback_is_called_once() -> None:
    token, calls = CancelToken(), []

    with token.on_set(lambda: calls.append(1)):
        token.set()
        token.set()

    assert calls == [1]


def test_a_callback_on_a_set_token_is_called_at_once() -> None:
    token, calls = CancelToken(), []
    token.set()

    with token.on_set(lambda: calls.append(1)):
        assert calls == [1]


def test_a_callback_is_forgotten_after_its_block() -> None:
    token, calls = CancelToken(), []
    with token.on_set(lambda: calls.append(1)):
        pass

    token.set()

    assert calls == []


def test_a_callback_may_look_at_the_token() -> None:
    token, seen = CancelToken(), []

    with token.on_set(lambda: seen.append(token.code)):
        token.set(ResultCode.NOT_ACTIVE, 'bye')

    assert seen == [ResultCode.NOT_ACTIVE]


def test_of_many_threads_one_sets_the_token() -> None:
    token, barrier, first = CancelToken(), threading.Barrier(8), []

    def race() -> None:
        barrier.wait()
        first.append(token.set())

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert first.count(True) == 1


def test_a_deadline_sets_the_token_with_timeout() -> None:
    token, stopped = CancelToken(), threading.Event()

    with token.on_set(stopped.set), token.deadline(time.monotonic() + 0.01):
        assert stopped.wait(5)

    assert token.code is ResultCode.TIMEOUT


def test_a_deadline_that_has_passed_sets_the_token_at_once() -> None:
    token = CancelToken()

    with token.deadline(time.monotonic() - 1.0):
        assert token.code is ResultCode.TIMEOUT


def test_no_deadline_starts_no_timer() -> None:
    before = set(threading.enumerate())

    with CancelToken().deadline(None):
        assert set(threading.enumerate()) <= before


def test_a_deadline_is_off_after_its_block() -> None:
    token = CancelToken()
    before = set(threading.enumerate())
    with token.deadline(time.monotonic() + 60.0):
        (timer,) = set(threading.enumerate()) - before

    timer.join(5)

    assert not timer.is_alive()
    assert not token.is_set


@pytest.mark.filterwarnings('error::pytest.PytestUnhandledThreadExceptionWarning')
@pytest.mark.parametrize('remaining_s', [1e30, float('inf')])
def test_a_deadline_beyond_all_timers_is_none(remaining_s: float) -> None:
    token, before = CancelToken(), set(threading.enumerate())

    with token.deadline(time.monotonic() + remaining_s):
        (timer,) = set(threading.enumerate()) - before
        timer.join(0.05)
        assert timer.is_alive()

    assert not token.is_set


def test_a_deadline_that_is_no_number_has_passed() -> None:
    token = CancelToken()

    with token.deadline(float('nan')):
        assert token.code is ResultCode.TIMEOUT
