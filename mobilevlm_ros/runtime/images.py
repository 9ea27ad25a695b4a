"""Camera data to RGB pixels: every common encoding of ``sensor_msgs/Image``, and JPEG, PNG and WebP.

Checks sizes before it touches a byte and raises one error class, ``BadImageError``, that says what does not fit.
16-bit images keep their upper 8 bits. Encodings: sensor_msgs/image_encodings.hpp; YUV is BT.601 limited range, as
OpenCV converts it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mobilevlm_ros.errors import BadImageError
from mobilevlm_ros.runtime.preprocess import MAX_SIDE

__all__ = ['ENCODINGS', 'decode_compressed', 'read_image', 'to_rgb']

_Pixels = NDArray[np.uint8]


def _cvt(code: int) -> Callable[[_Pixels], _Pixels]:
    def convert(pixels: _Pixels) -> _Pixels:
        result: _Pixels = cv2.cvtColor(pixels, code)
        return result

    return convert


def _same(pixels: _Pixels) -> _Pixels:
    return pixels


# encoding -> (channels, bytes of a channel, conversion to RGB). OpenCV names a Bayer pattern by its second row.
_PACKED: dict[str, tuple[int, int, Callable[[_Pixels], _Pixels]]] = {
    'rgb8': (3, 1, _same),
    'bgr8': (3, 1, _cvt(cv2.COLOR_BGR2RGB)),
    'rgba8': (4, 1, _cvt(cv2.COLOR_RGBA2RGB)),
    'bgra8': (4, 1, _cvt(cv2.COLOR_BGRA2RGB)),
    'mono8': (1, 1, _cvt(cv2.COLOR_GRAY2RGB)),
    'rgb16': (3, 2, _same),
    'bgr16': (3, 2, _cvt(cv2.COLOR_BGR2RGB)),
    'rgba16': (4, 2, _cvt(cv2.COLOR_RGBA2RGB)),
    'bgra16': (4, 2, _cvt(cv2.COLOR_BGRA2RGB)),
    'mono16': (1, 2, _cvt(cv2.COLOR_GRAY2RGB)),
    '8UC1': (1, 1, _cvt(cv2.COLOR_GRAY2RGB)),
    '8UC3': (3, 1, _cvt(cv2.COLOR_BGR2RGB)),
    '8UC4': (4, 1, _cvt(cv2.COLOR_BGRA2RGB)),
    'yuv422': (2, 1, _cvt(cv2.COLOR_YUV2RGB_UYVY)),
    'uyvy': (2, 1, _cvt(cv2.COLOR_YUV2RGB_UYVY)),
    'yuv422_yuy2': (2, 1, _cvt(cv2.COLOR_YUV2RGB_YUY2)),
    'yuyv': (2, 1, _cvt(cv2.COLOR_YUV2RGB_YUY2)),
}
for _pattern, _code in {
    'rggb': cv2.COLOR_BayerBG2RGB,
    'bggr': cv2.COLOR_BayerRG2RGB,
    'gbrg': cv2.COLOR_BayerGR2RGB,
    'grbg': cv2.COLOR_BayerGB2RGB,
}.items():
    _PACKED[f'bayer_{_pattern}8'] = (1, 1, _cvt(_code))
    _PACKED[f'bayer_{_pattern}16'] = (1, 2, _cvt(_code))

_SEMI_PLANAR = {'nv12': _cvt(cv2.COLOR_YUV2RGB_NV12), 'nv21': _cvt(cv2.COLOR_YUV2RGB_NV21)}

ENCODINGS = (*_PACKED, *_SEMI_PLANAR)
"""All encodings that ``to_rgb`` reads."""


def to_rgb(
    data: bytes | bytearray | memoryview,
    *,
    encoding: str,
    height: int,
    width: int,
    step: int,
    is_bigendian: bool = False,
) -> _Pixels:
    """The pixels of a raw image.

    :param step: bytes from the start of a row to the start of the next.
    :return: uint8 ``[height, width, 3]``, RGB; a copy.
    :raise BadImageError: if the encoding is unknown, or sizes and data do not fit each other.
    """
    if not 0 < height <= MAX_SIDE or not 0 < width <= MAX_SIDE:
        raise BadImageError(f'an image of {width}x{height} pixels; expected 1 to {MAX_SIDE} a side')
    if encoding in _PACKED:
        channels, n_bytes, convert = _PACKED[encoding]
        _check_even(encoding, height, width)
        rows = _rows(data, height, width * channels * n_bytes, step, encoding)
        pixels = _to_8_bit(rows, n_bytes, is_bigendian).reshape(height, width, channels)
        return np.ascontiguousarray(convert(np.ascontiguousarray(pixels))).copy()
    if encoding in _SEMI_PLANAR:
        _check_even(encoding, height, width)
        return _SEMI_PLANAR[encoding](_rows(data, height * 3 // 2, width, step, encoding))
    hint = ' It looks like a depth image: subscribe to a colour image.' if encoding in ('32FC1', '16UC1') else ''
    raise BadImageError(f'unsupported image encoding {encoding!r}.{hint} Supported are: {", ".join(ENCODINGS)}')


def _check_even(encoding: str, height: int, width: int) -> None:
    planar = encoding in _SEMI_PLANAR
    subsampled = planar or encoding in ('yuv422', 'uyvy', 'yuv422_yuy2', 'yuyv')
    if (subsampled and width % 2) or (planar and height % 2):
        raise BadImageError(f'{encoding} shares colour between neighbours, but the image has {width}x{height} pixels')
    # OpenCV gives black for less.
    if encoding.startswith('bayer_') and min(height, width) < 3:
        raise BadImageError(f'a Bayer pattern needs at least 3x3 pixels; found {width}x{height}')


def _rows(data: bytes | bytearray | memoryview, n_rows: int, row_bytes: int, step: int, encoding: str) -> _Pixels:
    """``[n_rows, row_bytes]`` without the padding at the end of the rows."""
    if step < row_bytes:
        raise BadImageError(f'step is {step} bytes, but a row of {encoding} needs {row_bytes}')
    flat = np.frombuffer(data, np.uint8)
    # The last row may lack its padding.
    if not step * (n_rows - 1) + row_bytes <= flat.size <= step * n_rows:
        raise BadImageError(f'the image has {flat.size} bytes of data; {n_rows} rows of {step} bytes were expected')
    if flat.size < step * n_rows:
        flat = np.concatenate((flat, np.zeros(step * n_rows - flat.size, np.uint8)))
    return np.ascontiguousarray(flat.reshape(n_rows, step)[:, :row_bytes])


def _to_8_bit(rows: _Pixels, n_bytes: int, is_bigendian: bool) -> _Pixels:
    if n_bytes == 1:
        return rows
    return np.ascontiguousarray(rows[:, 0::2] if is_bigendian else rows[:, 1::2])


def decode_compressed(data: bytes | bytearray | memoryview, format_hint: str = '') -> _Pixels:
    """The pixels of a JPEG, PNG or WebP image.

    :param format_hint: the ``format`` of ``sensor_msgs/CompressedImage``; only used to refuse depth images clearly.
    :return: uint8 ``[height, width, 3]``, RGB, upright (EXIF orientation applied).
    :raise BadImageError: if the data is empty, truncated, corrupt, or no such image.
    """
    if 'compressedDepth' in format_hint:
        raise BadImageError(f'format {format_hint!r} is a compressed depth image: subscribe to a colour image')
    raw = bytes(data)
    if not raw:
        raise BadImageError('the compressed image is empty (0 bytes)')
    try:
        with Image.open(io.BytesIO(raw), formats=('JPEG', 'PNG', 'WEBP')) as image:
            if max(image.size) > MAX_SIDE:
                raise BadImageError(f'an image of {image.width}x{image.height}; at most {MAX_SIDE} pixels a side')
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith('I'):
                grey = (np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            return np.array(upright.convert('RGB'))
    except BadImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many classes on damaged data; all of them mean the same here
        hint = f' (format {format_hint!r})' if format_hint else ''
        raise BadImageError(f'{len(raw)} bytes{hint} are no readable JPEG, PNG or WebP: {error}') from error


def read_image(path: Path) -> _Pixels:
    """The pixels of an image file; uint8 ``[height, width, 3]``, RGB.

    :raise BadImageError: if it cannot be read.
    """
    try:
        return decode_compressed(path.read_bytes())
    except OSError as error:
        raise BadImageError(f'{path} cannot be read: {error.strerror}') from error
    except BadImageError as error:
        raise BadImageError(f'{path}: {error}') from error
