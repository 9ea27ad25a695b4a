"""``labels.jsonl``: what a person says about a robot's frames, one line a frame, and every mistake in it named.

A line is ``{"image", "time_s", "questions": [{"kind", "question", "answer"}, ...]}``; docs/own_data.md has all fields.
The file is edited by hand, so all mistakes are reported together, each with file, line, column and what was expected. A
question without an answer is not labelled yet, and a frame with ``"checked": false`` still has a model's own answers:
both are counted and never used.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mobilevlm_ros.errors import BadImageError, DatasetError, DatasetMissingError, MobileVLMError
from mobilevlm_ros.runtime.formats import YES_NO, prepare
from mobilevlm_ros.runtime.images import read_image
from mobilevlm_ros.train.dialogue import IMAGE_MARK
from mobilevlm_ros.train.exam_questions import KINDS, ExamQuestion
from mobilevlm_ros.train.own_places import Places, parse_line
from mobilevlm_ros.train.problems import shown

__all__ = ['LABELS', 'MAX_WORDS', 'LabelledFrame', 'Labels', 'line_of', 'read_labels']

LABELS = 'labels.jsonl'
FORMATS = ('YES_NO', 'CHOICE', 'TEXT')
MAX_WORDS = 8
"""Of an answer in free words: the question asks for a word or a short phrase."""

_FRAME_FIELDS = ('image', 'time_s', 'checked', 'questions')
_FIELDS = ('kind', 'format', 'question', 'choices', 'answer', 'confidence')
_SHOWN = 10


@dataclass(frozen=True)
class LabelledFrame:
    """One frame and what is right about it.

    :ivar image: its file.
    :ivar time_s: when it was recorded, in seconds from some beginning that all frames share.
    :ivar questions: those with an answer; ``ExamQuestion.answers[0]`` is taught, all of them are right.
    """

    image: Path
    time_s: float
    questions: tuple[ExamQuestion, ...]


@dataclass(frozen=True)
class Labels:
    """All frames that have answers, by time; and what was left out.

    :ivar n_open: questions without an answer, of frames that count.
    :ivar n_unchecked: frames that still say ``"checked": false``.
    """

    frames: tuple[LabelledFrame, ...]
    n_open: int = 0
    n_unchecked: int = 0

    @property
    def n_questions(self) -> int:
        """That have an answer."""
        return sum(len(frame.questions) for frame in self.frames)


def line_of(image: str, time_s: float, questions: Sequence[dict[str, Any]], *, checked: bool = True) -> str:
    """One line of the file, with its end."""
    marked = {} if checked else {'checked': False}
    line = {'image': image, 'time_s': round(time_s, 3)} | marked | {'questions': list(questions)}
    return json.dumps(line, ensure_ascii=False) + '\n'


def read_labels(
    path: Path, *, decode: bool = True, on_progress: Callable[[float, float], None] = lambda done, total: None
) -> Labels:
    """Read the file.

    :param path: the file; pictures are named relative to its folder.
    :param decode: also look whether each picture can be read.
    :param on_progress: called with the number of lines done, and of all.
    :raise DatasetMissingError: if the file is not there.
    :raise DatasetError: if anything in it is wrong, or nothing has an answer.
    """
    try:
        text = path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise DatasetError(f'{path} is no UTF-8 text at byte {error.start}: save it as UTF-8') from error
    except OSError as error:
        raise DatasetMissingError(
            f'there are no labels at {path} ({error.strerror}): `mobilevlm train frames` makes the file'
        ) from error
    reader = _Reader(path, decode)
    lines = text.split('\n')
    for number, line in enumerate(lines, 1):
        if line.strip():
            reader.read(line, number)
        on_progress(number, len(lines))
    return reader.labels()


class _Wrong(Exception):
    """One mistake: where in the line, and what."""

    def __init__(self, column: int, text: str) -> None:
        super().__init__(text)
        self.column = column


class _Reader:
    """Collects frames and mistakes."""

    def __init__(self, path: Path, decode: bool) -> None:
        self._path = path
        self._decode = decode
        self._frames: list[LabelledFrame] = []
        self._mistakes: list[str] = []
        self._seen: dict[Path, int] = {}
        self._n_open = 0
        self._n_unchecked = 0
        self._number = 0

    def read(self, line: str, number: int) -> None:
        """One line."""
        self._number = number
        try:
            value, places = parse_line(line)
        except json.JSONDecodeError as error:
            self._add(error.colno, f'this is not JSON: {error.msg}')
            return
        try:
            self._frame(value, places)
        except _Wrong as wrong:
            self._add(wrong.column, str(wrong))

    def labels(self) -> Labels:
        """All of it.

        :raise DatasetError: if there was a mistake, or nothing has an answer.
        """
        if self._mistakes:
            n = len(self._mistakes)
            more = f'\n... and {n - _SHOWN} more' if n > _SHOWN else ''
            listed = '\n'.join(self._mistakes[:_SHOWN])
            raise DatasetError(f'{n} mistake{"s" if n > 1 else ""} in the labels:\n{listed}{more}')
        if not self._frames:
            why = (
                f'{self._n_unchecked} frames still say "checked": false: correct their answers, then set it to true'
                if self._n_unchecked
                else 'write answers into it'
            )
            raise DatasetError(f'{self._path} holds no question with an answer: {why}')
        frames = sorted(self._frames, key=lambda frame: (frame.time_s, str(frame.image)))
        return Labels(tuple(frames), self._n_open, self._n_unchecked)

    def _add(self, column: int, text: str) -> None:
        self._mistakes.append(f'{self._path}:{self._number}:{column}: {text}')

    def _frame(self, value: Any, places: Places) -> None:
        if not isinstance(value, dict):
            raise _Wrong(places[()], f'expected an object with {_listed(_FRAME_FIELDS)}, found {shown(value)}')
        _known(value, _FRAME_FIELDS, places, ())
        image = self._image(value, places)
        time_s, checked, asked = value.get('time_s'), value.get('checked', True), value.get('questions')
        if isinstance(time_s, bool) or not isinstance(time_s, int | float) or not math.isfinite(time_s):
            raise _Wrong(places.of(('time_s',)), f'time_s is {shown(time_s)}, expected a number of seconds')
        if not isinstance(checked, bool):
            raise _Wrong(places.of(('checked',)), f'checked is {shown(checked)}, expected true or false')
        if not isinstance(asked, list):
            raise _Wrong(places.of(('questions',)), f'questions is {shown(asked)}, expected a list in [ ]')
        questions, n_open = [], 0
        for index, entry in enumerate(asked):
            try:
                question = _question(entry, image, index, places)
            except _Wrong as wrong:
                self._add(wrong.column, str(wrong))
                continue
            if question is None:
                n_open += 1
            else:
                questions.append(question)
        if not checked:
            self._n_unchecked += 1
            return
        self._n_open += n_open
        if questions:
            self._frames.append(LabelledFrame(image, float(time_s), tuple(questions)))

    def _image(self, value: dict[str, Any], places: Places) -> Path:
        name, column = value.get('image'), places.of(('image',))
        if not isinstance(name, str) or not name or '\0' in name:
            raise _Wrong(column, f'image is {shown(name)}, expected the name of a picture, such as "frames/0001.jpg"')
        relative = PurePosixPath(name)
        if relative.is_absolute() or '..' in relative.parts:
            raise _Wrong(column, f'the picture {shown(name)} is not below {self._path.parent}: name it from there')
        path = self._path.parent / relative
        if not path.is_file():
            raise _Wrong(column, f'the picture {shown(name)} is not there: put it back, or delete this line')
        if path in self._seen:
            raise _Wrong(column, f'the picture {shown(name)} is in line {self._seen[path]} already: put them together')
        self._seen[path] = self._number
        if self._decode:
            try:
                read_image(path)
            except BadImageError as error:
                raise _Wrong(column, f'the picture {shown(name)} cannot be read: {error}') from error
        return path


def _question(value: Any, image: Path, index: int, places: Places) -> ExamQuestion | None:
    """A question with its answer; None if it has none yet."""
    at = ('questions', index)

    def wrong(name: str, text: str) -> _Wrong:
        return _Wrong(places.of((*at, name)), text)

    if not isinstance(value, dict):
        raise _Wrong(places[at], f'expected a question in {{ }} with {_listed(_FIELDS)}, found {shown(value)}')
    _known(value, _FIELDS, places, at)
    kind, text, answers = value.get('kind'), value.get('question', ''), value.get('answer', '')
    answers = answers if isinstance(answers, list) else [answers]
    if kind not in KINDS:
        raise wrong('kind', f'kind is {shown(kind)}, expected {_listed(KINDS)}{_meant(kind, KINDS)}')
    if not isinstance(text, str):
        raise wrong('question', f'question is {shown(text)}, expected a text')
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise wrong('answer', f'answer is {shown(value["answer"])}, expected a text, or several in [ ]')
    answers = [answer.strip() for answer in answers if answer.strip()]
    choices = _choices(value, kind, wrong)
    if not answers:
        return None
    if not text.strip():
        raise wrong('question', 'there is an answer, but the question is empty: write what is asked')
    if IMAGE_MARK in text:
        raise wrong('question', f'the question holds {IMAGE_MARK}, which stands for the picture: leave it out')
    question = ExamQuestion(f'{image.stem}-{index + 1}', image, kind, text.strip(), (), choices)
    try:
        options = prepare(question.asked()).options
    except MobileVLMError as error:
        raise wrong('choices' if choices else 'question', str(error)) from error
    return ExamQuestion(
        question.id, image, kind, question.text, tuple(_answer(one, options, wrong) for one in answers), choices
    )


def _choices(value: dict[str, Any], kind: str, wrong: Callable[[str, str], _Wrong]) -> tuple[str, ...]:
    """The choices of a closed question; the format must be the one that follows from kind and choices."""
    choices, written = value.get('choices', []), value.get('format')
    if not isinstance(choices, list) or not all(isinstance(one, str) for one in choices):
        raise wrong('choices', f'choices is {shown(choices)}, expected a list of texts, such as ["left", "right"]')
    if kind == 'yes_no' and choices:
        raise wrong('choices', 'a question of the kind yes_no has no choices: leave them out, or take another kind')
    if written is not None and written not in FORMATS:
        raise wrong('format', f'format is {shown(written)}, expected {_listed(FORMATS)}{_meant(written, FORMATS)}')
    follows = 'YES_NO' if kind == 'yes_no' else 'CHOICE' if choices else 'TEXT'
    if written is not None and written != follows:
        reason = f'the kind is {kind}' + ('' if kind == 'yes_no' else f' {"with" if choices else "without"} choices')
        raise wrong('format', f'format is {written}, but {reason}: expected {follows}')
    return tuple(choices)


def _answer(answer: str, options: Sequence[str], wrong: Callable[[str, str], _Wrong]) -> str:
    """An answer as it is taught: an option in its own spelling, yes and no as the models were taught them."""
    if not options:
        if not answer.isprintable():
            raise wrong('answer', f'the answer {shown(answer)} holds control characters, expected plain text')
        if len(answer.split()) > MAX_WORDS:
            raise wrong('answer', f'the answer has {len(answer.split())} words, expected a word or at most {MAX_WORDS}')
        return answer
    found = next((option for option in options if option.lower() == answer.lower()), None)
    if found is None:
        raise wrong('answer', f'answer is {shown(answer)}, expected {_listed(options)}{_meant(answer, options)}')
    return found.capitalize() if tuple(options) == YES_NO else found


def _known(value: dict[str, Any], fields: Sequence[str], places: Places, at: tuple[str | int, ...]) -> None:
    for name in value:
        if name not in fields:
            raise _Wrong(
                places.key((*at, name)),
                f'there is no field {shown(name)}, expected {_listed(fields)}{_meant(name, fields)}',
            )


def _meant(found: object, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(found), known, 1)
    return f': did you mean {near[0]}?' if near else ''


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f'{", ".join(first)} or {last}' if first else last
