"""The results of an evaluation on disk: one answer a line, and a description of the run beside them.

Lines are appended and put onto the disk in batches, so that a run that is killed loses seconds of work. What is there
is never rewritten: a run that goes on appends. ``run.json`` is replaced as a whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from mobilevlm_ros.errors import DiskSpaceError, EvaluationError

__all__ = ['RESULTS', 'RUN', 'ResultsWriter', 'read_results', 'read_run', 'replace_file', 'write_run']

RESULTS = 'results.jsonl'
RUN = 'run.json'
FORMAT_VERSION = 1
_MOST_UNSYNCED = 64
_SYNC_EVERY_S = 2.0


def read_run(out: Path) -> dict[str, Any]:
    """The description of the run in a folder.

    :raise EvaluationError: if there is none, or it is not one that this version reads.
    """
    path = out / RUN
    try:
        run = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise EvaluationError(f'{out} holds no evaluation: there is no {RUN} (mobilevlm evaluate bag)') from error
    except (OSError, ValueError, RecursionError) as error:
        raise EvaluationError(f'{path} cannot be read: {error}') from error
    if not isinstance(run, dict) or run.get('format_version') != FORMAT_VERSION:
        found = run.get('format_version') if isinstance(run, dict) else type(run).__name__
        raise EvaluationError(f'{path} has format version {found!r}; this version reads {FORMAT_VERSION}')
    return run


def write_run(out: Path, run: Mapping[str, Any]) -> None:
    """Write or replace the description of a run.

    :raise DiskSpaceError: if there is no room; the old one stays.
    :raise EvaluationError: if it cannot be written.
    """
    text = json.dumps({'format_version': FORMAT_VERSION, **run}, ensure_ascii=False, indent=1)
    replace_file(out / RUN, text.encode())


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that is there as a whole, or not at all.

    :raise DiskSpaceError: if there is no room; what was there before stays.
    :raise EvaluationError: if it cannot be written.
    """
    partial = path.with_name(f'{path.name}.partial')
    try:
        try:
            partial.write_bytes(data)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _unwritten(path, error) from error


def read_results(out: Path) -> Iterator[dict[str, Any]]:
    """The answers in a folder, one after the other; a last line that was cut off when the run was killed is left out.

    :raise EvaluationError: if there are none, or a line is damaged; names the line.
    """
    path = out / RESULTS
    try:
        with path.open('rb') as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b'\n'):
                    return
                yield _row(line, f'{path}, line {number}')
    except OSError as error:
        raise EvaluationError(f'{path} cannot be read: {error.strerror}') from error


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f'{where} is damaged ({error}): delete that line to leave its answer out') from error
    if not isinstance(row, dict) or not isinstance(row.get('key'), str):
        raise EvaluationError(f'{where} is no answer: expected an object with a key, found {line[:60]!r}')
    return row


class ResultsWriter:
    """Appends answers, and knows which there are already.

    :raise EvaluationError: if there are answers in the folder that cannot be read.
    :raise DiskSpaceError: if there is no room.
    """

    def __init__(self, out: Path) -> None:
        self._path = out / RESULTS
        self._known: set[bytes] = set()
        self._unsynced = 0
        self._synced_s = time.monotonic()
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self._path.open('ab', buffering=0)
            for row in read_results(out):
                self._known.add(_digest(row['key']))
            self._end = self._length_of_whole_lines()
            self._file.truncate(self._end)
        except OSError as error:
            raise _unwritten(self._path, error) from error
        self.n_rows = len(self._known)

    def __contains__(self, key: str) -> bool:
        """Whether the answer was there when the writer was opened."""
        return _digest(key) in self._known

    def add(self, row: Mapping[str, Any]) -> None:
        """Append an answer.

        :raise DiskSpaceError: if there is no room; all answers before it are kept.
        """
        line = json.dumps(row, ensure_ascii=False).encode(errors='replace') + b'\n'
        try:
            self._write(line)
            self._unsynced += 1
            if self._unsynced >= _MOST_UNSYNCED or time.monotonic() - self._synced_s > _SYNC_EVERY_S:
                self.sync()
        except OSError as error:
            raise _unwritten(self._path, error) from error
        self.n_rows += 1

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        try:
            while rest:  # a full disk may take a part of a line before it says so
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(self._end)
            raise
        self._end += len(line)

    def sync(self) -> None:
        """Put everything onto the disk."""
        os.fsync(self._file.fileno())
        self._unsynced, self._synced_s = 0, time.monotonic()

    def _length_of_whole_lines(self) -> int:
        size = self._path.stat().st_size
        with self._path.open('rb') as file:
            while size:
                start = max(0, size - (1 << 16))
                file.seek(start)
                newline = file.read(size - start).rfind(b'\n')
                if newline >= 0:
                    return start + newline + 1
                size = start
        return 0

    def __enter__(self) -> ResultsWriter:
        """Use it in a ``with`` statement."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Put everything onto the disk, and close."""
        try:
            self.sync()
        except OSError as failed:
            if kind is None:
                raise _unwritten(self._path, failed) from failed
        finally:
            self._file.close()


def _digest(key: str) -> bytes:
    """A long run has millions of keys, so that only as much of each is kept as tells them apart."""
    return hashlib.blake2b(key.encode(errors='replace'), digest_size=10).digest()


def _unwritten(path: Path, error: OSError) -> DiskSpaceError | EvaluationError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskSpaceError(
            f'the disk of {path.parent} is full ({error.strerror}): all answers before this one are kept; make room '
            'and run the same command again, which goes on from there'
        )
    return EvaluationError(f'{path} cannot be written: {error.strerror or error}')
