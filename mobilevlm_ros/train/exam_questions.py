"""The questions of an exam: what is asked about which picture, and which answers count as right.

One JSON object a line; ``models/nano/exam/README.md`` describes the fields. A file with a line that is not fully
understood is refused, so that no score is ever of fewer or other questions than it seems.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevlm_ros.errors import DatasetMissingError, DatasetSyntaxError, RecordError
from mobilevlm_ros.runtime.prompt import SHORT_SUFFIX
from mobilevlm_ros.types import AnswerFormat, Question

__all__ = ['KINDS', 'ExamQuestion', 'normalise', 'read_exam']

KINDS = ('yes_no', 'name', 'colour', 'count', 'place', 'scene')
NEGATIVES = ('', 'hard', 'easy')
MAX_ANSWER_TOKENS = 16

_FIELDS = {'id', 'image', 'kind', 'question', 'answers', 'choices', 'negative'}
_OPENINGS = re.compile(r"^(?:(?:it is|it's|its|this is|that is|they are|these are|there is|there are|a|an|the) )+")
_PLURALS = (('(?<=[^aeiou ])ies$', 'y'), ('(ch|sh|ss|x)es$', r'\1'), ('(?<=[^su])s$', ''))


@dataclass(frozen=True)
class ExamQuestion:
    """One question.

    :ivar image: where the picture is.
    :ivar answers: all accepted ones, as they were written.
    :ivar choices: of a closed question; empty for an open one and for yes/no.
    :ivar negative: of a question whose answer is no: how plausible a yes is.
    """

    id: str
    image: Path
    kind: str
    text: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    negative: str = ''

    def asked(self) -> Question:
        """The question as the runtime is asked it; an open one requests a short answer in the published words."""
        if self.kind == 'yes_no':
            return Question(self.text, AnswerFormat.YES_NO, id=self.id)
        if self.choices:
            return Question(self.text, AnswerFormat.CHOICE, self.choices, id=self.id)
        return Question(self.text + SHORT_SUFFIX, id=self.id, max_tokens=MAX_ANSWER_TOKENS)

    def is_right(self, answer: str) -> bool:
        """Whether the whole answer, normalised, is an accepted one."""
        plural = self.kind == 'name'
        return normalise(answer, plural=plural) in {normalise(accepted, plural=plural) for accepted in self.answers}


def normalise(answer: str, *, plural: bool = False) -> str:
    """An answer without what does not matter: case, punctuation, a leading "it is a".

    :param plural: take a plural for its singular, too (in the last word).
    """
    text = re.sub(r"[^\w' ]+", ' ', answer.lower().replace('_', ' '))
    text = _OPENINGS.sub('', ' '.join(text.split())).strip("' ")
    if plural:
        for ending, singular in _PLURALS:
            shorter, n_found = re.subn(ending, singular, text)
            if n_found:
                return shorter
    return text


def read_exam(path: Path, images: Path | None = None) -> list[ExamQuestion]:
    """Read the questions.

    :param path: the JSON lines.
    :param images: folder of the pictures; None: ``images`` beside the file.
    :raise DatasetMissingError: if the file or one of its pictures is not there.
    :raise DatasetSyntaxError: if a line is no JSON object.
    :raise RecordError: if a line is no question, or an id is there twice.
    """
    images = path.parent / 'images' if images is None else images
    try:
        lines = path.read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetMissingError(f'the questions {path} cannot be read: {error}') from error
    questions: dict[str, ExamQuestion] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DatasetSyntaxError(f'{path}, line {number} is not JSON: {error}') from error
        question = _question(record, images, f'{path}, line {number}')
        if question.id in questions:
            raise RecordError('question twice', f'{path}, line {number}: the id {question.id!r} is there already')
        if not question.image.is_file():
            raise DatasetMissingError(f'{path}, line {number}: the picture {question.image} is not there')
        questions[question.id] = question
    if not questions:
        raise DatasetSyntaxError(f'{path} holds no question')
    return list(questions.values())


def _question(record: Any, images: Path, where: str) -> ExamQuestion:
    if not isinstance(record, dict) or not record.keys() <= _FIELDS:
        found = sorted(record.keys() - _FIELDS) if isinstance(record, dict) else type(record).__name__
        raise RecordError('not a question', f'{where}: expected an object with {sorted(_FIELDS)}, found {found}')
    texts = {name: record.get(name) for name in ('id', 'image', 'kind', 'question')}
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise RecordError('not a question', f'{where}: {name} is a text, found {text!r}')
    answers, choices = (_texts(record.get(name, []), name, where) for name in ('answers', 'choices'))
    kind, negative = record['kind'], record.get('negative', '')
    if kind not in KINDS or negative not in NEGATIVES:
        raise RecordError('unknown kind', f'{where}: kind {kind!r}, negative {negative!r}; known: {KINDS}, {NEGATIVES}')
    allowed = {'yes', 'no'} if kind == 'yes_no' else set(choices)
    if not answers or (allowed and not set(answers) <= allowed):
        raise RecordError('no answer', f'{where}: answers {answers} are not among {sorted(allowed) or "any"}')
    return ExamQuestion(record['id'], images / record['image'], kind, record['question'], answers, choices, negative)


def _texts(value: Any, name: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(one, str) for one in value):
        raise RecordError('not a question', f'{where}: {name} is a list of texts, found {value!r}')
    return tuple(value)
