"""Which files a bag consists of, in which order, ready to be read.

``metadata.yaml`` names them. Where it is missing or the path is that of a single file, the files themselves are enough;
a note says so, and so does everything else that makes less of a bag than was recorded. Nothing here is trusted: names
cannot leave the folder, and a file is what its first bytes are.
"""

from __future__ import annotations

import errno
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml

from mobilevlm_ros.errors import BagDamagedError, BagFormatError, BagMissingError, DiskSpaceError

__all__ = ['Parts', 'find_parts', 'unpack', 'unreadable']

_METADATA = 'metadata.yaml'
_STORAGES = ('.mcap', '.db3')
_COMPRESSED = ('.zstd', '.zst')
_MOST_METADATA_BYTES = 8 << 20
_MAGIC = {'.mcap': b'\x89MCAP0\r\n', '.db3': b'SQLite format 3\0'}
_HELP = {
    '.mcap': 'If the recording was cut off, `mcap recover` makes a whole file of it.',
    '.db3': "If the recording was cut off, sqlite3's command .recover makes a whole file of it.",
}


@dataclass
class Parts:
    """The files of a bag.

    :ivar paths: in the order of recording; ``.mcap`` or ``.db3``, perhaps with ``.zstd`` behind it.
    :ivar n_messages: how many messages the metadata counts; None without metadata.
    :ivar notes: what the reader should know, for people.
    """

    paths: list[Path]
    n_messages: int | None = None
    notes: list[str] = field(default_factory=list)


def find_parts(path: Path) -> Parts:
    """The files of the bag at ``path``, a folder or one file.

    :raise BagMissingError: if there is nothing, or a part that the metadata names is not there.
    :raise BagFormatError: if it is no rosbag2.
    :raise BagDamagedError: if the metadata cannot be read.
    """
    if path.is_file():
        if path.name == _METADATA:
            return find_parts(path.parent)
        _storage_of(path)
        parts = Parts([path])
        if (path.parent / _METADATA).is_file():
            parts.notes.append(f'only {path.name} is read; {path.parent} may hold more parts of the same recording')
    elif not path.is_dir():
        raise BagMissingError(f'there is no bag {path}: expected a folder of rosbag2, or a .mcap or .db3 file')
    elif (path / _METADATA).is_file():
        parts = _described(path)
    else:
        found = [file for file in path.iterdir() if file.is_file() and _suffix(file) in _STORAGES]
        if not found:
            raise BagMissingError(f'{path} is no bag: it holds no {_METADATA}, no .mcap and no .db3 file')
        parts = Parts(sorted(found, key=_natural))
        names = ', '.join(file.name for file in parts.paths)
        parts.notes.append(
            f'{path} has no {_METADATA}, so its files are read in the order of their names: {names}. '
            '`ros2 bag reindex` writes one'
        )
    for part in parts.paths:
        log = part.with_name(f'{part.name}-wal')
        if log.is_file() and log.stat().st_size:
            parts.notes.append(f'{log.name} holds messages that are not in {part.name} yet, and they are not read: '
                               f'run `sqlite3 {part.name} "pragma wal_checkpoint"`')  # fmt: skip
    return parts


def unpack(part: Path, copy: Path) -> Path:
    """A file that rosbags can open: the part itself, or its decompressed copy.

    :param copy: where that is written; the suffix of the storage is added.
    :raise BagDamagedError: if it cannot be decompressed, or is not what its name says.
    :raise DiskSpaceError: if there is no room for the copy.
    """
    storage = _storage_of(part)
    copy = copy.with_suffix(storage)
    if part.suffix in _COMPRESSED:
        _decompress(part, copy)
    elif set('?#%') & set(str(part)):
        copy.symlink_to(part.resolve())  # rosbags hands the path to sqlite as a URI, where these mean something
    else:
        copy = part
    with copy.open('rb') as file:
        start = file.read(16)
    if start.startswith(b'#ROSBAG'):
        raise BagFormatError(f'{part} is a bag of ROS 1: convert it with `rosbags-convert --src {part} --dst FOLDER`')
    if not start.startswith(_MAGIC[storage]):
        found = f'starts with {start[:8]!r}' if start else 'is empty'
        raise BagDamagedError(f'{part} {found}; expected {_MAGIC[storage]!r}. {_HELP[storage]}')
    return copy


def unreadable(part: Path, problem: object) -> BagDamagedError:
    """The error of a part that rosbags cannot make sense of."""
    problem = str(problem).rstrip('.') or type(problem).__name__
    return BagDamagedError(f'{part} is truncated or damaged: {problem}. {_HELP.get(_suffix(part), "")}'.rstrip())


def _suffix(path: Path) -> str:
    """What kind of storage, below the compression."""
    return PurePath(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def _storage_of(path: Path) -> str:
    suffix = _suffix(path)
    if suffix not in _STORAGES:
        hint = ' (a bag of ROS 1: convert it with rosbags-convert)' if suffix == '.bag' else ''
        raise BagFormatError(f'{path} is no .mcap and no .db3 file{hint}: only rosbag2 is read')
    return suffix


def _natural(path: Path) -> list[tuple[int, str]]:
    """Orders ``bag_2`` before ``bag_10``."""
    return [(int(run), '') if run.isdigit() else (-1, run) for run in re.split(r'([0-9]+)', path.name)]


def _described(folder: Path) -> Parts:
    path = folder / _METADATA
    information = _read_metadata(path)
    names = information.get('relative_file_paths')
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise BagDamagedError(f'{path}: relative_file_paths is a list of files, found {str(names)[:80]}')
    if information.get('storage_identifier') not in ('mcap', 'sqlite3'):
        raise BagFormatError(
            f'{path} names the storage {str(information.get("storage_identifier"))[:40]!r}; read are mcap and sqlite3'
        )
    if information.get('compression_format') not in (None, '', 'zstd'):
        raise BagFormatError(
            f'{path} names the compression {str(information["compression_format"])[:40]!r}; read is zstd'
        )
    paths = [folder / PurePath(name).name for name in names]
    for part in paths:
        _storage_of(part)
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise BagMissingError(f'{path} names {len(paths)} files, but there is no {", ".join(missing)} beside it')
    n_messages = information.get('message_count')
    return Parts(paths, n_messages if isinstance(n_messages, int) else None)


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        with path.open('rb') as file:
            text = file.read(_MOST_METADATA_BYTES + 1)
        if len(text) > _MOST_METADATA_BYTES:
            raise BagDamagedError(f'{path} is larger than {_MOST_METADATA_BYTES >> 20} MiB, which no metadata is')
        loaded = yaml.safe_load(text)
        information = loaded['rosbag2_bagfile_information']
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise BagDamagedError(f'{path} cannot be read: {error}') from error
    except (KeyError, TypeError, IndexError) as error:
        raise BagDamagedError(f'{path} has no entry rosbag2_bagfile_information') from error
    if not isinstance(information, dict):
        raise BagDamagedError(f'{path}: rosbag2_bagfile_information is a mapping, found {str(information)[:80]}')
    return information


def _decompress(part: Path, target: Path) -> None:
    from backports import zstd

    try:
        with zstd.open(part, 'rb') as source, target.open('wb') as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskSpaceError(
                f'no room in {target.parent} to decompress {part}: set TMPDIR to a folder with more, or decompress it'
            ) from error
        raise unreadable(part, error) from error
    except (EOFError, zstd.ZstdError) as error:
        raise unreadable(part, error) from error
