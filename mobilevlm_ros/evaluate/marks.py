"""Reads JSON lines and YAML, and remembers where in the file every value stands: errors name line and column.

Nothing is guessed: a key that is there twice, which both formats would silently let win, is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mobilevlm_ros.errors import QuestionFileError

__all__ = ['Place', 'Record', 'read_records']

_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Place:
    """A place in a file; both counted from 1."""

    path: Path
    line: int
    column: int = 1

    def __str__(self) -> str:
        return f'{self.path}, line {self.line}, column {self.column}'


@dataclass(frozen=True)
class Record:
    """One value of a file, with the places of everything in it.

    :ivar value: plain data.
    """

    value: Any
    place: Place
    node: yaml.Node | None
    first_line: int

    def place_of(self, location: Sequence[str | int]) -> Place:
        """Where the value at a path of keys and indices stands, or else what is nearest around it."""
        node = self.node
        for step in location:
            if node is None:
                break
            inner = _child(node, step)
            if inner is None:
                break
            node = inner
        if node is None:
            return self.place
        return Place(self.place.path, self.first_line + node.start_mark.line, node.start_mark.column + 1)


def _child(node: yaml.Node, step: str | int) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        return next((value for key, value in node.value if key.value == str(step)), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        inner: yaml.Node = node.value[step]
        return inner
    return None


def read_records(path: Path) -> list[Record]:
    """The records of a file: the lines of ``.jsonl``, the entries of a list in ``.yaml``.

    :raise QuestionFileError: if it cannot be read, is something else, or has a syntax error.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise QuestionFileError(f'{path} has more than {_MOST_BYTES >> 20} MiB, which no file of questions has')
        text = path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise QuestionFileError(f'{path} is not UTF-8: {error}') from error
    except OSError as error:
        raise QuestionFileError(f'{path} cannot be read: {error.strerror}') from error
    try:
        if path.suffix == '.jsonl':
            # Not splitlines: a text in JSON may hold other signs that end lines.
            return [_json_line(path, number, line) for number, line in enumerate(text.split('\n'), 1) if line.strip()]
        if path.suffix in ('.yaml', '.yml'):
            return list(_yaml(path, text))
    except RecursionError as error:
        raise QuestionFileError(f'{path} is nested too deeply') from error
    raise QuestionFileError(f'{path}: expected a file .jsonl (one question a line), .yaml or .yml (a list)')


def _json_line(path: Path, number: int, line: str) -> Record:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise QuestionFileError(f'{Place(path, number, error.colno)}: no JSON: {error.msg}') from error
    except ValueError as error:  # a number of thousands of digits
        raise QuestionFileError(f'{Place(path, number)}: no JSON: {error}') from error
    try:
        node = yaml.compose(line, Loader=yaml.SafeLoader)  # JSON is YAML but for oddities, and has no places of its own
    except (yaml.YAMLError, ValueError):
        node = None
    if node is not None:
        _refuse_twice(path, node, number)
    return Record(value, Place(path, number), node, number)


def _yaml(path: Path, text: str) -> Iterator[Record]:
    try:
        loader = yaml.SafeLoader(text)
    except yaml.YAMLError as error:  # a character that no YAML may have
        raise QuestionFileError(f'{path} is no YAML: {error}') from error
    try:
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.SequenceNode):
            raise QuestionFileError(f'{Place(path, root.start_mark.line + 1)}: expected a list of questions')
        _refuse_twice(path, root, 1)
        for node in root.value:
            mark = node.start_mark
            value = loader.construct_object(node, deep=True)
            yield Record(value, Place(path, mark.line + 1, mark.column + 1), node, 1)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(path, mark.line + 1, mark.column + 1) if mark else Place(path, 1)
        raise QuestionFileError(f'{place}: no YAML: {error.problem or error.context}') from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise QuestionFileError(f'{path} is no YAML: {error}') from error
    finally:
        loader.dispose()


def _refuse_twice(path: Path, root: yaml.Node, first_line: int) -> None:
    """:raise QuestionFileError: if a mapping has a key twice."""
    waiting, seen = [root], {id(root)}
    while waiting:
        node = waiting.pop()
        inner = [node.value] if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in keys:
                    place = Place(path, first_line + key.start_mark.line, key.start_mark.column + 1)
                    raise QuestionFileError(f'{place}: the key {key.value!r} is there twice')
                if isinstance(key, yaml.ScalarNode):
                    keys.add(key.value)
            inner = [[value for _, value in node.value]]
        for one in (child for children in inner for child in children):
            if id(one) not in seen:
                seen.add(id(one))
                waiting.append(one)
