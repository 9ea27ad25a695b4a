"""What was gained: the same held-out questions, answered before and after, with how far chance may be behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from mobilevlm_ros.evaluate.intervals import Share, share_of
from mobilevlm_ros.evaluate.paired import Paired, compare_pairs
from mobilevlm_ros.train.exam import ALL_KINDS, Given, Score
from mobilevlm_ros.train.exam_questions import KINDS

__all__ = ['OwnReport']

_FEW = 30
"""Fewer questions than this say little."""
_CHANCE = 0.05


@dataclass(frozen=True)
class OwnReport:
    """Answers to the same questions in the same order.

    :ivar majorities: of each kind, the answer that is right most often, and how often that is.
    """

    before: Sequence[Given]
    after: Sequence[Given]
    majorities: dict[str, tuple[str, Score]]

    @property
    def kinds(self) -> list[str]:
        """Those that were asked, and all together last."""
        return [*(kind for kind in KINDS if any(one.kind == kind for one in self.after)), ALL_KINDS]

    def share(self, given: Sequence[Given], kind: str) -> Share:
        """What is right of a kind; questions about one frame count together."""
        chosen = [one for one in given if kind in (ALL_KINDS, one.kind)]
        return share_of([one.right for one in chosen], [one.picture for one in chosen])

    @property
    def paired(self) -> Paired:
        """All questions, before and after."""
        pictures = [one.picture for one in self.after]
        return compare_pairs([one.right for one in self.before], [one.right for one in self.after], pictures)

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            'scores': {
                kind: {
                    'before': self.share(self.before, kind).as_record(),
                    'after': self.share(self.after, kind).as_record(),
                    'majority': self.majorities[kind][1].as_record(),
                    'majority_answer': self.majorities[kind][0],
                }
                for kind in self.kinds
            },
            'paired': self.paired.as_record(),
            'before': [asdict(one) for one in self.before],
            'after': [asdict(one) for one in self.after],
        }

    def show(self, console: Console) -> None:
        """Print the table, and what it allows to say."""
        table = Table('kind', 'questions', box=None, pad_edge=False, title='held-out frames, 95 % intervals')
        for name in ('before', 'after', 'majority'):
            table.add_column(name, justify='right')
        for kind in self.kinds:
            after = self.share(self.after, kind)
            cells = [_cell(self.share(self.before, kind)), _cell(after), f'{self.majorities[kind][1].accuracy:.2f}']
            table.add_row(kind, str(after.n), *cells)
        console.print(table)
        console.print(self.verdict(), highlight=False, soft_wrap=True)

    def verdict(self) -> str:
        """In words: which way it went, and whether chance alone would do as much."""
        paired = self.paired
        way = 'better' if paired.difference > 0 else 'worse' if paired.difference < 0 else 'neither better nor worse'
        text = (
            f'{way}: {paired.n_gained} of {paired.n} questions are right now that were wrong, {paired.n_lost} the '
            f'other way round; chance alone does as much {paired.p:.0%} of the time.'
        )
        if paired.difference > 0 and paired.p > _CHANCE:
            text += ' That is no proof: label more frames.'
        if paired.n < _FEW:
            text += f' {paired.n} questions are few: hold out more frames.'
        return text


def _cell(share: Share) -> str:
    return f'{share.value:.2f} ({share.low:.2f}-{share.high:.2f})'
