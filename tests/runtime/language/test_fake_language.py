"""The fake language engine keeps the promises of the real one; the same tests run on both."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mobilevlm_ros.errors import InterruptedAnswerError, QuestionTooLongError
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.generate import generate
from mobilevlm_ros.runtime.language import EmbeddingSegment, LanguageOptions, TokenSegment
from mobilevlm_ros.runtime.language.fake import FakeLanguageEngine
from mobilevlm_ros.runtime.sampling import Sampler, SamplingSettings

BEFORE = TokenSegment((1, 2, 3))
AFTER = TokenSegment((70, 71, 72, 73))


@pytest.fixture(params=['real', 'fake'])
def either(request: pytest.FixtureRequest) -> Any:
    if request.param == 'real':
        return request.getfixturevalue('make_engine')(frame_cache=2)
    return FakeLanguageEngine(LanguageOptions(n_ctx=512, frame_cache=2), n_embd=64)


def prefill(engine: Any, *segments: Any) -> tuple[int, int]:
    stats = engine.prefill(segments, CancelToken())
    return stats.n_positions, stats.n_reused


def test_positions_and_reuse_are_counted_alike(either: Any, image_segment: Callable[..., EmbeddingSegment]) -> None:
    one, two, three = (image_segment(number) for number in (1, 2, 3))

    assert prefill(either, BEFORE, one, AFTER) == (11, 0)
    assert prefill(either, BEFORE, one, BEFORE) == (10, 7)
    assert prefill(either, BEFORE, two, AFTER)[1] == 3
    assert prefill(either, BEFORE, one, AFTER)[1] == 7
    assert prefill(either, BEFORE, three, AFTER)[1] == 3
    assert prefill(either, BEFORE, two, AFTER)[1] == 3
    assert either.n_past == 11


def test_holds_tells_what_needs_no_computing(either: Any, image_segment: Callable[..., EmbeddingSegment]) -> None:
    assert not either.holds([BEFORE, image_segment(1)])

    prefill(either, BEFORE, image_segment(1), AFTER)
    prefill(either, BEFORE, image_segment(2), AFTER)

    assert either.holds([BEFORE, image_segment(1)])
    assert either.holds([BEFORE, image_segment(2)])
    assert not either.holds([BEFORE, image_segment(3)])


def test_append_and_rewind_move_the_position(either: Any) -> None:
    prefill(either, BEFORE, AFTER)

    either.append([80, 81], CancelToken())
    assert either.n_past == 9
    either.rewind(8)

    assert either.n_past == 8


def test_too_long_is_refused_alike(either: Any) -> None:
    with pytest.raises(QuestionTooLongError):
        either.prefill([TokenSegment((70,) * 512)], CancelToken())
    prefill(either, TokenSegment((70,) * 511))
    either.append([71], CancelToken())

    with pytest.raises(QuestionTooLongError):
        either.append([72], CancelToken())


def test_a_set_token_interrupts_and_the_next_prefill_works(either: Any) -> None:
    cancel = CancelToken()
    cancel.set()

    with pytest.raises(InterruptedAnswerError):
        either.prefill([BEFORE, AFTER], cancel)

    assert prefill(either, BEFORE, AFTER) == (7, 0)


def test_forgetting_is_forgetting(either: Any, image_segment: Callable[..., EmbeddingSegment]) -> None:
    prefill(either, BEFORE, image_segment(1), AFTER)

    either.forget()

    assert prefill(either, BEFORE, image_segment(1), AFTER)[1] == 0


def answer(engine: FakeLanguageEngine, *segments: Any) -> str:
    engine.prefill(segments, CancelToken())
    return generate(engine, Sampler(SamplingSettings()), CancelToken(), max_tokens=100).text


def image(value: float) -> EmbeddingSegment:
    return EmbeddingSegment(f'image {value}', 2, lambda: np.full((2, 8), value, np.float32))


def text(words: str) -> TokenSegment:
    return TokenSegment(tuple(words.encode()))


def test_the_reply_says_what_was_asked_about_which_image() -> None:
    assert answer(FakeLanguageEngine(), image(1.0), text('what?')) == 'fake answer to 5 characters about image 16.000'


def test_a_custom_reply_is_given_to_the_byte() -> None:
    engine = FakeLanguageEngine(reply=lambda prompt, total: f'{prompt} 🐻 {total}')

    assert answer(engine, text('hi')) == 'hi 🐻 0.0'


def test_replies_follow_their_image_through_reuse() -> None:
    engine = FakeLanguageEngine(LanguageOptions(frame_cache=2))

    replies = [answer(engine, image(float(n)), text('x')) for n in (1, 2, 1, 3, 2, 2)]

    assert [reply.split()[-1] for reply in replies] == ['16.000', '32.000', '16.000', '48.000', '32.000', '32.000']


def test_a_reply_after_an_interruption_is_about_the_right_image() -> None:
    engine, cancel = FakeLanguageEngine(LanguageOptions(frame_cache=0)), CancelToken()
    answer(engine, image(1.0), text('x'))

    def stop() -> NDArray[np.float32]:
        cancel.set()
        return np.zeros((2, 8), np.float32)

    with pytest.raises(InterruptedAnswerError):
        engine.prefill([image(2.0), EmbeddingSegment('stop', 2, stop), text('x')], cancel)

    assert answer(engine, image(2.0), text('x')).endswith('about image 32.000')


def test_it_takes_its_time_and_can_be_interrupted_meanwhile() -> None:
    engine, cancel = FakeLanguageEngine(token_s=3600.0), CancelToken()

    with cancel.deadline(time.monotonic() + 0.02), pytest.raises(InterruptedAnswerError):
        engine.prefill([text('x'), text('y')], cancel)


def test_closing_is_noted() -> None:
    engine = FakeLanguageEngine()

    engine.close()
    engine.close()

    assert engine.closed
