"""Two runs over the same questions about the same frames: which answers flipped, and whether the second run is worse.

The second run is refused if it is worse than chance explains, by the exact test that takes frames, not answers, as
independent (``paired.py``). A test that finds nothing has not shown that two models are equally good: the largest drop
that is tolerated can be asked for beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from mobilevlm_ros.errors import EvaluationError, SettingsError
from mobilevlm_ros.evaluate.paired import Paired, compare_pairs, holm
from mobilevlm_ros.evaluate.results import read_run
from mobilevlm_ros.evaluate.scored import BLOCK_S, answers_in, group_of, has_failed

__all__ = ['Comparison', 'Flip', 'Limits', 'compare_runs']

_NAMED = 5
"""So many examples are named in a message."""

_ASKED = ('question', 'format', 'choices', 'truth', 'kind', 'received_ns')
"""What must be equal for two answers to be to the same question about the same frame."""


@dataclass(frozen=True)
class Limits:
    """From when on a second run is refused.

    :ivar alpha: a difference as large that comes by chance less often than this is significant.
    :ivar max_drop: refuse, too, if accuracy falls by more than this share, significant or not; None: do not.
    :ivar each_kind: refuse, too, if one kind of question is significantly worse (p-values after Holm).
    :raise SettingsError: if one is out of its range.
    """

    alpha: float = 0.05
    max_drop: float | None = None
    each_kind: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < 1.0:
            raise SettingsError(f'a level of significance is between 0 and 1, found {self.alpha}')
        if self.max_drop is not None and not 0.0 <= self.max_drop <= 1.0:
            raise SettingsError(f'a drop of accuracy is between 0 and 1, found {self.max_drop}')


@dataclass(frozen=True)
class Flip:
    """A question that one run answered rightly and the other wrongly; ``gained`` if the second was right."""

    question: str
    kind: str
    camera: str
    frame_index: int
    truth: str
    first: str
    second: str
    gained: bool


@dataclass(frozen=True)
class Comparison:
    """Two runs, compared.

    :ivar models: their names.
    :ivar accuracies: over the same questions.
    :ivar kinds: by kind of question; ``kind_p`` their p-values after Holm.
    :ivar median_s: of an answer, over the questions that both answered.
    :ivar n_unscored: compared questions without a truth; ``n_left_out``: that only one run has.
    :ivar reasons: why the second run is refused; empty: it is accepted.
    """

    models: tuple[str, str]
    accuracies: tuple[float, float]
    overall: Paired
    kinds: dict[str, Paired]
    kind_p: dict[str, float]
    flips: list[Flip]
    median_s: tuple[float, float] | None
    n_unscored: int
    n_left_out: int
    reasons: list[str] = field(default_factory=list)

    @property
    def accepted(self) -> bool:
        """Whether the second run may take the place of the first."""
        return not self.reasons

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self) | {
            'accepted': self.accepted,
            'overall': self.overall.as_record(),
            'kinds': {kind: one.as_record() for kind, one in self.kinds.items()},
            'flips': [vars(flip) for flip in self.flips],
        }


def compare_runs(
    first: Path, second: Path, limits: Limits, *, block_s: float = BLOCK_S, common: bool = False
) -> Comparison:
    """Compare the results in two folders.

    :param block_s: seconds of a recording that count as one group; 0: each frame is one.
    :param common: compare what both have, and leave out the rest.
    :raise EvaluationError: if results cannot be read, or the two runs cannot be compared; names what differs.
    """
    models = _model_of(first, common), _model_of(second, common)
    pairs, n_left_out = _pairs(_read(first, block_s), _read(second, block_s), common)
    scored = [(one, other) for one, other in pairs if one.right is not None and other.right is not None]
    if not scored:
        raise EvaluationError(f'none of {len(pairs)} compared questions has a truth: add answers to the questions')
    overall = _paired(scored)
    kinds = {
        kind: _paired([pair for pair in scored if pair[0].kind == kind])
        for kind in dict.fromkeys(one.kind for one, _ in scored)
    }
    kind_p = dict(zip(kinds, holm([one.p for one in kinds.values()]), strict=True))
    answered = [(one.seconds, other.seconds) for one, other in pairs if not (one.failed or other.failed)]
    median_s = tuple(np.median(answered, axis=0).tolist()) if answered else None
    return Comparison(
        models=models,
        accuracies=(_accuracy([one for one, _ in scored]), _accuracy([other for _, other in scored])),
        overall=overall,
        kinds=kinds,
        kind_p=kind_p,
        flips=[_flip(one, other) for one, other in scored if one.right != other.right],
        median_s=median_s,
        n_unscored=len(pairs) - len(scored),
        n_left_out=n_left_out,
        reasons=_reasons(overall, kinds, kind_p, limits),
    )


def _reasons(overall: Paired, kinds: Mapping[str, Paired], kind_p: Mapping[str, float], limits: Limits) -> list[str]:
    reasons = []
    drop = -overall.difference
    if drop > 0 and overall.p < limits.alpha:
        reasons.append(f'significantly worse: accuracy falls by {drop:.1%}, p = {overall.p:.2g} < {limits.alpha:g}')
    if limits.max_drop is not None and drop > limits.max_drop:
        reasons.append(f'accuracy falls by {drop:.1%}, more than {limits.max_drop:.1%}')
    if limits.each_kind:
        reasons += [
            f'significantly worse in {kind}: accuracy falls by {-one.difference:.1%}, p = {kind_p[kind]:.2g} (Holm)'
            for kind, one in kinds.items()
            if one.difference < 0 and kind_p[kind] < limits.alpha
        ]
    return reasons


# -- the answers of a run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Given:
    """What comparing needs of one answer.

    :ivar asked: equal for the same question about the same frame, wherever it was asked.
    """

    key: str
    asked: bytes
    question_id: str
    question: str
    kind: str
    camera: str
    frame_index: int
    truth: str
    answer: str
    right: bool | None
    failed: bool
    seconds: float
    group: str


def _model_of(folder: Path, common: bool) -> str:
    run = read_run(folder)
    if not run['finished'] and not common:
        raise EvaluationError(
            f'the run in {folder} is not finished ({run["n_done"]} answers): finish it, or compare what both runs have '
            'with --common'
        )
    return str(run['bundle']['model_id'])


def _read(folder: Path, block_s: float) -> dict[str, _Given]:
    rows = (row for row in answers_in(folder) if row['pass'] == 'seen')
    return {row['key']: _given(row, block_s) for row in rows}


def _given(row: Mapping[str, Any], block_s: float) -> _Given:
    asked = json.dumps([row[name] for name in _ASKED]).encode()
    return _Given(
        key=row['key'],
        asked=sha256(asked).digest(),
        question_id=row['question_id'],
        question=row['question'],
        kind=row['kind'],
        camera=row['camera'],
        frame_index=row['frame_index'],
        truth=row['truth'],
        answer=row['answer'],
        right=row['correct'],
        failed=has_failed(row),
        seconds=row['timing']['total_s'],
        group=group_of(row, block_s),
    )


def _pairs(
    first: Mapping[str, _Given], second: Mapping[str, _Given], common: bool
) -> tuple[list[tuple[_Given, _Given]], int]:
    """The answers to the same questions, and how many only one run has.

    :raise EvaluationError: if the questions differ.
    """
    changed = [one for key, one in first.items() if key in second and second[key].asked != one.asked]
    if changed:
        raise EvaluationError(
            f'{len(changed)} questions are not the same in both runs (text, kind, format, choices, truth, or time of '
            f'the frame): {_named(changed)}. Ask both models the same questions about the same recording'
        )
    alone = [[one for key, one in run.items() if key not in other] for run, other in ((first, second), (second, first))]
    for only, which in zip(alone, ('first', 'second'), strict=True):
        if only and not common:
            raise EvaluationError(
                f'{len(only)} questions were asked in the {which} run only: {_named(only)}. Ask both models the same '
                'questions about the same frames, or compare what both runs have with --common'
            )
    return [(one, second[key]) for key, one in first.items() if key in second], sum(map(len, alone))


def _named(answers: Sequence[_Given]) -> str:
    names = [f'{one.question_id} "{one.question}" ({one.camera}, frame {one.frame_index})' for one in answers[:_NAMED]]
    more = len(answers) - len(names)
    return '; '.join(names) + (f'; and {more} more' if more else '')


def _paired(pairs: Sequence[tuple[_Given, _Given]]) -> Paired:
    return compare_pairs(
        [bool(one.right) for one, _ in pairs],
        [bool(other.right) for _, other in pairs],
        [one.group for one, _ in pairs],
    )


def _accuracy(answers: Sequence[_Given]) -> float:
    return sum(bool(one.right) for one in answers) / len(answers)


def _flip(one: _Given, other: _Given) -> Flip:
    return Flip(
        question=one.question,
        kind=one.kind,
        camera=one.camera,
        frame_index=one.frame_index,
        truth=one.truth,
        first=one.answer,
        second=other.answer,
        gained=bool(other.right),
    )
