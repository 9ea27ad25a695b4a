"""Answer formats: what is added to a question, and what is allowed as its answer.

``prepare`` checks everything that an asker can get wrong about a format, before any engine runs.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import jsonschema
from jsonschema.validators import extend
from referencing import Registry
from referencing.exceptions import Unresolvable

from mobilevlm_ros.errors import AnswerFormatError
from mobilevlm_ros.runtime.prompt import CHOICE_SUFFIX, SHORT_SUFFIX, check_question
from mobilevlm_ros.types import AnswerFormat, Question

__all__ = ['YES_NO', 'PreparedQuestion', 'parse_json_answer', 'prepare']

YES_NO = ('yes', 'no')
MAX_CHOICES = 64
MAX_CHOICE_CHARACTERS = 200
MAX_SCHEMA_CHARACTERS = 16384

MAX_REPETITIONS = 1000
MAX_PATTERN_CHARACTERS = 200
"""More of either can make llama.cpp's grammars take minutes, or crash the process, and nothing can interrupt them."""
_COUNTS = ('minItems', 'maxItems', 'minLength', 'maxLength')

# The grammar enforces patterns already; Python's backtracking matcher on a pattern from outside could hang.
_AnswerValidator = extend(jsonschema.Draft202012Validator, {'pattern': lambda *_: ()})


@dataclass(frozen=True)
class PreparedQuestion:
    """A checked question.

    :ivar text: the user turn: question and format suffix.
    :ivar options: of a closed question; empty otherwise.
    :ivar schema: of a JSON question, as text; empty otherwise.
    """

    text: str
    options: tuple[str, ...] = ()
    schema: str = ''


def prepare(question: Question) -> PreparedQuestion:
    """Check a question and its format.

    :raise BadQuestionError: if the text cannot be asked.
    :raise AnswerFormatError: if the format lacks something, or is none.
    """
    text = check_question(question.text)
    if question.format is AnswerFormat.TEXT:
        return PreparedQuestion(text)
    if question.format is AnswerFormat.YES_NO:
        return PreparedQuestion(text + SHORT_SUFFIX, options=YES_NO)
    if question.format is AnswerFormat.CHOICE:
        options = _check_choices(question.choices)
        return PreparedQuestion(text + CHOICE_SUFFIX.format(options=', '.join(options)), options=options)
    if question.format is AnswerFormat.JSON:
        return PreparedQuestion(text, schema=_check_schema(question.json_schema))
    raise AnswerFormatError(f'unknown answer format {question.format!r}: expected TEXT, YES_NO, CHOICE or JSON')


def _check_choices(choices: tuple[str, ...]) -> tuple[str, ...]:
    if len(choices) < 2:
        raise AnswerFormatError(f'format CHOICE needs at least two choices, found {len(choices)}')
    if len(choices) > MAX_CHOICES:
        raise AnswerFormatError(f'format CHOICE takes at most {MAX_CHOICES} choices, found {len(choices)}')
    cleaned = tuple(choice.strip() for choice in choices)
    seen: set[str] = set()
    for choice in cleaned:
        if not choice or not choice.isprintable() or len(choice) > MAX_CHOICE_CHARACTERS:
            raise AnswerFormatError(
                f'the choice {choice[:40]!r} is empty, longer than {MAX_CHOICE_CHARACTERS} characters or not printable'
            )
        if choice.lower() in seen:
            raise AnswerFormatError(f'the choice {choice!r} is there twice (case does not count)')
        seen.add(choice.lower())
    return cleaned


def _check_schema(text: str) -> str:
    if not text.strip():
        raise AnswerFormatError('format JSON needs json_schema: a JSON Schema as text')
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise AnswerFormatError(f'the JSON schema has {len(text)} characters; at most {MAX_SCHEMA_CHARACTERS} are read')
    try:
        schema = json.loads(text)
        if not isinstance(schema, dict):
            raise AnswerFormatError(f'a JSON schema is an object, found {type(schema).__name__}')
        jsonschema.Draft202012Validator.check_schema(schema)
        _refuse_dangerous(schema)
    except AnswerFormatError:
        raise
    except ValueError as error:
        raise AnswerFormatError(f'json_schema is not JSON: {error}') from error
    except jsonschema.SchemaError as error:
        raise AnswerFormatError(f'json_schema is no JSON Schema: {error.message} at {error.json_path}') from error
    except RecursionError as error:
        raise AnswerFormatError('json_schema is nested too deeply') from error
    return text


def _refuse_dangerous(node: Any) -> None:
    """References that would be fetched from elsewhere, and small texts that make huge grammars."""
    if isinstance(node, list):
        for value in node:
            _refuse_dangerous(value)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key in ('$ref', '$dynamicRef') and isinstance(value, str) and not value.startswith('#'):
            raise AnswerFormatError(f'json_schema refers to {value!r}: only references within it (#/...) are read')
        if key in _COUNTS and isinstance(value, (int, float)) and value > MAX_REPETITIONS:
            raise AnswerFormatError(f'json_schema has {key} {value}; at most {MAX_REPETITIONS} can be kept to')
        if key == 'patternProperties':
            raise AnswerFormatError(
                'json_schema uses patternProperties, which no grammar keeps to: name the properties'
            )
        if key == 'pattern' and isinstance(value, str):
            _check_pattern(value)
        _refuse_dangerous(value)


def _check_pattern(pattern: str) -> None:
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        raise AnswerFormatError(
            f'a pattern in json_schema has {len(pattern)} characters; at most {MAX_PATTERN_CHARACTERS} are read'
        )
    # Repetitions may be nested, so that their numbers multiply; no need to know whether they are.
    size = len(pattern) if '(' in pattern else 1
    for braces in re.findall(r'\{([0-9, ]*)\}', pattern):
        size *= max((int(number) for number in re.findall('[0-9]+', braces)), default=1)
    if size > MAX_REPETITIONS:
        raise AnswerFormatError(f'the pattern {pattern!r} in json_schema repeats too much: use smaller numbers in {{}}')


def parse_json_answer(text: str, schema: str) -> str | None:
    """What is wrong with an answer, or None if it is JSON that satisfies the schema."""
    try:
        value = json.loads(text)
        validator = _AnswerValidator(json.loads(schema), registry=Registry())
        error = next(iter(validator.iter_errors(value)), None)
    except json.JSONDecodeError as error:
        return f'the answer is not complete JSON ({error}): raise max_tokens, or simplify the schema'
    except (ValueError, ArithmeticError, RecursionError, Unresolvable) as error:
        return f'the answer cannot be checked against the schema ({error})'
    return None if error is None else f'the answer does not satisfy the schema: {error.message} at {error.json_path}'
