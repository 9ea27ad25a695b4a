"""Real photos of web templates, labelled by hand: what is clearly there, its colour and box, what may be there.

The labels are in ``models/nano/training_photos.txt``, which says how to read and mend them. Not every thing is listed,
so nothing is counted, and what lies in no box is unknown. Pictures of one shoot are held out together.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance

from mobilevlm_ros.errors import DatasetError
from mobilevlm_ros.paths import shared_file
from mobilevlm_ros.train.nano_data.scenes import Thing
from mobilevlm_ros.train.pixel_colours import COLOURS
from mobilevlm_ros.train.regions import UNKNOWN

__all__ = ['Labelled', 'Photo', 'View', 'load_photos', 'photo_view']

_SIDE = 512
_LEAST_CUT = 0.6
"""The smallest share of a photo's sides that a view of it has."""
_LEAST_SEEN = 0.65
"""Share of a thing's box that has to be in a view for the thing to be said to be there."""
_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp')
_BOX = re.compile(r'(\d)(\d)(\d)(\d)')
_HELD_OUT_EVERY = 7
_N_FIELDS = 4


Box = tuple[float, float, float, float]
"""Left, top, right and bottom, as shares of width and height."""


@dataclass(frozen=True)
class Labelled:
    """A thing in a photo."""

    noun: str
    colour: str | None
    box: Box


@dataclass(frozen=True)
class Photo:
    """A photo and what is known of it.

    :ivar source: its package and place in it.
    """

    path: Path
    source: str
    things: tuple[Labelled, ...]
    unsure: tuple[str, ...]
    place: str
    held_out: bool


@dataclass(frozen=True)
class View:
    """A photo as another camera would have taken it.

    :ivar unsure: nouns that may be there; those of things that are cut off among them.
    :ivar regions: as in ``Scene``; ``UNKNOWN`` outside the ellipses that the boxes of the things hold.
    """

    image: Image.Image
    things: list[Thing]
    unsure: tuple[str, ...]
    regions: NDArray[np.uint8]


def load_photos(folders: Mapping[str, Path], labels: Path | None = None) -> list[Photo]:
    """The labelled photos.

    :param folders: where each package of the labels lies.
    :param labels: None: those of this project.
    :raise DatasetError: if a photo is missing, or a line of the labels is malformed.
    """
    labels = labels or shared_file('models/nano/training_photos.txt')
    lines = list(_lines(labels))
    shoots = sorted({(package, _shoot(fields[0])) for package, fields in lines})
    apart = set(shoots[_HELD_OUT_EVERY // 2 :: _HELD_OUT_EVERY])
    photos = []
    for package, (name, listed, unsure, place) in lines:
        if package not in folders:
            raise DatasetError(f'{labels} has the section [{package}], which is none of {", ".join(folders)}')
        path = _file(folders[package], name)
        things = tuple(_things(listed))
        words = tuple(word.replace('_', ' ') for word in unsure.split())
        photos.append(Photo(path, f'{package}/{name}', things, words, place, (package, _shoot(name)) in apart))
    return photos


def _file(folder: Path, name: str) -> Path:
    for suffix in _SUFFIXES:
        path = folder / f'{name}{suffix}'
        if path.is_file():
            return path
    raise DatasetError(f'{folder / name}.jpg is missing: delete {folder} and run again')


def _lines(labels: Path) -> Iterator[tuple[str, list[str]]]:
    """The package and the fields of every line."""
    package = ''
    for line in labels.read_text(encoding='utf-8').splitlines():
        if not line or line.startswith('#'):
            continue
        if line.startswith('['):
            package = line.strip('[] ')
            continue
        fields = [field.strip() for field in line.split('|')]
        if len(fields) != _N_FIELDS:
            raise DatasetError(f'{labels} has the line {line!r}, expected file | things | unsure | place')
        yield package, fields


def _shoot(name: str) -> str:
    """Name of the pictures that were taken together."""
    return re.sub(r'-?\d*$', '', name)


def _things(listed: str) -> Iterator[Labelled]:
    for entry in filter(None, (part.strip() for part in listed.split(','))):
        rest, _, digits = entry.partition('@')
        noun, _, colour = rest.partition(':')
        found = _BOX.fullmatch(digits)
        left, top, right, bottom = (int(digit) for digit in found.groups()) if found else (1, 1, 0, 0)
        if left > right or top > bottom or (colour and colour not in COLOURS):
            raise DatasetError(
                f'the label {entry!r} has an unknown colour, or no box (first and last tenth, such as @2468)'
            )
        box = (left / 10, top / 10, (right + 1) / 10, (bottom + 1) / 10)
        yield Labelled(noun.replace('_', ' '), colour or None, box)


def photo_view(photo: Photo, rng: random.Random) -> View:
    """A piece of the photo, mirrored or not, in other light."""
    file = Image.open(photo.path)
    file.draft('RGB', (2 * _SIDE, 2 * _SIDE))
    image = file.convert('RGB')
    image.thumbnail((_SIDE, _SIDE), reducing_gap=2.0)
    share = rng.uniform(_LEAST_CUT, 1.0) if rng.random() < 0.6 else 1.0
    left, top = rng.uniform(0, 1 - share), rng.uniform(0, 1 - share)
    cut = (left, top, left + share, top + share)
    width, height = image.size
    image = image.crop((round(cut[0] * width), round(cut[1] * height), round(cut[2] * width), round(cut[3] * height)))
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(0.75, 1.2))
    mirrored = rng.random() < 0.5
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    things, boxes, unsure = [], [], list(photo.unsure)
    for one in photo.things:
        box, seen = _inside(one.box, cut)
        if seen < _LEAST_SEEN:
            unsure.append(one.noun)
            continue
        if mirrored:
            box = (1 - box[2], box[1], 1 - box[0], box[3])
        boxes.append(box)
        area = (box[2] - box[0]) * (box[3] - box[1])
        things.append(Thing(one.noun, one.colour, (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, area))
    return View(image, things, tuple(unsure), _regions(boxes, image.size))


def _inside(box: Box, cut: Box) -> tuple[Box, float]:
    """The part of a box that lies in a cut, in shares of the cut; and how much of the box that is."""
    left, top = max(box[0], cut[0]), max(box[1], cut[1])
    right, bottom = min(box[2], cut[2]), min(box[3], cut[3])
    seen = max(0.0, right - left) * max(0.0, bottom - top) / ((box[2] - box[0]) * (box[3] - box[1]))
    side = cut[2] - cut[0]
    found = ((left - cut[0]) / side, (top - cut[1]) / side, (right - cut[0]) / side, (bottom - cut[1]) / side)
    return found, seen


def _regions(boxes: Sequence[Box], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Ellipses, the smaller before the larger."""
    canvas = Image.new('L', size, UNKNOWN)
    draw = ImageDraw.Draw(canvas)
    numbered = sorted(enumerate(boxes, start=1), key=lambda one: -(one[1][2] - one[1][0]) * (one[1][3] - one[1][1]))
    for number, (left, top, right, bottom) in numbered:
        draw.ellipse((left * size[0], top * size[1], right * size[0], bottom * size[1]), fill=number)
    return np.asarray(canvas)
