"""RGB pixels to the vision tower's input, equal to the published preprocessing.

Source: mobilevlm/utils.py (expand2square) and the CLIP image processor of openai/clip-vit-large-patch14-336: pad to a
square with the mean colour, resize the shortest edge bicubically on uint8 (Pillow's resample 3), crop the centre,
scale to 0..1, normalise. Pillow does the resizing because its bicubic filter is the published one, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevlm_ros.errors import BadImageError

__all__ = ['CLIP_MEAN', 'CLIP_STD', 'Aspect', 'PreprocessSpec', 'preprocess']

Aspect = Literal['pad', 'square']
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MAX_SIDE = 16384
"""Longest side that is accepted, in pixels; padding a longer image to a square could exhaust the memory."""
MAX_SQUARE_RATIO = 64
"""Longest shape that is cropped: resizing the short side of a longer one could exhaust the memory, too."""

# The image processor scales in float64, then rounds.
_SCALED = (np.arange(256) * (1 / 255)).astype(np.float32)


@dataclass(frozen=True)
class PreprocessSpec:
    """How a model wants its images.

    :ivar image_size: side of the square input, in pixels.
    :ivar aspect: ``pad`` keeps the whole image; ``square`` crops the centre (the published stage-1 rule).
    """

    image_size: int
    aspect: Aspect = 'pad'
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    @property
    def pad_rgb(self) -> tuple[int, int, int]:
        """Colour of the padding: the mean, cut (not rounded) to integers; (122, 116, 104) for CLIP."""
        red, green, blue = (int(channel * 255) for channel in self.mean)
        return red, green, blue


def preprocess(rgb_hwc: NDArray[np.uint8], spec: PreprocessSpec) -> NDArray[np.float32]:
    """Make the input tensor of one image.

    :param rgb_hwc: uint8 ``[height, width, 3]``.
    :return: float32 ``[1, 3, image_size, image_size]``.
    :raise BadImageError: if the array is no RGB image.
    """
    if rgb_hwc.dtype != np.uint8 or rgb_hwc.ndim != 3 or rgb_hwc.shape[2] != 3 or 0 in rgb_hwc.shape:
        raise BadImageError(f'expected RGB pixels, uint8 [height, width, 3]; found {rgb_hwc.dtype} {rgb_hwc.shape}')
    if max(rgb_hwc.shape) > MAX_SIDE:
        raise BadImageError(f'expected at most {MAX_SIDE} pixels a side; found {rgb_hwc.shape[1]}x{rgb_hwc.shape[0]}')
    if spec.aspect == 'pad':
        rgb_hwc = _pad_to_square(rgb_hwc, spec.pad_rgb)
    elif max(rgb_hwc.shape[:2]) > MAX_SQUARE_RATIO * min(rgb_hwc.shape[:2]):
        raise BadImageError(
            f'cropping a square out of {rgb_hwc.shape[1]}x{rgb_hwc.shape[0]} pixels would leave less than '
            f'1/{MAX_SQUARE_RATIO} of the image'
        )
    image = _resize_shortest_edge(Image.fromarray(rgb_hwc), spec.image_size)
    left, top = (image.width - spec.image_size) // 2, (image.height - spec.image_size) // 2
    image = image.crop((left, top, left + spec.image_size, top + spec.image_size))
    # In this order and precision, as the CLIP image processor computes it.
    scaled = _SCALED[np.asarray(image)]
    normalised = (scaled - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1)[None])


def _pad_to_square(rgb_hwc: NDArray[np.uint8], pad_rgb: tuple[int, int, int]) -> NDArray[np.uint8]:
    height, width = rgb_hwc.shape[:2]
    if height == width:
        return rgb_hwc
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = pad_rgb
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = rgb_hwc
    return square


def _resize_shortest_edge(image: Image.Image, edge: int) -> Image.Image:
    width, height = image.size
    if width <= height:
        size = edge, int(edge * height / width)
    else:
        size = int(edge * width / height), edge
    if size == image.size:
        return image
    return image.resize(size, Image.Resampling.BICUBIC)
