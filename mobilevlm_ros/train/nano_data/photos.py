"""Real photos of web templates, labelled by hand: what is clearly there, its colour and side, what may be there.

The labels are in ``models/nano/training_photos.txt``, which says how to read and mend them. Not every thing is listed,
so nothing is counted. Pictures of one shoot are held out together.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageEnhance

from mobilevlm_ros.errors import DatasetError
from mobilevlm_ros.paths import shared_file
from mobilevlm_ros.train.nano_data.scenes import Thing
from mobilevlm_ros.train.nano_data.words import COLOURS

__all__ = ['Photo', 'load_photos', 'photo_view']

_SIDE = 512
_X = {'l': 0.2, 'm': 0.5, 'r': 0.8, '': 0.4}
_CROPPED = 0.04
_HELD_OUT_EVERY = 7
_N_FIELDS = 4


@dataclass(frozen=True)
class Photo:
    """A photo and what is known of it.

    :ivar source: its package and place in it.
    """

    path: Path
    source: str
    things: tuple[Thing, ...]
    unsure: tuple[str, ...]
    place: str
    held_out: bool


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
        path = folders[package] / f'{name}.jpg'
        if not path.is_file():
            raise DatasetError(f'{path} is missing: delete {folders[package]} and run again')
        things = tuple(_things(listed))
        words = tuple(word.replace('_', ' ') for word in unsure.split())
        photos.append(Photo(path, f'{package}/{name}', things, words, place, (package, _shoot(name)) in apart))
    return photos


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


def _things(listed: str) -> Iterator[Thing]:
    for entry in filter(None, (part.strip() for part in listed.split(','))):
        rest, _, side = entry.partition('@')
        noun, _, colour = rest.partition(':')
        if side not in _X or (colour and colour not in COLOURS):
            raise DatasetError(f'the label {entry!r} has an unknown colour or side (l, m, r)')
        yield Thing(noun, colour or None, _X[side], 0.5, 0.0)


def photo_view(photo: Photo, rng: random.Random) -> tuple[Image.Image, list[Thing]]:
    """The photo as another camera would have taken it: mirrored or not, cut a little, in other light."""
    file = Image.open(photo.path)
    file.draft('RGB', (2 * _SIDE, 2 * _SIDE))
    image = file.convert('RGB')
    image.thumbnail((_SIDE, _SIDE), reducing_gap=2.0)
    left, top, right, bottom = (rng.uniform(0, _CROPPED) for _ in range(4))
    width, height = image.size
    image = image.crop(
        (round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height))
    )
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(0.75, 1.2))
    things = list(photo.things)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        things = [Thing(one.noun, one.colour, _mirrored(one.x), one.y, one.area) for one in things]
    return image, things


def _mirrored(x: float) -> float:
    """The other side; a thing whose side was not labelled stays on none."""
    return x if x == _X[''] else 1 - x
