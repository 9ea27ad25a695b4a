"""Answer formats: what is added to a question, what is allowed, and what is refused before an engine runs."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilevlm_ros.errors import AnswerFormatError, BadQuestionError
from mobilevlm_ros.runtime.formats import (
    MAX_CHOICES,
    MAX_REPETITIONS,
    MAX_SCHEMA_CHARACTERS,
    parse_json_answer,
    prepare,
)
from mobilevlm_ros.types import AnswerFormat, Question

SHORT = '\nAnswer the question using a single word or phrase.'
SCHEMA = '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'


def choice(*choices: str) -> Question:
    return Question('Which?', AnswerFormat.CHOICE, choices=choices)


def as_json(schema: Any) -> Question:
    return Question('What?', AnswerFormat.JSON, json_schema=schema if isinstance(schema, str) else json.dumps(schema))


def test_text_is_asked_as_it_is() -> None:
    prepared = prepare(Question(' What is it?\n'))

    assert (prepared.text, prepared.options, prepared.schema) == ('What is it?', (), '')


def test_yes_no_has_the_published_wording_and_two_options() -> None:
    prepared = prepare(Question('Is it open?', AnswerFormat.YES_NO))

    assert prepared.text == 'Is it open?' + SHORT
    assert prepared.options == ('yes', 'no')


def test_choice_lists_the_options() -> None:
    prepared = prepare(choice(' a red car', 'a truck '))

    assert prepared.text == 'Which?\nOptions: a red car, a truck.' + SHORT
    assert prepared.options == ('a red car', 'a truck')


def test_json_keeps_question_and_schema() -> None:
    prepared = prepare(as_json(SCHEMA))

    assert (prepared.text, prepared.schema) == ('What?', SCHEMA)


@pytest.mark.parametrize('answer_format', list(AnswerFormat))
def test_an_empty_question_is_refused_in_every_format(answer_format: AnswerFormat) -> None:
    with pytest.raises(BadQuestionError):
        prepare(Question(' ', answer_format, choices=('a', 'b'), json_schema=SCHEMA))


@pytest.mark.parametrize(
    ('choices', 'reason'),
    [
        ((), 'at least two choices, found 0'),
        (('a',), 'at least two choices, found 1'),
        (tuple(map(str, range(MAX_CHOICES + 1))), 'at most'),
        (('a', ''), 'empty'),
        (('a', '  '), 'empty'),
        (('a', 'b\nc'), 'not printable'),
        (('a', 'b\x1b'), 'not printable'),
        (('a', 'half \ud83d'), 'not printable'),
        (('a', 'b' * 201), 'longer than'),
        (('Red', 'red'), 'twice'),
        (('a', ' a '), 'twice'),
    ],
    ids=str,
)
def test_choices_that_cannot_be_used(choices: tuple[str, ...], reason: str) -> None:
    with pytest.raises(AnswerFormatError, match=reason):
        prepare(choice(*choices))


def test_an_unknown_format_is_refused() -> None:
    unknown: Any = 9

    with pytest.raises(AnswerFormatError, match='unknown answer format 9'):
        prepare(Question('What?', unknown))


@pytest.mark.parametrize(
    'schema',
    [
        {},
        {'type': 'object', 'additionalProperties': False},
        {'enum': ['a', 1, None]},
        {'$defs': {'n': {'type': 'integer'}}, 'properties': {'a': {'$ref': '#/$defs/n'}}},
        {'type': 'string', 'maxLength': MAX_REPETITIONS},
        {'type': 'string', 'pattern': '^[0-9]{1,3}(\\.[0-9]{1,3}){3}$'},
        {'type': 'string', 'pattern': '^.{0,1000}$'},
        {'properties': {'pattern': {'type': 'string'}, 'maxLength': {'type': 'integer'}}},
    ],
    ids=str,
)
def test_schemas_that_are_accepted(schema: Any) -> None:
    assert json.loads(prepare(as_json(schema)).schema) == schema


def nested(depth: int) -> str:
    return '{"items":' * depth + '{}' + '}' * depth


@pytest.mark.parametrize(
    ('schema', 'reason'),
    [
        ('', 'needs json_schema'),
        ('  \n', 'needs json_schema'),
        ('{', 'not JSON'),
        ('{"type": "object"', 'not JSON'),
        ("{'type': 'object'}", 'not JSON'),
        ('1' * 5000, 'not JSON'),
        ('null', 'is an object, found NoneType'),
        ('[]', 'is an object, found list'),
        ('true', 'is an object, found bool'),
        ('"object"', 'is an object, found str'),
        ({'type': 'objekt'}, 'no JSON Schema'),
        ({'type': 7}, 'no JSON Schema'),
        ({'properties': []}, 'no JSON Schema'),
        ({'required': 'n'}, 'no JSON Schema'),
        ({'maxLength': -1}, 'no JSON Schema'),
        ({'items': {'minItems': 'two'}}, r'no JSON Schema: .* at \$\.items'),
        ({'$ref': 'http://example.com/schema.json'}, 'only references within it'),
        ({'items': [{'$ref': 'file:///etc/passwd'}]}, 'no JSON Schema|only references within it'),
        ({'properties': {'a': {'anyOf': [{'$ref': 'other.json'}]}}}, 'only references within it'),
        ({'$dynamicRef': 'http://example.com/schema.json'}, 'only references within it'),
        ('{"title": "' + 'x' * MAX_SCHEMA_CHARACTERS + '"}', 'at most'),
        (nested(1500), 'nested too deeply'),
        ({'type': 'string', 'maxLength': 1_000_000}, 'maxLength 1000000; at most'),
        ({'type': 'string', 'minLength': 1e9}, 'minLength'),
        ({'properties': {'a': {'items': {}, 'maxItems': 10**7}}}, 'maxItems'),
        ({'minItems': 10**40}, 'minItems'),
        ({'type': 'string', 'pattern': '^a{99999999}$'}, 'repeats too much'),
        ({'type': 'string', 'pattern': '^(((a?){10}){10}){10}$'}, 'repeats too much'),
        ({'type': 'string', 'pattern': '^(a?){1000}$'}, 'repeats too much'),
        ({'type': 'string', 'pattern': '^' + 'a?' * 4000 + '$'}, 'at most 200 are read'),
        ({'patternProperties': {'^a': {}}}, 'patternProperties'),
    ],
    ids=lambda value: str(value)[:60],
)
def test_schemas_that_cannot_be_used(schema: Any, reason: str) -> None:
    with pytest.raises(AnswerFormatError, match=reason):
        prepare(as_json(schema))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    'type',
                    '$ref',
                    'properties',
                    'items',
                    'pattern',
                    'enum',
                    'maxLength',
                    '$defs',
                    'anyOf',
                    'not',
                    'x',
                    '$id',
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(JSON.map(json.dumps) | st.text(max_size=40))
def test_any_schema_is_accepted_or_bad_format(schema: str) -> None:
    try:
        prepared = prepare(Question('What?', AnswerFormat.JSON, json_schema=schema))
    except AnswerFormatError as error:
        assert str(error)
    else:
        assert prepared.schema == schema


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=()), max_size=8), max_size=5))
def test_any_choices_are_accepted_or_bad_format(choices: list[str]) -> None:
    try:
        options = prepare(choice(*choices)).options
    except AnswerFormatError:
        return

    assert len(options) == len(choices) >= 2
    assert len({option.lower() for option in options}) == len(options)


@pytest.mark.parametrize('text', ['{"n": 3}', ' {"n": -1, "more": true} '])
def test_an_answer_that_satisfies_its_schema(text: str) -> None:
    assert parse_json_answer(text, SCHEMA) is None


@pytest.mark.parametrize(
    ('text', 'problem'),
    [
        ('', 'not complete JSON'),
        ('{"n": ', 'not complete JSON'),
        ('{"n": 1} and more', 'not complete JSON'),
        ('{}', "does not satisfy the schema: 'n' is a required property"),
        ('{"n": "x"}', r"'x' is not of type 'integer' at \$\.n"),
        ('[' * 100_000, 'cannot be checked|not complete JSON'),
        ('{"n": ' + '1' * 5000 + '}', 'cannot be checked'),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_with_an_answer_is_told(text: str, problem: str) -> None:
    found = parse_json_answer(text, SCHEMA)

    assert found is not None
    assert re.search(problem, found)


def test_a_pattern_is_left_to_the_grammar() -> None:
    """Python's matcher would take years for this one."""
    schema = json.dumps({'type': 'string', 'pattern': '^(a+)+$'})

    assert parse_json_answer(json.dumps('a' * 60 + 'b'), schema) is None


@pytest.mark.parametrize(
    'schema',
    [
        {'not': {'$ref': '#/nowhere'}},
        {'$ref': '#nowhere'},
        {'$id': 'http://example.com/a', '$ref': '#/nowhere'},
        {'$dynamicRef': '#nowhere'},
        {'anyOf': [{'$id': 'http://example.com/b', 'allOf': [{'$ref': '#/nowhere'}]}]},
    ],
    ids=str,
)
def test_a_reference_to_nowhere_is_told_and_nothing_fetched(schema: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError('tried to fetch')

    monkeypatch.setattr('urllib.request.urlopen', no_network)

    found = parse_json_answer('1', json.dumps(schema))

    assert found is not None
    assert 'cannot be checked' in found


def test_a_schema_that_refers_to_itself_forever_is_told() -> None:
    found = parse_json_answer('1', '{"$ref": "#"}')

    assert found is not None
    assert 'cannot be checked' in found
