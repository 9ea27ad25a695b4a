"""Text out of files, however large: documents in bounded pieces, each with the place where reading can go on.

Reads plain text (``.txt``, ``.text``, ``.md``) and JSON Lines (``.jsonl``, ``.ndjson``, ``.json``), packed with gzip,
bzip2 or xz or not at all. A line that cannot be used is a problem with a name, and is left out. Knows no tokens.

Blank lines at the start of a document are left out, and so is a document that has no others.
Memory holds one chunk, and for JSON Lines one line of at most 64 MiB. A document of plain text longer than a chunk is
given in pieces that end at a line, or between words if the line is that long.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from mobilevlm_ros.errors import DatasetError, DatasetMissingError
from mobilevlm_ros.train.shards import InputFile, Position

__all__ = ['Chunk', 'Piece', 'Problem', 'describe', 'find_inputs', 'read_chunks']

MAX_LINE_BYTES = 64 << 20
_TEXT = ('.txt', '.text', '.md')
_JSON_LINES = ('.jsonl', '.ndjson', '.json')
_PACKED: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    '.gz': lambda raw: cast(IO[bytes], gzip.GzipFile(fileobj=raw)),
    '.bz2': lambda raw: cast(IO[bytes], bz2.BZ2File(raw)),
    '.xz': lambda raw: cast(IO[bytes], lzma.LZMAFile(raw)),  # noqa: SIM115  whoever unpacks closes it
}
_HEAD_BYTES = 1 << 20
_BOM = b'\xef\xbb\xbf'


@dataclass(frozen=True)
class Piece:
    """A stretch of a document; a piece that only ends one may be empty."""

    text: str
    ends_document: bool


@dataclass(frozen=True)
class Problem:
    """A line that was left out: its place, and why in two words."""

    place: str
    kind: str


@dataclass
class Chunk:
    """What was read at once.

    :ivar after: where reading goes on after it.
    :ivar n_read: bytes of the files, as they lie on the disk, up to there.
    """

    after: Position
    n_read: int = field(compare=False)
    pieces: list[Piece] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def find_inputs(paths: Sequence[Path], out: Path) -> list[Path]:
    """The files among ``paths``, and those that are text by their name in and below folders, by name.

    :param out: where the result will lie; what is in it is not looked at.
    :raise DatasetMissingError: if there is no such file or folder, or nothing in it.
    :raise DatasetError: if a file is of a kind that is not read.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = (file for file in path.rglob('*') if file.parent.resolve() != out.resolve())
            inside = sorted(file for file in below if file.is_file() and _kind(file) is not None)
            if not inside:
                raise DatasetMissingError(f'there is no text in {path}; expected files such as {_expected()}')
            found += inside
        elif not path.is_file():
            raise DatasetMissingError(f'there is no file {path}')
        elif path.suffix == '.zst':
            raise DatasetError(f'{path} is packed with zstd, which Python does not read: run `zstd -d {path}` first')
        elif _kind(path) is None:
            raise DatasetError(f'{path} is not known to be text by its name; expected files such as {_expected()}')
        else:
            found.append(path)
    return found


def describe(path: Path) -> InputFile:
    """What tells a file from others, without reading all of it.

    :raise DatasetMissingError: if it cannot be read.
    """
    try:
        with path.open('rb') as file:
            head = hashlib.sha256(file.read(_HEAD_BYTES)).hexdigest()
        return InputFile(file=str(path), n_bytes=path.stat().st_size, head_sha256=head)
    except OSError as error:
        raise DatasetMissingError(f'{path} cannot be read: {error.strerror}') from error


def read_chunks(
    paths: Sequence[Path], start: Position, *, separator: str | None, field: str, chunk_bytes: int
) -> Iterator[Chunk]:
    """All that follows ``start``, in chunks of about ``chunk_bytes``; a chunk never spans two files.

    :param separator: a line that parts documents in plain text; None: a file is a document.
    :param field: of a line of JSON, with the text of a document.
    :raise DatasetError: if a file is damaged or cannot be read.
    """
    n_before = sum(path.stat().st_size for path in paths[: start.input])
    for number in range(start.input, len(paths)):
        path = paths[number]
        begin = start if number == start.input else Position(input=number)
        try:
            with path.open('rb') as raw, _unpacked(path, raw) as file:
                reader = _Lines(path, file, begin, chunk_bytes)
                found = reader.json_lines(field) if _kind(path) == 'json' else reader.text(separator)
                for chunk in found:
                    chunk.n_read = n_before + raw.tell()
                    yield chunk
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            raise DatasetError(f'{path} cannot be read to its end, it may be truncated or damaged: {error}') from error
        n_before += path.stat().st_size


class _Lines:
    """Walks through the lines of one file and collects chunks of them."""

    def __init__(self, path: Path, file: IO[bytes], begin: Position, chunk_bytes: int) -> None:
        self._path, self._file, self._chunk_bytes = path, file, chunk_bytes
        self._input, self._offset, self._line, self._inside = begin.input, begin.offset, begin.line, begin.inside
        self._chunk = Chunk(begin, 0)
        self._n_bytes = 0
        file.seek(max(0, begin.offset - 1))
        self._at_line_start = begin.offset == 0 or file.read(1) == b'\n'

    def json_lines(self, field: str) -> Iterator[Chunk]:
        while line := self._file.readline(MAX_LINE_BYTES):
            self._offset += len(line)
            self._line += 1
            if len(line) == MAX_LINE_BYTES and not line.endswith(b'\n'):
                self._problem(f'longer than {MAX_LINE_BYTES >> 20} MiB')
                while rest := self._file.readline(self._chunk_bytes):
                    self._offset += len(rest)
                    if rest.endswith(b'\n'):
                        break
            elif line.strip():
                text, problem = _text_of(line.removeprefix(_BOM), field)
                if problem:
                    self._problem(problem)
                else:
                    self._chunk.pieces.append(Piece(text, True))
            self._n_bytes += len(line)
            if self._n_bytes >= self._chunk_bytes:
                yield self._take()
        yield self._take(at_end=True)

    def text(self, separator: str | None) -> Iterator[Chunk]:
        mark = None if separator is None else separator.encode()
        waiting: list[str] = []
        rest = b''
        while block := rest + self._file.readline(self._chunk_bytes - len(rest)):
            whole = block.endswith(b'\n')
            cut = len(block) if whole or len(block) < self._chunk_bytes else _between_words(block)
            block, rest = block[:cut], block[cut:]
            first = self._offset == 0
            self._offset += len(block)
            self._line += self._at_line_start
            if self._at_line_start and not rest and block.rstrip(b'\r\n') == mark:
                self._end_document(waiting)
            else:
                try:
                    text = (block.removeprefix(_BOM) if first else block).decode()
                except UnicodeDecodeError:
                    self._problem('not UTF-8')
                else:
                    if waiting or self._inside or text.strip():
                        waiting.append(text)
            self._at_line_start = whole and not rest
            self._n_bytes += len(block)
            if self._n_bytes >= self._chunk_bytes:
                if waiting:
                    self._chunk.pieces.append(Piece(''.join(waiting), False))
                    self._inside = True
                    waiting.clear()
                yield self._take()
        self._end_document(waiting)
        yield self._take(at_end=True)

    def _end_document(self, waiting: list[str]) -> None:
        if self._inside or waiting:
            self._chunk.pieces.append(Piece(''.join(waiting), True))
        waiting.clear()
        self._inside = False

    def _problem(self, kind: str) -> None:
        self._chunk.problems.append(Problem(f'{self._path}:{self._line}', kind))

    def _take(self, *, at_end: bool = False) -> Chunk:
        chunk = self._chunk
        if at_end:
            chunk.after = Position(input=self._input + 1)
        else:
            chunk.after = Position(input=self._input, offset=self._offset, line=self._line, inside=self._inside)
        self._chunk, self._n_bytes = Chunk(chunk.after, 0), 0
        return chunk


def _text_of(line: bytes, field: str) -> tuple[str, str]:
    """The text of a line of JSON, or what is wrong with it."""
    try:
        record: Any = json.loads(line)
    except UnicodeDecodeError:
        return '', 'not UTF-8'
    except (ValueError, RecursionError):
        return '', 'no JSON'
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        return '', f'no text under {field!r}'
    if not text.strip():
        return '', 'empty text'
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        return '', 'no valid Unicode'
    return text, ''


def _between_words(block: bytes) -> int:
    """Where to cut a block of a line that goes on: before its last word, or else before its last character."""
    space = block.rfind(b' ')
    if space > 0:
        return space
    for back in range(1, min(4, len(block) - 1) + 1):
        if block[-back] & 0xC0 != 0x80:  # the first byte of a character
            return len(block) - back
    return len(block)


def _kind(path: Path) -> str | None:
    suffix = Path(path.stem).suffix if path.suffix in _PACKED else path.suffix
    return 'text' if suffix in _TEXT else 'json' if suffix in _JSON_LINES else None


def _unpacked(path: Path, raw: IO[bytes]) -> IO[bytes]:
    unpack = _PACKED.get(path.suffix)
    return raw if unpack is None else unpack(raw)


def _expected() -> str:
    return f'{", ".join(_TEXT + _JSON_LINES)}, each also with {", ".join(_PACKED)}'
