"""Below which confidence an answer is unknown: what the bundle says of the format, unless somebody says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilevlm_ros.errors import BundleIncompleteError
from mobilevlm_ros.runtime.asking import Asked, AssistantSettings
from mobilevlm_ros.runtime.assistant import Assistant
from mobilevlm_ros.runtime.bundle import open_bundle
from mobilevlm_ros.runtime.options import OptionScores, OptionTree
from mobilevlm_ros.types import Answer, AnswerFormat, Frame, Question, ResultCode

FRAME = Frame(np.arange(48 * 64 * 3, dtype=np.uint32).reshape(48, 64, 3).astype(np.uint8))
YES_NO = Question('is the car red', AnswerFormat.YES_NO)
CHOICE = Question('what is it', AnswerFormat.CHOICE, ('red car', 'table'))

Load = Callable[[Any], Assistant]


def ask(assistant: Assistant, question: Question, limit: float | None = None) -> Answer:
    return assistant.ask(question, FRAME, settings=AssistantSettings(min_confidence=limit))


@pytest.mark.parametrize('answers', [None, {}, {'min_confidence': {}}])
@pytest.mark.parametrize(('confidence', 'code'), [(0.49, ResultCode.UNKNOWN), (0.5, ResultCode.OK)])
def test_a_bundle_that_says_nothing_means_a_half(
    load: Load, monkeypatch: pytest.MonkeyPatch, answers: Any, confidence: float, code: ResultCode
) -> None:
    scores = OptionScores((confidence, 0.3, 0.7 - confidence), mass=1.0, n_steps=0)
    monkeypatch.setattr(OptionTree, 'score', lambda self, first, later: scores)
    question = Question('what is it', AnswerFormat.CHOICE, ('red', 'blue', 'green'))

    assert ask(load(answers), question).result_code is code


@pytest.mark.parametrize(('name', 'strict', 'other'), [('yes_no', YES_NO, CHOICE), ('choice', CHOICE, YES_NO)])
def test_a_bundle_speaks_for_each_format(load: Load, name: str, strict: Question, other: Question) -> None:
    assistant = load({'min_confidence': {name: 1}})

    assert ask(assistant, strict).result_code is ResultCode.UNKNOWN
    assert ask(assistant, other).success


def test_who_asks_has_the_last_word(load: Load) -> None:
    assistant = load({'min_confidence': {'yes_no': 0.0, 'choice': 1.0}})

    assert ask(assistant, YES_NO, 1.0).result_code is ResultCode.UNKNOWN
    assert ask(assistant, CHOICE, 0.0).success
    assert assistant.ask(CHOICE, FRAME).result_code is ResultCode.UNKNOWN


def test_questions_asked_together_have_each_their_own(load: Load) -> None:
    assistant = load({'min_confidence': {'yes_no': 1.0}})
    sure = Asked(YES_NO, settings=AssistantSettings(min_confidence=0.0))
    codes = [answer.result_code for answer in assistant.ask_many([YES_NO, CHOICE, sure], FRAME)]

    assert codes == [ResultCode.UNKNOWN, ResultCode.OK, ResultCode.OK]


@pytest.mark.parametrize(
    'answers', [0.5, {'min_confidence': 0.5}, {'min_confidence': {'text': 0.5}}, {'min_confidence': {'yes_no': 1.1}}]
)
def test_what_is_no_limit_names_the_place(load: Load, answers: Any) -> None:
    with pytest.raises(BundleIncompleteError, match=r'\$\.answers'):
        load(answers)


def test_it_is_part_of_what_the_bundle_is(tiny_bundle: Path, load: Load) -> None:
    assert load({'min_confidence': {'yes_no': 0.7}}).model_id != open_bundle(tiny_bundle).model_id
