"""Reads a JSON array or JSON lines one value at a time, with the place of every mistake and bounds on every size.

A file of training data may have gigabytes and come from anywhere. Only one value's text is held at a time, none longer
than ``MAX_CHARACTERS``.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from mobilevlm_ros.errors import DatasetError, DatasetMissingError, DatasetSyntaxError

__all__ = ['MAX_CHARACTERS', 'Entry', 'read_entries']

MAX_CHARACTERS = 1 << 22
"""Longest value that is read; a dialogue that fills a context of 2048 tokens has some 10,000."""
_BLOCK_BYTES = 1 << 18
_SPACE = ' \t\r\n'
_OF_NUMBERS = '0123456789.eE+-'
_NO_UTF_8 = re.compile('[\udc80-\udcff]')
"""What the decoder makes of bytes that are no UTF-8; in JSON's own escapes these are plain letters and digits."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One value of the file, or why it is none.

    :ivar line: where it starts, counted from 1.
    :ivar error: what is wrong with this value alone, so that the next can be read; empty if nothing is.
    """

    line: int
    value: object
    error: str = ''


def read_entries(path: Path) -> Iterator[Entry]:
    """The values of the array, or of the lines if the file does not start with ``[``.

    :raise DatasetMissingError: if there is no such file.
    :raise DatasetSyntaxError: if the file is empty, or an array is broken off or malformed: with the place of the
        mistake, after the values before it.
    :raise DatasetError: if the file cannot be read.
    """
    if not path.is_file():
        what = 'is a folder' if path.is_dir() else 'is not there'
        raise DatasetMissingError(f'{path} {what}: give a file of dialogues, JSON or JSON lines')
    try:
        with path.open('rb') as file:
            first = file.read(1)
            while first and first in b'\xef\xbb\xbf \t\r\n':  # a byte order mark, too
                first = file.read(1)
            if not first:
                raise DatasetSyntaxError(f'{path} is empty: expected a JSON array of records, or one record a line')
            file.seek(0)
            yield from _array(path, file) if first == b'[' else _lines(path, file)
    except OSError as error:
        raise DatasetError(f'{path} cannot be read: {error.strerror}') from error


def _lines(path: Path, file: BinaryIO) -> Iterator[Entry]:
    number = 0
    while raw := file.readline(MAX_CHARACTERS):
        number += 1
        if len(raw) == MAX_CHARACTERS and not raw.endswith(b'\n'):
            yield Entry(number, None, f'the line has more than {MAX_CHARACTERS} bytes')
            while raw and not raw.endswith(b'\n'):
                raw = file.readline(MAX_CHARACTERS)
            continue
        try:
            text = raw.decode('utf-8-sig' if number == 1 else 'utf-8').strip(_SPACE)
            if text:
                yield Entry(number, json.loads(text))
        except UnicodeDecodeError as error:
            yield Entry(number, None, f'no UTF-8 at byte {error.start + 1} of the line: {error.reason}')
        except json.JSONDecodeError as error:
            yield Entry(number, None, f'no JSON at column {error.colno}: {error.msg}')
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists in lists
            yield Entry(number, None, f'no JSON that can be read: {error}')


def _array(path: Path, file: BinaryIO) -> Iterator[Entry]:
    text = _Text(path, file)
    text.skip_space()
    text.take('[')
    text.skip_space()
    if text.peek() == ']':
        text.take(']')
    else:
        while True:
            text.skip_space()
            yield text.value()
            text.skip_space()
            if text.take(',]') == ']':
                break
    text.skip_space()
    if text.peek():
        text.fail('expected the end of the file after the array')


class _Text:
    """The unread rest of a file, fetched block by block."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._decoder = codecs.getincrementaldecoder('utf-8-sig')('surrogateescape')
        self._json = json.JSONDecoder()
        self._buffer = ''
        self._at = 0
        self._line = 1  # of self._buffer[self._at]
        self._column = 1
        self._ended = False

    def fail(self, message: str, offset: int = 0) -> NoReturn:
        """:raise DatasetSyntaxError: always; ``offset`` characters from here."""
        line, column = self._place(offset)
        raise DatasetSyntaxError(f'{self._path}, line {line}, column {column}: {message}')

    def peek(self) -> str:
        """The next character; empty at the end of the file."""
        while self._at == len(self._buffer) and self._more():
            pass
        return self._buffer[self._at : self._at + 1]

    def take(self, expected: str) -> str:
        """Read one of the expected characters."""
        found = self.peek()
        if not found:
            self.fail('the file ends in the middle of the array: is it cut off?')
        if found not in expected:
            self.fail(f'expected {" or ".join(expected)}, found {found!r}')
        self._advance(1)
        return found

    def skip_space(self) -> None:
        """Go on to the next character that is no white space."""
        while (found := self.peek()) and found in _SPACE:
            self._advance(1)

    def value(self) -> Entry:
        """Read the value that starts here."""
        line = self._line
        while True:
            mistake, offset, end = '', 0, -1
            try:
                value, end = self._json.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                mistake, offset = error.msg, error.pos - self._at
            except (ValueError, RecursionError) as error:
                mistake = str(error)
            # A number may go on in the next block; "0." is read as 0, with more to come.
            if end >= 0 and (self._ended or self._buffer[end:].lstrip(_OF_NUMBERS)):
                bad_byte = _NO_UTF_8.search(self._buffer, self._at, end)
                error_text = f'no UTF-8 {bad_byte.start() - self._at} characters into it' if bad_byte else ''
                self._advance(end - self._at)
                return Entry(line, None if bad_byte else value, error_text)
            if len(self._buffer) - self._at > MAX_CHARACTERS:
                self.fail(mistake if mistake else f'a record of more than {MAX_CHARACTERS} characters', offset)
            if not self._more() and end < 0:
                if offset >= len(self._buffer) - self._at or mistake.startswith('Unterminated'):
                    mistake += '; the file ends in the middle of a record: is it cut off?'
                self.fail(mistake, offset)

    def _place(self, offset: int) -> tuple[int, int]:
        passed = self._buffer[self._at : self._at + offset]
        breaks = passed.count('\n')
        return self._line + breaks, len(passed) - passed.rfind('\n') if breaks else self._column + offset

    def _advance(self, n: int) -> None:
        self._line, self._column = self._place(n)
        self._at += n

    def _more(self) -> bool:
        """Fetch twice as much as there is unread, and forget what was read; False at the end of the file."""
        if self._ended:
            return False
        raw = self._file.read(max(_BLOCK_BYTES, len(self._buffer) - self._at))
        self._ended = not raw
        self._buffer = self._buffer[self._at :] + self._decoder.decode(raw, final=self._ended)
        self._at = 0
        return not self._ended
