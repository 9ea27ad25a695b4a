"""A picture of one answer: the frame that was asked about, with question and answer below it."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = ['draw_answer']

_WIDTH = 960
_MARGIN = 18
_BACKGROUND, _QUIET, _LOUD = (24, 26, 30), (160, 168, 180), (255, 255, 255)


def draw_answer(bgr_hwc: NDArray[np.uint8], question: str, answer: str, detail: str, path: Path) -> None:
    """Write a PNG.

    :param bgr_hwc: the frame, uint8 ``[height, width, 3]``, BGR.
    :param detail: a line in small print: camera, stamp, age, confidence.
    """
    frame = Image.fromarray(np.ascontiguousarray(bgr_hwc[:, :, ::-1]))
    frame = frame.resize((_WIDTH, round(frame.height * _WIDTH / frame.width)), Image.Resampling.BICUBIC)
    rows = _rows(question, 26, _QUIET, 68) + _rows(answer, 32, _LOUD, 54) + _rows(detail, 17, _QUIET, 104)
    height = sum(round(size * 1.35) for _, size, _ in rows) + 2 * _MARGIN
    sheet = Image.new('RGB', (_WIDTH, frame.height + height), _BACKGROUND)
    sheet.paste(frame)
    draw = ImageDraw.Draw(sheet)
    y = frame.height + _MARGIN
    for text, size, colour in rows:
        draw.text((_MARGIN, y), text, fill=colour, font=ImageFont.load_default(size))
        y += round(size * 1.35)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _rows(
    text: str, size: int, colour: tuple[int, int, int], width: int
) -> list[tuple[str, int, tuple[int, int, int]]]:
    return [(row, size, colour) for row in textwrap.wrap(text, width)[:6] or ['']]
