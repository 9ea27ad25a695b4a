"""A line of JSON, and the column of every value in it: what a message to somebody who edits by hand needs."""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ['Places', 'parse_line']

Path = tuple[str | int, ...]
_SPACE = re.compile(r'[ \t\r\n]*')


class Places(dict[Path, int]):
    """Columns, the first being 1, by the keys and indexes that lead to a value."""

    def __init__(self) -> None:
        super().__init__()
        self._keys: dict[Path, int] = {}

    def of(self, path: Path) -> int:
        """The column of a value; of what it would be in, if it is missing."""
        return self[path] if path in self else self[path[:-1]]

    def key(self, path: Path) -> int:
        """The column of the key of a value."""
        return self._keys[path]

    def add_key(self, path: Path, column: int) -> None:
        """Note where a key is."""
        self._keys[path] = column


def parse_line(text: str) -> tuple[Any, Places]:
    """The value in a line, and where its parts are.

    :raise json.JSONDecodeError: if it is not JSON, holds a number that is none of JSON's, or a key twice in an object.
    """
    places = Places()
    try:
        value = json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise json.JSONDecodeError('it is nested too deeply', text, 0) from error
    except _NoNumber as error:
        raise json.JSONDecodeError(f'{error} is no number of JSON', text, text.find(str(error))) from error
    _walk(text, _SPACE.match(text, 0).end(), (), places)  # type: ignore[union-attr]
    return value, places


class _NoNumber(Exception):
    pass


def _refuse(name: str) -> None:
    raise _NoNumber(name)


def _walk(text: str, at: int, path: Path, places: Places) -> int:
    """Note where the value at ``at`` and its parts are; the text is known to be JSON. Returns where it ends."""
    places[path] = at + 1
    opening = text[at]
    if opening not in '{[':
        return json.JSONDecoder().raw_decode(text, at)[1]
    at, index = _next(text, at + 1), 0
    while text[at] not in '}]':
        part: str | int = index
        if opening == '{':
            part, end = json.JSONDecoder().raw_decode(text, at)
            if (*path, part) in places:
                raise json.JSONDecodeError(f'the field {part!r} is there twice', text, at)
            places.add_key((*path, part), at + 1)
            at = _next(text, _next(text, end) + 1)  # behind the colon
        at = _next(text, _walk(text, at, (*path, part), places))
        if text[at] == ',':
            at = _next(text, at + 1)
        index += 1
    return at + 1


def _next(text: str, at: int) -> int:
    """The next place that is no white space."""
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()
