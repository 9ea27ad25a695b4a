"""A bundle's temperature: how sure a closed answer is, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilevlm_ros.errors import BundleIncompleteError
from mobilevlm_ros.runtime.asking import AssistantSettings
from mobilevlm_ros.runtime.assistant import Assistant
from mobilevlm_ros.runtime.bundle import open_bundle
from mobilevlm_ros.runtime.options import OptionScores
from mobilevlm_ros.types import AnswerFormat, Frame, Question, ResultCode

FRAME = Frame(np.arange(48 * 64 * 3, dtype=np.uint32).reshape(48, 64, 3).astype(np.uint8))
YES_NO = Question('is the car red', AnswerFormat.YES_NO)
CHOICE = Question('what is it', AnswerFormat.CHOICE, ('red car', 'table'))
ANY = AssistantSettings(min_confidence=0.0)

Load = Callable[[Any], Assistant]


@given(st.lists(st.floats(0.001, 1.0), min_size=2, max_size=6), st.floats(0.1, 10.0))
def test_options_keep_their_order_and_sum_to_one(weights: list[float], temperature: float) -> None:
    scores = OptionScores(tuple(weight / sum(weights) for weight in weights), mass=0.5, n_steps=1)
    found = scores.at(temperature)
    assert sum(found.probabilities) == pytest.approx(1.0)
    order = np.argsort(weights, kind='stable')
    assert (np.diff(np.array(found.probabilities)[order]) >= -1e-9).all()
    assert (found.mass, found.n_steps) == (0.5, 1)


def test_an_option_that_is_out_of_the_question_stays_out() -> None:
    assert OptionScores((1.0, 0.0), mass=1.0, n_steps=0).at(3.0).probabilities == (1.0, 0.0)


def test_the_same_answer_is_given_less_surely(load: Load) -> None:
    plain = load({}).ask(YES_NO, FRAME, settings=ANY)
    cooled = load({'temperature': {'yes_no': 4.0}}).ask(YES_NO, FRAME, settings=ANY)

    assert cooled.text == plain.text
    odds = plain.confidence / (1 - plain.confidence)
    assert cooled.confidence / (1 - cooled.confidence) == pytest.approx(odds**0.25, rel=1e-3)
    assert cooled.option_mass == pytest.approx(plain.option_mass, rel=1e-3)


def test_it_is_for_its_own_format(load: Load) -> None:
    plain = load({}).ask(CHOICE, FRAME, settings=ANY)
    assert load({'temperature': {'yes_no': 4.0}}).ask(CHOICE, FRAME, settings=ANY).confidence == pytest.approx(
        plain.confidence, rel=1e-4
    )


def test_the_limit_is_of_the_lowered_confidence(load: Load) -> None:
    plain = load({}).ask(YES_NO, FRAME, settings=ANY)
    limited = AssistantSettings(min_confidence=(0.5 + plain.confidence) / 2)
    assert load({}).ask(YES_NO, FRAME, settings=limited).result_code is ResultCode.OK
    answer = load({'temperature': {'yes_no': 50.0}}).ask(YES_NO, FRAME, settings=limited)
    assert answer.result_code is ResultCode.UNKNOWN


@pytest.mark.parametrize('wrong', [2.0, {'text': 2.0}, {'yes_no': 0}, {'yes_no': -1}, {'yes_no': 'hot'}])
def test_a_damaged_temperature_is_refused(load: Load, wrong: Any) -> None:
    with pytest.raises(BundleIncompleteError, match=r'\$\.answers'):
        load({'temperature': wrong})


def test_it_is_part_of_the_name_of_the_model(load: Load, tiny_bundle: Path) -> None:
    assert load({'temperature': {'yes_no': 2.0}}).model_id != open_bundle(tiny_bundle).model_id
