"""Writes bags out of real pictures, in every form that is read: for tests, and for the documentation's examples."""

from __future__ import annotations

import io
import shutil
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

Storage = Literal['mcap', 'sqlite3']

START_NS = 1_700_000_000_000_000_000
EXAM_IMAGES = Path(__file__).resolve().parents[1] / 'models' / 'nano' / 'exam' / 'images'

_store = get_typestore(Stores.ROS2_HUMBLE)


@dataclass(frozen=True)
class Message:
    """One message to be recorded.

    :ivar message: of rosbags' types; bytes are recorded as they are.
    """

    topic: str
    received_ns: int
    message: Any
    type: str = ''


def pictures(n: int, size: tuple[int, int] = (96, 64)) -> list[NDArray[np.uint8]]:
    """Real photographs, uint8 RGB ``[height, width, 3]``.

    :param size: width and height.
    """
    paths = sorted(path for path in EXAM_IMAGES.iterdir() if path.suffix in ('.jpg', '.png', '.webp'))
    return [np.asarray(Image.open(path).convert('RGB').resize(size)) for path in paths[:n]]


def _header(stamp_ns: int, frame_id: str) -> Any:
    types = _store.types
    stamp = types['builtin_interfaces/msg/Time'](sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9)
    return types['std_msgs/msg/Header'](stamp=stamp, frame_id=frame_id)


def raw_image(rgb_hwc: NDArray[np.uint8], stamp_ns: int, encoding: str = 'rgb8', frame_id: str = 'optical') -> Any:
    """A ``sensor_msgs/Image``."""
    pixels = rgb_hwc[:, :, ::-1] if encoding == 'bgr8' else rgb_hwc
    return _store.types['sensor_msgs/msg/Image'](
        header=_header(stamp_ns, frame_id),
        height=rgb_hwc.shape[0],
        width=rgb_hwc.shape[1],
        encoding=encoding,
        is_bigendian=0,
        step=rgb_hwc.shape[1] * 3,
        data=np.ascontiguousarray(pixels).reshape(-1),
    )


def compressed_image(rgb_hwc: NDArray[np.uint8], stamp_ns: int, kind: str = 'png', **options: Any) -> Any:
    """A ``sensor_msgs/CompressedImage``; png or jpeg, with Pillow's options."""
    buffer = io.BytesIO()
    Image.fromarray(rgb_hwc).save(buffer, kind, **options)
    data = np.frombuffer(buffer.getvalue(), np.uint8)
    header = _header(stamp_ns, 'optical')
    return _store.types['sensor_msgs/msg/CompressedImage'](header=header, format=f'rgb8; {kind}', data=data)


def text(words: str) -> Any:
    """A ``std_msgs/String``."""
    return _store.types['std_msgs/msg/String'](data=words)


def serialized(message: Any) -> bytes:
    """A message as it is recorded."""
    return message if isinstance(message, bytes) else bytes(_store.serialize_cdr(message, message.__msgtype__))


def stream(
    topic: str,
    images: Sequence[NDArray[np.uint8]],
    *,
    every_ns: int = 100_000_000,
    start_ns: int = START_NS,
    delay_ns: int = 5_000_000,
    compressed: bool = False,
) -> list[Message]:
    """A camera's recording; ``delay_ns`` is between stamp and arrival."""
    make = compressed_image if compressed else raw_image
    stamps = [start_ns + number * every_ns for number in range(len(images))]
    return [Message(topic, stamp + delay_ns, make(image, stamp)) for stamp, image in zip(stamps, images, strict=True)]


def write_bag(
    path: Path,
    messages: Iterable[Message],
    *,
    storage: Storage = 'mcap',
    compression: Literal['', 'file', 'message', 'storage'] = '',
    n_parts: int = 1,
) -> Path:
    """Write a folder of rosbag2, in ``n_parts`` files."""
    ordered = sorted(messages, key=lambda one: one.received_ns)
    if n_parts > 1:
        return _write_split(path, ordered, storage, compression, n_parts)
    writer = Writer(path, version=9, storage_plugin=StoragePlugin[storage.upper()])
    if compression:
        writer.set_compression(CompressionMode[compression.upper()], CompressionFormat.ZSTD)
    with writer:
        connections: dict[str, Any] = {}
        for one in ordered:
            if one.topic not in connections:
                type_name = one.type or one.message.__msgtype__
                connections[one.topic] = writer.add_connection(one.topic, type_name, typestore=_store)
            writer.write(connections[one.topic], one.received_ns, serialized(one.message))
    return path


def _write_split(path: Path, ordered: list[Message], storage: Storage, compression: Any, n_parts: int) -> Path:
    """As ros2 bag does with --max-bag-size: several files, one description."""
    path.mkdir(parents=True)
    each = -(-len(ordered) // n_parts)
    whole: dict[str, Any] = {}
    for part in range(n_parts):
        folder = write_bag(
            path / f'part{part}',
            ordered[part * each : (part + 1) * each],
            storage=storage,
            compression=compression,
        )
        described = yaml.safe_load((folder / 'metadata.yaml').read_text())['rosbag2_bagfile_information']
        name = described['relative_file_paths'][0].replace(f'part{part}', f'{path.name}_{part}')
        shutil.move(folder / described['relative_file_paths'][0], path / name)
        shutil.rmtree(folder)
        described['relative_file_paths'] = [name]
        described['files'] = [one | {'path': name} for one in described['files']]
        whole = _joined(whole, described) if whole else described
    (path / 'metadata.yaml').write_text(yaml.safe_dump({'rosbag2_bagfile_information': whole}))
    return path


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The description of a recording and of the part that follows it."""
    start_ns = first['starting_time']['nanoseconds_since_epoch']
    end_ns = second['starting_time']['nanoseconds_since_epoch'] + second['duration']['nanoseconds']
    counts = {one['topic_metadata']['name']: one for one in first['topics_with_message_count']}
    for one in second['topics_with_message_count']:
        name = one['topic_metadata']['name']
        before = counts[name]['message_count'] if name in counts else 0
        counts[name] = one | {'message_count': before + one['message_count']}
    return first | {
        'duration': {'nanoseconds': end_ns - start_ns},
        'files': first['files'] + second['files'],
        'message_count': first['message_count'] + second['message_count'],
        'relative_file_paths': first['relative_file_paths'] + second['relative_file_paths'],
        'topics_with_message_count': list(counts.values()),
    }


def storage_file(bag: Path) -> Path:
    """The one file with messages of a bag."""
    (found,) = (path for path in bag.iterdir() if path.name != 'metadata.yaml')
    return found


def without_index(mcap: Path) -> None:
    """Take the summary away from an mcap file, as a recorder with ``noSummary`` leaves it."""
    data = mcap.read_bytes()
    footer = len(data) - 8 - 20 - 9
    (summary_start,) = struct.unpack_from('<Q', data, footer + 9)
    mcap.write_bytes(data[:summary_start] + data[footer : footer + 9] + bytes(20) + data[-8:])
