"""Encoding while nobody asks, and questions answered together, through the node over real DDS."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from mobilevlm_msgs.msg import Answer
from numpy.typing import NDArray
from rclpy.parameter import Parameter
from robot import LONG_TOKENS, Robot, wait_until

Pixels = NDArray[np.uint8]


def counts(robot: Robot) -> Any:
    return robot.node._session.ahead.counts


def set_parameter(robot: Robot, name: str, value: Any) -> Any:
    return robot.node.set_parameters([Parameter(name, value=value)])[0]


def model_values(robot: Robot) -> dict[str, str]:
    """The newest diagnostics of the model."""
    name = f'{robot.ns.strip("/")}/vqa_node: model'
    found = [status for array in robot.diagnostics for status in array.status if status.name == name]
    return {pair.key: pair.value for pair in found[-1].values} if found else {}


def test_by_default_nothing_is_encoded_ahead(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))

    answer = robot.ask()

    assert not answer.timing.vision_reused
    assert (counts(robot).n_encoded, counts(robot).busy_s) == (0, 0)


def test_a_question_about_a_frame_that_was_encoded_ahead_is_warm(make_robot: Any, photo: Pixels) -> None:
    robot = make_robot(encode_ahead_duty=1.0).start()
    robot.show(robot.image(photo, age_s=0.5))
    wait_until(lambda: counts(robot).n_encoded == 1)

    answer = robot.ask()

    assert answer.result_code == Answer.OK
    assert answer.timing.vision_reused
    assert answer.timing.vision_s == 0
    assert answer.age_s > 0.5
    assert counts(robot).n_hits == 1
    wait_until(lambda: model_values(robot).get('questions about them') == '1')
    assert model_values(robot)['frames encoded ahead'] == '1'


def test_it_can_be_switched_on_and_off_at_any_time(robot: Robot, photo: Pixels) -> None:
    assert set_parameter(robot, 'encode_ahead_duty', 1.0).successful
    robot.show(robot.image(photo))
    wait_until(lambda: counts(robot).n_encoded == 1)

    assert set_parameter(robot, 'cameras.camera.encode_ahead', False).successful
    wait_until(lambda: not robot.node._session.ahead.settings.cameras)
    robot.show(robot.image(255 - photo))
    assert set_parameter(robot, 'cameras.camera.encode_ahead', True).successful
    wait_until(lambda: counts(robot).n_encoded == 2)

    assert set_parameter(robot, 'encode_ahead_duty', 0.0).successful
    wait_until(lambda: robot.node._session.ahead.settings.duty == 0)
    robot.show(robot.image(photo // 2))
    assert not robot.ask().timing.vision_reused
    assert counts(robot).n_encoded == 2


@pytest.mark.parametrize('value', [-0.1, 1.1, float('nan')])
def test_a_share_that_is_none_is_refused(shared_robot: Robot, value: float) -> None:
    assert not set_parameter(shared_robot, 'encode_ahead_duty', value).successful


def test_questions_and_encodings_under_load_then_a_clean_end(make_robot: Any, photo: Pixels) -> None:
    robot = make_robot(encode_ahead_duty=1.0, encode_ahead_max_lag_s=5.0).start()
    robot.show(robot.image(photo))
    stop = threading.Event()

    def film() -> None:
        shift = 0
        while not stop.wait(0.01):
            robot.publish(robot.image(np.roll(photo, shift := shift + 1, axis=1)))

    camera = threading.Thread(target=film)
    camera.start()
    try:
        wait_until(lambda: counts(robot).n_encoded >= 3)
        codes = {robot.ask(max_tokens=2).result_code for _ in range(20)}
        n_hits, first_thread = counts(robot).n_hits, robot.node._session.worker._thread
        assert robot.change_state('deactivate')
        assert robot.change_state('activate')
        wait_until(lambda: counts(robot).n_encoded >= 1)
        second_thread = robot.node._session.worker._thread
        assert robot.change_state('deactivate')
    finally:
        stop.set()
        camera.join(10)

    assert codes == {Answer.OK}
    assert n_hits > 0
    assert not first_thread.is_alive()
    assert not second_thread.is_alive()


def test_closed_questions_that_wait_are_answered_together(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    sizes: list[int] = []
    assistant = robot.node._session._assistant
    ask_many = assistant.ask_many

    def recorded(asked: Any, frame: Any, **options: Any) -> Any:
        sizes.append(len(asked))
        return ask_many(asked, frame, **options)

    assistant.ask_many = recorded
    first = robot.ask_async(max_tokens=LONG_TOKENS)
    wait_until(lambda: robot.node._session.worker._running)

    waiting = []
    for n, what in enumerate(('red', 'blue', 'green', 'a car')):
        waiting.append(robot.ask_async(f'is it {what}?', format=Answer.YES_NO))
        wait_until(lambda n=n: robot.node._session.worker.n_waiting == n + 1)
    answers = [robot.result(future).detail for future in waiting]

    assert robot.result(first).success
    assert sizes == [1, 4]
    assert [answer.question for answer in answers] == ['is it red?', 'is it blue?', 'is it green?', 'is it a car?']
    assert all(sum(answer.probabilities) == pytest.approx(1.0, abs=1e-5) for answer in answers)
    assert all(0 < answer.timing.queue_s < answer.timing.total_s for answer in answers)


def test_questions_with_images_of_their_own_are_answered_alone(robot: Robot, photo: Pixels) -> None:
    first = robot.ask_async(image=robot.image(photo), max_tokens=LONG_TOKENS)
    wait_until(lambda: robot.node._session.worker._running)
    images = [robot.image(photo), robot.image(255 - photo)]

    futures = [robot.ask_async('is it red?', format=Answer.YES_NO, image=image) for image in images]
    one, other = [robot.result(future).detail for future in futures]

    assert robot.result(first).success
    assert list(one.probabilities) != list(other.probabilities)


def test_a_question_is_not_delayed_by_an_encoding(make_robot: Any, photo: Pixels) -> None:
    robot = make_robot(encode_ahead_duty=1.0).start()
    vision = robot.node._session._assistant._vision
    encode, begun = vision.encode, threading.Event()

    def slow(pixels: Any, cancel: Any) -> Any:
        if not begun.is_set():
            begun.set()
            end_s = time.monotonic() + 10
            while time.monotonic() < end_s:
                cancel.raise_if_set()
                time.sleep(0.001)
        return encode(pixels, cancel)

    vision.encode = slow
    robot.show(robot.image(photo))
    assert begun.wait(10)
    started_s = time.monotonic()

    answer = robot.ask()

    assert time.monotonic() - started_s < 5
    assert answer.result_code == Answer.OK
    assert counts(robot).n_interrupted == 1
