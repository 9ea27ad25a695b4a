"""Questions by topic, events, the latched model description, diagnostics."""

from __future__ import annotations

from typing import Any

import numpy as np
import psutil
import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from mobilevlm_msgs.msg import Answer, Event, ModelInfo, Question
from numpy.typing import NDArray
from rclpy.qos import DurabilityPolicy, QoSProfile
from robot import Robot, wait_until

Pixels = NDArray[np.uint8]


def answer_with_id(robot: Robot, question_id: str) -> Any:
    """The published answer to a question."""
    return wait_until(lambda: next((a for a in robot.answers if a.question_id == question_id), None))


def status(robot: Robot, name: str, level: bytes, message: str = '') -> Any:
    """Wait for a diagnostic status of this robot."""
    full_name = f'{robot.ns.strip("/")}/vqa_node: {name}'

    def find() -> Any:
        for array in reversed(robot.diagnostics[-3:]):
            for entry in array.status:
                if entry.name == full_name and entry.level == level and message in entry.message:
                    return {pair.key: pair.value for pair in entry.values}
        return None

    return wait_until(find)


def test_question_topic_is_answered_with_its_id(robot: Robot, photo: Pixels) -> None:
    message = robot.show(robot.image(photo))
    robot.questions.publish(Question(id='q-7', question='what is the table', max_tokens=6))
    answer = answer_with_id(robot, 'q-7')
    assert answer.result_code == Answer.OK
    assert answer.header == message.header
    assert answer.timing.generated_tokens == 6


def test_bad_question_on_the_topic_is_answered_too(robot: Robot) -> None:
    robot.questions.publish(Question(id='q-8', question='x', camera='nose'))
    assert answer_with_id(robot, 'q-8').result_code == Answer.UNKNOWN_CAMERA


def test_service_answers_are_published_too(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    answer = robot.ask()
    assert answer_with_id(robot, answer.question_id).text == answer.text


def test_refusal_makes_an_event(robot: Robot) -> None:
    answer = robot.ask('')
    event = wait_until(lambda: next((e for e in robot.events if e.kind == Event.QUESTION_REFUSED), None))
    assert event.question_id == answer.question_id
    assert event.result_code == Answer.BAD_QUESTION


def test_model_info_is_latched(robot: Robot) -> None:
    late: list[Any] = []
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    robot.client.create_subscription(ModelInfo, f'{robot.ns}/vqa_node/model_info', late.append, latched)
    info = wait_until(lambda: late and late[-1])
    assert info.name == 'tiny'
    assert info.model_id.startswith('tiny-cpu@')
    assert info.warning
    assert (info.image_size, info.visual_tokens, info.context_length) == (32, 4, 2048)
    assert info.prompt_template == 'v1'
    assert 0 < info.memory_bytes <= psutil.virtual_memory().total


def test_diagnostics_of_a_healthy_node(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    robot.ask()
    wait_until(lambda: status(robot, 'model', DiagnosticStatus.OK, 'answering').get('answers OK') == '1')
    values = status(robot, 'model', DiagnosticStatus.OK, 'answering')
    assert values['queue'] == '0 of 4'
    assert int(values['memory (MiB)']) > 0
    assert 0.0 < float(values['total p50 (s)']) <= float(values['total p99 (s)'])
    camera = status(robot, 'camera camera', DiagnosticStatus.OK)
    assert int(camera['frames']) >= 1
    assert 0.0 <= float(camera['age (s)']) < 60.0


def test_diagnostics_measure_the_rate(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    robot.client.create_timer(0.05, lambda: robot.publish(robot.image(photo)))

    def rate() -> float:
        return float(status(robot, 'camera camera', DiagnosticStatus.OK)['rate (Hz)'])

    assert wait_until(lambda: rate() > 8.0)


@pytest.mark.parametrize(
    ('age_s', 'level', 'message'),
    [(120.0, DiagnosticStatus.ERROR, 'frozen'), (-30.0, DiagnosticStatus.WARN, 'in the future')],
)
def test_diagnostics_of_bad_stamps(robot: Robot, photo: Pixels, age_s: float, level: bytes, message: str) -> None:
    robot.show(robot.image(photo, age_s=age_s))
    status(robot, 'camera camera', level, message)


def test_diagnostics_without_a_camera(robot: Robot) -> None:
    status(robot, 'camera camera', DiagnosticStatus.ERROR, 'nobody publishes')


def test_diagnostics_of_an_inactive_node(make_robot: Any) -> None:
    robot = make_robot()
    assert robot.change_state('configure')
    status(robot, 'model', DiagnosticStatus.WARN, 'not active')


def test_frozen_camera_makes_an_event(make_robot: Any, photo: Pixels) -> None:
    robot = make_robot(max_frame_age_s=0.2).start()
    robot.show(robot.image(photo))
    event = wait_until(lambda: next((e for e in robot.events if e.kind == Event.CAMERA_LOST), None))
    assert event.camera == 'camera'
