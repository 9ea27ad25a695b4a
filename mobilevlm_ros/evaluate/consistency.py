"""Whether a model agrees with itself: over neighbouring frames, and between a question and its negation.

No truth is needed. A question keeps its right answer over the frames that it is asked about, and on one frame the
right answer to a negation is the opposite one: whoever does otherwise is wrong once at least. Failed answers are left
out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from mobilevlm_ros.evaluate.intervals import Share, share_of
from mobilevlm_ros.evaluate.scored import Scored

__all__ = ['Consistency', 'consistency_of']

_OPPOSITE = {'yes': 'no', 'no': 'yes'}


@dataclass(frozen=True)
class Consistency:
    """Shares of pairs that agree; None where there are no pairs.

    :ivar neighbours: the same question on two frames that follow each other among those it was asked about: the same
        answer.
    :ivar negations: a yes/no question and its negation on one frame: opposite answers.
    """

    neighbours: Share | None
    negations: Share | None

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return {name: None if share is None else share.as_record() for name, share in vars(self).items()}


def consistency_of(answers: Sequence[Scored]) -> Consistency:
    """Find the pairs, and count."""
    given = [one for one in answers if not one.failed]
    return Consistency(_share(_neighbours(given)), _share(_negations(given)))


_Agreements = list[tuple[bool, str]]
"""Whether a pair agrees, and the group of its first answer."""


def _neighbours(given: Sequence[Scored]) -> _Agreements:
    ordered = sorted(given, key=lambda one: (one.question_id, one.camera, one.frame_index))
    found: _Agreements = []
    for _, series in groupby(ordered, key=lambda one: (one.question_id, one.camera)):
        found += [(first.answer == second.answer, first.group) for first, second in pairwise(series)]
    return found


def _negations(given: Sequence[Scored]) -> _Agreements:
    by_place = {one.place: one for one in given}
    found: _Agreements = []
    for one in given:
        other = by_place.get((one.negation_of, one.camera, one.frame_index)) if one.negation_of else None
        if other is not None:
            found.append((one.answer == _OPPOSITE.get(other.answer), one.group))
    return found


def _share(agreements: _Agreements) -> Share | None:
    if not agreements:
        return None
    agree, groups = zip(*agreements, strict=True)
    return share_of(agree, groups)
