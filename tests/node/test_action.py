"""The action: streaming, cancelling, deadlines."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
from action_msgs.msg import GoalStatus
from mobilevlm_msgs.msg import Answer
from numpy.typing import NDArray
from robot import LONG_TOKENS, Robot, wait_until

Pixels = NDArray[np.uint8]


def finished(robot: Robot, handle: Any) -> Any:
    """Status and result of a goal."""
    return robot.result(handle.get_result_async())


def test_text_is_streamed(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    feedback: list[Any] = []
    result = finished(robot, robot.goal(on_feedback=feedback.append, max_tokens=40))
    assert result.status == GoalStatus.STATUS_SUCCEEDED
    assert result.result.success
    texts = [item.text for item in feedback if item.text]
    assert len(texts) > 5
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert result.result.answer.startswith(texts[-1])
    stages = [item.stage for item in feedback]
    assert stages[0] == 'queued'
    assert {'vision', 'decode'} <= set(stages)


def test_service_and_action_answer_alike(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    by_service = robot.ask(max_tokens=20)
    by_action = finished(robot, robot.goal(max_tokens=20)).result.detail
    assert by_action.text == by_service.text
    assert by_action.prompt_hash == by_service.prompt_hash


def test_cancel_mid_answer_returns_the_partial_text(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    feedback: list[Any] = []
    handle = robot.goal(on_feedback=feedback.append, max_tokens=LONG_TOKENS)
    wait_until(lambda: len(feedback) > 20)
    started_s = time.monotonic()
    handle.cancel_goal_async()
    result = finished(robot, handle)
    assert time.monotonic() - started_s < 0.2
    assert result.status == GoalStatus.STATUS_CANCELED
    assert result.result.detail.result_code == Answer.CANCELED
    assert result.result.answer
    assert 0 < result.result.detail.timing.generated_tokens < LONG_TOKENS
    assert robot.ask().result_code == Answer.OK


def test_cancel_while_waiting_is_served_at_once(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    running = robot.goal(max_tokens=LONG_TOKENS)
    wait_until(lambda: robot.node._session.worker._running)
    waiting = robot.goal(max_tokens=4)
    waiting.cancel_goal_async()
    result = finished(robot, waiting)
    assert result.status == GoalStatus.STATUS_CANCELED
    assert robot.node._session.worker._running
    running.cancel_goal_async()
    assert finished(robot, running).status == GoalStatus.STATUS_CANCELED


def test_deadline_aborts_with_the_partial_text(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    result = finished(robot, robot.goal(max_tokens=LONG_TOKENS, deadline_s=0.3))
    assert result.status == GoalStatus.STATUS_ABORTED
    assert result.result.detail.result_code == Answer.TIMEOUT
    assert result.result.answer
    assert not result.result.success


def test_refused_goal_says_why(robot: Robot) -> None:
    result = finished(robot, robot.goal('', max_tokens=4))
    assert result.status == GoalStatus.STATUS_ABORTED
    assert result.result.detail.result_code == Answer.BAD_QUESTION


def test_full_queue_aborts_with_busy(make_robot: Any, photo: Pixels) -> None:
    robot = make_robot(queue_size=1).start()
    robot.show(robot.image(photo))
    handles = [robot.goal(max_tokens=LONG_TOKENS) for _ in range(2)]
    result = finished(robot, robot.goal(max_tokens=4))
    assert result.result.detail.result_code == Answer.BUSY
    for handle in handles:
        handle.cancel_goal_async()
        finished(robot, handle)


def test_client_that_goes_away_mid_answer(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    feedback: list[Any] = []
    robot.goal(on_feedback=feedback.append, max_tokens=500)
    wait_until(lambda: len(feedback) > 5)
    robot.drop_action_client()
    assert robot.ask().result_code == Answer.OK
