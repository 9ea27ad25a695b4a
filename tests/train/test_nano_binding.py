"""Questions that one thing of a picture answers: each is true, and each needs that thing."""

from __future__ import annotations

import random
import re

from hypothesis import given
from hypothesis import strategies as st
from nano_sources import some_things

from mobilevlm_ros.train.nano_data.binding import binding_questions
from mobilevlm_ros.train.nano_data.scenes import Thing
from mobilevlm_ros.train.pixel_colours import COLOURS

RED_CUP = Thing('cup', 'red', 0.2, 0.5, 0.1)
BLUE_CAR = Thing('car', 'blue', 0.8, 0.5, 0.1)


def asked(*things: Thing, seed: int = 0, **options: object) -> dict[str, str]:
    found = binding_questions(things, random.Random(seed), most=99, **options)  # type: ignore[arg-type]
    return {one.question.split('\n')[0]: one.answer for one in found}


def test_what_has_a_colour_is_asked_and_what_colour_it_has() -> None:
    found = asked(RED_CUP, BLUE_CAR)
    assert found['Which object is red?'] == 'cup'
    assert found['Which object is blue?'] == 'car'
    colours = {answer for question, answer in found.items() if re.match(r'What .*colou?r.* cup\?', question)}
    assert colours == {'red'}


def test_what_is_on_a_side_is_asked_and_on_which_side_it_is() -> None:
    found = asked(RED_CUP, BLUE_CAR)
    assert found['What is on the right?'] == 'car'
    assert found['Is the cup to the left or to the right of the car?'] == 'left'


def test_where_a_colour_may_be_that_of_others_its_thing_is_not_asked() -> None:
    assert not any('object' in question for question in asked(RED_CUP, BLUE_CAR, complete=False))
    assert not any('object' in question for question in asked(RED_CUP, Thing('car', None, 0.8, 0.5, 0.1)))
    assert not any('object' in question for question in asked(RED_CUP, Thing('car', 'red', 0.8, 0.5, 0.1)))


def test_of_several_alike_none_is_meant() -> None:
    assert not any('cup' in question for question in asked(RED_CUP, Thing('cup', 'blue', 0.8, 0.5, 0.1)))


def test_the_background_has_its_colour() -> None:
    found = asked(RED_CUP, background='green')
    assert 'green' in {answer for question, answer in found.items() if 'background' in question}


@given(some_things(5), st.integers(0, 1000))
def test_each_question_is_asked_once_and_no_more_than_wanted(things: list[Thing], seed: int) -> None:
    found = binding_questions(things, random.Random(seed), most=6)
    questions = [one.question for one in found]
    assert len(set(questions)) == len(questions) <= 6


@given(some_things(5), st.integers(0, 1000))
def test_every_answer_is_that_of_the_one_thing_that_is_named(things: list[Thing], seed: int) -> None:
    by_noun = {thing.noun: thing for thing in things}
    for question, answer in asked(*things, seed=seed).items():
        named = [noun for noun in re.findall(r'the (\w+)', question) if noun in by_noun]
        assert all(sum(thing.noun == noun for thing in things) == 1 for noun in named)
        if answer in COLOURS:
            assert by_noun[named[0]].colour == answer
        elif answer in ('left', 'right') and len(named) == 1:
            assert (by_noun[named[0]].x < 0.5) == (answer == 'left')
