"""Names for the colours of pixels, and new colours for cut-outs, so that colour is not tied to the kind of object."""

from __future__ import annotations

import random

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevlm_ros.train.nano_data.words import COLOURS

__all__ = ['main_colour', 'tinted']

# Hue from, to (degrees), name; brown, pink, and the colours without hue are decided by saturation and value below.
_HUES = (
    (0, 14, 'red'), (14, 40, 'orange'), (40, 68, 'yellow'), (68, 165, 'green'),
    (165, 258, 'blue'), (258, 295, 'purple'), (295, 340, 'pink'), (340, 361, 'red'),
)  # fmt: skip
_TINTS = {
    'red': (205, 25, 25), 'orange': (240, 125, 15), 'yellow': (240, 215, 30), 'green': (35, 150, 50),
    'blue': (35, 80, 205), 'purple': (125, 40, 165), 'pink': (240, 130, 180), 'brown': (120, 72, 38),
    'black': (28, 28, 30), 'white': (240, 240, 240), 'gray': (128, 128, 128),
}  # fmt: skip
_SURE = 0.55
_UNNAMED = len(COLOURS)
"""The index of beige, which people call by many names."""
_FEWEST_PIXELS = 100


def main_colour(image: Image.Image) -> str | None:
    """The colour of most opaque pixels of an RGBA image; None: there is none, and it is not asked about."""
    pixels = np.asarray(image.resize((48, 48)))
    opaque = np.ascontiguousarray(pixels[pixels[..., 3] > 200][:, :3])
    if len(opaque) < _FEWEST_PIXELS:
        return None
    counts = np.bincount(_indices(opaque), minlength=_UNNAMED + 1)
    best = int(counts.argmax())
    return COLOURS[best] if best != _UNNAMED and counts[best] > _SURE * len(opaque) else None


def _indices(rgb: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Index into ``COLOURS`` of each pixel, uint8 ``[n, 3]``; or ``_UNNAMED``."""
    hsv = cv2.cvtColor(rgb.reshape(1, -1, 3), cv2.COLOR_RGB2HSV)[0].astype(int)
    hue, saturation, value = hsv[:, 0] * 2, hsv[:, 1], hsv[:, 2]
    found = np.full(len(rgb), COLOURS.index('gray'))
    for low, high, name in _HUES:
        found[(hue >= low) & (hue < high)] = COLOURS.index(name)
    found[(hue >= 8) & (hue < 45) & (value < 165)] = COLOURS.index('brown')
    found[(hue >= 14) & (hue < 50) & (value >= 165) & (saturation < 120)] = _UNNAMED
    found[((hue < 14) | (hue >= 340)) & (saturation < 110) & (value > 180)] = COLOURS.index('pink')
    pale = (saturation < 38) | (value < 45)
    found[pale & (value >= 60) & (value < 195)] = COLOURS.index('gray')
    found[pale & (value >= 195)] = COLOURS.index('white')
    found[value < 60] = COLOURS.index('black')
    return found


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
