"""What is wrong with training data: counted by kind, with the first examples of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ['Example', 'Problem', 'Problems', 'name_of', 'printable', 'shown']

MAX_EXAMPLES = 5
_MAX_SHOWN = 240
_MAX_NAME = 80


def printable(text: str) -> str:
    """A text out of the data, safe to show: without control characters and half characters, and not too long."""
    shown = text if len(text) <= _MAX_SHOWN else f'{text[:_MAX_SHOWN]}…'
    return ''.join(
        sign if sign.isprintable() else sign.encode('unicode_escape', 'backslashreplace').decode() for sign in shown
    )


def shown(value: object) -> str:
    """A value that was found where another was expected, for a message."""
    if value is None:
        return 'nothing'
    if isinstance(value, str):
        return repr(printable(value[:_MAX_NAME]))
    return str(value) if isinstance(value, bool | float) else type(value).__name__


def name_of(found: object, otherwise: str) -> str:
    """A record's id as a text, safe to show; ``otherwise`` if it has none that can be used."""
    if isinstance(found, str | int) and not isinstance(found, bool) and str(found):
        return printable(str(found)[:_MAX_NAME])
    return otherwise


@dataclass(frozen=True, slots=True)
class Example:
    """One record with a problem.

    :ivar record: its id, or its place if it has none.
    :ivar place: file and line.
    """

    record: str
    place: str
    detail: str

    def __str__(self) -> str:
        return printable(f'{self.record} ({self.place}): {self.detail}')


@dataclass(slots=True)
class Problem:
    """All records with one kind of problem."""

    kind: str
    count: int = 0
    examples: list[Example] = field(default_factory=list)


class Problems:
    """Problems by kind, the most frequent first."""

    def __init__(self) -> None:
        self._by_kind: dict[str, Problem] = {}

    def add(self, kind: str, example: Example) -> None:
        """Count a record."""
        problem = self._by_kind.setdefault(kind, Problem(kind))
        problem.count += 1
        if len(problem.examples) < MAX_EXAMPLES:
            problem.examples.append(example)

    def __iter__(self) -> Iterator[Problem]:
        return iter(sorted(self._by_kind.values(), key=lambda problem: (-problem.count, problem.kind)))

    def __len__(self) -> int:
        return len(self._by_kind)

    @property
    def total(self) -> int:
        """Number of records with a problem; each is counted once, under what was found first."""
        return sum(problem.count for problem in self)

    def count(self, kind: str) -> int:
        """Number of records with this kind of problem."""
        problem = self._by_kind.get(kind)
        return problem.count if problem else 0

    def summary(self) -> str:
        """One line: kinds and counts, each with its first example."""
        return '; '.join(f'{problem.count} × {problem.kind}, first {problem.examples[0]}' for problem in self)
