"""Serialised images are read as rclpy writes them, and damaged ones never get further than an error.

Here and not beside the other tests of the runtime because rclpy is the reference.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage, Image

from mobilevlm_ros.errors import BadImageError
from mobilevlm_ros.runtime.cdr import read_compressed_image, read_image, stamp_of

UINT32 = st.integers(0, 2**32 - 1)
TEXT = st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0'), max_size=30)
STAMPS = st.tuples(st.integers(-(2**31), 2**31 - 1), st.integers(0, 999_999_999))


def stamped(message: Any, stamp: tuple[int, int], frame_id: str) -> Any:
    message.header.stamp.sec, message.header.stamp.nanosec = stamp
    message.header.frame_id = frame_id
    return message


@given(STAMPS, TEXT, UINT32, UINT32, TEXT, st.integers(0, 255), UINT32, st.binary(max_size=70))
def test_raw_image_is_read_as_it_was_written(
    stamp: tuple[int, int], frame_id: str, height: int, width: int, encoding: str, order: int, step: int, data: bytes
) -> None:
    message = Image(height=height, width=width, encoding=encoding, is_bigendian=order, step=step, data=data)
    serialized = serialize_message(stamped(message, stamp, frame_id))
    image = read_image(serialized)
    assert image.stamp_ns == stamp_of(serialized) == stamp[0] * 1_000_000_000 + stamp[1]
    assert (image.frame_id, image.encoding) == (frame_id, encoding)
    assert (image.height, image.width, image.step, image.is_bigendian) == (height, width, step, bool(order))
    assert bytes(image.data) == data


@given(STAMPS, TEXT, TEXT, st.binary(max_size=70))
def test_compressed_image_is_read_as_it_was_written(
    stamp: tuple[int, int], frame_id: str, image_format: str, data: bytes
) -> None:
    serialized = serialize_message(stamped(CompressedImage(format=image_format, data=data), stamp, frame_id))
    image = read_compressed_image(serialized)
    assert image.stamp_ns == stamp_of(serialized)
    assert (image.frame_id, image.format, bytes(image.data)) == (frame_id, image_format, data)


def test_pixels_are_not_copied() -> None:
    serialized = serialize_message(Image(height=480, width=640, data=bytes(480 * 640 * 3)))
    view = np.frombuffer(read_image(serialized).data, np.uint8)
    assert np.shares_memory(view, np.frombuffer(serialized, np.uint8))


def test_big_endian() -> None:
    members = struct.pack('>iI I4s II I5s3x', 2, 3, 4, b'cam\0', 1, 2, 5, b'rgb8\0')
    # is_bigendian stands right after the text; step is aligned.
    members = members[:-3] + struct.pack('>B2xI I6s', 1, 6, 6, b'pixels')
    image = read_image(b'\0\0\0\0' + members)
    assert (image.stamp_ns, image.frame_id, image.height, image.width) == (2_000_000_003, 'cam', 1, 2)
    assert (image.encoding, image.is_bigendian, image.step, bytes(image.data)) == ('rgb8', True, 6, b'pixels')


@pytest.mark.parametrize('start', [b'', b'\0', b'\0\1\0', b'\1\1\0\0', b'\0\3\0\0', b'\0\1\0\0', b'\0\1\0\0abc'])
def test_what_is_no_message(start: bytes) -> None:
    with pytest.raises(BadImageError):
        read_image(start)
    assert stamp_of(start) == 0


@given(st.data())
def test_damaged_messages_are_read_or_refused(data: st.DataObject) -> None:
    raw = Image(height=4, width=4, encoding='rgb8', step=12, data=bytes(48))
    compressed = CompressedImage(format='jpeg', data=bytes(50))
    message, read = data.draw(st.sampled_from([(raw, read_image), (compressed, read_compressed_image)]))
    damaged = bytearray(serialize_message(message))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    serialized = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        image = read(serialized)
    except BadImageError:
        return
    assert len(image.data) <= len(serialized)
    assert image.stamp_ns == stamp_of(serialized)


@given(st.binary(max_size=200))
@example(b'\0\1\0\0' + b'\xff' * 60)
def test_any_bytes_are_read_or_refused(serialized: bytes) -> None:
    for read in (read_image, read_compressed_image):
        try:
            read(serialized)
        except BadImageError as error:
            assert str(error)
