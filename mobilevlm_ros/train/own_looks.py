"""Which of a camera's frames are worth labelling: simple measures, and a choice that is the same every time.

Left out are frames that are too dark or too bright, blurred ones, and those that look like one that is kept. Of what
remains, at most a given number is taken, evenly spread over it.

- brightness: the mean grey level, 0 to 255;
- blur: how much of the change between neighbouring pixels stays when the picture (at most 320 pixels) is blurred once
  more, along the worse of the two directions; 0 to 1. Photographs of the exam have 0.16 to 0.42, and 0.43 to 0.72 when
  they are smeared over 9 pixels, as by a turning robot (Crete et al. 2007, "The Blur Effect");
- change: both pictures in 16 x 16 cells, their mean brightness taken out; the largest difference of a cell, in grey
  levels. A door that opens in a corner of the picture changes its cells, the noise of the camera changes none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ['Limits', 'Look', 'Verdict', 'choose', 'look_at']

Verdict = Literal['kept', 'dark', 'bright', 'blurred', 'near-duplicate', 'more than asked for']

_SIDE = 320
_CELLS = 16
_SMEARED = 11
"""Pixels that the second blur goes over."""


@dataclass(frozen=True)
class Look:
    """What is measured of a frame.

    :ivar brightness: 0 to 255.
    :ivar blur: 0 to 1; a picture of one colour has 1.
    :ivar cells: colours, float32 ``[16, 16, 3]``, around a mean of 0.
    """

    brightness: float
    blur: float
    cells: NDArray[np.float32]


@dataclass(frozen=True)
class Limits:
    """What is left out; see the module.

    :ivar change: the least difference from every frame that is kept.
    """

    darkest: float = 20.0
    brightest: float = 245.0
    blur: float = 0.5
    change: float = 12.0


def look_at(rgb_hwc: NDArray[np.uint8]) -> Look:
    """Measure a frame, uint8 ``[height, width, 3]``."""
    height, width = rgb_hwc.shape[:2]
    scale = min(1.0, _SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(rgb_hwc, size, interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    cells = cv2.resize(small, (_CELLS, _CELLS), interpolation=cv2.INTER_AREA).astype(np.float32)
    return Look(float(grey.mean()), _blur(grey.astype(np.float32)), cells - cells.mean())


def _blur(grey: NDArray[np.float32]) -> float:
    worst = 0.0
    for axis, window in ((0, (1, _SMEARED)), (1, (_SMEARED, 1))):
        changes = np.abs(np.diff(grey, axis=axis))
        left = np.abs(np.diff(cv2.blur(grey, window), axis=axis))
        lost, total = float(np.maximum(0.0, changes - left).sum()), float(changes.sum())
        worst = max(worst, 1.0 - lost / total if total else 1.0)
    return worst


def choose(looks: Sequence[Look], n_most: int, limits: Limits | None = None) -> list[Verdict]:
    """What becomes of each frame.

    :param looks: in the order of recording.
    :param n_most: as many are kept at most.
    :return: for each frame whether it is kept, or why not; the first reason that holds.
    """
    limits = limits or Limits()
    verdicts: list[Verdict] = []
    kept: list[NDArray[np.float32]] = []
    for look in looks:
        if look.brightness < limits.darkest:
            verdicts.append('dark')
        elif look.brightness > limits.brightest:
            verdicts.append('bright')
        elif look.blur > limits.blur:
            verdicts.append('blurred')
        elif kept and _changes(look.cells, kept) < limits.change:
            verdicts.append('near-duplicate')
        else:
            verdicts.append('kept')
            kept.append(look.cells)
    places = [place for place, verdict in enumerate(verdicts) if verdict == 'kept']
    if len(places) > n_most:
        spread = {places[i] for i in np.linspace(0, len(places) - 1, n_most).round().astype(int)}
        for place in places:
            if place not in spread:
                verdicts[place] = 'more than asked for'
    return verdicts


def _changes(cells: NDArray[np.float32], kept: Sequence[NDArray[np.float32]]) -> float:
    """How much a frame differs from the most similar of those that are kept."""
    differences = np.abs(np.stack(kept) - cells).mean(axis=-1)
    return float(differences.max(axis=(1, 2)).min())
