"""The service: answers, refusals, and that the node answers the next question after each of them."""

from __future__ import annotations

import json
import time

import cv2
import numpy as np
import pytest
from mobilevlm_msgs.msg import Answer
from mobilevlm_msgs.srv import AskImage
from numpy.typing import NDArray
from robot import LONG_TOKENS, Robot, wait_until
from sensor_msgs.msg import CompressedImage, Image

Pixels = NDArray[np.uint8]


def answers_next(robot: Robot, photo: Pixels) -> None:
    """The node still answers."""
    robot.show(robot.image(photo))
    assert robot.ask().result_code == Answer.OK


def test_an_answer_names_its_frame(robot: Robot, photo: Pixels) -> None:
    message = robot.show(robot.image(photo))
    answer = robot.ask('what is the table')
    assert answer.result_code == Answer.OK, answer.message
    assert answer.text
    assert answer.header == message.header
    assert answer.camera == 'camera'
    assert 0.0 < answer.age_s < 60.0
    assert answer.question == 'what is the table'
    assert answer.model_id.startswith('tiny-cpu@')
    assert len(answer.prompt_hash) == 16
    assert 0.0 < answer.confidence <= 1.0


def test_timing_covers_the_stages(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    timing = robot.ask(max_tokens=8).timing
    stages = (
        timing.queue_s + timing.image_s + timing.preprocess_s + timing.vision_s + timing.prefill_s + timing.decode_s
    )
    assert timing.vision_s > 0.0
    assert timing.prefill_s > 0.0
    assert 0.0 < timing.first_text_s <= timing.total_s
    assert stages <= timing.total_s + 1e-4
    assert timing.generated_tokens == 8
    assert not timing.vision_reused


def test_second_question_on_a_frame_reuses_it(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    robot.ask('what is the table')
    second = robot.ask('is the car red')
    assert second.timing.vision_reused
    assert second.timing.vision_s == 0.0
    assert second.timing.reused_tokens > 0


def test_yes_no_gives_probabilities(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    answer = robot.ask('is the car red', format=Answer.YES_NO)
    assert answer.result_code == Answer.OK
    assert list(answer.options) == ['yes', 'no']
    assert sum(answer.probabilities) == pytest.approx(1.0, abs=1e-5)
    assert answer.text == answer.options[int(np.argmax(answer.probabilities))]
    assert answer.confidence == pytest.approx(max(answer.probabilities))


def test_choice_answers_one_of_them(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    answer = robot.ask('what is it', format=Answer.CHOICE, choices=['red car', 'red truck', 'table'])
    assert answer.result_code in (Answer.OK, Answer.UNKNOWN)
    assert list(answer.options) == ['red car', 'red truck', 'table']


def test_below_the_confidence_limit_is_unknown(make_robot, photo: Pixels) -> None:
    robot = make_robot(min_confidence=1.0).start()
    robot.show(robot.image(photo))
    answer = robot.ask('what is it', format=Answer.CHOICE, choices=['red', 'blue', 'green'])
    assert answer.result_code == Answer.UNKNOWN
    assert answer.text == ''
    assert len(answer.probabilities) == 3


def test_json_answer_obeys_its_schema(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    schema = {'type': 'object', 'properties': {'seen': {'type': 'boolean'}}, 'required': ['seen']}
    answer = robot.ask('is the car red', format=Answer.JSON, json_schema=json.dumps(schema), max_tokens=200)
    if answer.result_code == Answer.OK:
        assert isinstance(json.loads(answer.text)['seen'], bool)
    else:
        # A random model may write white space until it is cut off; it must then be told as such.
        assert answer.result_code == Answer.INCOMPLETE


def test_response_is_plain_for_the_shell(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    good = robot.result(robot.ask_async(max_tokens=4))
    assert good.success and good.answer == good.detail.text
    bad = robot.result(robot.ask_async(''))
    assert not bad.success and bad.answer == ''


def test_image_in_the_request(robot: Robot, photo: Pixels) -> None:
    message = robot.image(photo)
    answer = robot.ask(image=message)
    assert answer.result_code == Answer.OK
    assert answer.camera == 'request'
    assert answer.header == message.header


def test_compressed_image_in_the_request(robot: Robot, photo: Pixels) -> None:
    data = cv2.imencode('.png', photo[:, :, ::-1])[1].tobytes()
    compressed = robot.ask(compressed_image=CompressedImage(format='png', data=data))
    assert compressed.result_code == Answer.OK
    assert robot.ask(image=robot.image(photo)).text == compressed.text


def _short(field: str) -> Image:
    message = Image(height=4, width=4, encoding='rgb8', step=12, data=bytes(48))
    if field == 'data':
        message.data = bytes(47)
    elif field == 'step':
        message.step = 11
    elif field == 'encoding':
        message.encoding = 'rgb9'
    elif field == 'height':
        message.height = 0
    return message


@pytest.mark.parametrize('field', ['data', 'step', 'encoding', 'height'])
def test_broken_image_in_the_request(shared_robot: Robot, photo: Pixels, field: str) -> None:
    answer = shared_robot.ask(image=_short(field))
    assert answer.result_code == Answer.BAD_IMAGE
    assert answer.message
    answers_next(shared_robot, photo)


@pytest.mark.parametrize('data', [b'\xff\xd8\xff\xe0 no jpeg', b'\x89PNG\r\n\x1a\n', b'?'])
def test_broken_compressed_image_in_the_request(shared_robot: Robot, photo: Pixels, data: bytes) -> None:
    answer = shared_robot.ask(compressed_image=CompressedImage(format='jpeg', data=data))
    assert answer.result_code == Answer.BAD_IMAGE
    answers_next(shared_robot, photo)


def test_two_images_in_the_request(robot: Robot, photo: Pixels) -> None:
    compressed = CompressedImage(format='png', data=cv2.imencode('.png', photo)[1].tobytes())
    assert robot.ask(image=robot.image(photo), compressed_image=compressed).result_code == Answer.BAD_IMAGE


SCHEMA_IS_LIST = '[1, 2]'


@pytest.mark.parametrize(
    ('fields', 'code'),
    [
        ({'question': ''}, Answer.BAD_QUESTION),
        ({'question': ' \n '}, Answer.BAD_QUESTION),
        ({'question': 'bell \x07'}, Answer.BAD_QUESTION),
        ({'question': 'x', 'deadline_s': float('nan')}, Answer.BAD_QUESTION),
        ({'question': 'x', 'max_frame_age_s': -1.0}, Answer.BAD_QUESTION),
        ({'question': 'is the table red ' * 900}, Answer.TOO_LONG),
        ({'question': 'x', 'camera': 'nose'}, Answer.UNKNOWN_CAMERA),
        ({'question': 'x', 'format': 4}, Answer.BAD_FORMAT),
        ({'question': 'x', 'format': Answer.CHOICE}, Answer.BAD_FORMAT),
        ({'question': 'x', 'format': Answer.CHOICE, 'choices': ['one']}, Answer.BAD_FORMAT),
        ({'question': 'x', 'format': Answer.CHOICE, 'choices': ['a', 'A']}, Answer.BAD_FORMAT),
        ({'question': 'x', 'format': Answer.JSON}, Answer.BAD_FORMAT),
        ({'question': 'x', 'format': Answer.JSON, 'json_schema': '{'}, Answer.BAD_FORMAT),
        ({'question': 'x', 'format': Answer.JSON, 'json_schema': SCHEMA_IS_LIST}, Answer.BAD_FORMAT),
        ({'question': 'x', 'format': Answer.JSON, 'json_schema': '{"type": "thing"}'}, Answer.BAD_FORMAT),
    ],
)
def test_bad_request_has_a_code_and_the_next_is_answered(
    shared_robot: Robot, photo: Pixels, fields: dict[str, object], code: int
) -> None:
    shared_robot.show(shared_robot.image(photo))
    answer = shared_robot.ask(**fields)
    assert answer.result_code == code, answer.message
    assert answer.message
    assert answer.text == ''
    answers_next(shared_robot, photo)


def test_no_frame_yet(robot: Robot, photo: Pixels) -> None:
    assert robot.ask().result_code == Answer.NO_FRAME
    answers_next(robot, photo)


def test_stale_frame_is_refused_and_described(robot: Robot, photo: Pixels) -> None:
    message = robot.show(robot.image(photo, age_s=5.0))
    answer = robot.ask(max_frame_age_s=4.0)
    assert answer.result_code == Answer.STALE
    assert answer.age_s > 4.0
    assert answer.header == message.header
    assert robot.ask(max_frame_age_s=60.0).result_code == Answer.OK


def test_several_cameras_must_be_named(make_robot, photo: Pixels) -> None:
    robot = make_robot(camera_names=['front', 'rear'], cameras__rear__topic='back').start()
    robot.show(robot.image(photo), 'front/image', 'front')
    robot.show(robot.image(255 - photo), 'back', 'rear')
    assert robot.ask().result_code == Answer.UNKNOWN_CAMERA
    front, rear = robot.ask(camera='front'), robot.ask(camera='rear')
    assert (front.camera, rear.camera) == ('front', 'rear')
    assert front.confidence != rear.confidence


def test_a_waiting_question_is_answered_after_the_running_one(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    running = robot.ask_async('what is the table', max_tokens=600)
    wait_until(lambda: robot.node._session.worker._running)
    waiting = robot.ask_async('is the car red', max_tokens=4)
    second = robot.result(waiting).detail
    first = robot.result(running).detail
    assert first.result_code == second.result_code == Answer.OK
    assert second.timing.queue_s > 0.05


def test_full_queue_is_busy_at_once(make_robot, photo: Pixels) -> None:
    robot = make_robot(queue_size=1).start()
    robot.show(robot.image(photo))
    open_questions = [robot.ask_async(max_tokens=LONG_TOKENS) for _ in range(2)]
    wait_until(lambda: robot.node._session.worker.n_waiting == 1)
    times_s = []
    for _ in range(9):
        started_s = time.perf_counter()
        answer = robot.ask()
        times_s.append(time.perf_counter() - started_s)
        assert answer.result_code == Answer.BUSY
    assert np.median(times_s) < 0.020
    for future in open_questions:
        assert robot.result(future).detail.result_code == Answer.OK


def test_images_keep_arriving_while_it_decodes(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    future = robot.ask_async(max_tokens=LONG_TOKENS)
    wait_until(lambda: robot.node._session.worker._running)
    before, sent = robot.n_frames(), 0
    while not future.done():
        robot.publish(robot.image(photo))
        sent += 1
        time.sleep(1 / 50)
    taken = robot.n_frames() - before
    assert sent >= 10
    assert taken >= 0.9 * sent - 1


def test_deadline_returns_what_was_said(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    started_s = time.monotonic()
    answer = robot.ask(max_tokens=LONG_TOKENS, deadline_s=0.3)
    assert answer.result_code == Answer.TIMEOUT
    assert 0.3 <= answer.timing.total_s < 0.5
    assert time.monotonic() - started_s < 2.0
    assert answer.text
    answers_next(robot, photo)


def test_client_that_goes_away_harms_nobody(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    gone = robot.client.create_client(AskImage, f'{robot.ns}/vqa_node/ask_image')
    assert gone.wait_for_service(10.0)
    gone.call_async(AskImage.Request(question='what is the table', max_tokens=400))
    wait_until(lambda: robot.node._session.worker._running)
    robot.client.destroy_client(gone)
    answers_next(robot, photo)


def test_text_with_nul_reaches_the_client(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    answer = robot.ask(max_tokens=600)
    assert answer.result_code == Answer.OK
    assert '\0' not in answer.text
