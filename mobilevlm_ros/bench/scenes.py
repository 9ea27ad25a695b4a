"""What is asked about: pictures of which no two are equal, so that each frame is new to every cache."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ['CHOICES', 'QUESTION', 'SECOND_QUESTION', 'YES_NO_QUESTIONS', 'scene']

QUESTION = 'What is in the picture?'
"""Of the paper's latency table for vision."""
SECOND_QUESTION = 'Where is the red cup now?'
"""For a frame that is known already."""
CHOICES = ('kitchen', 'office', 'street', 'corridor')
YES_NO_QUESTIONS = (
    'Is there a person?',
    'Is the door open?',
    'Is there a chair?',
    'Is the light on?',
    'Is the floor wet?',
    'Is there a cup?',
    'Is it a street?',
    'Is the table empty?',
)


def scene(index: int, height: int, width: int) -> NDArray[np.uint8]:
    """Blocks of colour with noise, uint8 ``[height, width, 3]``; equal numbers give equal pictures."""
    random = np.random.default_rng(index)
    rows, columns = -(-height // 40), -(-width // 40)
    blocks = random.integers(0, 256, (rows, columns, 3), np.uint8).repeat(40, axis=0).repeat(40, axis=1)
    picture: NDArray[np.uint8] = blocks[:height, :width] // 2 + random.integers(0, 128, (height, width, 3), np.uint8)
    return picture
