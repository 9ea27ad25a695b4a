"""The colour of a cut-out, and new ones, so that colour is not tied to the kind of object."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image

from mobilevlm_ros.train.pixel_colours import clear_colour

__all__ = ['main_colour', 'tinted']

_TINTS = {
    'red': (205, 25, 25), 'orange': (240, 125, 15), 'yellow': (240, 215, 30), 'green': (35, 150, 50),
    'blue': (35, 80, 205), 'purple': (125, 40, 165), 'pink': (240, 130, 180), 'brown': (120, 72, 38),
    'black': (28, 28, 30), 'white': (240, 240, 240), 'gray': (128, 128, 128),
}  # fmt: skip
_FEWEST_PIXELS = 100


def main_colour(image: Image.Image) -> str | None:
    """The colour of most opaque pixels of an RGBA image; None: there is none, and it is not asked about."""
    pixels = np.asarray(image.resize((48, 48)))
    return clear_colour(pixels[pixels[..., 3] > 200][:, :3], _FEWEST_PIXELS)


def tinted(image: Image.Image, colour: str, rng: random.Random) -> Image.Image:
    """The RGBA image in another colour, with its shading."""
    pixels = np.asarray(image).astype(np.float32)
    light = pixels[..., :3] @ np.array([0.3, 0.59, 0.11], np.float32)
    inside = pixels[..., 3] > 128
    usual = max(float(np.median(light[inside])) if inside.any() else 128.0, 40.0)
    base = np.array(_TINTS[colour], np.float32) * rng.uniform(0.85, 1.12)
    shade = np.clip(light / usual, 0.45, 1.6)[..., None] ** 0.8
    pixels[..., :3] = np.clip(base * shade, 0, 255)
    return Image.fromarray(pixels.astype(np.uint8), 'RGBA')
