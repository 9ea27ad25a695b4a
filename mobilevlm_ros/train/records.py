"""LLaVA's dialogue files as records that can be trained on, and the rest counted and named.

A file is a JSON array or JSON lines of ``{"id", "image": relative path, "conversations": [{"from": "human" or "gpt",
"value": text}]}``. What the published code dies of in the middle of a run, or trains on without a word, is found here:
the files are taken for untrusted, and a record is either whole or is not used.

Source: mobilevlm/train/train.py (``LazySupervisedDataset``).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, overload

from mobilevlm_ros.errors import DatasetError, DatasetMissingError, RecordError
from mobilevlm_ros.train.dialogue import IMAGE_MARK, Turn, alternating
from mobilevlm_ros.train.json_stream import read_entries
from mobilevlm_ros.train.problems import Example, Problems, name_of, shown

__all__ = ['OnBad', 'Record', 'Records', 'iter_records', 'read_records', 'refusal']

OnBad = Literal['skip', 'refuse']

MAX_TURNS = 2048
MAX_IMAGE_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """A dialogue, perhaps about an image.

    :ivar place: file and line, for messages.
    """

    id: str
    image: Path | None
    turns: tuple[Turn, ...]
    place: str = ''

    @property
    def n_words(self) -> int:
        """Words of all turns: the length by which the published sampler groups."""
        return sum(len(turn.text.split()) for turn in self.turns)


class Records(Sequence[Record]):
    """Records that can be used; ``problems`` counts those that cannot."""

    def __init__(self, records: Sequence[Record], problems: Problems | None = None) -> None:
        self._records = records
        self.problems = problems if problems is not None else Problems()

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)


def read_records(path: Path, images: Path | None, *, on_bad: OnBad = 'refuse') -> Records:
    """Read a file of dialogues.

    :param images: the folder that image paths are relative to; None: the data has no images.
    :param on_bad: ``skip`` leaves out records that cannot be used, ``refuse`` raises if there is one.
    :raise DatasetMissingError: if the file or the folder is not there.
    :raise DatasetSyntaxError: if the file is malformed in a way that hides what follows; whatever ``on_bad`` says.
    :raise DatasetError: if records are refused, or none can be used.
    """
    problems = Problems()
    records = list(iter_records(path, images, problems))
    if on_bad == 'refuse' and len(problems):
        raise refusal(path, problems, len(records))
    if not records:
        raise DatasetError(f'{path} holds no record that can be trained on: {problems.summary() or "it is empty"}')
    return Records(records, problems)


def refusal(path: Path, problems: Problems, n_good: int) -> DatasetError:
    """The error for data that is not used because of what is wrong with some of it."""
    return DatasetError(
        f'{problems.total} of {problems.total + n_good} records of {path} cannot be trained on: {problems.summary()}. '
        'Mend them, or leave them out with `--on-bad skip` (in a configuration: `data.on_bad: skip`); '
        '`mobilevlm train check` lists more'
    )


def iter_records(path: Path, images: Path | None, problems: Problems) -> Iterator[Record]:
    """The records that can be used, one by one; the others are added to ``problems``.

    :raise DatasetMissingError: if the file or the folder is not there.
    :raise DatasetSyntaxError: if the file is malformed in a way that hides what follows.
    """
    if images is not None and not images.is_dir():
        raise DatasetMissingError(f'the folder of images {images} is not there: give it with --images')
    folder = _ImageFolder(images)
    for number, entry in enumerate(read_entries(path), start=1):
        place = f'{path.name}:{entry.line}'
        name = name_of(entry.value.get('id') if isinstance(entry.value, dict) else None, f'#{number}')
        try:
            if entry.error:
                raise RecordError('no JSON', entry.error)
            yield _record(entry.value, name, place, folder)
        except RecordError as error:
            problems.add(error.kind, Example(name, place, error.detail))


def _record(value: object, name: str, place: str, folder: _ImageFolder) -> Record:
    if not isinstance(value, dict):
        raise RecordError('no record', f'expected an object with "conversations", found {shown(value)}')
    turns = _turns(value.get('conversations'))
    asked = alternating(turns)
    _check_texts(asked)
    if asked[-1].role != 'gpt':
        raise RecordError('no answer', 'the last question has no answer')
    # As published, an image that is there but null counts as one, and dies.
    image = folder.find(value['image']) if 'image' in value else None
    _check_marks(asked, has_image=image is not None)
    return Record(name, image, turns, place)


def _turns(listed: object) -> tuple[Turn, ...]:
    if not isinstance(listed, list):
        raise RecordError('no dialogue', f'"conversations" should be a list of turns, found {shown(listed)}')
    if not listed:
        raise RecordError('no dialogue', '"conversations" is empty')
    if len(listed) > MAX_TURNS:
        raise RecordError('too long', f'{len(listed)} turns, at most {MAX_TURNS} are read')
    return tuple(_turn(index, turn) for index, turn in enumerate(listed, start=1))


def _turn(index: int, turn: object) -> Turn:
    if not isinstance(turn, dict):
        raise RecordError('malformed turn', f'turn {index} should be {{"from", "value"}}, found {shown(turn)}')
    role, text = turn.get('from'), turn.get('value')
    if not isinstance(text, str):
        raise RecordError('malformed turn', f'the "value" of turn {index} should be a text, found {shown(text)}')
    if role not in ('human', 'gpt'):
        raise RecordError('unknown role', f'turn {index} is from {shown(role)}, expected "human" or "gpt"')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError('no Unicode', f'turn {index} holds half a character: {error.reason}') from error
    return Turn(cast(Any, role), text)


def _check_texts(turns: Sequence[Turn]) -> None:
    for index, turn in enumerate(turns, start=1):
        if not turn.text.strip():
            kind = 'empty answer' if turn.role == 'gpt' else 'empty question'
            raise RecordError(kind, f'turn {index} from the first question on is empty')


def _check_marks(turns: Sequence[Turn], *, has_image: bool) -> None:
    """That an image has exactly one place, in a question."""
    if any(IMAGE_MARK in turn.text for turn in turns if turn.role == 'gpt'):
        raise RecordError('image mark in an answer', f'an answer holds {IMAGE_MARK}; it belongs into a question')
    n_marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if n_marks and not has_image:
        raise RecordError('image mark without image', f'a question holds {IMAGE_MARK}, but the record has no "image"')
    if n_marks > 1:
        raise RecordError('several images', f'{IMAGE_MARK} stands {n_marks} times; one image a dialogue is supported')
    if has_image and not n_marks:
        raise RecordError('image never shown', f'the record has an "image", but no question holds {IMAGE_MARK}')


class _ImageFolder:
    """Finds images below a folder, and nothing outside."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def find(self, name: object) -> Path:
        """The file of an image.

        :raise RecordError: if it is none, is missing, or is outside the folder.
        """
        if isinstance(name, list):
            raise RecordError('several images', f'"image" lists {len(name)} files; one image a dialogue is supported')
        if not isinstance(name, str) or not name or '\0' in name:
            raise RecordError('malformed image', f'"image" should be a relative path, found {shown(name)}')
        if self._folder is None:
            raise RecordError('missing image', f'{shown(name)}: no folder of images was given (--images)')
        # The names alone decide: a link inside the folder was put there by its owner, a name came with the data.
        relative = os.path.normpath(name)
        if os.path.isabs(name) or relative.split(os.sep)[0] == os.pardir or relative == os.curdir:
            raise RecordError('image outside the folder', f'{shown(name)} does not lie in the folder of images')
        path = self._folder / relative
        try:
            status = path.stat()
        except (OSError, ValueError) as error:
            raise RecordError('missing image', f'{shown(name)} is not in the folder of images') from error
        if not stat.S_ISREG(status.st_mode):
            raise RecordError('missing image', f'{shown(name)} is no file')
        if not 0 < status.st_size <= MAX_IMAGE_BYTES:
            raise RecordError('broken image', f'{shown(name)} has {status.st_size} bytes')
        return path
