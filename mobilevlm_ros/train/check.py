"""Looks at training data before a run does: what is in it, what is wrong with it, and what would be trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mobilevlm_ros.errors import BadImageError, DatasetSyntaxError, RecordError
from mobilevlm_ros.runtime.images import read_image
from mobilevlm_ros.runtime.preprocess import PreprocessSpec, preprocess
from mobilevlm_ros.train.dialogue import alternating
from mobilevlm_ros.train.dialogue_text import DialogueFormat, read_dialogues
from mobilevlm_ros.train.problems import Example, Problems
from mobilevlm_ros.train.records import Record, iter_records
from mobilevlm_ros.train.templates import encode_dialogue
from mobilevlm_ros.train.tokens import Tokenizer

__all__ = ['DatasetReport', 'Format', 'TokenCounts', 'check_dataset']

Format = Literal['llava'] | DialogueFormat

MASKED = 'not trained on'
"""The kind of problem of a sample that the published rules mask as a whole."""


@dataclass(slots=True)
class TokenCounts:
    """Tokens of the records that can be trained on, each image counted as one.

    :ivar longest: of one record, before it is cut.
    :ivar n_cut: records that are cut because they are too long.
    """

    total: int = 0
    trained: int = 0
    longest: int = 0
    n_cut: int = 0


@dataclass(slots=True)
class DatasetReport:
    """What ``check_dataset`` found.

    :ivar n_with_image: records that can be trained on and have an image; ``n_text_only`` have none.
    :ivar n_images: distinct image files of these.
    :ivar n_answers: answers of these.
    :ivar tokens: None: there was no tokenizer.
    :ivar broken_off: why the rest of the file cannot be read, with the place; empty if all was.
    """

    data: Path
    n_with_image: int = 0
    n_text_only: int = 0
    n_images: int = 0
    n_answers: int = 0
    tokens: TokenCounts | None = None
    problems: Problems = field(default_factory=Problems)
    broken_off: str = ''

    @property
    def n_good(self) -> int:
        """Records that can be trained on."""
        return self.n_with_image + self.n_text_only

    @property
    def n_records(self) -> int:
        """All records that were read."""
        return self.n_good + self.problems.total

    @property
    def flawless(self) -> bool:
        """Whether there are records, and nothing is wrong with any."""
        return self.n_good > 0 and not len(self.problems) and not self.broken_off

    @property
    def usable(self) -> bool:
        """Whether records are left to train on when those with problems are skipped."""
        return self.n_good > 0 and not self.broken_off

    def as_json(self) -> dict[str, Any]:
        """All of it, in JSON's types."""
        counts = self.tokens
        return {
            'data': str(self.data),
            'records': self.n_records,
            'good': self.n_good,
            'with_image': self.n_with_image,
            'text_only': self.n_text_only,
            'images': self.n_images,
            'answers': self.n_answers,
            'tokens': None
            if counts is None
            else {'total': counts.total, 'trained': counts.trained, 'longest': counts.longest, 'cut': counts.n_cut},
            'problems': [
                {'kind': problem.kind, 'count': problem.count, 'examples': [str(one) for one in problem.examples]}
                for problem in self.problems
            ],
            'broken_off': self.broken_off,
        }


def check_dataset(
    data: Path,
    images: Path | None,
    *,
    form: Format = 'llava',
    tokenizer: Tokenizer | None = None,
    template: str = 'v1',
    max_tokens: int = 2048,
    system: str = '',
    spec: PreprocessSpec | None = None,
    on_progress: Callable[[float, float], None] | None = None,
) -> DatasetReport:
    """Read every record, and, as far as asked, every image and every token.

    :param form: of the file; those other than LLaVA's have no images.
    :param tokenizer: None: dialogues are not tokenised, so problems of lengths and masks stay unseen.
    :param spec: how images are preprocessed; each is read and preprocessed once. None: they only have to be there.
    :param on_progress: told how many records are done, and of how many.
    :raise DatasetMissingError: if the file or the folder is not there.
    :raise DatasetError: if the file is not LLaVA's, and no record of it can be used.
    :raise SettingsError: if there is no such template, or the tokenizer is not made for it.
    """
    report = DatasetReport(data, tokens=None if tokenizer is None else TokenCounts())
    records: list[Record] = []
    try:
        if form == 'llava':
            for record in iter_records(data, images, report.problems):
                records.append(record)  # one by one, to keep those before a mistake in the file
        else:
            read = read_dialogues(data, form, template, on_bad='skip')
            records, report.problems = list(read), read.problems
    except DatasetSyntaxError as error:
        report.broken_off = str(error)
    flaws: dict[Path, str] = {}
    used: set[Path] = set()
    for number, record in enumerate(records, start=1):
        try:
            if record.image is not None and spec is not None:
                _check_image(record.image, spec, flaws)
            if tokenizer is not None and report.tokens is not None:
                _count(record, report.tokens, tokenizer, template, max_tokens, system)
        except RecordError as error:
            report.problems.add(error.kind, Example(record.id, record.place, error.detail))
        else:
            report.n_answers += sum(turn.role == 'gpt' for turn in alternating(record.turns))
            if record.image is None:
                report.n_text_only += 1
            else:
                report.n_with_image += 1
                used.add(record.image)
        if on_progress is not None:
            on_progress(number, len(records))
    report.n_images = len(used)
    return report


def _check_image(path: Path, spec: PreprocessSpec, flaws: dict[Path, str]) -> None:
    """:raise RecordError: if an image cannot be read; ``flaws`` remembers what was found for each file."""
    if path not in flaws:
        try:
            preprocess(read_image(path), spec)
            flaws[path] = ''
        except BadImageError as error:
            flaws[path] = str(error)
    if flaws[path]:
        raise RecordError('broken image', flaws[path])


def _count(
    record: Record, counts: TokenCounts, tokenizer: Tokenizer, template: str, max_tokens: int, system: str
) -> None:
    """:raise RecordError: if nothing of the record would be trained on."""
    encoded = encode_dialogue(record.turns, template, tokenizer, max_tokens, system=system)
    if encoded.masked:
        raise RecordError(MASKED, encoded.masked)
    counts.total += len(encoded.input_ids)
    counts.trained += encoded.n_trained
    counts.longest = max(counts.longest, len(encoded.input_ids) + encoded.n_cut)
    counts.n_cut += encoded.n_cut > 0
