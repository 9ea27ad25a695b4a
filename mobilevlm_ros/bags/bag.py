"""A recorded bag, read one message after the other, in constant memory.

Reads rosbag2 in mcap and sqlite3, in one file or split, plain or compressed with zstd by file or by message; an mcap
without an index is read from its start. What is wrong with the bag is a ``BagError``; what is wrong with a single
message is counted in ``Bag.broken``, and the others are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mobilevlm_ros.bags.choosing import FrameFilter, check_range
from mobilevlm_ros.bags.frame import BagFrame, Clock
from mobilevlm_ros.bags.parts import Parts, find_parts, unpack, unreadable
from mobilevlm_ros.errors import (
    BadImageError,
    BagError,
    BagFormatError,
    BagRangeError,
    BagTopicError,
    DependencyError,
    DiskSpaceError,
)
from mobilevlm_ros.runtime.camera_message import IMAGE_TYPES
from mobilevlm_ros.runtime.cdr import stamp_of

if TYPE_CHECKING:
    from rosbags.rosbag2 import Reader

__all__ = ['Bag', 'BrokenMessage', 'Topic', 'open_bag']

_ZSTD_MAGIC = b'\x28\xb5\x2f\xfd'  # no CDR starts like that
_MOST_MESSAGE_BYTES = 1 << 30
_LISTED_BROKEN = 100


@dataclass(frozen=True)
class Topic:
    """A topic with images.

    :ivar type: ``sensor_msgs/msg/Image`` or ``CompressedImage``.
    :ivar n_messages: as the bag counts them; broken ones are among them.
    :ivar first_ns: when the recorder got the first; ``last_ns`` the last. 0 if there is none.
    :ivar first_stamp_ns: stamp of the first; ``last_stamp_ns`` of the last. 0 if there is none.
    """

    name: str
    type: str
    n_messages: int
    first_ns: int = 0
    last_ns: int = 0
    first_stamp_ns: int = 0
    last_stamp_ns: int = 0


@dataclass(frozen=True)
class BrokenMessage:
    """A message that is no image."""

    topic: str
    index: int
    received_ns: int
    problem: str


@contextmanager
def open_bag(path: Path) -> Iterator[Bag]:
    """Open a folder of rosbag2, or one of its files.

    :raise BagError: if it may not be read.
    :raise BagMissingError: if there is no bag, or a part of it is missing.
    :raise BagFormatError: if it is no rosbag2, or its images are in a form that is not read.
    :raise BagDamagedError: if a part is truncated or damaged.
    :raise DiskSpaceError: if there is no room to decompress it.
    :raise DependencyError: if rosbags is not installed.
    """
    try:
        import rosbags.rosbag2  # noqa: F401
    except ImportError as error:
        raise DependencyError('reading bags needs rosbags: pip install rosbags==0.11.9') from error
    with ExitStack() as stack:
        try:
            parts = find_parts(path)
            folder = Path(stack.enter_context(TemporaryDirectory(prefix='mobilevlm_bag_')))
            files = [unpack(part, folder / str(number)) for number, part in enumerate(parts.paths)]
        except OSError as error:
            raise BagError(f'{path} cannot be read: {error.strerror or error}') from error
        yield Bag(path, parts, files)


class Bag:
    """See the module; made by ``open_bag``.

    :ivar notes: what the reader should know of how the bag is read, for people.
    :ivar broken: the first hundred messages that could not be read; ``n_broken`` counts all.
    """

    def __init__(self, path: Path, parts: Parts, files: list[Path]) -> None:
        self.path = path
        self.notes = parts.notes
        self.broken: list[BrokenMessage] = []
        self._known_broken: set[tuple[str, int]] = set()
        self._names = dict(zip(files, parts.paths, strict=True))
        self._files = files
        self._other_types: dict[str, str] = {}
        self.topics: tuple[Topic, ...] = tuple(self._survey(parts.n_messages))

    @property
    def n_broken(self) -> int:
        """How many messages were found that are no image; see ``broken``."""
        return len(self._known_broken)

    # -- what there is ------------------------------------------------------------------------------------------------

    def topic(self, name: str | None) -> Topic:
        """The named topic, or the only one with images if none is named.

        :raise BagTopicError: if there is no such topic, it has no images, or none was named while there are several.
        """
        listed = ', '.join(f'{topic.name} ({topic.n_messages})' for topic in self.topics) or 'none'
        for topic in self.topics:
            if topic.name == name:
                return topic
        if name is None:
            if len(self.topics) == 1:
                return self.topics[0]
            raise BagTopicError(f'name one of the topics with images in {self.path}: {listed}')
        if name in self._other_types:
            raise BagTopicError(
                f'{name} in {self.path} has type {self._other_types[name]}; expected {" or ".join(IMAGE_TYPES)}. '
                f'Topics with images: {listed}'
            )
        raise BagTopicError(f'there is no topic {name} in {self.path}; topics with images: {listed}')

    def start_ns(self, clock: Clock = 'header') -> int:
        """When the first image of any topic was taken or received; 0 without images."""
        return min((_span(topic, clock)[0] for topic in self.topics if topic.n_messages), default=0)

    def end_ns(self, clock: Clock = 'header') -> int:
        """When the last image of any topic was taken or received; 0 without images."""
        return max((_span(topic, clock)[1] for topic in self.topics if topic.n_messages), default=0)

    # -- frames -------------------------------------------------------------------------------------------------------

    def frames(
        self,
        topics: str | Iterable[str] | None = None,
        *,
        start_s: float | None = None,
        end_s: float | None = None,
        every_s: float | None = None,
        stamp: Clock = 'header',
    ) -> Iterator[BagFrame]:
        """The frames in the order in which they were recorded; may be called again, also while another is read.

        :param topics: one topic, or several; None: all with images.
        :param start_s: first moment, in seconds since ``start_ns``; None: from the start.
        :param end_s: last moment, that one included; None: to the end.
        :param every_s: only the first frame of each topic in every such interval, counted from ``start_s``.
        :param stamp: the clock of these three.
        :raise BagTopicError: see ``topic``; at once, like the next.
        :raise BagRangeError: if a number makes no sense; while reading if there was no frame between the two moments.
        :raise BagDamagedError: while reading, if a part is damaged there.
        """
        asked = [topics] if isinstance(topics, str) else [one.name for one in self.topics] if topics is None else topics
        names = {self.topic(name).name for name in asked}
        check_range(start_s, end_s, every_s)
        return self._selected(names, start_s, end_s, every_s, stamp)

    def _selected(
        self, names: set[str], start_s: float | None, end_s: float | None, every_s: float | None, stamp: Clock
    ) -> Iterator[BagFrame]:
        origin_ns = self.start_ns(stamp)
        chosen = FrameFilter(origin_ns, start_s=start_s, end_s=end_s, every_s=every_s)
        n_found = 0
        for frame in self._read(names):
            if chosen.takes(frame.topic, frame.time_ns(stamp)):
                n_found += 1
                yield frame
        if not n_found:
            asked = f'{start_s or 0.0:.3f} s to {"the end" if end_s is None else f"{end_s:.3f} s"}'
            raise BagRangeError(
                f'{self.path} has no frame of {", ".join(sorted(names)) or "any topic"} from {asked}; it has '
                f'{sum(topic.n_messages for topic in self.topics if topic.name in names)} messages of these in '
                f'{(self.end_ns(stamp) - origin_ns) / 1e9:.3f} s'
            )

    def count_broken(self, message: BrokenMessage) -> None:
        """Count a message that could not be read, or a frame that did not decode; once, however often it is read."""
        if (message.topic, message.index) not in self._known_broken:
            self._known_broken.add((message.topic, message.index))
            if len(self.broken) < _LISTED_BROKEN:
                self.broken.append(message)

    # -- files --------------------------------------------------------------------------------------------------------

    def _read(self, names: set[str]) -> Iterator[BagFrame]:
        """Every frame of some topics; what is broken is counted, in the first reading only."""
        counts = dict.fromkeys(names, 0)
        for file in self._files:
            with self._opened(file) as reader:
                wanted = [one for one in reader.connections if one.topic in names and one.msgtype in IMAGE_TYPES]
                # Given no connection, the reader gives every message.
                for connection, received_ns, data in reader.messages(wanted) if wanted else ():
                    index = counts[connection.topic]
                    counts[connection.topic] += 1
                    try:
                        serialized = _plain(data)
                    except BadImageError as error:
                        self.count_broken(BrokenMessage(connection.topic, index, received_ns, str(error)))
                        continue
                    stamp_ns = stamp_of(serialized)
                    yield BagFrame(connection.topic, index, stamp_ns, received_ns, connection.msgtype, serialized)

    @contextmanager
    def _opened(self, file: Path) -> Iterator[Reader]:
        """The reader of one file; whatever it raises means that the file is damaged."""
        from rosbags.rosbag2 import Reader

        try:
            with Reader(file) as reader:
                yield reader
        except (BagError, DiskSpaceError):
            raise
        except Exception as error:  # on damaged data rosbags raises whatever its parsers do
            raise unreadable(self._names[file], error) from error

    def _survey(self, n_expected: int | None) -> Iterator[Topic]:
        """Look into every part once: which topics are there, how much, and from when to when."""
        found: dict[str, Topic] = {}
        n_messages = 0
        for file in self._files:
            with self._opened(file) as reader:
                n_messages += reader.message_count
                for connection in reader.connections:
                    if connection.msgtype not in IMAGE_TYPES:
                        self._other_types[connection.topic] = connection.msgtype
                        continue
                    _check_serialization(file, connection)
                    known = found.get(connection.topic, Topic(connection.topic, connection.msgtype, 0))
                    found[connection.topic] = _extended(known, reader, connection)
        if n_expected is not None and n_expected != n_messages:
            self.notes.append(f'metadata.yaml counts {n_expected} messages, the files hold {n_messages}')
        return iter(sorted(found.values(), key=lambda topic: topic.name))


def _check_serialization(file: Path, connection: Any) -> None:
    if connection.ext.serialization_format != 'cdr':
        raise BagFormatError(
            f'{connection.topic} in {file} is serialised as {connection.ext.serialization_format!r}; only cdr is read'
        )


def _extended(topic: Topic, reader: Reader, connection: Any) -> Topic:
    """The topic with what one more part holds of it."""
    first = next(reader.messages([connection]), None)
    if first is None:
        return topic
    last = _last_message(reader, connection, first)
    if not topic.n_messages:
        topic = replace(topic, first_ns=first[1], first_stamp_ns=_stamp(first[2]))
    return replace(
        topic,
        n_messages=topic.n_messages + connection.msgcount,
        last_ns=last[1],
        last_stamp_ns=_stamp(last[2]),
    )


def _last_message(reader: Reader, connection: Any, first: tuple[Any, int, bytes]) -> tuple[Any, int, bytes]:
    """Looks back from the end, further and further, so that a long bag is not read as a whole."""
    back_ns = 1_000_000_000
    while True:
        start_ns = max(reader.end_time - back_ns, first[1])
        last = None
        for last in reader.messages([connection], start=start_ns):  # noqa: B007
            pass
        if last is not None:
            return last
        if start_ns <= first[1]:
            return first
        back_ns *= 8


def _span(topic: Topic, clock: Clock) -> tuple[int, int]:
    if clock == 'receive':
        return topic.first_ns, topic.last_ns
    return topic.first_stamp_ns or topic.first_ns, topic.last_stamp_ns or topic.last_ns


def _plain(data: Any) -> bytes:
    """A message without its compression.

    :raise BadImageError: if it cannot be decompressed, or is none.
    """
    if not isinstance(data, bytes):
        raise BadImageError(f'the bag holds {type(data).__name__} in place of a message')
    if not data.startswith(_ZSTD_MAGIC):
        return data
    from backports import zstd

    try:
        decompressor = zstd.ZstdDecompressor()
        plain = decompressor.decompress(data, max_length=_MOST_MESSAGE_BYTES)
    except (zstd.ZstdError, MemoryError) as error:
        raise BadImageError(f'a message of {len(data)} bytes cannot be decompressed: {error}') from error
    if not decompressor.eof:
        raise BadImageError(
            f'a compressed message of {len(data)} bytes is cut off, or larger than {_MOST_MESSAGE_BYTES >> 20} MiB'
        )
    return plain


def _stamp(data: Any) -> int:
    """The stamp in a message that may be broken; 0 then."""
    try:
        return stamp_of(_plain(data))
    except BadImageError:
        return 0
