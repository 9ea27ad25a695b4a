"""The published preprocessing: expand2square, then transformers' CLIP image processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from mobilevlm_ros.errors import BadImageError
from mobilevlm_ros.runtime.preprocess import CLIP_MEAN, CLIP_STD, MAX_SIDE, PreprocessSpec, preprocess

SIZES = [(336, 336), (336, 200), (200, 336), (640, 480), (479, 641), (37, 91), (91, 38), (5, 400), (1, 1), (2, 3)]


@pytest.fixture(scope='module')
def processor() -> Any:
    pytest.importorskip('torch', reason='needs torch and transformers as references: make venv-dev')
    clip = pytest.importorskip('transformers.models.clip.image_processing_pil_clip')
    return clip.CLIPImageProcessorPil(size={'shortest_edge': 336}, crop_size={'height': 336, 'width': 336})


def random_picture(width: int, height: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def expand2square(picture: Image.Image) -> Image.Image:
    """The published rule, in other words."""
    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    result = Image.new('RGB', (side, side), (122, 116, 104))
    corner = (0, (side - height) // 2) if width > height else ((side - width) // 2, 0)
    result.paste(picture, corner)
    return result


def published(processor: Any, rgb_hwc: NDArray[np.uint8], aspect: str) -> NDArray[np.float32]:
    picture = Image.fromarray(rgb_hwc)
    if aspect == 'pad':
        picture = expand2square(picture)
    result: NDArray[np.float32] = processor(picture, return_tensors='np')['pixel_values']
    return result


@pytest.mark.parametrize('seed', [0, 1, 2])
@pytest.mark.parametrize(('width', 'height'), SIZES)
def test_pad_equals_the_published_preprocessing(processor: Any, width: int, height: int, seed: int) -> None:
    picture = random_picture(width, height, seed)

    ours = preprocess(picture, PreprocessSpec(336, 'pad'))

    np.testing.assert_array_equal(ours, published(processor, picture, 'pad'))


@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize(('width', 'height'), [size for size in SIZES if min(size) >= 37])
def test_square_equals_the_published_preprocessing(processor: Any, width: int, height: int, seed: int) -> None:
    picture = random_picture(width, height, seed)

    ours = preprocess(picture, PreprocessSpec(336, 'square'))

    np.testing.assert_array_equal(ours, published(processor, picture, 'square'))


def test_the_padding_colour_is_the_published_one() -> None:
    assert PreprocessSpec(336).pad_rgb == (122, 116, 104)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 120),
    height=st.integers(1, 120),
    size=st.sampled_from([8, 15, 32]),
    aspect=st.sampled_from(['pad', 'square']),
)
def test_any_size_gives_one_finite_tensor_in_range(width: int, height: int, size: int, aspect: Any) -> None:
    picture = random_picture(width, height, seed=width)
    low = (0.0 - np.array(CLIP_MEAN)) / CLIP_STD
    high = (1.0 - np.array(CLIP_MEAN)) / CLIP_STD
    if aspect == 'square' and max(width, height) > 64 * min(width, height):
        with pytest.raises(BadImageError):
            preprocess(picture, PreprocessSpec(size, aspect))
        return

    tensor = preprocess(picture, PreprocessSpec(size, aspect))

    assert tensor.shape == (1, 3, size, size)
    assert tensor.dtype == np.float32
    assert tensor.flags.c_contiguous
    channels = tensor[0].reshape(3, -1)
    assert (channels.min(axis=1) >= low - 1e-6).all()
    assert (channels.max(axis=1) <= high + 1e-6).all()


def test_the_input_is_not_changed() -> None:
    picture = random_picture(20, 10, seed=0)
    copy = picture.copy()

    preprocess(picture, PreprocessSpec(16))

    np.testing.assert_array_equal(picture, copy)


def test_a_view_with_strides_gives_the_same_as_its_copy() -> None:
    view = random_picture(40, 30, seed=0)[::2, ::-1]

    result = preprocess(view, PreprocessSpec(16))

    np.testing.assert_array_equal(result, preprocess(view.copy(), PreprocessSpec(16)))


@pytest.mark.parametrize(
    'pixels',
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((1, MAX_SIDE + 1, 3), np.uint8),
    ],
    ids=['float', 'grey', 'four channels', 'empty', 'too long'],
)
def test_what_is_no_rgb_image_is_refused(pixels: Any) -> None:
    with pytest.raises(BadImageError, match='expected'):
        preprocess(pixels, PreprocessSpec(16))


def test_a_crop_that_would_take_gigabytes_is_refused() -> None:
    with pytest.raises(BadImageError, match='cropping'):
        preprocess(np.zeros((1, MAX_SIDE, 3), np.uint8), PreprocessSpec(336, 'square'))
