"""Checkpoints of a run: written beside their place and renamed when whole, the newest kept, the newest found again.

Whatever ends a run (a kill, a full disk, a lost socket) leaves the checkpoints that were there, and nothing that looks
like one and is not. Knows what a checkpoint folder is called, not what is in it.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mobilevlm_ros.errors import DiskSpaceError, MobileVLMError, TrainingError

__all__ = ['PARTIAL', 'check_room', 'checkpoints', 'disk_errors_named', 'keep_newest', 'newest', 'publish_folder']

PARTIAL = 'partial'
"""Folder, below that of the checkpoints, in which one is written."""
_NAME = re.compile(r'checkpoint-(\d+)\Z')
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LEAST_FREE = 1 << 20


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found)]


def newest(folder: Path) -> Path | None:
    """The checkpoint to go on from."""
    return next(reversed(checkpoints(folder)), None)


def keep_newest(folder: Path, n: int) -> None:
    """Remove all but the newest ``n``."""
    for path in checkpoints(folder)[:-n]:
        # Renamed first, so that one which is half removed is not taken for one.
        doomed = path.with_name(f'{path.name}.old')
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def publish_folder(written: Path, place: Path) -> None:
    """Move a folder to its place once its bytes are on the disk; one that is there already is replaced.

    :raise OSError: if it cannot be moved.
    """
    for path in written.rglob('*'):
        if path.is_file():
            with path.open('rb') as file:
                os.fsync(file.fileno())
    if place.exists():
        shutil.rmtree(place)
    written.rename(place)


def check_room(folder: Path, needed: int, last: Path | None) -> None:
    """That there is room for so many bytes.

    :raise DiskSpaceError: if there is not; names the checkpoint to go on from.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskSpaceError(
            f'a checkpoint takes {_mib(needed)}, but {folder} has {_mib(free)} free. {_advice(folder, last)}'
        )


@contextmanager
def disk_errors_named(folder: Path, last: Path | None) -> Iterator[None]:
    """Errors of writing as errors of this package.

    torch.save tells of a full disk only that it failed to write, so the disk is looked at.

    :raise DiskSpaceError: if the disk is full.
    :raise TrainingError: if it cannot be written for another reason.
    """
    try:
        yield
    except MobileVLMError:
        raise
    except Exception as error:  # safetensors and torch raise errors of their own
        is_full = isinstance(error, OSError) and error.errno in _FULL
        if is_full or any(sign in str(error) for sign in ('No space left', 'os error 28')):
            raise DiskSpaceError(f'the disk is full. {_advice(folder, last)}') from error
        if shutil.disk_usage(folder).free < _LEAST_FREE:
            raise DiskSpaceError(f'the disk is full. {_advice(folder, last)}') from error
        if isinstance(error, OSError):
            raise TrainingError(f'{error}. {_advice(folder, last)}') from error
        raise


def _advice(folder: Path, last: Path | None) -> str:
    kept = f'{last.name} is intact' if last is not None else 'There is no earlier checkpoint'
    return f'{kept}: free some space on the disk of {folder}, then run the same command with --resume'


def _mib(n_bytes: int) -> str:
    return f'{-(-n_bytes >> 20)} MiB'
