"""What is read out of whole bags: every storage, compression and division gives the frames that were recorded."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import bag_writing as writing
import numpy as np
import pytest
from bag_writing import START_NS, Message

from mobilevlm_ros.bags import open_bag
from mobilevlm_ros.errors import (
    BadImageError,
    BagDamagedError,
    BagFormatError,
    BagMissingError,
    BagRangeError,
    BagTopicError,
)

PICTURES = writing.pictures(6)
FORMS = [
    ('mcap', '', 1),
    ('sqlite3', '', 1),
    ('mcap', 'storage', 1),
    ('mcap', 'message', 1),
    ('sqlite3', 'message', 1),
    ('mcap', 'file', 1),
    ('sqlite3', 'file', 1),
    ('mcap', '', 3),
    ('sqlite3', 'file', 3),
]


def two_cameras() -> list[Message]:
    return [
        *writing.stream('/front/image_raw', PICTURES),
        *writing.stream('/rear/image_raw/compressed', PICTURES[::-1], compressed=True, start_ns=START_NS + 10**7),
        Message('/chatter', START_NS + 3, writing.text('hello')),
    ]


@pytest.fixture
def bag(tmp_path: Path) -> Path:
    return writing.write_bag(tmp_path / 'bag', two_cameras())


@pytest.mark.parametrize(('storage', 'compression', 'n_parts'), FORMS)
def test_every_form_gives_what_was_recorded(tmp_path: Path, storage: Any, compression: Any, n_parts: int) -> None:
    path = writing.write_bag(tmp_path / 'b', two_cameras(), storage=storage, compression=compression, n_parts=n_parts)
    with open_bag(path) as bag:
        assert [(topic.name, topic.n_messages) for topic in bag.topics] == [
            ('/front/image_raw', 6),
            ('/rear/image_raw/compressed', 6),
        ]
        front, rear = bag.topics
        assert (front.type, rear.type) == ('sensor_msgs/msg/Image', 'sensor_msgs/msg/CompressedImage')
        assert (front.first_stamp_ns, front.last_stamp_ns) == (START_NS, START_NS + 500_000_000)
        assert (front.first_ns, front.last_ns) == (START_NS + 5_000_000, START_NS + 505_000_000)
        assert bag.notes == []
        frames = list(bag.frames())
        assert [frame.received_ns for frame in frames] == sorted(frame.received_ns for frame in frames)
        for topic, expected in ((front, PICTURES), (rear, PICTURES[::-1])):
            ours = [frame for frame in frames if frame.topic == topic.name]
            assert [frame.index for frame in ours] == list(range(6))
            for frame, picture in zip(ours, expected, strict=True):
                np.testing.assert_array_equal(frame.decode(), picture)


def test_a_frame_carries_what_the_runtime_needs(bag: Path) -> None:
    with open_bag(bag) as opened:
        frame = next(opened.frames('/front/image_raw', start_s=0.3)).frame()
    assert (frame.camera, frame.frame_id, frame.stamp_ns) == ('/front/image_raw', 'optical', START_NS + 300_000_000)


@pytest.mark.parametrize('storage', ['mcap', 'sqlite3'])
def test_a_single_file_is_enough(tmp_path: Path, storage: Any) -> None:
    path = writing.write_bag(tmp_path / 'b', two_cameras(), storage=storage)
    with open_bag(writing.storage_file(path)) as bag:
        assert len(list(bag.frames('/front/image_raw'))) == 6
        assert 'may hold more parts' in bag.notes[0]


def test_parts_without_metadata_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    pictures = writing.pictures(1) * 12
    path = writing.write_bag(tmp_path / 'b', writing.stream('/camera', pictures), n_parts=12)
    (path / 'metadata.yaml').unlink()
    with open_bag(path) as bag:
        stamps = [frame.stamp_ns for frame in bag.frames()]
        assert 'no metadata.yaml' in bag.notes[0]
    assert stamps == [START_NS + number * 100_000_000 for number in range(12)]


def test_messages_compressed_one_by_one_are_known_without_metadata(tmp_path: Path) -> None:
    path = writing.write_bag(tmp_path / 'b', two_cameras(), compression='message')
    (path / 'metadata.yaml').unlink()
    with open_bag(path) as bag:
        np.testing.assert_array_equal(next(bag.frames('/front/image_raw')).decode(), PICTURES[0])


def test_an_mcap_without_an_index_is_read(bag: Path) -> None:
    writing.without_index(writing.storage_file(bag))
    with open_bag(bag) as opened:
        assert len(list(opened.frames('/front/image_raw'))) == 6


@pytest.mark.parametrize('storage', ['mcap', 'sqlite3'])
@pytest.mark.parametrize('folder', ['what?', 'a%20b', 'no#1'])
def test_odd_names_of_folders_do_not_matter(tmp_path: Path, storage: Any, folder: str) -> None:
    path = writing.write_bag(tmp_path / 'b', two_cameras(), storage=storage).rename(tmp_path / folder)
    with open_bag(path) as bag:
        assert len(bag.topics) == 2


# -- which frames -----------------------------------------------------------------------------------------------------


def test_a_range_holds_both_its_ends(bag: Path) -> None:
    with open_bag(bag) as opened:
        assert [one.index for one in opened.frames('/front/image_raw', start_s=0.1, end_s=0.3)] == [1, 2, 3]


def test_every_so_often_takes_the_first_of_each_interval(bag: Path) -> None:
    with open_bag(bag) as opened:
        assert [one.index for one in opened.frames('/front/image_raw', every_s=0.2)] == [0, 2, 4]
        assert [one.index for one in opened.frames('/front/image_raw', start_s=0.1, every_s=0.2)] == [1, 3, 5]
        assert len(list(opened.frames(every_s=0.2))) == 6, 'each topic by itself'


def test_an_interval_that_no_binary_number_is_loses_no_frame(tmp_path: Path) -> None:
    path = writing.write_bag(tmp_path / 'b', writing.stream('/camera', writing.pictures(1) * 30))
    with open_bag(path) as bag:
        assert len(list(bag.frames(every_s=0.1))) == 30


def test_the_clock_can_be_the_recorders(tmp_path: Path) -> None:
    """A camera whose stamps lag more and more: by header it spans 0.2 s, by receive time 2 s."""
    messages = [
        Message('/camera', START_NS + number * 10**9, writing.raw_image(picture, START_NS + number * 10**8))
        for number, picture in enumerate(PICTURES[:3])
    ]
    path = writing.write_bag(tmp_path / 'b', messages)
    with open_bag(path) as bag:
        assert len(list(bag.frames(end_s=0.5))) == 3
        assert len(list(bag.frames(end_s=0.5, stamp='receive'))) == 1


def test_a_frame_without_a_stamp_counts_from_its_arrival(tmp_path: Path) -> None:
    messages = [
        Message('/camera', START_NS + number * 10**9, writing.raw_image(picture, 0))
        for number, picture in enumerate(PICTURES[:3])
    ]
    path = writing.write_bag(tmp_path / 'b', messages)
    with open_bag(path) as bag:
        assert [frame.index for frame in bag.frames(start_s=0.5, end_s=1.5)] == [1]


def test_memory_does_not_grow_with_the_bag(tmp_path: Path) -> None:
    """Each part is 16 messages of 300 kB."""
    big = [np.full((320, 320, 3), number, np.uint8) for number in range(4)] * 16
    path = writing.write_bag(tmp_path / 'b', writing.stream('/camera', big), n_parts=4, storage='sqlite3')
    with open_bag(path) as bag:
        tracemalloc.start()
        try:
            n_frames = sum(frame.decode().shape == (320, 320, 3) for frame in bag.frames())
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert n_frames == 64
    assert peak < 3 << 20, 'of 19 MB'


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_an_unknown_topic_is_refused_with_those_there_are(bag: Path) -> None:
    with open_bag(bag) as opened, pytest.raises(BagTopicError, match=r'no topic /side.*/front/image_raw \(6\)'):
        opened.frames('/side')


def test_a_topic_of_another_type_is_refused_with_its_type(bag: Path) -> None:
    with open_bag(bag) as opened, pytest.raises(BagTopicError, match=r'/chatter .* type std_msgs/msg/String'):
        opened.frames('/chatter')


def test_one_of_several_topics_must_be_named_where_one_is_meant(bag: Path) -> None:
    with open_bag(bag) as opened, pytest.raises(BagTopicError, match='name one of'):
        opened.topic(None)


def test_a_range_without_a_frame_is_an_error(bag: Path) -> None:
    with open_bag(bag) as opened, pytest.raises(BagRangeError, match=r'no frame .* from 7.000 s to 8.000 s.* 0.510 s'):
        list(opened.frames(start_s=7, end_s=8))


@pytest.mark.parametrize('options', [{'every_s': 0}, {'start_s': float('nan')}, {'start_s': 2, 'end_s': 1}])
def test_a_range_that_makes_no_sense_is_refused_at_once(bag: Path, options: Any) -> None:
    with open_bag(bag) as opened, pytest.raises(BagRangeError):
        opened.frames(**options)


def test_a_bag_without_images_has_no_topics(tmp_path: Path) -> None:
    path = writing.write_bag(tmp_path / 'b', [Message('/chatter', START_NS, writing.text('hello'))])
    with open_bag(path) as bag:
        assert bag.topics == ()
        with pytest.raises(BagRangeError):
            list(bag.frames())


@pytest.mark.parametrize('storage', ['mcap', 'sqlite3'])
def test_a_truncated_file_is_named(tmp_path: Path, storage: Any) -> None:
    path = writing.write_bag(tmp_path / 'b', two_cameras(), storage=storage)
    file = writing.storage_file(path)
    file.write_bytes(file.read_bytes()[:20_000])
    with pytest.raises(BagDamagedError, match=rf'{file.name} is truncated or damaged.*recover'), open_bag(path) as bag:
        list(bag.frames())


@pytest.mark.parametrize(('data', 'error'), [(b'', BagDamagedError), (b'#ROSBAG V2.0\n', BagFormatError)])
def test_a_file_that_is_something_else_is_named(tmp_path: Path, data: bytes, error: type[Exception]) -> None:
    path = tmp_path / 'x.mcap'
    path.write_bytes(data)
    with pytest.raises(error, match=r'x\.mcap'), open_bag(path):
        pass


def test_what_is_no_bag_at_all_is_named(tmp_path: Path) -> None:
    for path, error in (
        (tmp_path / 'nothing', BagMissingError),
        (tmp_path, BagMissingError),
        (Path(__file__), BagFormatError),
    ):
        with pytest.raises(error, match=path.name), open_bag(path):
            pass


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    path = writing.write_bag(tmp_path / 'b', two_cameras(), n_parts=3)
    (path / 'b_1.mcap').unlink()
    with pytest.raises(BagMissingError, match=r'no b_1\.mcap'), open_bag(path):
        pass


@pytest.mark.parametrize(
    ('found', 'replaced', 'error'),
    [
        ('storage_identifier: mcap', 'storage_identifier: floppy', BagFormatError),
        ('b.mcap', '../../etc/passwd', BagFormatError),
        ('relative_file_paths', 'files_somewhere', BagDamagedError),
        ('rosbag2_bagfile_information', 'something', BagDamagedError),
        ('rosbag2_bagfile_information:', '{[', BagDamagedError),
    ],
)
def test_bad_metadata_is_named(tmp_path: Path, found: str, replaced: str, error: type[Exception]) -> None:
    path = writing.write_bag(tmp_path / 'b', two_cameras())
    metadata = path / 'metadata.yaml'
    assert found in metadata.read_text()
    metadata.write_text(metadata.read_text().replace(found, replaced))
    with pytest.raises(error, match=r'metadata\.yaml|passwd'), open_bag(path):
        pass


def test_messages_that_are_not_there_are_noted(bag: Path) -> None:
    metadata = bag / 'metadata.yaml'
    metadata.write_text(metadata.read_text().replace('  message_count: 13', '  message_count: 99'))
    with open_bag(bag) as opened:
        assert opened.notes == ['metadata.yaml counts 99 messages, the files hold 13']


def test_messages_in_the_log_of_sqlite_are_noted(tmp_path: Path) -> None:
    path = writing.write_bag(tmp_path / 'b', two_cameras(), storage='sqlite3')
    (path / 'b.db3-wal').write_bytes(b'not yet')
    with open_bag(path) as bag:
        assert 'wal_checkpoint' in bag.notes[0]


def test_a_broken_message_is_counted_and_the_others_are_read(tmp_path: Path) -> None:
    good = writing.stream('/camera', PICTURES[:3])
    cut = Message('/camera', START_NS + 1, b'\x28\xb5\x2f\xfd cut', 'sensor_msgs/msg/Image')
    path = writing.write_bag(tmp_path / 'b', [good[0], cut, *good[1:]])
    with open_bag(path) as bag:
        assert [frame.index for frame in bag.frames()] == [1, 2, 3]
        list(bag.frames())
        assert bag.n_broken == 1, 'once, however often it is read'
        assert (bag.broken[0].topic, bag.broken[0].index) == ('/camera', 0)
        assert 'is cut off' in bag.broken[0].problem


def test_a_frame_that_does_not_decode_says_which_it_is(tmp_path: Path) -> None:
    message = writing.serialized(writing.raw_image(PICTURES[0], START_NS))[:-100]
    path = writing.write_bag(tmp_path / 'b', [Message('/camera', START_NS, message, 'sensor_msgs/msg/Image')])
    with open_bag(path) as bag, pytest.raises(BadImageError, match=r'message 0 of /camera: .* cut off'):
        next(bag.frames()).decode()
