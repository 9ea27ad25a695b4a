"""The same frame and question through the running node and through the evaluation of a recording: one answer.

The very bytes that the bag holds are what the camera publishes, so that nothing but the way of asking differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bag_writing as writing
import numpy as np
import pytest
import yaml
from mobilevlm_msgs.msg import Answer
from rclpy.serialization import deserialize_message
from robot import Robot
from sensor_msgs.msg import CompressedImage, Image

from mobilevlm_ros.bags import BagFrame, open_bag
from mobilevlm_ros.build.nano import build_nano
from mobilevlm_ros.cli import main
from mobilevlm_ros.evaluate.results import read_results
from mobilevlm_ros.paths import bundle_dir
from mobilevlm_ros.runtime.asking import AssistantSettings

DATA = Path(__file__).resolve().parents[1] / 'data'
STREET = '/street/image_raw/compressed'
QUESTIONS: list[dict[str, Any]] = [
    {'id': 'closed', 'text': 'Is the car red?', 'format': 'yes_no'},
    {'id': 'choice', 'text': 'What is it?', 'format': 'choice', 'choices': ['red car', 'truck', 'table']},
    {'id': 'open', 'text': 'What is the table?', 'format': 'text', 'max_tokens': 12},
    {'id': 'json', 'text': 'Is the car red?', 'format': 'json', 'schema': {'type': 'boolean'}},
]
FORMATS = {'text': Answer.TEXT, 'yes_no': Answer.YES_NO, 'choice': Answer.CHOICE, 'json': Answer.JSON}
TYPES = {'sensor_msgs/msg/Image': Image, 'sensor_msgs/msg/CompressedImage': CompressedImage}


def recording(path: Path, *, compressed: bool) -> Path:
    """Two pictures, the first taken just now: the node takes no frame that is old."""
    images = writing.pictures(2)
    return writing.write_bag(path, writing.stream('/camera', images, compressed=compressed, start_ns=time.time_ns()))


def evaluated(bag: Path, bundle: Path, out: Path, *options: str) -> dict[str, dict[str, Any]]:
    """What the command answers about the first frame of a bag, by question."""
    file = out.with_suffix('.yaml')
    file.write_text(yaml.safe_dump([{**one, 'when': {'at_s': 0.0}} for one in QUESTIONS]))
    arguments = ['evaluate', 'bag', str(bag), '--questions', str(file), '--bundle', str(bundle), '--out', str(out)]
    assert main([*arguments, *options]) == 0
    return {row['question_id']: row for row in read_results(out)}


def frames_of(bag: Path) -> list[BagFrame]:
    with open_bag(bag) as opened:
        return list(opened.frames())


def shown(robot: Robot, frame: BagFrame) -> None:
    """Publish a message as it was recorded."""
    robot.show(deserialize_message(frame.serialized, TYPES[frame.message_type]))


def asked(robot: Robot, question: dict[str, Any]) -> Any:
    """What the node says."""
    return robot.ask(
        question['text'],
        format=FORMATS[question['format']],
        choices=question.get('choices', []),
        json_schema='{"type": "boolean"}' if question['format'] == 'json' else '',
        max_tokens=question.get('max_tokens', 0),
    )


@pytest.mark.parametrize('compressed', [False, True], ids=['raw', 'compressed'])
@pytest.mark.parametrize('options', [(), ('--realtime',)], ids=['offline', 'realtime'])
def test_the_node_and_the_evaluation_answer_alike(
    make_robot: Callable[..., Robot], tiny_bundle: Path, tmp_path: Path, compressed: bool, options: tuple[str, ...]
) -> None:
    robot = make_robot(min_confidence=0.0).start()
    bag = recording(tmp_path / 'bag', compressed=compressed)
    rows = evaluated(bag, tiny_bundle, tmp_path / 'out', *options)
    shown(robot, frames_of(bag)[0])
    for question in QUESTIONS:
        row, answer = rows[question['id']], asked(robot, question)
        assert answer.result_code == Answer.OK, answer.message
        assert answer.text and (row['answer'], row['result_code']) == (answer.text, 'OK')
        assert row['prompt_hash'] == answer.prompt_hash and len(answer.prompt_hash) == 16
        assert row['model_id'] == answer.model_id
        # Both kept the picture's state, or computed it anew: within what the order of sums makes of float32.
        assert row['confidence'] == pytest.approx(answer.confidence, abs=1e-4)
        np.testing.assert_allclose(row['probabilities'], answer.probabilities, atol=1e-4)


def test_another_frame_or_another_wording_is_told_apart(robot: Robot, tiny_bundle: Path, tmp_path: Path) -> None:
    """What makes the test above mean something: the picture moves the probabilities, the wording the hash."""
    bag = recording(tmp_path / 'bag', compressed=False)
    row = evaluated(bag, tiny_bundle, tmp_path / 'out')['choice']
    question = next(one for one in QUESTIONS if one['id'] == 'choice')
    shown(robot, frames_of(bag)[1])
    of_other_frame = asked(robot, question)
    assert of_other_frame.prompt_hash == row['prompt_hash']
    assert np.abs(np.asarray(of_other_frame.probabilities) - row['probabilities']).max() > 1e-3
    shown(robot, frames_of(bag)[0])
    assert asked(robot, question | {'text': 'What is this?'}).prompt_hash != row['prompt_hash']


@pytest.mark.model
@pytest.mark.timeout(300)
def test_nano_answers_alike_about_the_committed_recording(tmp_path: Path) -> None:
    """The stamp is a new one, because the recording is old; the picture is the same."""
    nano = bundle_dir('nano', 'cpu')
    build_nano(nano)
    question = {'id': 'man', 'text': 'Is there a man in the picture?', 'format': 'yes_no'}
    (tmp_path / 'q.yaml').write_text(yaml.safe_dump([{**question, 'camera': STREET, 'when': {'at_s': 1.5}}]))
    arguments = ['--questions', str(tmp_path / 'q.yaml'), '--bundle', str(nano), '--out', str(tmp_path / 'out')]
    assert main(['evaluate', 'bag', str(DATA / 'bag_mcap'), *arguments]) == 0
    (row,) = read_results(tmp_path / 'out')
    (frame,) = (one for one in frames_of(DATA / 'bag_mcap') if (one.topic, one.index) == (STREET, row['frame_index']))
    message = deserialize_message(frame.serialized, CompressedImage)
    robot = Robot({'bundle': str(nano), 'max_frame_age_s': 600.0, 'min_confidence': 0.0}).start()
    try:
        robot.stamp(message)
        robot.show(message)
        answer = asked(robot, question)
    finally:
        robot.close()
    assert (row['answer'], row['prompt_hash']) == (answer.text, answer.prompt_hash)
    assert row['probabilities'] == pytest.approx(list(answer.probabilities), abs=1e-4)


def test_an_answer_is_as_long_as_the_node_makes_it() -> None:
    from mobilevlm_ros.node.parameters import PARAMETERS

    (limit,) = (one.default for one in PARAMETERS if one.name == 'max_tokens')
    assert AssistantSettings().max_tokens == limit
