"""A file of questions about a bag: what is asked, about which frames, in which form, and which answers are right.

.. code-block:: yaml

    - id: person
      text: Is there a person?
      camera: /front/image_raw        # may be left out where the bag has one camera
      when: {every_s: 1.0}            # or each_frame, {stamp_ns: ...}, {at_s: ...}, {from_s: ..., to_s: ...}
      format: yes_no                  # text (default), yes_no, choice with choices, json with schema
      truth: yes                      # or a list, or {checker: number, accepted: [3], tolerance: 1}

The same as JSON lines. A file with a question that is not fully understood is refused: no score is ever of other
questions than it seems. Errors name file, line, column, key, what was found and what was expected.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from mobilevlm_ros.errors import MobileVLMError, QuestionFileError
from mobilevlm_ros.evaluate.checkers import Checker, describe_truth, is_right
from mobilevlm_ros.evaluate.marks import Record, read_records
from mobilevlm_ros.runtime.formats import prepare
from mobilevlm_ros.runtime.prompt import SHORT_SUFFIX
from mobilevlm_ros.types import AnswerFormat, Question

__all__ = ['BagQuestion', 'Truth', 'When', 'file_hash', 'read_questions']

_CHECKERS: dict[str, Checker] = {'TEXT': 'normalised', 'YES_NO': 'yes_no', 'CHOICE': 'choice', 'JSON': 'json_field'}
_NEEDS_NUMBER = ('number', 'json_field')

Seconds = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


def _check_scalar(value: Any) -> Any:
    if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f'expected a text, a number, true or false, found {str(value)[:60]}')
    return value


Scalar = Annotated[Any, AfterValidator(_check_scalar)]


class _Section(BaseModel):
    model_config = ConfigDict(extra='forbid', strict=True, frozen=True)


class When(_Section):
    """Which frames a question is asked about; seconds count from the first image in the bag.

    :ivar each_frame: all of them.
    :ivar stamp_ns: the one with this stamp.
    :ivar at_s: the first one from then on.
    :ivar from_s: none before; ``to_s``: none after. Alone: each frame between.
    :ivar every_s: the first frame in every such interval.
    """

    each_frame: Literal[True] | None = None
    stamp_ns: int | None = None
    at_s: Seconds | None = None
    from_s: Seconds | None = None
    to_s: Seconds | None = None
    every_s: Positive | None = None

    @model_validator(mode='after')
    def _one_way(self) -> When:
        ranged = any(value is not None for value in (self.from_s, self.to_s, self.every_s))
        ways = [self.each_frame is not None, self.stamp_ns is not None, self.at_s is not None, ranged]
        if sum(ways) != 1:
            raise ValueError(
                'expected one of each_frame, {stamp_ns: ...}, {at_s: ...}, or a range of from_s, to_s and every_s'
            )
        if self.from_s is not None and self.to_s is not None and self.to_s < self.from_s:
            raise ValueError(f'the range ends ({self.to_s} s) before it begins ({self.from_s} s)')
        return self


class Truth(_Section):
    """Which answers are right.

    :ivar checker: None: the one that fits the format.
    :ivar accepted: each of them is right.
    :ivar tolerance: of numbers.
    :ivar field: of ``json_field``: keys and indices, with points between them.
    """

    checker: Checker | None = None
    accepted: tuple[Scalar, ...] = Field(min_length=1)
    tolerance: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    field: str = ''


def _as_when(value: Any) -> Any:
    return {'each_frame': True} if value == 'each_frame' else value


def _as_truth(value: Any) -> Any:
    """One answer, or a list of them, is the short form."""
    if isinstance(value, dict):
        accepted = value.get('accepted')
        if isinstance(accepted, str | int | float):
            return {**value, 'accepted': (accepted,)}
        return {**value, 'accepted': tuple(accepted)} if isinstance(accepted, list) else value
    if isinstance(value, str | int | float):
        return {'accepted': (value,)}
    return {'accepted': tuple(value)} if isinstance(value, list) else value


def _as_schema(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict) else value


class BagQuestion(_Section):
    """One question.

    :ivar id: names it in the results; without slashes.
    :ivar camera: the topic; empty: the only one with images.
    :ivar short: whether the words that models are taught to answer shortly by are added to an open question.
    :ivar kind: scores are given by kind; default: the format.
    :ivar negation_of: id of the question whose right answer is the opposite.
    :ivar deadline_s: for playing in real time: seconds until the answer must be there.
    :ivar max_frame_age_s: for playing in real time: the oldest frame that may be asked about.
    """

    id: Annotated[str, Field(pattern=r'^[^/\s][^/]*$', max_length=200)]
    text: Text
    when: Annotated[When, BeforeValidator(_as_when)]
    camera: str = ''
    format: Annotated[
        Literal['TEXT', 'YES_NO', 'CHOICE', 'JSON'],
        BeforeValidator(lambda value: value.upper() if isinstance(value, str) else value),
    ] = 'TEXT'
    choices: Annotated[
        tuple[str, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
    ] = ()
    schema_: Annotated[str, BeforeValidator(_as_schema), Field(alias='schema')] = ''
    short: bool = False
    truth: Annotated[Truth | None, BeforeValidator(_as_truth)] = None
    kind: str = ''
    negation_of: str = ''
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    deadline_s: Positive | None = None
    max_frame_age_s: Positive | None = None

    @model_validator(mode='after')
    def _whole(self) -> BagQuestion:
        if self.short and self.format != 'TEXT':
            raise ValueError(f'short is for the format text; {self.format.lower()} is short by itself')
        if self.choices and self.format != 'CHOICE':
            raise ValueError(f'choices are for the format choice, found format {self.format.lower()}')
        if self.schema_ and self.format != 'JSON':
            raise ValueError(f'schema is for the format json, found format {self.format.lower()}')
        try:
            prepare(self.asked())
        except MobileVLMError as error:
            raise ValueError(str(error)) from error
        if self.truth is not None:
            self._check_truth(self.truth)
        return self

    def _check_truth(self, truth: Truth) -> None:
        checker = truth.checker or _CHECKERS[self.format]
        if truth.tolerance and checker not in _NEEDS_NUMBER:
            raise ValueError(f'truth.tolerance is for the checkers number and json_field, found {checker}')
        if truth.field and checker != 'json_field':
            raise ValueError(f'truth.field is for the checker json_field, found {checker}')
        possible: Sequence[str] = {'YES_NO': ('yes', 'no'), 'CHOICE': self.choices}.get(self.format, ())
        for one in self.accepted:
            if possible and not any(is_right(checker, option, [one]) for option in possible):
                raise ValueError(f'truth: no possible answer is {one!r}; they are {", ".join(possible)}')
            if checker == 'number' and not is_right('number', str(one), [one]):
                raise ValueError(f'truth: the checker number expects numbers, found {one!r}')

    @property
    def checker(self) -> Checker:
        """The one that was named, or that fits the format."""
        return (self.truth.checker if self.truth else None) or _CHECKERS[self.format]

    @property
    def accepted(self) -> tuple[bool | int | float | str, ...]:
        """The right answers; YAML's true and false are yes and no where an answer is text."""
        values = self.truth.accepted if self.truth else ()
        if self.checker == 'json_field':
            return values
        return tuple(('no', 'yes')[value] if isinstance(value, bool) else value for value in values)

    def asked(self) -> Question:
        """The question as the runtime is asked it."""
        return Question(
            self.text + SHORT_SUFFIX if self.short else self.text,
            AnswerFormat[self.format],
            self.choices,
            json_schema=self.schema_,
            camera=self.camera,
            id=self.id,
            max_tokens=self.max_tokens,
            deadline_s=self.deadline_s,
            max_frame_age_s=self.max_frame_age_s,
        )

    def is_right(self, answer: str) -> bool | None:
        """Whether an answer is right; None if the question has no truth."""
        if self.truth is None:
            return None
        truth = self.truth
        return is_right(self.checker, answer, self.accepted, tolerance=truth.tolerance, field=truth.field)

    @property
    def shown_truth(self) -> str:
        """The truth for people; empty if there is none."""
        if self.truth is None:
            return ''
        return describe_truth(self.accepted, tolerance=self.truth.tolerance, field=self.truth.field)

    def as_record(self) -> dict[str, Any]:
        """For the description of a run."""
        truth = self.truth
        return {
            'id': self.id,
            'text': self.text,
            'kind': self.kind or self.format.lower(),
            'format': self.format,
            'choices': list(self.choices),
            'schema': self.schema_,
            'camera': self.camera,
            'short': self.short,
            'when': self.when.model_dump(exclude_none=True),
            'truth': truth
            and {
                'checker': self.checker,
                'accepted': list(self.accepted),
                'tolerance': truth.tolerance,
                'field': truth.field,
            },
            'negation_of': self.negation_of,
            'max_tokens': self.max_tokens,
            'deadline_s': self.deadline_s,
            'max_frame_age_s': self.max_frame_age_s,
        }


def file_hash(path: Path) -> str:
    """SHA-256 of a file of questions, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_questions(path: Path) -> list[BagQuestion]:
    """Read a file of questions, ``.jsonl`` or ``.yaml``.

    :raise QuestionFileError: if it has an error; names every question with one, the first twenty.
    """
    questions: dict[str, BagQuestion] = {}
    records: dict[str, Record] = {}
    problems: list[str] = []
    for record in read_records(path):
        try:
            question = BagQuestion.model_validate(record.value)
        except ValidationError as error:
            problems += [_problem(record, detail) for detail in error.errors()]
            continue
        if question.id in questions:
            first = records[question.id].place
            place = record.place_of(['id'])
            problems.append(f'{place}: the id {question.id!r} is there already, at line {first.line}')
            continue
        questions[question.id], records[question.id] = question, record
    for question in questions.values() if not problems else ():
        problem = _problem_of_negation(question, questions)
        if problem:
            problems.append(f'{records[question.id].place_of(["negation_of"])}: {problem}')
    if problems:
        more = f'\n... and {len(problems) - 20} more' if len(problems) > 20 else ''
        raise QuestionFileError('\n'.join(problems[:20]) + more)
    if not questions:
        raise QuestionFileError(f'{path} holds no question')
    return list(questions.values())


def _problem_of_negation(question: BagQuestion, questions: dict[str, BagQuestion]) -> str:
    if not question.negation_of:
        return ''
    other = questions.get(question.negation_of)
    if other is None or other is question:
        return f'negation_of {question.negation_of!r}: expected the id of another question in this file'
    if {question.format, other.format} != {'YES_NO'}:
        return f'negation_of {other.id!r}: both questions must have the format yes_no'
    if (question.when, question.camera) != (other.when, other.camera):
        return f'negation_of {other.id!r}: both questions must have the same camera and the same when'
    return ''


def _problem(record: Record, detail: ErrorDetails) -> str:
    """One finding of pydantic, with its place and in the words of the file."""
    location = list(detail['loc'])
    key = '.'.join(str(step) for step in location)
    kind = detail['type']
    if kind == 'extra_forbidden':
        sections: dict[str, type[BaseModel]] = {'when': When, 'truth': Truth}
        owner = sections.get(str(location[0]), BagQuestion) if len(location) > 1 else BagQuestion
        known = [field.alias or name for name, field in owner.model_fields.items()]
        close = difflib.get_close_matches(str(location[-1]), known, 1)
        meant = f'; did you mean {close[0]!r}?' if close else ''
        return f'{record.place_of(location)}: unknown key {key!r}{meant} Expected: {", ".join(known)}'
    if kind == 'missing':
        return f'{record.place_of(location[:-1])}: the key {key!r} is missing'
    if kind == 'value_error':
        return f'{record.place_of(location)}: {key + ": " if key else ""}{detail["ctx"]["error"]}'
    found = repr(detail['input'])
    found = found if len(found) <= 60 else f'{found[:60]}...'
    return f'{record.place_of(location)}: {key or "the question"}: {detail["msg"]}, found {found}'
