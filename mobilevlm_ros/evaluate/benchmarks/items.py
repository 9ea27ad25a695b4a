"""What the benchmarks have in common: a question about an image, an answer to it, and how both are scored."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevlm_ros.errors import BadImageError, BenchmarkError
from mobilevlm_ros.evaluate.benchmarks.files import read_lines
from mobilevlm_ros.runtime.preprocess import MAX_SIDE, Aspect

__all__ = [
    'LETTER_SUFFIX',
    'LONG_ANSWER',
    'SHORT_ANSWER',
    'SHORT_SUFFIX',
    'Base64Image',
    'Benchmark',
    'FileImage',
    'Given',
    'Item',
    'Scores',
    'latest',
    'read_answers',
]

SHORT_SUFFIX = 'Answer the question using a single word or phrase.'
LETTER_SUFFIX = "Answer with the option's letter from the given choices directly."
SHORT_ANSWER = 128
"""Longest answer in tokens where the published script has this limit (model_vqa_loader.py)."""
LONG_ANSWER = 1024
"""The same of model_vqa_science.py and model_vqa_mmbench.py."""
MAX_IMAGE_BYTES = 1 << 26
_FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP')


@dataclass(frozen=True, slots=True)
class FileImage:
    """An image in a file of its own."""

    path: Path

    def read(self) -> NDArray[np.uint8]:
        """RGB pixels, uint8 ``[height, width, 3]``.

        :raise BadImageError: if it cannot be read.
        """
        try:
            size = self.path.stat().st_size
            if size > MAX_IMAGE_BYTES:
                raise BadImageError(f'the file has {size} bytes; at most {MAX_IMAGE_BYTES} are read')
            return _decode(self.path.read_bytes())
        except OSError as error:
            raise BadImageError(f'{self.path} cannot be read: {error.strerror}') from error
        except BadImageError as error:
            raise BadImageError(f'{self.path}: {error}') from error


@dataclass(frozen=True, slots=True)
class Base64Image:
    """An image in a cell of a table.

    :ivar place: of the cell, for errors.
    """

    text: str
    place: str = field(compare=False)

    def read(self) -> NDArray[np.uint8]:
        """RGB pixels, uint8 ``[height, width, 3]``.

        :raise BadImageError: if it cannot be read.
        """
        try:
            return _decode(base64.b64decode(self.text))
        except (binascii.Error, ValueError) as error:  # ValueError: letters that are not ASCII
            raise BadImageError(f'{self.place}: the image is no base64: {error}') from error
        except BadImageError as error:
            raise BadImageError(f'{self.place}: {error}') from error


def _decode(data: bytes) -> NDArray[np.uint8]:
    """As the published scripts decode: unlike a robot's images not turned upright by their EXIF data."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if max(image.size) > MAX_SIDE:
                raise BadImageError(f'an image of {image.width}x{image.height}; at most {MAX_SIDE} pixels a side')
            return np.array(image.convert('RGB'))
    except BadImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many classes on damaged data; all of them mean the same here
        raise BadImageError(f'{len(data)} bytes are no readable image: {error}') from error


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    :ivar number: its place in the benchmark, from 0; unlike ``question_id`` never there twice.
    :ivar text: what is asked, with the suffix that says how to answer.
    :ivar prompt: what the published script notes as the prompt; scorers read it.
    :ivar max_tokens: longest answer.
    :ivar extra: what else the published script notes.
    """

    number: int
    question_id: int | str
    image: FileImage | Base64Image
    text: str
    prompt: str
    max_tokens: int
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Given:
    """One answer, as the published scripts note it."""

    question_id: int | str
    prompt: str
    text: str


@dataclass(frozen=True)
class Scores:
    """What a benchmark's rules make of answers.

    :ivar figures: by name, the one that papers print first.
    :ivar n_questions: how many questions count.
    :ivar notes: what must be known beside the figures.
    """

    figures: dict[str, float]
    n_questions: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark is read, asked, scored and handed in.

    :ivar name: of the command.
    :ivar unit: of the first figure.
    :ivar aspect: how the published script makes images square, where it differs from the model's own way.
    :ivar items: the questions of a folder, in their order, checked; images are not read yet.
    :ivar score: of the answers in a folder's terms; ``partial``: questions without an answer are left out, where else
        the published rule for them holds.
    :ivar submit: writes answers to a folder in the benchmark's own format, and names the files.
    """

    name: str
    title: str
    unit: str
    items: Callable[[Path], Iterator[Item]]
    score: Callable[[Path, Sequence[Given], bool], Scores]
    submit: Callable[[Path, Sequence[Given], Path], list[Path]]
    aspect: Aspect | None = None


def read_answers(path: Path) -> Iterator[Given]:
    """The answers of a file as the published scripts write it.

    :raise BenchmarkError: if it cannot be read, or a line is no answer.
    """
    for record in read_lines(path):
        yield Given(record.identity('question_id'), record.text('prompt'), record.text('text'))


def latest(answers: Iterable[Given]) -> dict[str, Given]:
    """Answers by question; the last one counts where there are several, as the published scorers have it.

    :raise BenchmarkError: if there is none.
    """
    by_question = {str(answer.question_id): answer for answer in answers}
    if not by_question:
        raise BenchmarkError('there are no answers to score')
    return by_question
