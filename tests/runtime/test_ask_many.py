"""Several questions about one frame at once: the answers of one after the other, and each mistake is its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mobilevlm_ros.errors import EngineError, InterruptedAnswerError
from mobilevlm_ros.runtime.asking import Asked, AssistantSettings, Progress
from mobilevlm_ros.runtime.assistant import Assistant
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.loading import fake_assistant, load_assistant_from
from mobilevlm_ros.types import Answer, AnswerFormat, Frame, Question, ResultCode, Timing

BOUND = 2e-3
"""How far a probability from a batch is from that of a question alone: keys and values are rounded to float16."""
SURE = AssistantSettings(min_confidence=0.0)
YES_NO = [Question(f'is the {what}?', AnswerFormat.YES_NO) for what in ('car red', 'car blue', 'truck red', 'a', 'b')]
CHOICES = [
    Question('what is it?', AnswerFormat.CHOICE, choices=('the car', 'the truck', 'a table')),
    Question('what is it?', AnswerFormat.CHOICE, choices=('red', 'green')),
    Question('what?', AnswerFormat.CHOICE, choices=('the red car', 'the red truck', 'the red table')),
]
CLOSED = [*YES_NO, *CHOICES]
TEXT = Question('what is the car?', max_tokens=12)
JSON = Question('what?', AnswerFormat.JSON, json_schema='{"type": "boolean"}', max_tokens=20)


@pytest.fixture
def frame(photo: NDArray[np.uint8]) -> Frame:
    return Frame(photo, camera='front', frame_id='lens', stamp_ns=123, age_s=0.25)


@pytest.fixture
def alone(tiny_bundle: Path) -> Iterator[Assistant]:
    """An assistant that is asked one question after the other."""
    assistant = load_assistant_from(tiny_bundle)
    yield assistant
    assistant.close()


def computed(assistant: Assistant) -> list[int]:
    """From now on, how many positions each call of the model computes."""
    engine: Any = assistant.language
    sizes: list[int] = []
    compute = engine._compute

    def counted(batch: Any, cancel: CancelToken) -> None:
        compute(batch, cancel)
        sizes.append(int(batch.n_tokens))

    engine._compute = counted
    return sizes


def same_but_for_rounding(one: Answer, other: Answer) -> bool:
    assert one.probabilities == pytest.approx(other.probabilities, abs=BOUND)
    assert one.option_mass == pytest.approx(other.option_mass, abs=BOUND)
    assert one.confidence == pytest.approx(other.confidence, abs=BOUND)
    exact = {'confidence': 0.0, 'probabilities': (), 'option_mass': 0.0, 'timing': Timing()}
    return replace(one, **exact) == replace(other, **exact)  # type: ignore[arg-type]


def test_answers_are_those_of_one_after_the_other(tiny_assistant: Assistant, alone: Assistant, frame: Frame) -> None:
    questions = [CLOSED[0], TEXT, *CLOSED[1:], JSON]

    answers = tiny_assistant.ask_many(questions, frame, settings=SURE)

    for question, answer in zip(questions, answers, strict=True):
        assert answer.question is question
        assert answer.success
        assert same_but_for_rounding(answer, alone.ask(question, frame, settings=SURE))


def test_closed_questions_are_one_call_of_the_model(tiny_assistant: Assistant, frame: Frame) -> None:
    tiny_assistant.ask(TEXT, frame)
    sizes = computed(tiny_assistant)

    answers = tiny_assistant.ask_many([*YES_NO[:3], *CHOICES], frame)

    assert len(sizes) == 1
    own = [answer.timing.prompt_tokens - answer.timing.reused_tokens for answer in answers]
    n_branchings = sum(answer.timing.generated_tokens for answer in answers)
    assert sizes[0] < sum(own) + 5 * n_branchings  # beginnings that they share are computed once
    assert all(answer.timing.vision_reused for answer in answers)


def test_one_closed_question_is_one_call_of_the_model(tiny_assistant: Assistant, frame: Frame) -> None:
    tiny_assistant.ask(TEXT, frame)
    sizes = computed(tiny_assistant)

    first, second = tiny_assistant.ask(YES_NO[0], frame), tiny_assistant.ask(CHOICES[0], frame)

    assert len(sizes) == 2
    assert (first.timing.generated_tokens, second.timing.generated_tokens > 0) == (0, True)


def test_a_cold_frame_is_seen_once(tiny_assistant: Assistant, frame: Frame) -> None:
    runs: list[int] = []
    vision: Any = tiny_assistant._vision
    encode = vision.encode
    vision.encode = lambda *args: (runs.append(1), encode(*args))[1]

    answers = tiny_assistant.ask_many([*CLOSED, TEXT], frame)

    assert len(runs) == 1
    assert [answer.timing.vision_reused for answer in answers] == [False] * len(CLOSED) + [True]


def test_no_questions_have_no_answers(tiny_assistant: Assistant, frame: Frame) -> None:
    assert tiny_assistant.ask_many([], frame) == []


def test_equal_questions_have_equal_answers(tiny_assistant: Assistant, frame: Frame) -> None:
    one, other = tiny_assistant.ask_many([YES_NO[0], YES_NO[0]], frame)

    assert one.probabilities == other.probabilities


def test_more_than_one_batch_holds_are_answered_too(tiny_assistant: Assistant, alone: Assistant, frame: Frame) -> None:
    choices = tuple(f'{a} {b}' for a in ('red', 'blue', 'green', 'the') for b in ('car', 'truck', 'table', 'a'))
    questions = [
        Question(f'what is {number}?', AnswerFormat.CHOICE, choices=choices[: 5 + number]) for number in range(12)
    ]

    answers = tiny_assistant.ask_many(questions, frame, settings=SURE)

    assert sum(answer.timing.generated_tokens for answer in answers) > 64
    for question, answer in zip(questions, answers, strict=True):
        assert same_but_for_rounding(answer, alone.ask(question, frame, settings=SURE))


def test_questions_that_fill_the_context_are_answered_in_several_batches(
    tiny_assistant: Assistant, alone: Assistant, frame: Frame
) -> None:
    questions = [Question(f'is {n}' + ' the table' * 140 + '?', AnswerFormat.YES_NO) for n in range(8)]
    assert len(tiny_assistant.language.tokenize(questions[0].text)) * 8 > tiny_assistant.language.n_ctx

    answers = tiny_assistant.ask_many(questions, frame, settings=SURE)

    for question, answer in zip(questions, answers, strict=True):
        assert same_but_for_rounding(answer, alone.ask(question, frame, settings=SURE))


@pytest.mark.parametrize(
    ('bad', 'code'),
    [
        (Question(''), ResultCode.BAD_QUESTION),
        (Question('', AnswerFormat.YES_NO), ResultCode.BAD_QUESTION),
        (Question('the ' * 4000, AnswerFormat.YES_NO), ResultCode.TOO_LONG),
        (Question('what?', AnswerFormat.CHOICE, choices=('a',)), ResultCode.BAD_FORMAT),
        (Question('what?', AnswerFormat.JSON, json_schema='{'), ResultCode.BAD_FORMAT),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_question_does_not_spoil_the_others(
    tiny_assistant: Assistant, alone: Assistant, frame: Frame, bad: Question, code: ResultCode
) -> None:
    first, second, third = tiny_assistant.ask_many([YES_NO[0], bad, CHOICES[0]], frame, settings=SURE)

    assert (second.result_code, bool(second.message), second.text) == (code, True, '')
    assert same_but_for_rounding(first, alone.ask(YES_NO[0], frame, settings=SURE))
    assert same_but_for_rounding(third, alone.ask(CHOICES[0], frame, settings=SURE))


def test_options_that_leave_no_room_are_too_long_alone(tiny_assistant: Assistant, frame: Frame) -> None:
    room = tiny_assistant.language.n_ctx - tiny_assistant.ask(YES_NO[0], frame).timing.prompt_tokens
    long_question = Question('is ' + '1' * (room - 40), AnswerFormat.CHOICE, choices=('1' * 150, '1' * 149 + '2'))

    first, second = tiny_assistant.ask_many([YES_NO[0], long_question], frame, settings=SURE)

    assert first.success
    assert second.result_code is ResultCode.TOO_LONG


def test_a_frame_that_cannot_be_seen_is_told_to_all(tiny_assistant: Assistant) -> None:
    answers = tiny_assistant.ask_many([*CLOSED, TEXT], Frame(np.zeros((0, 4, 3), np.uint8)))

    assert {answer.result_code for answer in answers} == {ResultCode.BAD_IMAGE}


def test_an_error_of_the_engine_is_told_to_all_and_the_next_works(tiny_assistant: Assistant, frame: Frame) -> None:
    engine: Any = tiny_assistant.language
    branch = engine.branch

    def fail(*_: Any) -> Any:
        raise EngineError('broken')

    engine.branch = fail
    answers = tiny_assistant.ask_many([*YES_NO, TEXT], frame)
    engine.branch = branch

    assert [answer.result_code for answer in answers] == [ResultCode.ENGINE_ERROR] * 5 + [ResultCode.OK]
    assert tiny_assistant.ask_many(YES_NO, frame, settings=SURE)[0].success


def test_each_question_has_its_own_settings(tiny_assistant: Assistant, frame: Frame) -> None:
    strict = AssistantSettings(min_confidence=1.0)

    first, second = tiny_assistant.ask_many([Asked(YES_NO[0], settings=SURE), Asked(YES_NO[0], settings=strict)], frame)

    assert (first.result_code, second.result_code) == (ResultCode.OK, ResultCode.UNKNOWN)
    assert second.probabilities == first.probabilities


# -- stopping -----------------------------------------------------------------------------------------------------


def test_cancelling_all_stops_all(tiny_assistant: Assistant, frame: Frame) -> None:
    cancel = CancelToken()
    cancel.set(ResultCode.TIMEOUT, 'too late')

    answers = tiny_assistant.ask_many([*CLOSED, TEXT], frame, cancel=cancel)

    assert {(answer.result_code, answer.message) for answer in answers} == {(ResultCode.TIMEOUT, 'too late')}
    assert tiny_assistant.ask_many(CLOSED, frame, settings=SURE)[0].success


def stop_at_decode(token: CancelToken, code: ResultCode) -> Any:
    def on_progress(progress: Progress) -> None:
        if progress.stage == 'decode':
            token.set(code, 'stopped')

    return on_progress


def test_a_canceled_question_drops_out_and_the_others_go_on(
    tiny_assistant: Assistant, alone: Assistant, frame: Frame
) -> None:
    token = CancelToken()
    asked = [
        Asked(YES_NO[0], settings=SURE),
        Asked(YES_NO[1], token, stop_at_decode(token, ResultCode.CANCELED), settings=SURE),
        Asked(CHOICES[0], settings=SURE),
    ]

    first, second, third = tiny_assistant.ask_many(asked, frame)

    assert (second.result_code, second.message, second.probabilities) == (ResultCode.CANCELED, 'stopped', ())
    assert same_but_for_rounding(first, alone.ask(YES_NO[0], frame, settings=SURE))
    assert same_but_for_rounding(third, alone.ask(CHOICES[0], frame, settings=SURE))


def test_when_the_last_is_canceled_the_batch_stops(tiny_assistant: Assistant, frame: Frame) -> None:
    tokens = [CancelToken(), CancelToken()]
    codes = [ResultCode.CANCELED, ResultCode.TIMEOUT]
    asked = [
        Asked(question, token, stop_at_decode(token, code))
        for question, token, code in zip(YES_NO[:2], tokens, codes, strict=True)
    ]
    tiny_assistant.ask(TEXT, frame)
    sizes = computed(tiny_assistant)

    answers = tiny_assistant.ask_many(asked, frame)

    assert [answer.result_code for answer in answers] == codes
    assert sizes == []


# -- times --------------------------------------------------------------------------------------------------------


def test_each_answer_has_its_times(tiny_assistant: Assistant, frame: Frame) -> None:
    asked = [Asked(YES_NO[0], timing=Timing(queue_s=5.0)), Asked(YES_NO[1]), Asked(TEXT)]

    first, second, text = (answer.timing for answer in tiny_assistant.ask_many(asked, frame))

    assert first.queue_s == 5.0
    assert 5.0 < first.first_text_s <= first.total_s
    assert second.total_s < 5.0
    for timing in (second, text):
        assert 0 < timing.first_text_s <= timing.total_s
        assert min(timing.prefill_s, timing.decode_s) > 0
    assert (first.vision_s, first.prefill_s) == (second.vision_s, second.prefill_s)
    assert text.total_s >= second.total_s


# -- ahead of questions -------------------------------------------------------------------------------------------


def test_a_frame_encoded_ahead_meets_its_question_warm(
    tiny_assistant: Assistant, alone: Assistant, frame: Frame
) -> None:
    key, was_computed = tiny_assistant.encode(frame, CancelToken())
    assert was_computed
    assert tiny_assistant.is_warm(key)
    assert tiny_assistant.encode(frame, CancelToken()) == (key, False)

    for question in (TEXT, YES_NO[0], JSON):
        answer = tiny_assistant.ask(question, frame)
        assert (answer.timing.vision_reused, answer.timing.vision_s) == (True, 0)
        assert replace(answer, timing=Timing()) == replace(alone.ask(question, frame), timing=Timing())


def test_a_dropped_frame_is_cold(tiny_assistant: Assistant, photo: NDArray[np.uint8]) -> None:
    frame = Frame(photo)
    key, _ = tiny_assistant.encode(frame, CancelToken())
    other, _ = tiny_assistant.encode(Frame(255 - photo), CancelToken())

    tiny_assistant.drop(key)

    assert not tiny_assistant.is_warm(key)
    assert tiny_assistant.is_warm(other)
    assert not tiny_assistant.ask(TEXT, frame).timing.vision_reused


def test_encoding_ahead_can_be_canceled(tiny_assistant: Assistant, frame: Frame) -> None:
    cancel = CancelToken()
    cancel.set()

    with pytest.raises(InterruptedAnswerError):
        tiny_assistant.encode(frame, cancel)

    assert tiny_assistant.ask(TEXT, frame).success


def test_the_fake_answers_many_as_it_answers_one(frame: Frame) -> None:
    assistant = fake_assistant(token_s=0.0)

    many = assistant.ask_many(CLOSED, frame)

    for question, answer in zip(CLOSED, many, strict=True):
        assert replace(answer, timing=Timing()) == replace(assistant.ask(question, frame), timing=Timing())
