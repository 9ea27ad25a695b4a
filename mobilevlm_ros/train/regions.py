"""Which part of a picture shows what: small maps, and what they say of each visual token.

A map is a gray PNG in the proportions of its picture: 0 where nothing is that has a name, ``i`` on the ``i``-th thing
of the picture (from 1), 255 where it is not known. ``regions.json`` lists the pictures: ``[{"id", "image", "regions",
"things": [[noun, colour or null], ...], "place": noun or ""}, ...]``; paths are relative to the folders of each. A
colour is one of ``COLOURS``; for another word, and where none is told, the pixels say it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from mobilevlm_ros.errors import BadImageError, DatasetError, DatasetMissingError
from mobilevlm_ros.runtime.images import read_image
from mobilevlm_ros.train.pixel_colours import COLOURS, UNNAMED, colour_indices

__all__ = ['UNKNOWN', 'Cells', 'Grounded', 'cells_of', 'read_grounded', 'save_map']

UNKNOWN = 255
_SIDE = 96
_PIXELS_A_CELL = 8
_MOST_PIXELS = 1 << 22


@dataclass(frozen=True)
class Grounded:
    """A picture whose things are known, with their places.

    :ivar regions: file of the map.
    :ivar things: noun and colour of each, in the numbers of the map less one.
    :ivar place: what kind of place the picture was taken at; empty: not known.
    """

    id: str
    image: Path
    regions: Path
    things: tuple[tuple[str, str | None], ...]
    place: str


@dataclass(frozen=True)
class Cells:
    """What each cell of a square grid over the model's picture shows.

    :ivar shares: float32 ``[n_things, grid * grid]``, how much of the cell each thing covers.
    :ivar unknown: float32 ``[grid * grid]``, how much of it may show anything.
    :ivar colours: float32 ``[grid * grid, len(COLOURS)]``, how much of it is of each colour: where a thing's colour is
        told, that one, else as its pixels are.
    """

    shares: NDArray[np.float32]
    unknown: NDArray[np.float32]
    colours: NDArray[np.float32]


class _Entry(BaseModel):
    model_config = ConfigDict(extra='ignore', strict=True)
    id: str
    image: str
    regions: str
    things: list[tuple[str, str | None]]
    place: str = ''


def save_map(regions: NDArray[np.uint8], path: Path) -> None:
    """Write a map ``[height, width]``, made smaller."""
    height, width = regions.shape
    factor = min(1.0, _SIDE / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    Image.fromarray(regions).resize(size, Image.Resampling.NEAREST).save(path, 'PNG')


def read_grounded(path: Path, images: Path) -> list[Grounded]:
    """The pictures of a ``regions.json``, whose maps lie in ``regions/`` beside it.

    :param images: folder of the pictures.
    :raise DatasetMissingError: if there is no such file.
    :raise DatasetError: if it is malformed, empty, or names a file outside its folder.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        entries = TypeAdapter(list[_Entry]).validate_python(content, strict=False)
    except FileNotFoundError as error:
        raise DatasetMissingError(f'there is no file {path}: `mobilevlm train nano-data` writes one') from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = '.'.join(str(part) for part in first['loc'])
        raise DatasetError(f'{path} is no list of pictures and their regions: {place}: {first["msg"]}') from error
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f'{path} cannot be read: {error}') from error
    if not entries:
        raise DatasetError(f'{path} lists no picture')
    found = []
    for one in entries:
        if any(Path(name).is_absolute() or '..' in Path(name).parts for name in (one.image, one.regions)):
            raise DatasetError(f'{path}: picture {one.id!r:.60} names a file outside its folder')
        maps = path.parent / 'regions'
        found.append(Grounded(one.id, images / one.image, maps / one.regions, tuple(one.things), one.place))
    return found


def cells_of(picture: Grounded, grid: int, aspect: Literal['pad', 'square']) -> Cells:
    """What the map says of a grid over what the model sees.

    :param grid: cells a side.
    :param aspect: as in ``PreprocessSpec``: whether the picture is padded to a square, or cut to one.
    :raise BadImageError: if the map cannot be read, or shows a thing that is not listed.
    """
    try:
        with Image.open(picture.regions) as file:
            if file.width * file.height > _MOST_PIXELS:
                raise BadImageError(f'{picture.regions} has {file.width}x{file.height} pixels: it is no map of regions')
            regions = np.asarray(file.convert('L'))
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise BadImageError(f'{picture.regions} cannot be read: {error}') from error
    n_things = len(picture.things)
    strange = set(np.unique(regions).tolist()) - {0, UNKNOWN, *range(1, n_things + 1)}
    if strange:
        raise BadImageError(f'{picture.regions} shows thing {min(strange)}, but {picture.id} has {n_things}')
    side = grid * _PIXELS_A_CELL
    square = Image.fromarray(_square(regions, aspect)).resize((side, side), Image.Resampling.NEAREST)
    cells = _by_cell(np.asarray(square), grid)
    shares = [(cells == number).mean(1, dtype=np.float32) for number in range(1, n_things + 1)]
    colours = _by_cell(_pixel_colours(picture.image, side, aspect), grid)
    for number, (_, colour) in enumerate(picture.things, start=1):
        if colour in COLOURS:
            colours[cells == number] = COLOURS.index(colour)
    return Cells(
        np.stack(shares) if shares else np.zeros((0, grid * grid), np.float32),
        (cells == UNKNOWN).mean(1, dtype=np.float32),
        np.stack([(colours == index).mean(1, dtype=np.float32) for index in range(len(COLOURS))], 1),
    )


def _pixel_colours(image: Path, side: int, aspect: Literal['pad', 'square']) -> NDArray[np.int64]:
    """``[side, side]``, index into ``COLOURS`` of what the model sees; ``UNNAMED``: of none, or padding."""
    rgb = read_image(image)
    small = Image.fromarray(_square(rgb, aspect)).resize((side, side), Image.Resampling.BOX)
    inside = _square(np.ones(rgb.shape[:2], np.uint8), aspect)
    found = colour_indices(np.asarray(small).reshape(-1, 3)).reshape(side, side)
    kept = Image.fromarray(inside).resize((side, side), Image.Resampling.NEAREST)
    return np.where(np.asarray(kept) > 0, found, UNNAMED)


def _by_cell(fine: NDArray[Any], grid: int) -> NDArray[Any]:
    """``[side, side]`` to ``[grid * grid, pixels]``."""
    return fine.reshape(grid, fine.shape[0] // grid, grid, -1).swapaxes(1, 2).reshape(grid * grid, -1)


def _square(regions: NDArray[np.uint8], aspect: Literal['pad', 'square']) -> NDArray[np.uint8]:
    """The middle, or all with nothing around it: as the picture is prepared."""
    height, width = regions.shape[:2]
    if aspect == 'square':
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return regions[top : top + side, left : left + side]
    side = max(height, width)
    padded = np.zeros((side, side, *regions.shape[2:]), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    padded[top : top + height, left : left + width] = regions
    return padded
