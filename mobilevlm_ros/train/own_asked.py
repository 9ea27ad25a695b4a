"""What is to be asked about every frame, as a person writes it on a command line, and a bundle's own answers to it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevlm_ros.errors import EngineError, MobileVLMError, SettingsError
from mobilevlm_ros.runtime.assistant import Assistant, AssistantSettings
from mobilevlm_ros.runtime.formats import prepare
from mobilevlm_ros.runtime.images import read_image
from mobilevlm_ros.train.exam_questions import KINDS, ExamQuestion
from mobilevlm_ros.train.own_labels import MAX_WORDS
from mobilevlm_ros.types import Frame

__all__ = ['NOTHING_ASKED', 'Asked', 'parse_asked', 'suggest']

_WRITTEN = re.compile(r'\s*(\w+)\s*:\s*(.*?)\s*(?:\[(.*)\]\s*)?', re.S)
_FAILED = 100


@dataclass(frozen=True)
class Asked:
    """One question, and its entry in the labels."""

    kind: str
    text: str
    choices: tuple[str, ...] = ()

    def entry(self, answer: str = '', confidence: float | None = None) -> dict[str, Any]:
        """One element of ``questions``, for a person to fill in or to correct."""
        form = 'YES_NO' if self.kind == 'yes_no' else 'CHOICE' if self.choices else 'TEXT'
        choices = {'choices': list(self.choices)} if self.choices else {}
        sure = {} if confidence is None else {'confidence': round(confidence, 2)}
        return {'kind': self.kind, 'format': form, 'question': self.text, **choices, 'answer': answer, **sure}

    def question(self, image: Path, number: int) -> ExamQuestion:
        """The same about a picture."""
        return ExamQuestion(f'{image.stem}-{number}', image, self.kind, self.text, (), self.choices)


NOTHING_ASKED = (Asked('yes_no', ''),)
"""What a person finds in the labels who named no questions: one to fill in."""


def parse_asked(written: str) -> Asked:
    """Read ``KIND: QUESTION`` or ``KIND: QUESTION [CHOICE | CHOICE]``.

    :raise SettingsError: if it is neither, or cannot be asked.
    """
    found = _WRITTEN.fullmatch(written)
    if found is None or found[1] not in KINDS or not found[2]:
        raise SettingsError(
            f'--ask {written!r} is no question: expected KIND: QUESTION, or KIND: QUESTION [CHOICE | CHOICE], with a '
            f'kind out of {", ".join(KINDS)}; such as "yes_no: Is the door open?"'
        )
    choices = tuple(choice.strip() for choice in found[3].split('|')) if found[3] is not None else ()
    asked = Asked(found[1], found[2], choices)
    if asked.kind == 'yes_no' and choices:
        raise SettingsError(f'--ask {written!r}: a question of the kind yes_no has no choices')
    try:
        prepare(asked.question(Path('1.jpg'), 1).asked())
    except MobileVLMError as error:
        raise SettingsError(f'--ask {written!r} cannot be asked: {error}') from error
    return asked


def suggest(assistant: Assistant, image: Path, asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """The entries of a picture with the assistant's own answers, for a person to correct.

    :raise BadImageError: if the picture cannot be read.
    :raise EngineError: if the model fails.
    """
    questions = [one.question(image, number).asked() for number, one in enumerate(asked, 1)]
    frame = Frame(read_image(image), camera=image.name)
    answers = assistant.ask_many(questions, frame, settings=AssistantSettings(min_confidence=0.0))
    for one, answer in zip(asked, answers, strict=True):
        if answer.result_code >= _FAILED:
            raise EngineError(f'{one.text!r} about {image.name} got no answer: {answer.message}')
    return [one.entry(_short(answer.text), answer.confidence) for one, answer in zip(asked, answers, strict=True)]


def _short(text: str) -> str:
    """An answer as labels may hold it: without control characters, and of a few words."""
    plain = ''.join(sign if sign.isprintable() else ' ' for sign in text)
    return ' '.join(plain.split()[:MAX_WORDS])
