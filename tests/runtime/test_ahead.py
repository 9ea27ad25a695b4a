"""Encoding while nobody asks: how much time it may take, which frame a question gets, and that off means off."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mobilevlm_ros.errors import BadImageError, EngineError, StaleFrameError, UnknownCameraError
from mobilevlm_ros.runtime.ahead import AheadEncoder, AheadSettings
from mobilevlm_ros.runtime.assistant import Assistant
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.frames import FrameStore, PendingFrame
from mobilevlm_ros.runtime.language import LanguageOptions
from mobilevlm_ros.runtime.language.fake import FakeLanguageEngine
from mobilevlm_ros.runtime.preprocess import PreprocessSpec
from mobilevlm_ros.runtime.prompt import plain
from mobilevlm_ros.runtime.vision.fake import FakeVision
from mobilevlm_ros.runtime.worker import Job, QuestionWorker
from mobilevlm_ros.types import Answer, Frame, Question, ResultCode

WAIT_S = 10.0
SECOND = 1_000_000_000
ON = AheadSettings(duty=0.5, max_lag_s=1.0, cameras=('front', 'rear'))


def pixels(number: int) -> NDArray[np.uint8]:
    return np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)


class Bench:
    """An encoder on fake engines and a clock that only moves when it is told to, or while something is encoded."""

    def __init__(self, settings: AheadSettings = ON, encode_s: float = 2.0, frame_cache: int = 4) -> None:
        self.now_s = 100.0
        self.encode_s = encode_s
        self.decoded: list[str] = []
        self.vision = FakeVision()
        language = FakeLanguageEngine(LanguageOptions(frame_cache=frame_cache))
        self.assistant = Assistant(self.vision, language, plain('see: '), PreprocessSpec(16), model_id='m')
        encode = self.vision.encode

        def timed(*args: Any) -> NDArray[np.float32]:
            self.now_s += self.encode_s
            return encode(*args)

        self.vision.encode = timed  # type: ignore[method-assign]
        self.frames = FrameStore(['front', 'rear'], lambda: int(self.now_s * SECOND))
        self.ahead = AheadEncoder(self.assistant, self.frames, settings, lambda: self.now_s)

    def show(self, number: int, camera: str = 'front') -> None:
        def decode() -> tuple[NDArray[np.uint8], str]:
            self.decoded.append(camera)
            return pixels(number), ''

        self.frames.put(camera, PendingFrame(0, int(self.now_s * SECOND), decode))

    def work(self, cancel: CancelToken | None = None) -> None:
        self.ahead.work(cancel or CancelToken())

    def run(self, until_s: float, frame_period_s: float = 0.1) -> None:
        """Do as a worker does that nobody asks, with a camera that never stops."""
        number = 0
        next_frame_s = self.now_s
        while self.now_s < until_s:
            while next_frame_s <= self.now_s:
                self.show(number := number + 1)
                next_frame_s += frame_period_s
            wait_s = self.ahead.wait_s()
            assert wait_s is not None
            if wait_s <= 0:
                self.work()
            else:
                self.now_s += min(wait_s, max(next_frame_s - self.now_s, 1e-3))

    def shown(self, frame: Frame) -> int:
        return next(number for number in range(100) if np.array_equal(frame.rgb_hwc, pixels(number)))


@pytest.fixture
def bench() -> Bench:
    return Bench()


# -- how much -----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 1.0), st.floats(0.05, 3.0))
def test_no_more_than_the_share_of_the_time_is_spent(duty: float, encode_s: float) -> None:
    bench = Bench(AheadSettings(duty, 1.0, ('front',)), encode_s)
    started_s = bench.now_s

    bench.run(until_s=started_s + 30.0)

    passed_s = bench.now_s - started_s
    assert bench.ahead.counts.busy_s == pytest.approx(bench.ahead.counts.n_encoded * encode_s)
    # Each start is paid for until the next one; the last may still be unpaid.
    assert bench.ahead.counts.busy_s <= duty * passed_s + encode_s + 1e-6
    # And little less, although each time it waits for a new frame.
    assert bench.ahead.counts.n_encoded >= passed_s / (encode_s / duty + 0.13) - 1


def test_between_two_encodings_it_rests(bench: Bench) -> None:
    bench.show(1)
    assert bench.ahead.wait_s() == 0
    bench.work()

    bench.show(2)

    assert bench.ahead.wait_s() == pytest.approx(2.0)
    bench.now_s += 2.0
    assert bench.ahead.wait_s() == 0


def test_an_interrupted_encoding_is_paid_for_too(bench: Bench) -> None:
    bench.show(1)
    cancel = CancelToken()
    encode = bench.vision.encode

    def interrupted(*args: Any) -> Any:
        encode(*args)
        cancel.set()
        cancel.raise_if_set()

    bench.vision.encode = interrupted  # type: ignore[method-assign]
    bench.work(cancel)

    assert (bench.ahead.counts.n_encoded, bench.ahead.counts.n_interrupted) == (0, 1)
    assert bench.ahead.wait_s() == pytest.approx(2.0)


def test_an_unchanged_picture_is_not_encoded_again(bench: Bench) -> None:
    for _ in range(5):
        bench.show(1)
        bench.work()
        bench.now_s += 10

    assert bench.vision.n_runs == bench.ahead.counts.n_encoded == 1


def test_without_a_new_frame_there_is_nothing_to_do(bench: Bench) -> None:
    assert (bench.ahead.wait_s() or 0) > 0
    bench.show(1)
    bench.work()
    bench.now_s += 10

    assert (bench.ahead.wait_s() or 0) > 0
    bench.work()
    assert bench.ahead.counts.n_encoded == 1


def test_cameras_take_turns(bench: Bench) -> None:
    for number in range(0, 8, 2):
        bench.show(number, 'front')
        bench.show(number + 1, 'rear')
        bench.work()

    assert bench.decoded == ['front', 'rear', 'front', 'rear']


def test_only_the_chosen_cameras_are_looked_at() -> None:
    bench = Bench(AheadSettings(0.5, 1.0, ('rear', 'gone')))
    bench.show(1, 'front')

    bench.work()

    assert bench.vision.n_runs == 0


@pytest.mark.parametrize('settings', [AheadSettings(), AheadSettings(0.0, 1.0, ('front',)), AheadSettings(0.5, 1.0)])
def test_off_means_off(settings: AheadSettings) -> None:
    bench = Bench(settings)
    bench.show(1)

    assert bench.ahead.wait_s() is None
    bench.work()

    assert bench.vision.n_runs == 0
    assert bench.shown(bench.ahead.take('front', 60.0)) == 1
    assert bench.ahead.counts.n_hits == 0


def test_switched_off_it_lets_go_of_what_it_held(bench: Bench) -> None:
    bench.show(1)
    bench.work()
    bench.show(2, 'rear')
    bench.work()

    bench.ahead.settings = AheadSettings()

    assert bench.ahead.wait_s() == 0
    bench.work()
    assert bench.ahead.wait_s() is None
    assert bench.assistant.language._cache.n_saved == 0  # type: ignore[attr-defined]


# -- which frame --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('newer_by_s', 'expected'), [(0.0, 1), (0.9, 1), (1.0, 1), (1.1, 2)])
def test_a_question_takes_the_encoded_frame_within_the_lag(bench: Bench, newer_by_s: float, expected: int) -> None:
    bench.encode_s = 0.0
    bench.show(1)
    bench.work()
    bench.now_s += newer_by_s
    bench.show(2)
    bench.now_s += 0.25

    frame = bench.ahead.take('front', 60.0)

    assert bench.shown(frame) == expected
    assert frame.age_s == pytest.approx(0.25 + (newer_by_s if expected == 1 else 0.0))
    assert bench.ahead.counts.n_hits == (expected == 1)


def test_without_a_lag_only_the_newest_will_do() -> None:
    bench = Bench(AheadSettings(0.5, 0.0, ('front',)), encode_s=0.0)
    bench.show(1)
    bench.work()
    assert bench.shown(bench.ahead.take('front', 60.0)) == 1
    assert bench.ahead.counts.n_hits == 1

    bench.show(2)  # at the same moment, by a clock that stands still

    assert bench.shown(bench.ahead.take('front', 60.0)) == 2


def test_the_age_limit_of_a_question_goes_before_the_lag(bench: Bench) -> None:
    bench.encode_s = 0.0
    bench.show(1)
    bench.work()
    bench.now_s += 0.5
    bench.show(2)

    assert bench.shown(bench.ahead.take('front', 0.4)) == 2
    bench.now_s += 1.0
    with pytest.raises(StaleFrameError):
        bench.ahead.take('front', 0.4)


def test_an_encoded_frame_that_is_cold_again_is_no_reason_to_take_an_older_one(bench: Bench) -> None:
    bench.encode_s = 0.0
    bench.show(1)
    bench.work()
    bench.show(2)
    bench.assistant.forget()

    assert bench.shown(bench.ahead.take('front', 60.0)) == 2
    assert bench.ahead.counts.n_hits == 0


def test_after_a_jump_of_time_the_encoded_frame_is_not_used(bench: Bench) -> None:
    bench.encode_s = 0.0
    bench.show(1)
    bench.work()
    bench.frames.clear()
    bench.show(2)

    assert bench.shown(bench.ahead.take('front', 60.0)) == 2


def test_a_camera_that_is_not_there_is_told(bench: Bench) -> None:
    with pytest.raises(UnknownCameraError):
        bench.ahead.take('up', 60.0)


def test_the_question_about_an_encoded_frame_is_warm(bench: Bench) -> None:
    bench.show(1)
    bench.work()

    answer = bench.assistant.ask(Question('what?'), bench.ahead.take('front', 60.0))

    assert answer.timing.vision_reused
    assert bench.vision.n_runs == 1


# -- what is kept -------------------------------------------------------------------------------------------------


def test_frames_that_nobody_asked_about_take_no_place_of_others() -> None:
    bench = Bench(frame_cache=3)
    asked = Frame(pixels(50))
    bench.assistant.ask(Question('what?'), asked)
    for number in range(10):
        bench.show(number)
        bench.work()

    assert bench.assistant.ask(Question('what else?'), asked).timing.vision_reused
    assert bench.assistant.language._cache.n_saved == 2  # type: ignore[attr-defined]


def test_an_encoded_frame_that_was_asked_about_is_kept_like_others(bench: Bench) -> None:
    bench.show(1)
    bench.work()
    frame = bench.ahead.take('front', 60.0)
    bench.show(2)
    bench.work()

    assert bench.assistant.ask(Question('what?'), frame).timing.vision_reused


# -- what goes wrong ----------------------------------------------------------------------------------------------


def test_an_image_that_cannot_be_decoded_is_passed_over_and_told_once(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> Any:
        raise BadImageError('damaged')

    for _ in range(3):
        bench.frames.put('front', PendingFrame(0, int(bench.now_s * SECOND), fail))
        bench.work()
        assert (bench.ahead.wait_s() or 0) > 0
    bench.show(1)
    bench.work()

    assert bench.ahead.counts.n_encoded == 1
    assert sum('damaged' in record.message for record in caplog.records) == 1


def test_a_failing_engine_is_not_tried_again_on_the_same_frame(bench: Bench) -> None:
    def fail(*_: Any) -> Any:
        raise EngineError('broken')

    bench.vision.encode = fail  # type: ignore[method-assign]
    bench.show(1)
    bench.work()

    assert (bench.ahead.wait_s() or 0) > 0
    assert bench.ahead.counts.n_encoded == 0


# -- with a worker ------------------------------------------------------------------------------------------------


class Live:
    """A worker on engines that take their time, and a camera."""

    def __init__(self, assistant: Assistant, settings: AheadSettings) -> None:
        self.assistant = assistant
        self.frames = FrameStore(['front'], time.monotonic_ns)
        self.ahead = AheadEncoder(assistant, self.frames, settings)
        self.worker = QuestionWorker(assistant, capacity=4, idle=self.ahead)
        self.answers: list[Answer] = []
        self.answered = threading.Event()

    def show(self, number: int) -> None:
        self.frames.put('front', PendingFrame(0, time.monotonic_ns(), lambda: (pixels(number), '')))

    def ask(self, text: str = 'what?') -> Answer:
        self.answered.clear()

        def on_done(answer: Answer) -> None:
            self.answers.append(answer)
            self.answered.set()

        self.worker.submit(Job(Question(text), lambda: self.ahead.take('front', 60.0), on_done))
        assert self.answered.wait(WAIT_S)
        return self.answers[-1]


def wait_until(condition: Callable[[], Any]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.002)


@pytest.fixture
def make_live() -> Iterator[Callable[..., Live]]:
    made: list[Live] = []

    def make(settings: AheadSettings = ON, vision_s: float = 0.0, assistant: Assistant | None = None) -> Live:
        vision, language = FakeVision(run_s=vision_s), FakeLanguageEngine()
        made.append(Live(assistant or Assistant(vision, language, plain(), PreprocessSpec(16), model_id='m'), settings))
        return made[-1]

    yield make
    for live in made:
        assert live.worker.stop()


def test_an_idle_worker_encodes_and_the_question_is_warm(make_live: Callable[..., Live]) -> None:
    live = make_live()
    live.show(1)
    wait_until(lambda: live.ahead.counts.n_encoded == 1)

    assert live.ask().timing.vision_reused
    assert live.ahead.counts.n_hits == 1


def test_a_question_interrupts_the_encoding_at_once(make_live: Callable[..., Live]) -> None:
    live = make_live(vision_s=5.0)
    vision: Any = live.assistant._vision
    encode, begun = vision.encode, threading.Event()

    def told(rows: Any, cancel: CancelToken) -> Any:
        vision._run_s = 0.0 if begun.is_set() else 5.0
        begun.set()
        return encode(rows, cancel)

    vision.encode = told
    live.show(1)
    assert begun.wait(WAIT_S)
    started_s = time.monotonic()

    answer = live.ask()

    assert time.monotonic() - started_s < 2.5
    assert answer.result_code is ResultCode.OK
    assert live.ahead.counts.n_interrupted == 1


def test_off_the_worker_does_nothing_while_nobody_asks(make_live: Callable[..., Live]) -> None:
    live = make_live(AheadSettings(0.0, 1.0, ('front',)))
    live.show(1)

    answer = live.ask()

    assert not answer.timing.vision_reused
    assert live.assistant._vision.n_runs == 1  # type: ignore[attr-defined]
    assert (live.ahead.counts.n_encoded, live.ahead.counts.n_hits) == (0, 0)


def test_it_can_be_switched_on_while_the_worker_sleeps(make_live: Callable[..., Live]) -> None:
    live = make_live(AheadSettings())
    live.show(1)
    live.ask()
    live.show(2)

    live.ahead.settings = ON
    live.worker.wake()

    wait_until(lambda: live.ahead.counts.n_encoded == 1)


def test_a_worker_that_encodes_stops_at_once(make_live: Callable[..., Live]) -> None:
    live = make_live(vision_s=5.0)
    live.show(1)
    wait_until(lambda: (live.ahead.wait_s() or 0) == 0)
    started_s = time.monotonic()

    assert live.worker.stop()

    assert time.monotonic() - started_s < 2.5


def test_a_bug_in_the_work_does_not_end_the_answering(
    make_live: Callable[..., Live], caplog: pytest.LogCaptureFixture
) -> None:
    live = make_live(AheadSettings())

    def fail(cancel: CancelToken) -> None:
        raise ZeroDivisionError('bug')

    live.ahead.work = fail  # type: ignore[method-assign]
    live.show(1)
    live.ahead.settings = ON
    live.worker.wake()

    wait_until(lambda: any('given up' in record.message for record in caplog.records))
    assert live.ask().success


def test_on_real_engines_questions_and_encodings_under_load(
    make_live: Callable[..., Live], tiny_assistant: Assistant
) -> None:
    live = make_live(AheadSettings(1.0, 5.0, ('front',)), assistant=tiny_assistant)
    stop = threading.Event()

    def film() -> None:
        number = 0
        while not stop.wait(0.003):
            live.show(number := number + 1)

    camera = threading.Thread(target=film)
    camera.start()
    try:
        wait_until(lambda: live.ahead.counts.n_encoded >= 3)
        for _ in range(30):
            answer = live.ask('is the car red?')
            assert answer.result_code is ResultCode.OK
    finally:
        stop.set()
        camera.join(WAIT_S)

    assert live.ahead.counts.n_hits > 0
    assert live.worker.stop()
