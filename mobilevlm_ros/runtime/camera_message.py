"""From the serialised message of a camera to pixels: one way for what arrives live and for what was recorded."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.runtime.cdr import read_compressed_image, read_image
from mobilevlm_ros.runtime.images import decode_compressed, to_rgb

__all__ = ['IMAGE_TYPES', 'decode_message']

COMPRESSED_IMAGE = 'sensor_msgs/msg/CompressedImage'
IMAGE_TYPES = ('sensor_msgs/msg/Image', COMPRESSED_IMAGE)


def decode_message(serialized: bytes, message_type: str) -> tuple[NDArray[np.uint8], str]:
    """The pixels of a camera message and its ``frame_id``.

    :param serialized: CDR.
    :param message_type: one of ``IMAGE_TYPES``.
    :return: uint8 ``[height, width, 3]``, RGB.
    :raise BadImageError: if the message is damaged, or its image cannot be decoded.
    """
    if message_type == COMPRESSED_IMAGE:
        compressed = read_compressed_image(serialized)
        return decode_compressed(compressed.data, compressed.format), compressed.frame_id
    image = read_image(serialized)
    rgb_hwc = to_rgb(
        image.data,
        encoding=image.encoding,
        height=image.height,
        width=image.width,
        step=image.step,
        is_bigendian=image.is_bigendian,
    )
    return rgb_hwc, image.frame_id
