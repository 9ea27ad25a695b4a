"""Examines a bundle: asks hand-labelled questions through the runtime, and scores the answers by kind.

Beside the accuracy stand what it has to beat: the same model shown a grey picture, the answer that is right most
often, and, where one is given, a bundle that was not trained. An answer is right if all of it is an accepted one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from mobilevlm_ros.errors import EngineError
from mobilevlm_ros.evaluate.intervals import wilson_interval
from mobilevlm_ros.runtime.assistant import Assistant, AssistantSettings
from mobilevlm_ros.runtime.images import read_image
from mobilevlm_ros.train.exam_questions import KINDS, ExamQuestion, normalise
from mobilevlm_ros.types import Frame

__all__ = ['ALL_KINDS', 'ExamReport', 'Given', 'Score', 'answer_all', 'majority', 'scores']

ALL_KINDS = 'all'
_GREY = 128
_FAILED = 100
"""Result codes from here on mean that there was no answer, not that it was unsure."""


@dataclass(frozen=True)
class Given:
    """What was answered to a question.

    :ivar picture: name of the picture's file, also where it was not shown.
    :ivar confidence: probability of the answer, as the runtime reports it.
    :ivar negative: see ``ExamQuestion``.
    :ivar format: how it was asked: ``text``, ``yes_no`` or ``choice``.
    """

    id: str
    picture: str
    kind: str
    answer: str
    right: bool
    confidence: float
    negative: str = ''
    format: str = 'text'


@dataclass(frozen=True)
class Score:
    """So many right of so many; ``low`` and ``high`` are the Wilson interval at 95 %."""

    n_right: int
    n: int

    @property
    def accuracy(self) -> float:
        """The share; 0 of none."""
        return self.n_right / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """See ``wilson_interval``."""
        return wilson_interval(self.n_right, self.n)

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        low, high = self.interval
        return {'right': self.n_right, 'of': self.n, 'accuracy': self.accuracy, 'low': low, 'high': high}


@dataclass
class ExamReport:
    """One bundle, examined.

    :ivar model_id: the bundle's own name.
    :ivar given: its answers.
    :ivar majorities: of each kind, the answer that is right most often, and how often that is.
    :ivar blind: the same model's answers about a grey picture.
    :ivar untrained: the answers of the bundle that was not trained.
    :ivar temperature: of closed formats, by name, as the bundle has it already.
    """

    model_id: str
    given: list[Given]
    majorities: dict[str, tuple[str, Score]]
    blind: list[Given] = field(default_factory=list)
    untrained: list[Given] = field(default_factory=list)
    temperature: dict[str, float] = field(default_factory=dict)

    def columns(self) -> dict[str, dict[str, Score]]:
        """What is compared: name of the column to scores by kind."""
        columns = {'accuracy': scores(self.given)}
        if self.blind:
            columns['blind'] = scores(self.blind)
        columns['majority'] = {kind: score for kind, (_, score) in self.majorities.items()}
        if self.untrained:
            columns['untrained'] = scores(self.untrained)
        return columns

    def details(self) -> dict[str, Score]:
        """Yes/no questions apart: where a model that says yes to everything shows."""
        asked = [one for one in self.given if one.kind == 'yes_no']
        nos = [one for one in asked if one.negative]
        parts = {
            'answer is yes': [one for one in asked if not one.negative],
            'answer is no': nos,
            'answer is no, hard': [one for one in nos if one.negative == 'hard'],
        }
        return {name: _score(given) for name, given in parts.items()}

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            'model_id': self.model_id,
            'scores': {
                name: {kind: score.as_record() for kind, score in column.items()}
                for name, column in self.columns().items()
            },
            'majority_answers': {kind: answer for kind, (answer, _) in self.majorities.items()},
            'details': {name: score.as_record() for name, score in self.details().items()},
            'answers': [asdict(one) for one in self.given],
            'blind_answers': [asdict(one) for one in self.blind],
            'untrained_answers': [asdict(one) for one in self.untrained],
        }


def answer_all(
    assistant: Assistant,
    questions: Iterable[ExamQuestion],
    *,
    blind: bool = False,
    on_progress: Callable[[float, float], None] = lambda done, total: None,
) -> list[Given]:
    """Ask everything, picture by picture; every question gets the likeliest answer, however unsure.

    :param blind: show a grey picture instead.
    :param on_progress: called with the number of questions done, and of all.
    :return: in the order of the pictures' names.
    :raise BadImageError: if a picture cannot be read.
    :raise EngineError: if the model fails on a question.
    """
    ordered = sorted(questions, key=lambda question: str(question.image))
    settings = AssistantSettings(min_confidence=0.0)
    grey = Frame(np.full((256, 256, 3), _GREY, np.uint8))
    given: list[Given] = []
    for image, group in groupby(ordered, key=lambda question: question.image):
        of_image = list(group)
        frame = grey if blind else Frame(read_image(image), camera=image.name)
        answers = assistant.ask_many([question.asked() for question in of_image], frame, settings=settings)
        for question, answer in zip(of_image, answers, strict=True):
            if answer.result_code >= _FAILED:
                raise EngineError(f'question {question.id} got no answer: {answer.message}')
            right = question.is_right(answer.text)
            form = answer.question.format.name.lower()
            given.append(
                Given(
                    question.id,
                    image.name,
                    question.kind,
                    answer.text,
                    right,
                    answer.confidence,
                    question.negative,
                    form,
                )
            )
        on_progress(len(given), len(ordered))
    return given


def scores(given: Sequence[Given]) -> dict[str, Score]:
    """Scores by kind, those of all questions last."""
    kinds = [kind for kind in KINDS if any(one.kind == kind for one in given)]
    by_kind = {kind: _score([one for one in given if one.kind == kind]) for kind in kinds}
    return by_kind | {ALL_KINDS: _score(given)}


def _score(given: Sequence[Given]) -> Score:
    return Score(sum(one.right for one in given), len(given))


def majority(questions: Sequence[ExamQuestion]) -> dict[str, tuple[str, Score]]:
    """For each kind, the one answer that the most questions accept; ties go to the first in the alphabet.

    The score of all kinds is that of somebody who knows the kind of a question, and nothing else.
    """
    best: dict[str, tuple[str, Score]] = {}
    for kind in KINDS:
        of_kind = [question for question in questions if question.kind == kind]
        if not of_kind:
            continue
        accepted = Counter(
            answer
            for question in of_kind
            for answer in {normalise(one, plural=kind == 'name') for one in question.answers}
        )
        answer, n_right = min(accepted.items(), key=lambda item: (-item[1], item[0]))
        best[kind] = answer, Score(n_right, len(of_kind))
    n_right = sum(score.n_right for _, score in best.values())
    return best | {ALL_KINDS: ('', Score(n_right, len(questions)))}
