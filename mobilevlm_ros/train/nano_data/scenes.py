"""Pictures with exact ground truth: cut-outs on photos, standing in rooms at their sizes, or on tables."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from mobilevlm_ros.train.nano_data.colours import tinted
from mobilevlm_ros.train.nano_data.cutouts import Cutout, Materials
from mobilevlm_ros.train.nano_data.words import HEIGHTS_M
from mobilevlm_ros.train.pixel_colours import COLOURS

__all__ = ['Scene', 'Thing', 'draw_scene']

_SIZES = ((480, 360), (480, 360), (480, 360), (400, 400), (512, 288))
_LEAST_SEEN = 0.6
_TRIES = 12


@dataclass(frozen=True)
class Thing:
    """One object in a picture.

    :ivar x: centre, as a share of the width. :ivar y: likewise of the height.
    :ivar area: share of the picture that it covers.
    """

    noun: str
    colour: str | None
    x: float
    y: float
    area: float


@dataclass(frozen=True)
class Scene:
    """A picture and all that is in it.

    :ivar place: what kind of scene it is, for questions; empty: not asked about.
    :ivar regions: uint8 ``[height, width]``, which pixel shows what: i + 1 for ``things[i]``, 0 for none of them.
    """

    image: Image.Image
    things: list[Thing]
    place: str
    regions: NDArray[np.uint8]


def draw_scene(materials: Materials, rng: random.Random) -> Scene:
    """One picture; the same for the same materials and state of ``rng``."""
    size = rng.choice(_SIZES)
    roll = rng.random()
    if roll < 0.33:
        canvas, placed, place = _room(materials, size, rng)
    elif roll < 0.5:
        canvas, placed, place = _table(materials, size, rng)
    else:
        canvas, placed, place = _anywhere(materials, size, rng)
    picture, things, regions = _paste(canvas, placed, rng)
    return Scene(_camera(picture, rng), things, place, regions)


Placed = list[tuple[Cutout, tuple[int, int], tuple[int, int]]]
"""Cut-out, its size in pixels, and its upper left corner."""


def _pick(materials: Materials, nouns: list[str], rng: random.Random) -> Cutout:
    return rng.choice(materials.by_noun[rng.choice(nouns)])


def _room(materials: Materials, size: tuple[int, int], rng: random.Random) -> tuple[Image.Image, Placed, str]:
    """A wall and a floor, and what stands on it at its size."""
    width, height = size
    horizon = int(height * rng.uniform(0.45, 0.68))
    canvas = _flat(size, rng)
    canvas.paste(_floor(materials, (width, height - horizon), rng), (0, horizon))
    pixels_a_metre = height * rng.uniform(0.3, 0.62)
    nouns = [noun for noun in materials.by_noun if noun in HEIGHTS_M]
    placed: Placed = []
    n = rng.choice((1, 2, 2, 3, 3, 4))
    chosen = [_pick(materials, nouns, rng) for _ in range(n)] if nouns else []
    if chosen and rng.random() < 0.3:  # several of a kind, to be counted
        chosen = [rng.choice(materials.by_noun[chosen[0].noun]) for _ in range(rng.randint(2, 4))]
    feet = sorted(rng.uniform(0.15, 0.95) for _ in chosen)  # farther things first
    for cutout, depth in zip(chosen, feet, strict=True):
        tall = HEIGHTS_M[cutout.noun] * pixels_a_metre * (0.7 + 0.6 * depth)
        shape = _shape(cutout, tall, (width * 0.7, height * 0.85))
        y = int(horizon + depth * (height - horizon)) - shape[1]
        placed.append((cutout, shape, (_free_x(shape, placed, width, rng), max(-shape[1] // 8, y))))
    outdoors = {'car', 'truck', 'bus', 'tree', 'horse', 'cow', 'sheep', 'goat', 'traffic cone', 'fire hydrant'}
    indoors = {'sofa', 'bed', 'armchair', 'wardrobe', 'bookcase', 'stove', 'refrigerator', 'desk', 'bathtub', 'toilet'}
    found = {cutout.noun for cutout in chosen}
    return canvas, placed, 'room' if found & indoors and not found & outdoors else ''


def _table(materials: Materials, size: tuple[int, int], rng: random.Random) -> tuple[Image.Image, Placed, str]:
    """A table seen from above its edge, and small things on it."""
    width, height = size
    edge = int(height * rng.uniform(0.25, 0.5))
    canvas = _photo(materials, size, rng).filter(ImageFilter.GaussianBlur(rng.uniform(2, 6)))
    if rng.random() < 0.5:
        canvas = _flat(size, rng)
    canvas.paste(_planks((width, height - edge), rng), (0, edge))
    nouns = [noun for noun in materials.by_noun if noun not in HEIGHTS_M]
    chosen = [_pick(materials, nouns, rng) for _ in range(rng.choice((1, 2, 2, 3, 3, 4)))] if nouns else []
    if chosen and rng.random() < 0.3:
        chosen = [rng.choice(materials.by_noun[chosen[0].noun]) for _ in range(rng.randint(2, 4))]
    placed: Placed = []
    for cutout, depth in zip(chosen, sorted(rng.uniform(0.1, 0.95) for _ in chosen), strict=True):
        tall = height * rng.uniform(0.2, 0.42) * (0.8 + 0.4 * depth)
        shape = _shape(cutout, tall, (width * 0.45, height * 0.6))
        y = int(edge + depth * (height - edge)) - shape[1]
        placed.append((cutout, shape, (_free_x(shape, placed, width, rng), max(0, y))))
    return canvas, placed, ''


def _anywhere(materials: Materials, size: tuple[int, int], rng: random.Random) -> tuple[Image.Image, Placed, str]:
    """On a photo or a plain ground, of any size and at any place."""
    width, height = size
    canvas = _photo(materials, size, rng) if rng.random() < 0.7 else _flat(size, rng)
    n = rng.choice((0, *(1,) * 7, *(2,) * 6, 3, 3, 4, 4))
    common = [noun for noun in materials.by_noun if noun in HEIGHTS_M]
    every = list(materials.by_noun)
    chosen = [_pick(materials, common if common and rng.random() < 0.45 else every, rng) for _ in range(n)]
    if n > 1 and rng.random() < 0.35:
        chosen = [rng.choice(materials.by_noun[chosen[0].noun]) for _ in range(n)]
    placed: Placed = []
    for cutout in chosen:
        share = rng.uniform(0.4, 0.95) if n == 1 else rng.uniform(0.3, 0.6)
        shape = _shape(cutout, height * share, (width * (0.9 if n == 1 else 0.5), height * 0.95))
        y = int(rng.uniform(0, max(1, height - shape[1])))
        placed.append((cutout, shape, (_free_x(shape, placed, width, rng), y)))
    return canvas, placed, ''


def _shape(cutout: Cutout, tall: float, most: tuple[float, float]) -> tuple[int, int]:
    width, height = cutout.image.size
    factor = min(tall / height, most[0] / width, most[1] / height)
    return max(14, int(width * factor)), max(14, int(height * factor))


def _free_x(shape: tuple[int, int], placed: Placed, width: int, rng: random.Random) -> int:
    """A place with little overlap, if there is one."""
    best, least = 0, float('inf')
    for _ in range(_TRIES):
        x = int(rng.uniform(0, max(1, width - shape[0])))
        overlap = sum(max(0, min(x + shape[0], at[0] + s[0]) - max(x, at[0])) for _, s, at in placed)
        if overlap < least:
            best, least = x, overlap
    return best


def _paste(
    canvas: Image.Image, placed: Placed, rng: random.Random
) -> tuple[Image.Image, list[Thing], NDArray[np.uint8]]:
    """The picture, what of the things can be seen, and where; one that would be mostly hidden is not drawn."""
    width, height = canvas.size
    drawn: list[tuple[Thing, NDArray[np.bool_], int]] = []
    for cutout, shape, corner in placed:
        image, colour = cutout.image, cutout.colour
        if cutout.tintable and rng.random() < 0.35:
            colour = rng.choice(COLOURS)
            image = tinted(image, colour, rng)
        if rng.random() < 0.5 and 'sign' not in cutout.noun:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = image.resize(shape, Image.Resampling.BICUBIC)
        if cutout.noun not in HEIGHTS_M and rng.random() < 0.3:
            image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
        layer = Image.new('L', canvas.size, 0)
        layer.paste(image.getchannel('A'), corner)
        mask = np.asarray(layer) > 100
        if not mask.any() or any((other & ~mask).sum() < _LEAST_SEEN * whole for _, other, whole in drawn):
            continue
        if rng.random() < 0.6:
            _shadow(canvas, image, corner, rng)
        canvas.paste(image, corner, image)
        drawn = [(thing, other & ~mask, whole) for thing, other, whole in drawn]
        ys, xs = np.nonzero(mask)
        thing = Thing(
            cutout.noun,
            colour,
            float(xs.min() + xs.max()) / 2 / width,
            float(ys.min() + ys.max()) / 2 / height,
            float(mask.mean()),
        )
        drawn.append((thing, mask, int(mask.sum())))
    regions = np.zeros((height, width), np.uint8)
    for number, (_, mask, _) in enumerate(drawn, start=1):
        regions[mask] = number
    return canvas, [thing for thing, _, _ in drawn], regions


def _shadow(canvas: Image.Image, image: Image.Image, corner: tuple[int, int], rng: random.Random) -> None:
    """A soft dark ellipse where it stands."""
    width, height = image.size
    deep = max(4, int(height * rng.uniform(0.06, 0.12)))
    ys, xs = np.mgrid[0:deep, 0:width]
    distance = ((xs - width / 2) / (width / 2)) ** 2 + ((ys - deep / 2) / (deep / 2)) ** 2
    mask = Image.fromarray((np.clip(1 - distance, 0, 1) * rng.uniform(60, 130)).astype(np.uint8))
    canvas.paste((15, 15, 18), (corner[0], corner[1] + height - deep // 2), mask)


def _photo(materials: Materials, size: tuple[int, int], rng: random.Random) -> Image.Image:
    """A piece of a background."""
    image = rng.choice(materials.backgrounds)
    share = rng.uniform(0.4, 1.0)
    width = min(image.width * share, image.height * share * size[0] / size[1])
    height = width * size[1] / size[0]
    x, y = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    piece = image.resize(size, Image.Resampling.BILINEAR, (x, y, x + width, y + height))
    return piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else piece


def _tone(low: float, high: float, rng: random.Random) -> tuple[int, int, int]:
    """Mostly a gray with a hint of colour, sometimes a colour."""
    level, spread = rng.uniform(low, high), 14 if rng.random() < 0.65 else 60
    red, green, blue = (int(min(255, max(0, level + rng.uniform(-spread, spread)))) for _ in range(3))
    return red, green, blue


def _flat(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """A wall: one tone, light from one side, some grain."""
    width, height = size
    pixels = np.empty((height, width, 3), np.float32)
    pixels[:] = _tone(70, 240, rng)
    pixels *= np.linspace(rng.uniform(0.75, 1.1), rng.uniform(0.75, 1.1), width)[None, :, None]
    grain = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(0, 7), (height, width, 1))
    return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))


def _planks(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Wood, stone or a cloth: stripes of slightly different tone."""
    width, height = size
    base = np.array((rng.uniform(90, 200), 0, 0)) if rng.random() < 0.6 else None
    tone = np.array(_tone(60, 225, rng), np.float32)
    if base is not None:  # wood
        tone = np.array((base[0], base[0] * rng.uniform(0.68, 0.82), base[0] * rng.uniform(0.42, 0.62)), np.float32)
    generator = np.random.default_rng(rng.getrandbits(32))
    n = rng.choice((1, 4, 6, 9))
    rows = np.repeat(generator.normal(1, 0.05, n), -(-height // n))[:height]
    fibre = np.repeat(generator.normal(0, 5, (height, max(1, width // 24 + 1))), 24, axis=1)[:, :width]
    pixels = tone * rows[:, None, None] + fibre[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.8))


def _floor(materials: Materials, size: tuple[int, int], rng: random.Random) -> Image.Image:
    if rng.random() < 0.6:
        return _planks(size, rng)
    texture = _photo(materials, size, rng).filter(ImageFilter.GaussianBlur(1.5))
    return Image.blend(texture, Image.new('RGB', size, _tone(50, 190, rng)), rng.uniform(0.4, 0.8))


def _camera(image: Image.Image, rng: random.Random) -> Image.Image:
    """Light, a soft lens, noise, and a poor JPEG, each sometimes."""
    pixels = np.asarray(image).astype(np.float32)
    if rng.random() < 0.6:
        pixels = pixels * rng.uniform(0.65, 1.2) + rng.uniform(-12, 12)
    if rng.random() < 0.3:
        pixels += np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 9), pixels.shape)
    out = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if rng.random() < 0.3:
        out = out.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.4)))
    if rng.random() < 0.25:
        buffer = io.BytesIO()
        out.save(buffer, 'JPEG', quality=rng.randint(30, 80))
        out = Image.open(buffer).convert('RGB')
    return out
