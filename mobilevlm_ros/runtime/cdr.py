"""Reads ``sensor_msgs/Image`` and ``CompressedImage`` out of their serialised form, without ROS and without copying.

Every length is checked against the bytes that are there: a damaged message is a ``BadImageError``, while the native
deserialiser has been seen to crash the process on one. The pixels stay a view of the message.

Format: OMG DDS-XTypes 7.4, plain CDR (version 1, or 2, which differs only for 8-byte members); four bytes of
encapsulation, then the members, each aligned to its size counted from after the encapsulation.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from mobilevlm_ros.errors import BadImageError

__all__ = ['SerializedCompressedImage', 'SerializedImage', 'read_compressed_image', 'read_image', 'stamp_of']

# Second byte of the encapsulation -> byte order.
_ORDERS = {0: '>', 1: '<', 6: '>', 7: '<'}
_NANOSECONDS = 1_000_000_000


@dataclass(frozen=True)
class SerializedImage:
    """The members of a ``sensor_msgs/Image``; ``data`` is a view of the serialised message."""

    stamp_ns: int
    frame_id: str
    height: int
    width: int
    encoding: str
    is_bigendian: bool
    step: int
    data: memoryview


@dataclass(frozen=True)
class SerializedCompressedImage:
    """The members of a ``sensor_msgs/CompressedImage``; ``data`` is a view of the serialised message."""

    stamp_ns: int
    frame_id: str
    format: str
    data: memoryview


class _Reader:
    """Takes one member after the other."""

    def __init__(self, serialized: bytes) -> None:
        if len(serialized) < 4 or serialized[0] != 0 or serialized[1] not in _ORDERS:
            raise BadImageError(f'a camera message of {len(serialized)} bytes is no CDR: {serialized[:4].hex()}...')
        self._bytes = memoryview(serialized)
        self._order = _ORDERS[serialized[1]]
        self._at = 4

    def _take(self, n_bytes: int) -> memoryview:
        end = self._at + n_bytes
        if end > len(self._bytes):
            raise BadImageError(
                f'a camera message of {len(self._bytes)} bytes is cut off or damaged: {n_bytes} more were expected '
                f'at byte {self._at}'
            )
        taken = self._bytes[self._at : end]
        self._at = end
        return taken

    def uint32(self) -> int:
        self._at += -self._at % 4  # the encapsulation is four bytes long, so alignment counts the same from the start
        value: int = struct.unpack(f'{self._order}I', self._take(4))[0]
        return value

    def int32(self) -> int:
        value = self.uint32()
        return value - (1 << 32) if value >= 1 << 31 else value

    def uint8(self) -> int:
        return self._take(1)[0]

    def octets(self) -> memoryview:
        return self._take(self.uint32())

    def text(self) -> str:
        return bytes(self.octets()).rstrip(b'\0').decode(errors='replace')

    def stamp_ns(self) -> int:
        sec = self.int32()
        return sec * _NANOSECONDS + self.uint32()


def read_image(serialized: bytes) -> SerializedImage:
    """:raise BadImageError: if the bytes are no serialised ``sensor_msgs/Image``."""
    reader = _Reader(serialized)
    # Arguments are evaluated in this order, which is that of the message's members.
    return SerializedImage(
        stamp_ns=reader.stamp_ns(),
        frame_id=reader.text(),
        height=reader.uint32(),
        width=reader.uint32(),
        encoding=reader.text(),
        is_bigendian=bool(reader.uint8()),
        step=reader.uint32(),
        data=reader.octets(),
    )


def read_compressed_image(serialized: bytes) -> SerializedCompressedImage:
    """:raise BadImageError: if the bytes are no serialised ``sensor_msgs/CompressedImage``."""
    reader = _Reader(serialized)
    return SerializedCompressedImage(
        stamp_ns=reader.stamp_ns(), frame_id=reader.text(), format=reader.text(), data=reader.octets()
    )


def stamp_of(serialized: bytes) -> int:
    """Nanoseconds of the stamp, which both messages begin with; 0 if the message is damaged before that."""
    try:
        return _Reader(serialized).stamp_ns()
    except BadImageError:
        return 0
