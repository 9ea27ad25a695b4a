"""The answers that a report shows, failures first, and the frames that they are about, made small.

Bounded however long the run was: so many answers are kept while the results are gone through, and so many frames are
put into the page, one in memory at a time. What is left out is counted, and named in the CSV file.
"""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from mobilevlm_ros.evaluate.scored import has_failed

__all__ = ['Card', 'Thumbnail', 'Thumbnails', 'choose_cards', 'outcome_of', 'with_blind']

_SIDE = 320
"""Longest side of a thumbnail, in pixels."""

_ORDER = {'wrong': 0, 'failed': 1, 'unscored': 2, 'right': 3}


@dataclass(frozen=True)
class Card:
    """One answer, to be shown; texts are as they were, and not safe in a page until escaped.

    :ivar outcome: see ``outcome_of``.
    :ivar time_s: since the start of the recording.
    :ivar options: of a closed question, each with its probability.
    :ivar blind: what was answered without seeing; None if that was not asked.
    """

    key: str
    outcome: str
    question: str
    kind: str
    answer: str
    truth: str
    code: str
    message: str
    confidence: float | None
    options: tuple[tuple[str, float], ...]
    camera: str
    frame_index: int
    time_s: float
    seconds: float
    image: str
    blind: str | None = None


@dataclass(frozen=True)
class Thumbnail:
    """A small frame, as a data URI; ``name`` is its class in the page's style."""

    name: str
    uri: str
    width: int
    height: int


def outcome_of(row: Mapping[str, Any]) -> str:
    """What became of a question: ``wrong``, ``failed`` (no answer), ``unscored`` (it has no truth), or ``right``."""
    if has_failed(row):
        return 'failed'
    if row['correct'] is None:
        return 'unscored'
    return 'right' if row['correct'] else 'wrong'


def choose_cards(rows: Iterable[Mapping[str, Any]], most: int, start_ns: int) -> list[Card]:
    """Pick what to show, in order: what went wrong, surest first; no answer; no truth; what was right, unsure first.

    :param rows: lines of the results, gone through once.
    :param start_ns: of the recording.
    """
    seen = (row for row in rows if row['pass'] == 'seen')
    return [_card(row, start_ns) for row in heapq.nsmallest(most, seen, key=_rank)]


def with_blind(cards: Iterable[Card], rows: Iterable[Mapping[str, Any]]) -> list[Card]:
    """The same cards, with what was answered without seeing."""
    by_key = {card.key.removeprefix('seen/'): card for card in cards}
    for row in rows:
        key = row['key'].removeprefix('blind/')
        if row['pass'] == 'blind' and key in by_key:
            by_key[key] = replace(by_key[key], blind=row['answer'])
    return list(by_key.values())


class Thumbnails:
    """Frames of some cards, made small when they are asked for.

    :param folder: that the results are in.
    :param cards: in the order that they are shown in: the frames of the first ones are embedded.
    :param most: so many different frames are embedded.
    """

    def __init__(self, folder: Path, cards: Iterable[Card], most: int) -> None:
        self._folder = folder.resolve()
        self._images = list(dict.fromkeys(card.image for card in cards if card.image))
        self._most = most
        self._names: dict[str, str] = {}

    @property
    def n_left_out(self) -> int:
        """Frames that are named only, because there are too many."""
        return max(0, len(self._images) - self._most)

    def __iter__(self) -> Iterator[Thumbnail]:
        for number, image in enumerate(self._images[: self._most]):
            found = self._small(image)
            if found is not None:
                content, width, height = found
                self._names[image] = f'f{number}'
                uri = f'data:image/jpeg;base64,{base64.b64encode(content).decode("ascii")}'
                yield Thumbnail(f'f{number}', uri, width, height)

    def name_of(self, image: str) -> str:
        """Its class, once all were gone through; empty if it is not embedded."""
        return self._names.get(image, '')

    def _small(self, image: str) -> tuple[bytes, int, int] | None:
        """JPEG, width and height; None if there is no such file in the folder, or it is no image."""
        path = (self._folder / image).resolve()
        if not path.is_relative_to(self._folder):
            return None
        try:
            with Image.open(path) as opened:
                opened.draft('RGB', (_SIDE, _SIDE))
                small = opened.convert('RGB')
            small.thumbnail((_SIDE, _SIDE))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # PIL's for damaged files
            return None
        content = io.BytesIO()
        small.save(content, 'JPEG', quality=72, optimize=True)
        return content.getvalue(), small.width, small.height


def _rank(row: Mapping[str, Any]) -> tuple[int, float]:
    outcome = outcome_of(row)
    confidence = row['confidence'] or 0.0
    return _ORDER[outcome], -confidence if outcome == 'wrong' else confidence


def _card(row: Mapping[str, Any], start_ns: int) -> Card:
    return Card(
        key=row['key'],
        outcome=outcome_of(row),
        question=row['question'],
        kind=row['kind'],
        answer=row['answer'],
        truth=row['truth'],
        code=row['result_code'],
        message=row['message'],
        confidence=row['confidence'],
        options=tuple(zip(row['options'], row['probabilities'], strict=False)),
        camera=row['camera'],
        frame_index=row['frame_index'],
        time_s=(row['received_ns'] - start_ns) / 1e9,
        seconds=row['timing']['total_s'],
        image=row['image'],
    )
