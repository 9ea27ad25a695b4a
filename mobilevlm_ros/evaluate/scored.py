"""What scores need of each answer, and no more: so that a long run is scored in little memory.

Answers about the same second of a recording (``block_s``) are one group: frames that follow each other show nearly the
same, and answers about them count as one another's repetition as far as they agree (see ``intervals.py``).
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobilevlm_ros.errors import EvaluationError, SettingsError
from mobilevlm_ros.evaluate.checkers import normalise
from mobilevlm_ros.evaluate.results import read_results
from mobilevlm_ros.types import ResultCode

__all__ = ['BLOCK_S', 'STAGES', 'Collected', 'Scored', 'answers_in', 'collect', 'group_of', 'has_failed']

BLOCK_S = 1.0
"""Seconds of a recording that count as one group, unless asked otherwise."""

STAGES = (
    'queue_s',
    'image_s',
    'preprocess_s',
    'vision_s',
    'prefill_s',
    'decode_s',
    'first_text_s',
    'total_s',
)
_OF_QUESTION = ('key', 'pass', 'question_id', 'kind', 'question', 'format', 'choices', 'truth', 'negation_of')
_OF_ANSWER = ('answer', 'correct', 'result_code', 'message', 'confidence', 'options', 'probabilities', 'timing')
_OF_FRAME = ('camera', 'frame_index', 'stamp_ns', 'received_ns', 'image', 'prompt_hash', 'model_id', 'realtime')
_FIELDS = frozenset((*_OF_QUESTION, *_OF_ANSWER, *_OF_FRAME))
_TIMED = frozenset((*STAGES, 'prompt_tokens', 'reused_tokens', 'generated_tokens', 'vision_reused'))
_FIRST_FAILURE = 100
"""Result codes from here on mean that there was no answer, not that it was unsure."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One answer, as far as scores need it; fields as in a line of the results.

    :ivar answer: without what does not matter, to be compared with another.
    :ivar right: None if the question has no truth.
    :ivar group: answers of different groups are taken as independent.
    """

    question_id: str
    kind: str
    answer: str
    right: bool | None
    confidence: float | None
    failed: bool
    camera: str
    frame_index: int
    group: str
    negation_of: str

    @property
    def place(self) -> tuple[str, str, int]:
        """Names the question asked about the frame; equal for the blind answer to it."""
        return self.question_id, self.camera, self.frame_index


@dataclass
class Collected:
    """All answers of a run.

    :ivar seen: given with the frame in view; ``blind``: to a grey one.
    :ivar seconds: by whether the frame was known already (``new``, ``known``), and stage: of the answers in view that
        did not fail.
    :ivar codes: how many answers in view ended with which result code.
    :ivar met: of questions with a deadline: whether it was met, and the group.
    """

    seen: list[Scored] = field(default_factory=list)
    blind: list[Scored] = field(default_factory=list)
    seconds: dict[str, dict[str, array[float]]] = field(
        default_factory=lambda: {known: {stage: array('d') for stage in STAGES} for known in ('new', 'known')}
    )
    codes: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    met: list[tuple[bool, str]] = field(default_factory=list)


def answers_in(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of the results in a folder, with every field that scores, report and comparison use.

    :raise EvaluationError: if they cannot be read, or a field is missing.
    """
    for number, row in enumerate(read_results(folder), 1):
        missing = _FIELDS - row.keys()
        if missing or row['result_code'] not in ResultCode.__members__ or _TIMED - row['timing'].keys():
            what = f'without {", ".join(sorted(missing))}' if missing else 'with an unknown result code or timing'
            raise EvaluationError(
                f'{folder}: answer {number} is {what}, as another version wrote it: evaluate again into another folder'
            )
        yield row


def collect(rows: Iterable[Mapping[str, Any]], *, block_s: float = BLOCK_S) -> Collected:
    """Go through the results once.

    :param rows: see ``answers_in``.
    :raise SettingsError: if ``block_s`` is negative.
    """
    found = Collected()
    for row in rows:
        _add(found, row, block_s)
    return found


def _add(found: Collected, row: Mapping[str, Any], block_s: float) -> None:
    failed = has_failed(row)
    one = Scored(
        question_id=row['question_id'],
        kind=row['kind'],
        answer=normalise(row['answer']),
        right=row['correct'],
        confidence=row['confidence'],
        failed=failed,
        camera=row['camera'],
        frame_index=row['frame_index'],
        group=group_of(row, block_s),
        negation_of=row['negation_of'],
    )
    if row['pass'] == 'blind':
        found.blind.append(one)
        return
    found.seen.append(one)
    found.codes[row['result_code']] += 1
    timing, realtime = row['timing'], row['realtime']
    if not failed:
        of_stage = found.seconds['known' if timing['vision_reused'] else 'new']
        for stage in STAGES:
            of_stage[stage].append(timing[stage])
        found.tokens['prompt'] += timing['prompt_tokens']
        found.tokens['reused'] += timing['reused_tokens']
        found.tokens['generated'] += timing['generated_tokens']
    if realtime is not None and realtime['deadline_s'] is not None:
        found.met.append((realtime['met'], one.group))


def group_of(row: Mapping[str, Any], block_s: float) -> str:
    """The block of the recording that an answer belongs to; with blocks of no length, its frame.

    :raise SettingsError: if the length is negative.
    """
    if block_s < 0:
        raise SettingsError(f'a block of a recording lasts 0 seconds (each frame for itself) or more, found {block_s}')
    if block_s:
        return str(int(row['received_ns'] // (block_s * 1e9)))
    return f'{row["camera"]} {row["frame_index"]}'


def has_failed(row: Mapping[str, Any]) -> bool:
    """Whether there was no answer: it timed out, the frame was stale, the engine failed."""
    return ResultCode[row['result_code']] >= _FIRST_FAILURE
