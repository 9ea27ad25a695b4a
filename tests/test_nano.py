"""The embedded default, for real: equality with PyTorch, reuse, stopping in time, and that it sees at all."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest

from mobilevlm_ros.build.nano import build_nano
from mobilevlm_ros.build.parity import read_report
from mobilevlm_ros.paths import bundle_dir
from mobilevlm_ros.runtime.assistant import Assistant, Progress
from mobilevlm_ros.runtime.bundle import open_bundle
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.images import read_image
from mobilevlm_ros.runtime.loading import load_assistant_from, return_freed_memory, warm_up
from mobilevlm_ros.runtime.preprocess import preprocess
from mobilevlm_ros.types import AnswerFormat, Frame, Question, ResultCode

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]
PARITY = Path(__file__).parent / 'data' / 'nano_parity.npz'
EXAM = Path(__file__).parents[1] / 'models' / 'nano' / 'exam' / 'images'
# Forced to go on, as the model itself answers in a word or two.
LONG = Question(
    'Count.',
    format=AnswerFormat.JSON,
    json_schema='{"type": "array", "items": {"type": "integer"}, "minItems": 400}',
    max_tokens=1500,
)


@pytest.fixture(scope='module')
def nano() -> Iterator[Assistant]:
    """The nano model, built if it is not (this may download 170 MB)."""
    path = bundle_dir('nano', 'cpu')
    build_nano(path)
    assistant = load_assistant_from(path)
    warm_up(assistant)
    yield assistant
    assistant.close()


@pytest.fixture(scope='module')
def parity() -> Any:
    """One real image with what PyTorch makes of it in float32."""
    with np.load(PARITY, allow_pickle=False) as file:
        return dict(file)


def fresh(parity: Any, index: int) -> Frame:
    """A frame that was not seen before."""
    return Frame(np.roll(parity['image'], 7 * (index + 1), axis=1))


def test_its_own_report_says_so_too(nano: Assistant) -> None:
    """What building it compared: three other images, every stage, without PyTorch."""
    stages = {stage.stage: stage for stage in read_report(open_bundle(bundle_dir('nano', 'cpu'))).stages}
    assert all(stage.passed for stage in stages.values())
    assert stages['visual tokens'].worst >= 0.99999
    assert stages['logits'].worst >= 0.999
    assert stages['image to tokens'].worst >= 0.9


def test_visual_tokens_equal_pytorch(nano: Assistant, parity: Any) -> None:
    pixels_nchw = preprocess(parity['image'], nano._spec)
    tokens, reference = nano._vision.encode(pixels_nchw, CancelToken()), parity['projected']
    cosine = (tokens * reference).sum() / np.linalg.norm(tokens) / np.linalg.norm(reference)
    assert cosine >= 0.99999
    assert np.abs(tokens - reference).max() < 1e-3


@pytest.mark.parametrize('index', range(3))
def test_prompt_and_greedy_answer_equal_pytorch(nano: Assistant, parity: Any, index: int) -> None:
    question = str(parity[f'question_{index}'])
    before, after = nano._template.chunks(question, nano.language)
    assert before == parity['before_ids'].tolist()
    assert after == parity[f'after_ids_{index}'].tolist()
    answer = nano.ask(Question(question), Frame(parity['image']))
    assert answer.text == str(parity[f'answer_{index}'])


@pytest.mark.parametrize('noun', ['cat', 'car'])
@pytest.mark.parametrize('shown', ['cat', 'car'])
def test_it_sees(nano: Assistant, noun: str, shown: str) -> None:
    """The same question about two real pictures has two answers."""
    frame = Frame(read_image(EXAM / {'cat': 'cat_face.jpg', 'car': 'white_car.jpg'}[shown]))
    answer = nano.ask(Question(f'Is there a {noun} in the picture?', format=AnswerFormat.YES_NO), frame)
    assert answer.text == ('yes' if noun == shown else 'no')
    assert answer.confidence > 0.6


def test_second_question_on_a_frame_costs_only_its_own_tokens(nano: Assistant, parity: Any) -> None:
    question = Question('What is in the picture?', max_tokens=8)
    frame = fresh(parity, 50)
    nano.ask(Question('Is there a car?'), frame)
    warm = nano.ask(question, frame)
    nano.forget()
    cold = nano.ask(question, frame)
    assert warm.timing.vision_s == 0.0
    assert warm.timing.reused_tokens == 52
    assert cold.timing.reused_tokens == 0
    assert warm.text == cold.text
    assert warm.confidence == cold.confidence
    # Wide, because machines are busy; benchmarks/ has the figure.
    assert warm.timing.first_text_s < cold.timing.first_text_s


@pytest.mark.parametrize('stage', ['vision', 'decode'])
def test_cancel_stops_within_200_ms(nano: Assistant, parity: Any, stage: str) -> None:
    overruns_s = []
    for run in range(5):
        cancel, set_at = CancelToken(), [0.0]

        def stop(cancel: CancelToken = cancel, set_at: list[float] = set_at) -> None:
            set_at[0] = time.monotonic()
            cancel.set()

        def on_progress(progress: Progress, stop: Any = stop, set_at: list[float] = set_at) -> None:
            if not set_at[0] and progress.stage == stage and (stage == 'vision' or len(progress.text) > 8):
                set_at[0] = 1.0
                # A moment later, so that it falls into the middle of a native call.
                threading.Timer(0.02, stop).start()

        answer = nano.ask(LONG, fresh(parity, run), cancel=cancel, on_progress=on_progress)
        assert answer.result_code is ResultCode.CANCELED
        assert bool(answer.text) == (stage == 'decode')
        overruns_s.append(time.monotonic() - set_at[0])
    assert np.median(overruns_s) < 0.2


@pytest.mark.parametrize('deadline_s', [0.02, 0.2, 0.5])
def test_deadline_stops_within_200_ms(nano: Assistant, parity: Any, deadline_s: float) -> None:
    overruns_s = []
    for run in range(3):
        cancel = CancelToken()
        started_s = time.monotonic()
        with cancel.deadline(started_s + deadline_s):
            answer = nano.ask(LONG, fresh(parity, 100 + run), cancel=cancel)
        assert answer.result_code is ResultCode.TIMEOUT, answer.message
        overruns_s.append(time.monotonic() - started_s - deadline_s)
    assert np.median(overruns_s) < 0.2


def test_answers_after_being_stopped_are_those_of_a_fresh_model(nano: Assistant, parity: Any) -> None:
    question, frame = Question('Describe the image.', max_tokens=12), fresh(parity, 200)
    cancel = CancelToken()
    threading.Timer(0.25, cancel.set).start()
    nano.ask(LONG, frame, cancel=cancel)
    stopped = nano.ask(question, frame)
    nano.forget()
    assert stopped.text == nano.ask(question, frame).text


def test_closing_gives_the_memory_back(nano: Assistant) -> None:
    def resident_mib() -> float:
        return float(psutil.Process().memory_info().rss / 2**20)

    load_assistant_from(bundle_dir('nano', 'cpu')).close()  # what is loaded once and stays: libraries, threads
    return_freed_memory()
    before_mib = resident_mib()
    second = load_assistant_from(bundle_dir('nano', 'cpu'))
    warm_up(second)
    loaded_mib = resident_mib()
    second.close()
    return_freed_memory()
    assert loaded_mib - before_mib > 300
    assert resident_mib() - before_mib < 64


def test_compressed_camera_image_gives_nearly_the_same_confidence(nano: Assistant, parity: Any) -> None:
    question = Question('Is there a person in the picture?', format=AnswerFormat.YES_NO)
    encoded = cv2.imencode('.jpg', parity['image'][:, :, ::-1])[1]
    jpeg = cv2.imdecode(encoded, cv2.IMREAD_COLOR)[:, :, ::-1]
    raw, compressed = (nano.ask(question, Frame(np.ascontiguousarray(pixels))) for pixels in (parity['image'], jpeg))
    assert compressed.text == raw.text
    assert compressed.confidence == pytest.approx(raw.confidence, abs=0.1)
