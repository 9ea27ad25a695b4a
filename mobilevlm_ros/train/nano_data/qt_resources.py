"""Pictures out of Qt's binary resource files (``.rcc``), in which Debian's educational programs keep theirs.

A file is a header, a tree of nodes of fixed size, names in UTF-16 and the contents, which may be compressed by zlib;
all numbers are big-endian. Source: Qt, ``qtbase/src/corelib/io/qresource.cpp`` (format versions 1 to 3).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from mobilevlm_ros.errors import DatasetError

__all__ = ['unpack_resources']

_MAGIC = b'qres'
_COMPRESSED, _FOLDER, _ZSTD = 1, 2, 4
_MOST_FILES = 100_000
_MOST_BYTES = 1 << 28


def unpack_resources(path: Path, folder: Path, suffixes: tuple[str, ...]) -> int:
    """Write the files with one of the suffixes flat into ``folder``; returns their number.

    :raise DatasetError: if it is no such file, or is damaged.
    """
    data = path.read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    n = 0
    try:
        for name, content in _files(data):
            if name.endswith(suffixes) and '/' not in name and '\\' not in name:
                (folder / name).write_bytes(content)
                n += 1
    except (struct.error, zlib.error, UnicodeDecodeError, ValueError) as error:
        raise DatasetError(f'{path} is no resource file of Qt, or is damaged: {error}') from error
    return n


def _files(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file.

    :raise ValueError: if it is malformed.
    """
    if data[:4] != _MAGIC:
        raise ValueError('it does not start with "qres"')
    version, tree, contents, names = struct.unpack_from('>4I', data, 4)
    node_bytes = 14 if version < 2 else 22
    todo, n_seen = [0], 0
    while todo:
        place = tree + todo.pop() * node_bytes
        n_seen += 1
        if n_seen > _MOST_FILES:
            raise ValueError(f'it lists more than {_MOST_FILES} files')
        name_at, flags = struct.unpack_from('>IH', data, place)
        if flags & _FOLDER:
            n, first = struct.unpack_from('>II', data, place + 6)
            if n > _MOST_FILES:
                raise ValueError(f'a folder of it has {n} files')
            todo += range(first + n - 1, first - 1, -1)
            continue
        (content_at,) = struct.unpack_from('>I', data, place + 10)
        yield _name(data, names + name_at), _content(data, contents + content_at, flags)


def _name(data: bytes, place: int) -> str:
    (n,) = struct.unpack_from('>H', data, place)
    return data[place + 6 : place + 6 + 2 * n].decode('utf-16-be')


def _content(data: bytes, place: int, flags: int) -> bytes:
    (n,) = struct.unpack_from('>I', data, place)
    content = data[place + 4 : place + 4 + n]
    if len(content) != n:
        raise ValueError('it was cut off')
    if flags & _ZSTD:
        raise ValueError('it is compressed by Zstandard, which is not read here')
    if not flags & _COMPRESSED:
        return content
    unpacker = zlib.decompressobj()
    found = unpacker.decompress(content[4:], _MOST_BYTES)
    if not unpacker.eof:
        raise ValueError('a file of it is larger than 256 MiB, or was cut off')
    return found
