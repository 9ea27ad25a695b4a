"""Checkers, against answers as models give them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilevlm_ros.evaluate.checkers import CHECKERS, accepts, describe_truth, is_right, normalise, number_in


@pytest.mark.parametrize(
    ('checker', 'answer', 'accepted', 'right'),
    [
        ('exact', ' Red\n', ['Red'], True),
        ('exact', 'red', ['Red'], False),
        ('normalised', 'It is a RED car.', ['red car'], True),
        ('normalised', 'The red, car!', ['a red car'], True),
        ('normalised', 'a red car and a bike', ['red car'], False),
        ('normalised', '１２ Straße', ['12 strasse'], True),
        ('normalised', '1.5', ['15'], False),
        ('normalised', 'the', ['the'], True),
        ('normalised', '', ['red'], False),
        ('choice', 'A cup', ['a cup', 'the cup'], True),
        ('choice', 'cup', ['a cup'], False),
        ('yes_no', 'Yes, there is.', ['yes'], True),
        ('yes_no', 'There is no dog', ['no'], True),
        ('yes_no', 'yes', ['no'], False),
        ('yes_no', 'maybe yes, maybe no', ['yes'], False),
        ('yes_no', 'nothing', ['no'], False),
        ('yes_no', '', ['no'], False),
    ],
)
def test_texts(checker: Any, answer: str, accepted: list[Any], right: bool) -> None:
    assert is_right(checker, answer, accepted) is right


@pytest.mark.parametrize(
    ('answer', 'accepted', 'tolerance', 'right'),
    [
        ('There are 3 people.', [3], 0, True),
        ('three', [3], 0, True),
        ('no people', [0], 0, True),
        ('2 or 3', [3], 0, False),
        ('3, yes 3', [3], 0, True),
        ('1,234.5 m', [1234.5], 0, True),
        ('-2 °C', [-2], 0, True),
        ('0.3', [0.2], 0.1, True),
        ('0.31', [0.2], 0.1, False),
        ('five', ['5', 'six'], 0, True),
        ('many', [3], 10, False),
        ('9' * 400, [3], 10, False),
    ],
)
def test_numbers(answer: str, accepted: list[Any], tolerance: float, right: bool) -> None:
    assert is_right('number', answer, accepted, tolerance=tolerance) is right


@pytest.mark.parametrize(
    ('value', 'field', 'accepted', 'right'),
    [
        ({'n': 3}, 'n', [3], True),
        ({'n': 3.4}, 'n', [3], True),
        ({'n': 3.6}, 'n', [3], False),
        ({'objects': [{'name': 'The Cup'}]}, 'objects.0.name', ['cup'], True),
        ({'objects': []}, 'objects.0.name', ['cup'], False),
        ({'open': True}, 'open', [True], True),
        ({'open': True}, 'open', [1], False),
        ({'n': 1}, 'n', [True], False),
        ({'n': 10**400}, 'n', [3], False),
        (3, '', [3], True),
        ({'n': None}, 'n', [3], False),
    ],
)
def test_json_fields(value: Any, field: str, accepted: list[Any], right: bool) -> None:
    assert is_right('json_field', json.dumps(value), accepted, tolerance=0.5, field=field) is right


def test_an_answer_that_is_no_json_is_wrong() -> None:
    assert not is_right('json_field', '{"n": 3', [3], field='n')
    assert not is_right('json_field', '[' * 100_000, [3], field='0')


def test_a_question_of_a_run_is_checked_by_its_truth() -> None:
    question = {'truth': {'checker': 'number', 'accepted': [3], 'tolerance': 1.0, 'field': ''}}
    assert accepts(question, '4')
    assert not accepts(question, '5')
    assert not accepts({'truth': None}, '5')


def test_truth_is_shown_to_people() -> None:
    assert describe_truth([3, 4], tolerance=1, field='size') == 'size: 3 | 4 (±1)'
    assert describe_truth([True], field='open') == 'open: true'


@given(st.text(), st.sampled_from(CHECKERS))
def test_no_answer_is_an_error(answer: str, checker: Any) -> None:
    assert is_right(checker, answer, ['yes', 3, True]) in (True, False)


@given(st.text())
def test_normalising_twice_changes_nothing_for_the_checker(text: str) -> None:
    assert is_right('normalised', text, [text])
    assert normalise(text) == normalise(text.upper().lower()) or not text.isascii()


@given(st.integers(-(10**15), 10**15))
def test_numbers_in_digits_are_read(number: int) -> None:
    assert number_in(f'about {number} of them') == number
    assert number_in(f'{number:,}') == number
