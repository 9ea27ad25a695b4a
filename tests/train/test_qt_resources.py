"""Pictures out of Qt's resource files: what was put in comes out, and damage is named."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mobilevlm_ros.errors import DatasetError
from mobilevlm_ros.train.nano_data.qt_resources import unpack_resources


def resources(files: dict[str, bytes], *, version: int = 2, flags: int = 0) -> bytes:
    """A resource file: a root, a folder in it, and the files in that."""
    names, contents, nodes = b'', b'', []
    after = bytes(8) if version > 1 else b''

    def name(text: str) -> int:
        nonlocal names
        place = len(names)
        names += struct.pack('>HI', len(text), 0) + text.encode('utf-16-be')
        return place

    nodes.append(struct.pack('>IHII', 0, 2, 1, 1) + after)
    nodes.append(struct.pack('>IHII', name('pictures'), 2, len(files), 2) + after)
    for text, content in files.items():
        stored = struct.pack('>I', len(content)) + zlib.compress(content) if flags & 1 else content
        nodes.append(struct.pack('>IHHHI', name(text), flags, 0, 0, len(contents)) + after)
        contents += struct.pack('>I', len(stored)) + stored
    head, tree = 24, b''.join(nodes)
    places = (head, head + len(tree), head + len(tree) + len(contents))
    return b'qres' + struct.pack('>IIIII', version, *places, 0) + tree + contents + names


@pytest.mark.parametrize('version', [1, 2, 3])
@pytest.mark.parametrize('flags', [0, 1])
def test_what_was_put_in_comes_out(tmp_path: Path, version: int, flags: int) -> None:
    files = {'a.jpg': b'first', 'ß.webp': b'second' * 100, 'note.txt': b'no picture'}
    (tmp_path / 'x.rcc').write_bytes(resources(files, version=version, flags=flags))
    assert unpack_resources(tmp_path / 'x.rcc', tmp_path / 'out', ('.jpg', '.webp')) == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir()} == {
        'a.jpg': b'first',
        'ß.webp': b'second' * 100,
    }


def test_a_name_with_a_path_is_left_out(tmp_path: Path) -> None:
    (tmp_path / 'x.rcc').write_bytes(resources({'../a.jpg': b'x'}))
    assert unpack_resources(tmp_path / 'x.rcc', tmp_path / 'out', ('.jpg',)) == 0


@pytest.mark.parametrize('data', [b'', b'qres', b'PK\3\4' + bytes(40), b'qres' + b'\xff' * 60])
def test_another_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / 'x.rcc').write_bytes(data)
    with pytest.raises(DatasetError, match='no resource file of Qt'):
        unpack_resources(tmp_path / 'x.rcc', tmp_path / 'out', ('.jpg',))


def test_zstandard_is_named(tmp_path: Path) -> None:
    (tmp_path / 'x.rcc').write_bytes(resources({'a.jpg': b'x'}, version=3, flags=4))
    with pytest.raises(DatasetError, match='Zstandard'):
        unpack_resources(tmp_path / 'x.rcc', tmp_path / 'out', ('.jpg',))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(place=st.integers(4, 150), value=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_harmless(tmp_path: Path, place: int, value: int) -> None:
    data = bytearray(resources({'a.jpg': b'first', 'b.jpg': b'second'}, flags=1))
    data[place % len(data)] = value
    (tmp_path / 'x.rcc').write_bytes(bytes(data))
    try:
        unpack_resources(tmp_path / 'x.rcc', tmp_path / 'out', ('.jpg',))
    except DatasetError:
        return
    assert all(path.parent == tmp_path / 'out' for path in (tmp_path / 'out').iterdir())
