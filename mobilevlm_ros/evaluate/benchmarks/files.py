"""Reads the files of benchmarks: JSON, JSON lines and tables, which come from anywhere.

Every size has a bound, every error names file, place, what was found and what was expected. Nothing here knows what a
question is.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mobilevlm_ros.errors import BenchmarkError

__all__ = ['Record', 'find', 'find_image', 'read_document', 'read_lines', 'read_table', 'shown']

MAX_LINE_CHARACTERS = 1 << 22
"""Longest line of a JSON-lines file."""
MAX_DOCUMENT_BYTES = 1 << 27
"""Largest JSON document; the largest published one, ScienceQA's problems, has some 30 MB."""
MAX_VALUES = 1 << 23
"""Most values in a JSON document: a few bytes of text can be a hundred of memory."""
MAX_CELL_CHARACTERS = 1 << 25
"""Longest cell of a table, such as an image in base64: 24 MiB of file."""
_MAX_ROW_CHARACTERS = MAX_CELL_CHARACTERS + (1 << 20)


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file, and where it stands.

    :ivar place: file and line, row or key, for errors.
    """

    values: Mapping[str, Any]
    place: str

    def text(self, key: str) -> str:
        """A value that has to be a text.

        :raise BenchmarkError: if it is missing, or none.
        """
        value = self._value(key)
        if not isinstance(value, str):
            raise BenchmarkError(f'{self.place}: "{key}" should be a text, found {shown(value)}')
        return value

    def whole(self, key: str) -> int:
        """A value that has to be a whole number, from 0 on.

        :raise BenchmarkError: if it is missing, or none.
        """
        value = self._value(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise BenchmarkError(f'{self.place}: "{key}" should be a whole number, found {shown(value)}')
        return value

    def identity(self, key: str) -> int | str:
        """A value that names something: a text or a whole number.

        :raise BenchmarkError: if it is missing, or neither.
        """
        value = self._value(key)
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise BenchmarkError(f'{self.place}: "{key}" should be a number or a text, found {shown(value)}')
        return value

    def texts(self, key: str) -> list[str]:
        """A value that has to be a list of texts.

        :raise BenchmarkError: if it is missing, or none.
        """
        value = self._value(key)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise BenchmarkError(f'{self.place}: "{key}" should be a list of texts, found {shown(value)}')
        return value

    def _value(self, key: str) -> Any:
        if key not in self.values:
            raise BenchmarkError(f'{self.place}: "{key}" is missing; there are {shown(sorted(self.values))}')
        return self.values[key]

    @classmethod
    def of(cls, value: object, place: str) -> Record:
        """The record that a value of JSON is.

        :raise BenchmarkError: if it is none.
        """
        if not isinstance(value, dict):
            raise BenchmarkError(f'{place}: expected an object, found {shown(value)}')
        return cls(value, place)


def shown(value: object) -> str:
    """A value in an error: short, and on one line."""
    text = json.dumps(value, ensure_ascii=False, default=repr) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 120 else f'{text[:100]}... ({len(text)} characters)'


def find(data: Path, *names: str) -> Path:
    """The first of ``names`` that is in the folder; the published layouts differ a little.

    :raise BenchmarkError: if none is.
    """
    for name in names:
        if (data / name).exists():
            return data / name
    raise BenchmarkError(f'{data} has none of {", ".join(names)}: give the folder of the benchmark with --data')


def find_image(folder: Path, name: str, place: str) -> Path:
    """The file of an image below a folder; the names come with the data, so that they may not lead out of it.

    :raise BenchmarkError: if it is missing, or outside.
    """
    relative = os.path.normpath(name)
    if '\0' in name or os.path.isabs(name) or relative.split(os.sep)[0] in (os.pardir, os.curdir):
        raise BenchmarkError(f'{place}: the image {shown(name)} does not lie in {folder}')
    path = folder / relative
    if not path.is_file():
        raise BenchmarkError(f'{place}: the image {path} is not there')
    return path


def read_lines(path: Path) -> Iterator[Record]:
    """The objects of a JSON-lines file; empty lines are skipped.

    :raise BenchmarkError: if the file cannot be read, or a line is no object.
    """
    with _opened(path) as file:
        for number, line in enumerate(_bounded_lines(path, file, MAX_LINE_CHARACTERS), start=1):
            if line.strip():
                place = f'{path}, line {number}'
                yield Record.of(_parsed(line, place), place)


def read_document(path: Path) -> Any:
    """The value of a JSON file.

    :raise BenchmarkError: if the file cannot be read, is too large, or is no JSON.
    """
    with _opened(path) as file:
        if (size := path.stat().st_size) > MAX_DOCUMENT_BYTES:
            raise BenchmarkError(f'{path} has {size} bytes; at most {MAX_DOCUMENT_BYTES} are read')
        text = _read(path, file)
    n_values = sum(map(text.count, ',[{'))
    if n_values > MAX_VALUES:
        raise BenchmarkError(f'{path} holds some {n_values} values; at most {MAX_VALUES} are read')
    return _parsed(text, str(path))


def read_table(path: Path) -> Iterator[Record]:
    r"""The rows of a table with tabulators between cells, and quotes around cells as spreadsheets write them.

    :raise BenchmarkError: if the file cannot be read, or a row does not have a cell for each column.
    """
    with _opened(path, newline='') as file:
        rows = _rows(path, csv.reader(_bounded_lines(path, file, _MAX_ROW_CHARACTERS), delimiter='\t', strict=True))
        header = next(rows, None)
        if not header:
            raise BenchmarkError(f'{path} is empty: expected a line with the names of the columns')
        for number, row in enumerate(rows, start=1):
            place = f'{path}, row {number}'
            if len(row) != len(header):
                raise BenchmarkError(f'{place} has {len(row)} cells, expected {len(header)} ({", ".join(header)})')
            yield Record(dict(zip(header, row, strict=True)), place)


def _opened(path: Path, newline: str | None = None) -> IO[str]:
    try:
        return path.open(encoding='utf-8-sig', newline=newline)
    except OSError as error:
        raise BenchmarkError(f'{path} cannot be read: {error.strerror}') from error


def _read(path: Path, file: IO[str], n_characters: int = -1, *, line: bool = False) -> str:
    try:
        return file.readline(n_characters) if line else file.read(n_characters)
    except UnicodeDecodeError as error:
        raise BenchmarkError(f'{path} is no UTF-8 text: {error.reason} at byte {error.start} of a block') from error
    except OSError as error:
        raise BenchmarkError(f'{path} cannot be read: {error.strerror}') from error


def _bounded_lines(path: Path, file: IO[str], longest: int) -> Iterator[str]:
    number = 0
    while line := _read(path, file, longest + 1, line=True):
        number += 1
        if len(line) > longest:
            raise BenchmarkError(f'{path}, line {number}, has more than {longest} characters')
        yield line


def _rows(path: Path, reader: Any) -> Iterator[list[str]]:
    while True:
        # The limit belongs to the whole process; it is ours while a row is read.
        before = csv.field_size_limit(MAX_CELL_CHARACTERS)
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise BenchmarkError(f'{path}, line {reader.line_num}: no table with tabulators: {error}') from error
        finally:
            csv.field_size_limit(before)
        if row:
            yield row


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f'line {error.lineno}, ' if error.lineno > 1 else ''
        raise BenchmarkError(f'{place}: no JSON at {line}column {error.colno}: {error.msg}') from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists in lists
        raise BenchmarkError(f'{place}: no JSON that can be read: {error}') from error
