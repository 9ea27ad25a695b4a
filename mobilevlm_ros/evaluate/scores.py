"""The scores of a run: accuracy beside what it has to beat, whether confidence can be believed, speed, consistency.

Accuracy stands beside two baselines. Blind: the same model, asked the same about a grey frame, so that what it knows
without looking is not taken for sight. Majority: the one answer that would be right most often; it is chosen knowing
the truth, so that beating it means something. Questions without a truth are asked, timed and shown, but not scored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mobilevlm_ros.evaluate.calibration import Calibration, calibrate, risk_coverage
from mobilevlm_ros.evaluate.checkers import accepts
from mobilevlm_ros.evaluate.consistency import Consistency, consistency_of
from mobilevlm_ros.evaluate.intervals import Share, share_of
from mobilevlm_ros.evaluate.latency import Latency, latencies
from mobilevlm_ros.evaluate.paired import Paired, compare_pairs
from mobilevlm_ros.evaluate.scored import BLOCK_S, Collected, Scored, collect

__all__ = ['Abstention', 'KindScore', 'Scores', 'score']

_MOST_POINTS = 200


@dataclass(frozen=True)
class KindScore:
    """Accuracy over questions of one kind, beside the baselines.

    :ivar blind: accuracy without seeing, over the questions that were asked so; None if none was.
    :ivar sight: what seeing changed, over the same questions.
    :ivar majority: accuracy of always giving the answer ``majority_answer``; None if it is not known.
    """

    seen: Share
    blind: Share | None = None
    sight: Paired | None = None
    majority: Share | None = None
    majority_answer: str = ''

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            'seen': self.seen.as_record(),
            'blind': None if self.blind is None else self.blind.as_record(),
            'sight': None if self.sight is None else self.sight.as_record(),
            'majority': None if self.majority is None else self.majority.as_record(),
            'majority_answer': self.majority_answer,
        }


@dataclass(frozen=True)
class Abstention:
    """Accuracy against the share of questions answered, if only answers from some confidence on are given.

    :ivar limits: of confidence, falling; ``coverages`` and ``accuracies`` with each, at most 200 of them.
    :ivar mean_accuracy: over all coverages (1 less the area under risk and coverage).
    """

    n: int
    limits: tuple[float, ...]
    coverages: tuple[float, ...]
    accuracies: tuple[float, ...]
    mean_accuracy: float


@dataclass(frozen=True)
class Scores:
    """All figures about a run.

    :ivar block_s: seconds of a recording that count as one group.
    :ivar n: answers in view; ``n_failed``: of these, no answer at all; ``n_unscored``: of questions without a truth.
    :ivar kinds: by kind of question, in the order of the results.
    :ivar abstention: None, as ``calibration``, if no scored answer has a confidence.
    :ivar met: share of the questions with a deadline that met it; None if there were none.
    """

    block_s: float
    n: int
    n_failed: int
    n_unscored: int
    overall: KindScore
    kinds: dict[str, KindScore]
    abstention: Abstention | None
    calibration: Calibration | None
    latency: Latency
    consistency: Consistency
    codes: dict[str, int]
    met: Share | None

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            'block_s': self.block_s,
            'answers': self.n,
            'failed': self.n_failed,
            'without_truth': self.n_unscored,
            'overall': self.overall.as_record(),
            'kinds': {kind: one.as_record() for kind, one in self.kinds.items()},
            'abstention': None if self.abstention is None else vars(self.abstention),
            'calibration': None if self.calibration is None else self.calibration.as_record(),
            'latency': self.latency.as_record(),
            'consistency': self.consistency.as_record(),
            'result_codes': self.codes,
            'deadline': None if self.met is None else self.met.as_record(),
        }


def score(
    rows: Iterable[Mapping[str, Any]],
    questions: Sequence[Mapping[str, Any]],
    *,
    block_s: float = BLOCK_S,
    max_risk: float = 0.1,
) -> Scores:
    """Compute every figure.

    :param rows: see ``answers_in``; gone through once.
    :param questions: as the description of the run has them.
    :param block_s: seconds of the recording that count as one group; 0: each frame is one.
    :param max_risk: share of wrong answers to allow, from which a limit of confidence follows.
    :raise SettingsError: if a setting is out of its range.
    """
    found = collect(rows, block_s=block_s)
    scored = [one for one in found.seen if one.right is not None]
    blind = [one for one in found.blind if one.right is not None]
    by_kind = {kind: [one for one in scored if one.kind == kind] for kind in dict.fromkeys(one.kind for one in scored)}
    majorities = _majorities(by_kind, questions)
    kinds = {
        kind: _kind(of_kind, [one for one in blind if one.kind == kind], majorities.get(kind))
        for kind, of_kind in by_kind.items()
    }
    all_kinds = None
    if scored and len(majorities) == len(by_kind):
        guesses = {place: right for _, hits in majorities.values() for place, right in hits.items()}
        all_kinds = '', guesses
    sure = [one for one in scored if one.confidence is not None]
    return Scores(
        block_s=block_s,
        n=len(found.seen),
        n_failed=sum(one.failed for one in found.seen),
        n_unscored=len(found.seen) - len(scored),
        overall=_kind(scored, blind, all_kinds),
        kinds=kinds,
        abstention=_abstention(sure),
        calibration=_calibration(sure, max_risk),
        latency=latencies(found),
        consistency=consistency_of(found.seen),
        codes=dict(found.codes.most_common()),
        met=_met(found),
    )


def _share(answers: Sequence[Scored]) -> Share:
    return share_of([bool(one.right) for one in answers], [one.group for one in answers])


_Guess = tuple[str, dict[tuple[str, str, int], bool]]
"""An answer, and where it is right."""


def _kind(seen: Sequence[Scored], blind: Sequence[Scored], majority: _Guess | None) -> KindScore:
    by_place = {one.place: one for one in blind}
    both = [(one, by_place[one.place]) for one in seen if one.place in by_place]
    always = None
    if majority is not None:
        always = share_of([majority[1][one.place] for one in seen], [one.group for one in seen])
    return KindScore(
        seen=_share(seen),
        blind=_share([other for _, other in both]) if both else None,
        sight=_sight(both) if both else None,
        majority=always,
        majority_answer=majority[0] if majority is not None else '',
    )


def _sight(both: Sequence[tuple[Scored, Scored]]) -> Paired:
    return compare_pairs(
        [bool(other.right) for _, other in both], [bool(one.right) for one, _ in both], [one.group for one, _ in both]
    )


def _majorities(by_kind: Mapping[str, Sequence[Scored]], questions: Sequence[Mapping[str, Any]]) -> dict[str, _Guess]:
    """For each kind, the accepted answer that is right about the most frames; ties go to the first in the alphabet.

    Kinds whose questions name no accepted answer are left out.
    """
    by_id = {question['id']: question for question in questions}
    majorities = {}
    for kind, answers in by_kind.items():
        asked = {one.question_id: by_id[one.question_id] for one in answers if one.question_id in by_id}
        known = [one for one in answers if one.question_id in asked]
        candidates = sorted({text for question in asked.values() for text in _candidates(question)})
        if not candidates or len(known) < len(answers):
            continue
        n_asked: dict[str, int] = {}
        for one in answers:
            n_asked[one.question_id] = n_asked.get(one.question_id, 0) + 1
        best, best_ids, most = '', set[str](), -1
        for candidate in candidates:
            ids = {name for name, question in asked.items() if accepts(question, candidate)}
            n_right = sum(n_asked[name] for name in ids)
            if n_right > most:
                best, best_ids, most = candidate, ids, n_right
        majorities[kind] = best, {one.place: one.question_id in best_ids for one in answers}
    return majorities


def _candidates(question: Mapping[str, Any]) -> list[str]:
    """The accepted answers of a question, as a model would give them: in JSON where a field of it is looked at."""
    truth = question.get('truth') or {}
    accepted = list(truth.get('accepted') or ())
    if truth.get('checker') != 'json_field':
        return [str(one) for one in accepted]
    for step in reversed(truth['field'].split('.') if truth.get('field') else []):
        accepted = [{step: one} for one in accepted]
    return [json.dumps(one, ensure_ascii=False) for one in accepted]


def _abstention(sure: Sequence[Scored]) -> Abstention | None:
    if not sure:
        return None
    limits, coverages, risks = risk_coverage(*_confidences(sure))
    steps = [coverages[0], *(coverages[1:] - coverages[:-1])]
    mean = float(sum(step * (1 - risk) for step, risk in zip(steps, risks, strict=True)))
    every = max(1, -(-len(limits) // _MOST_POINTS))
    kept = sorted({*range(0, len(limits), every), len(limits) - 1})
    return Abstention(
        n=len(sure),
        limits=tuple(float(limits[k]) for k in kept),
        coverages=tuple(float(coverages[k]) for k in kept),
        accuracies=tuple(float(1 - risks[k]) for k in kept),
        mean_accuracy=mean,
    )


def _calibration(sure: Sequence[Scored], max_risk: float) -> Calibration | None:
    if not sure:
        return None
    confidences, right = _confidences(sure)
    return calibrate(confidences, right, [one.group for one in sure], max_risk=max_risk, lowest=0.0)


def _confidences(sure: Sequence[Scored]) -> tuple[list[float], list[bool]]:
    return [one.confidence or 0.0 for one in sure], [bool(one.right) for one in sure]


def _met(found: Collected) -> Share | None:
    if not found.met:
        return None
    met, groups = zip(*found.met, strict=True)
    return share_of(met, groups)
