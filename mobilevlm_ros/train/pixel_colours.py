"""Names for the colours of pixels: the eleven basic colour terms (Berlin and Kay, 1969), by hue and lightness."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ['COLOURS', 'UNNAMED', 'clear_colour', 'colour_indices']

COLOURS = ('red', 'orange', 'yellow', 'green', 'blue', 'purple', 'pink', 'brown', 'black', 'white', 'gray')
UNNAMED = len(COLOURS)
"""The index of beige, which people call by many names."""
# Hue from, to (degrees), name; brown, pink, and the colours without hue are decided by saturation and value below.
_HUES = (
    (0, 14, 'red'), (14, 40, 'orange'), (40, 68, 'yellow'), (68, 165, 'green'),
    (165, 258, 'blue'), (258, 295, 'purple'), (295, 340, 'pink'), (340, 361, 'red'),
)  # fmt: skip
_SURE = 0.55


def colour_indices(rgb: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Index into ``COLOURS`` of each pixel, uint8 ``[n, 3]``; or ``UNNAMED``."""
    hsv = cv2.cvtColor(np.ascontiguousarray(rgb).reshape(1, -1, 3), cv2.COLOR_RGB2HSV)[0].astype(int)
    hue, saturation, value = hsv[:, 0] * 2, hsv[:, 1], hsv[:, 2]
    found = np.full(len(rgb), COLOURS.index('gray'))
    for low, high, name in _HUES:
        found[(hue >= low) & (hue < high)] = COLOURS.index(name)
    found[(hue >= 8) & (hue < 45) & (value < 165)] = COLOURS.index('brown')
    found[(hue >= 14) & (hue < 50) & (value >= 165) & (saturation < 120)] = UNNAMED
    found[((hue < 14) | (hue >= 340)) & (saturation < 110) & (value > 180)] = COLOURS.index('pink')
    pale = (saturation < 38) | (value < 45)
    found[pale & (value >= 60) & (value < 195)] = COLOURS.index('gray')
    found[pale & (value >= 195)] = COLOURS.index('white')
    found[value < 60] = COLOURS.index('black')
    return found


def clear_colour(rgb: NDArray[np.uint8], fewest: int) -> str | None:
    """The colour of most of the pixels, uint8 ``[n, 3]``; None: there is none, or there are fewer than ``fewest``."""
    if len(rgb) < fewest:
        return None
    counts = np.bincount(colour_indices(rgb), minlength=UNNAMED + 1)
    best = int(counts.argmax())
    return COLOURS[best] if best != UNNAMED and counts[best] > _SURE * len(rgb) else None
