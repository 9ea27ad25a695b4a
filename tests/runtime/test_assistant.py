"""One question about one frame, on tiny real engines: answers, reuse, codes, and a next question that always works."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mobilevlm_ros import errors
from mobilevlm_ros.errors import EngineError, MobileVLMError
from mobilevlm_ros.runtime.assistant import Assistant, AssistantSettings, Progress
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.language.fake import FakeLanguageEngine
from mobilevlm_ros.runtime.loading import fake_assistant, load_assistant_from
from mobilevlm_ros.runtime.preprocess import PreprocessSpec
from mobilevlm_ros.runtime.prompt import plain
from mobilevlm_ros.runtime.sampling import SamplingSettings
from mobilevlm_ros.runtime.vision.fake import FakeVision
from mobilevlm_ros.types import Answer, AnswerFormat, Frame, Question, ResultCode, Timing

SCHEMA = json.dumps({'type': 'object', 'properties': {'n': {'type': 'boolean'}}, 'required': ['n']})
TEXT = Question('what is the car?', max_tokens=12)
OTHER_TEXT = Question('is the table red?', max_tokens=12)
YES_NO = Question('is the car red?', AnswerFormat.YES_NO)
CHOICE = Question('what is it?', AnswerFormat.CHOICE, choices=('the car', 'the truck', 'a table'))
JSON = Question('what?', AnswerFormat.JSON, json_schema=SCHEMA, max_tokens=60)


@pytest.fixture
def frame(photo: NDArray[np.uint8]) -> Frame:
    return Frame(photo, camera='front', frame_id='lens', stamp_ns=123, age_s=0.25)


@pytest.fixture
def other_frame(photo: NDArray[np.uint8]) -> Frame:
    return Frame(255 - photo, camera='front')


@pytest.fixture
def cold(tiny_bundle: Path) -> Iterator[Callable[[Question, Frame], Answer]]:
    """Answers of an assistant that has seen nothing before."""
    assistant = load_assistant_from(tiny_bundle)

    def ask(question: Question, frame: Frame) -> Answer:
        assistant.forget()
        return assistant.ask(question, frame)

    yield ask
    assistant.close()


def same(one: Answer, other: Answer) -> bool:
    """Equal in everything but the times."""
    return replace(one, timing=other.timing) == other


# -- answers ------------------------------------------------------------------------------------------------------


def test_an_answer_names_its_frame_model_and_prompt(tiny_assistant: Assistant, frame: Frame) -> None:
    answer = tiny_assistant.ask(TEXT, frame)

    assert answer.result_code is ResultCode.OK
    assert answer.success
    assert (answer.camera, answer.frame_id, answer.stamp_ns, answer.age_s) == ('front', 'lens', 123, 0.25)
    assert answer.model_id == tiny_assistant.model_id
    assert len(answer.prompt_hash) == 16
    assert answer.question is TEXT


def test_a_text_answer_has_confidence_and_says_that_it_was_cut(tiny_assistant: Assistant, frame: Frame) -> None:
    answer = tiny_assistant.ask(TEXT, frame)

    assert answer.text
    assert answer.truncated
    assert answer.timing.generated_tokens == 12
    assert 0 < answer.confidence < 1
    assert answer.options == ()


@pytest.mark.parametrize('question', [YES_NO, CHOICE])
def test_a_closed_answer_is_the_most_probable_option(
    tiny_assistant: Assistant, frame: Frame, question: Question
) -> None:
    answer = tiny_assistant.ask(question, frame, settings=AssistantSettings(min_confidence=0.0))

    assert answer.result_code is ResultCode.OK
    assert answer.options == (question.choices or ('yes', 'no'))
    assert sum(answer.probabilities) == pytest.approx(1.0)
    assert answer.text == answer.options[int(np.argmax(answer.probabilities))]
    assert answer.confidence == max(answer.probabilities)
    assert 0 < answer.option_mass <= 1


def test_an_unsure_closed_answer_is_unknown_and_keeps_its_probabilities(
    tiny_assistant: Assistant, frame: Frame
) -> None:
    answer = tiny_assistant.ask(CHOICE, frame, settings=AssistantSettings(min_confidence=1.0))

    assert answer.result_code is ResultCode.UNKNOWN
    assert answer.text == ''
    assert 'below the limit of 1.00' in answer.message
    assert sum(answer.probabilities) == pytest.approx(1.0)
    assert answer.confidence == max(answer.probabilities)


def test_a_json_answer_satisfies_its_schema(tiny_assistant: Assistant, frame: Frame) -> None:
    answer = tiny_assistant.ask(JSON, frame)

    assert answer.result_code is ResultCode.OK
    assert isinstance(json.loads(answer.text)['n'], bool)


def test_a_json_answer_that_was_cut_is_incomplete(tiny_assistant: Assistant, frame: Frame) -> None:
    answer = tiny_assistant.ask(replace(JSON, max_tokens=2), frame)

    assert answer.result_code is ResultCode.INCOMPLETE
    assert 'raise max_tokens' in answer.message
    assert answer.truncated


def test_a_model_that_says_nothing_is_unknown(frame: Frame) -> None:
    vision, language = FakeVision(), FakeLanguageEngine(reply=lambda prompt, total: ' ')
    assistant = Assistant(vision, language, plain(), PreprocessSpec(16), model_id='mute')

    answer = assistant.ask(TEXT, frame)

    assert (answer.result_code, answer.text) == (ResultCode.UNKNOWN, '')
    assert answer.message == 'the model had nothing to say'


def test_the_assistants_max_tokens_is_the_default(tiny_assistant: Assistant, frame: Frame) -> None:
    answer = tiny_assistant.ask(Question('what?'), frame, settings=AssistantSettings(max_tokens=5))

    assert answer.timing.generated_tokens == 5


def test_sampling_settings_are_those_of_the_question(tiny_assistant: Assistant, frame: Frame) -> None:
    def ask(seed: int) -> str:
        sampling = SamplingSettings(temperature=2.0, seed=seed)
        return tiny_assistant.ask(TEXT, frame, settings=AssistantSettings(sampling=sampling)).text

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)


def test_progress_tells_stages_and_growing_text(tiny_assistant: Assistant, frame: Frame) -> None:
    seen: list[Progress] = []

    answer = tiny_assistant.ask(TEXT, frame, on_progress=seen.append)

    stages = list(dict.fromkeys(progress.stage for progress in seen))
    assert stages == ['vision', 'decode']
    texts = [progress.text for progress in seen if progress.text]
    assert all(answer.text.startswith(text) for text in texts)
    assert texts


def test_progress_on_a_known_frame_begins_with_prefill(tiny_assistant: Assistant, frame: Frame) -> None:
    tiny_assistant.ask(TEXT, frame)
    seen: list[Progress] = []

    tiny_assistant.ask(OTHER_TEXT, frame, on_progress=seen.append)

    assert seen[0].stage == 'prefill'


# -- reuse --------------------------------------------------------------------------------------------------------


def test_a_second_question_on_a_frame_computes_its_own_tokens_only(tiny_assistant: Assistant, frame: Frame) -> None:
    first = tiny_assistant.ask(TEXT, frame).timing
    second = tiny_assistant.ask(OTHER_TEXT, frame).timing

    assert not first.vision_reused
    assert first.vision_s > 0
    assert second.vision_reused
    assert (second.vision_s, second.preprocess_s) == (0, 0)
    before, after = tiny_assistant._template.chunks(OTHER_TEXT.text, tiny_assistant.language)
    assert second.reused_tokens == len(before) + 4
    assert second.prompt_tokens == len(before) + 4 + len(after)


@pytest.mark.parametrize('question', [OTHER_TEXT, YES_NO, CHOICE, JSON], ids=lambda q: q.format.name)
def test_a_warm_answer_is_the_cold_one(
    tiny_assistant: Assistant, frame: Frame, cold: Callable[[Question, Frame], Answer], question: Question
) -> None:
    tiny_assistant.ask(TEXT, frame)

    assert same(tiny_assistant.ask(question, frame), cold(question, frame))


def test_answers_about_alternating_frames_are_never_mixed(
    tiny_assistant: Assistant, photo: NDArray[np.uint8], cold: Callable[[Question, Frame], Answer]
) -> None:
    frames = [Frame(np.roll(photo, 7 * shift, axis=1)) for shift in range(7)]
    expected = {
        (number, question.text): cold(question, frame)
        for number, frame in enumerate(frames)
        for question in (TEXT, OTHER_TEXT)
    }
    assert len({answer.text for answer in expected.values()}) > 7
    random = np.random.default_rng(0)

    for number in random.integers(0, 7, 25):
        question = TEXT if random.random() < 0.5 else OTHER_TEXT
        answer = tiny_assistant.ask(question, frames[int(number)])
        assert same(answer, expected[int(number), question.text])


def test_equal_pixels_are_one_frame_whatever_their_stamp(tiny_assistant: Assistant, frame: Frame) -> None:
    tiny_assistant.ask(TEXT, frame)

    repeated = Frame(frame.rgb_hwc.copy(), camera='back', stamp_ns=999)

    assert tiny_assistant.ask(TEXT, repeated).timing.vision_reused


def test_equal_bytes_of_another_shape_are_another_frame(tiny_assistant: Assistant, frame: Frame) -> None:
    tiny_assistant.ask(TEXT, frame)
    height, width, _ = frame.rgb_hwc.shape

    reshaped = Frame(frame.rgb_hwc.reshape(width, height, 3))

    assert not tiny_assistant.ask(TEXT, reshaped).timing.vision_reused


def test_visual_tokens_of_recent_frames_are_kept_and_no_more(photo: NDArray[np.uint8]) -> None:
    vision, language = FakeVision(), FakeLanguageEngine()
    language._cache._capacity = 0
    assistant = Assistant(vision, language, plain(), PreprocessSpec(16), model_id='m', n_frames=2)
    frames = [Frame(photo + number) for number in range(3)]

    for number in (0, 1, 0, 1, 2, 1, 0):
        assistant.ask(Question('what?'), frames[number])

    assert vision.n_runs == 4


def test_forgetting_makes_the_next_question_cold(tiny_assistant: Assistant, frame: Frame) -> None:
    before = tiny_assistant.ask(TEXT, frame)

    tiny_assistant.forget()
    after = tiny_assistant.ask(TEXT, frame)

    assert (after.timing.vision_reused, after.timing.reused_tokens) == (False, 0)
    assert same(after, before)


# -- the prompt's hash --------------------------------------------------------------------------------------------


def test_equal_prompts_have_equal_hashes(tiny_assistant: Assistant, frame: Frame, other_frame: Frame) -> None:
    assert tiny_assistant.ask(TEXT, frame).prompt_hash == tiny_assistant.ask(TEXT, other_frame).prompt_hash


def test_whatever_changes_the_answer_changes_the_hash(tiny_assistant: Assistant, frame: Frame) -> None:
    sampled = AssistantSettings(sampling=SamplingSettings(temperature=1.0))
    other_seed = AssistantSettings(sampling=SamplingSettings(temperature=1.0, seed=1))
    other_schema = replace(JSON, json_schema='{"type": "null"}')

    hashes = [
        tiny_assistant.ask(question, frame, settings=settings).prompt_hash
        for question, settings in [
            (TEXT, None), (OTHER_TEXT, None), (TEXT, sampled), (TEXT, other_seed), (YES_NO, None), (CHOICE, None),
            (replace(CHOICE, choices=CHOICE.choices[::-1]), None), (JSON, None), (other_schema, None),
        ]
    ]  # fmt: skip

    assert len(set(hashes)) == len(hashes)


def test_the_hash_knows_the_model(frame: Frame) -> None:
    def ask(model_id: str) -> str:
        assistant = Assistant(FakeVision(), FakeLanguageEngine(), plain(), PreprocessSpec(16), model_id=model_id)
        return assistant.ask(TEXT, frame).prompt_hash

    assert ask('a') == ask('a') != ask('b')


# -- what goes wrong ----------------------------------------------------------------------------------------------


def canceled(code: ResultCode) -> CancelToken:
    token = CancelToken()
    token.set(code, 'stopped')
    return token


@pytest.mark.parametrize(
    ('question', 'options', 'code'),
    [
        (Question(''), {}, ResultCode.BAD_QUESTION),
        (Question('bell\a'), {}, ResultCode.BAD_QUESTION),
        (Question('the ' * 4000), {}, ResultCode.TOO_LONG),
        (replace(CHOICE, choices=('a',)), {}, ResultCode.BAD_FORMAT),
        (replace(JSON, json_schema='{'), {}, ResultCode.BAD_FORMAT),
        (replace(JSON, json_schema='{"not": {}}'), {}, ResultCode.BAD_FORMAT),
        (replace(JSON, json_schema='{"const": "\\u0000"}'), {}, ResultCode.BAD_FORMAT),
        (replace(JSON, json_schema='{"maxLength": 1000000}'), {}, ResultCode.BAD_FORMAT),
        (replace(JSON, json_schema='{"pattern": "^\\ud800$", "type": "string"}'), {}, ResultCode.BAD_FORMAT),
        (Question('what?', format=7), {}, ResultCode.BAD_FORMAT),  # type: ignore[arg-type]
        (TEXT, {'cancel': canceled(ResultCode.CANCELED)}, ResultCode.CANCELED),
        (TEXT, {'cancel': canceled(ResultCode.TIMEOUT)}, ResultCode.TIMEOUT),
        (TEXT, {'cancel': canceled(ResultCode.NOT_ACTIVE)}, ResultCode.NOT_ACTIVE),
    ],
)
def test_each_mistake_has_its_code_and_the_next_question_works(
    tiny_assistant: Assistant,
    frame: Frame,
    cold: Callable[[Question, Frame], Answer],
    question: Question,
    options: dict[str, Any],
    code: ResultCode,
) -> None:
    answer = tiny_assistant.ask(question, frame, **options)

    assert answer.result_code is code
    assert answer.message
    assert (answer.text, answer.success) == ('', False)
    assert (answer.camera, answer.model_id) == ('front', tiny_assistant.model_id)
    assert same(tiny_assistant.ask(OTHER_TEXT, frame), cold(OTHER_TEXT, frame))


@pytest.mark.parametrize(
    'pixels',
    [np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)],
    ids=['empty', 'grey', 'float'],
)
def test_a_bad_frame_has_its_code_and_the_next_question_works(
    tiny_assistant: Assistant, frame: Frame, pixels: Any
) -> None:
    answer = tiny_assistant.ask(TEXT, Frame(pixels))

    assert answer.result_code is ResultCode.BAD_IMAGE
    assert tiny_assistant.ask(TEXT, frame).success


# Not: an answer that was interrupted, which has a text, and a record of training data, of which engines know nothing.
OTHERS = {errors.InterruptedAnswerError, errors.RecordError}
ALL_ERRORS = [
    error
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, MobileVLMError) and error not in OTHERS
]


@pytest.mark.parametrize('error', ALL_ERRORS, ids=lambda error: error.__name__)
def test_every_error_of_the_engines_becomes_its_code(frame: Frame, error: Any) -> None:
    assistant = fake_assistant(token_s=0.0)
    vision: Any = assistant._vision
    encode = vision.encode

    def fail(pixels: Any, cancel: CancelToken) -> Any:
        raise error('broken', frame) if error is errors.StaleFrameError else error('broken')

    vision.encode = fail
    answer = assistant.ask(TEXT, frame)
    vision.encode = encode

    assert (answer.result_code, answer.message, answer.text) == (error.code, 'broken', '')
    assert assistant.ask(TEXT, frame).success


def test_cancelling_keeps_the_partial_text(
    tiny_assistant: Assistant, frame: Frame, cold: Callable[[Question, Frame], Answer]
) -> None:
    cancel = CancelToken()

    def stop_soon(progress: Progress) -> None:
        if len(progress.text) >= 4:
            cancel.set()

    answer = tiny_assistant.ask(replace(TEXT, max_tokens=500), frame, cancel=cancel, on_progress=stop_soon)

    assert answer.result_code is ResultCode.CANCELED
    assert len(answer.text) >= 4
    assert answer.timing.generated_tokens < 500
    assert cold(TEXT, frame).text.startswith(answer.text[:4])
    assert same(tiny_assistant.ask(TEXT, frame), cold(TEXT, frame))


def test_cancelling_a_closed_question_has_no_answer(tiny_assistant: Assistant, frame: Frame) -> None:
    cancel = CancelToken()

    def stop(progress: Progress) -> None:
        if progress.stage == 'decode':
            cancel.set()

    answer = tiny_assistant.ask(CHOICE, frame, cancel=cancel, on_progress=stop)

    assert (answer.result_code, answer.text, answer.probabilities) == (ResultCode.CANCELED, '', ())
    assert tiny_assistant.ask(CHOICE, frame, settings=AssistantSettings(min_confidence=0.0)).success


def test_a_long_answer_ends_with_the_context(tiny_assistant: Assistant, frame: Frame) -> None:
    answer = tiny_assistant.ask(replace(TEXT, max_tokens=100_000), frame)

    assert answer.result_code is ResultCode.OK
    assert answer.truncated
    assert answer.timing.prompt_tokens + answer.timing.generated_tokens == tiny_assistant.language.n_ctx + 1
    assert tiny_assistant.ask(OTHER_TEXT, frame).success


def test_a_question_without_room_for_an_answer_is_too_long(tiny_assistant: Assistant, frame: Frame) -> None:
    n_ctx, language = tiny_assistant.language.n_ctx, tiny_assistant.language

    def prompt_tokens(n: int) -> int:
        before, after = tiny_assistant._template.chunks('a' + '1' * n, language)
        return len(before) + 4 + len(after)

    n_fits = next(n for n in range(n_ctx) if prompt_tokens(n) + 16 == n_ctx)

    assert tiny_assistant.ask(Question('a' + '1' * n_fits, max_tokens=50), frame).success
    answer = tiny_assistant.ask(Question('a' + '1' * (n_fits + 1), max_tokens=50), frame)
    assert answer.result_code is ResultCode.TOO_LONG


# -- times --------------------------------------------------------------------------------------------------------


def test_the_stages_add_up(tiny_assistant: Assistant, frame: Frame) -> None:
    timing = tiny_assistant.ask(TEXT, frame).timing

    stages = timing.preprocess_s + timing.vision_s + timing.prefill_s + timing.decode_s
    assert min(timing.preprocess_s, timing.vision_s, timing.prefill_s, timing.decode_s) > 0
    assert stages <= timing.total_s
    assert 0 < timing.first_text_s <= timing.total_s


def test_what_came_before_counts(tiny_assistant: Assistant, frame: Frame) -> None:
    timing = Timing(queue_s=10.0, image_s=5.0)

    answer = tiny_assistant.ask(TEXT, frame, timing=timing)

    assert answer.timing is timing
    assert timing.total_s > 15.0
    assert 15.0 < timing.first_text_s <= timing.total_s


# -- construction -------------------------------------------------------------------------------------------------


def test_engines_that_do_not_fit_are_refused() -> None:
    with pytest.raises(EngineError, match='8 wide, the language model takes 16'):
        Assistant(FakeVision(), FakeLanguageEngine(n_embd=16), plain(), PreprocessSpec(16), model_id='x')


def test_closing_frees_both_engines() -> None:
    assistant = fake_assistant()

    assistant.close()
    assistant.close()

    assert assistant._vision.closed  # type: ignore[attr-defined]
    assert assistant.language.closed  # type: ignore[attr-defined]


def test_threads_are_set_when_they_change(frame: Frame) -> None:
    assistant = fake_assistant(token_s=0.0)
    calls: list[tuple[int, int]] = []
    assistant.language.set_threads = lambda n, n_batch: calls.append((n, n_batch))  # type: ignore[method-assign]

    for n_threads in (0, 2, 2, 0):
        assistant.ask(TEXT, frame, settings=AssistantSettings(n_threads=n_threads))

    assert calls == [(2, 2), (0, 0)]
