"""Reading JSON value by value: the same values as the json module's, and the place of every mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mobilevlm_ros.errors import DatasetMissingError, DatasetSyntaxError
from mobilevlm_ros.train import json_stream
from mobilevlm_ros.train.json_stream import read_entries


@pytest.fixture(scope='module')
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('json') / 'data.json'


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and bounds so small that every value crosses them."""
    monkeypatch.setattr(json_stream, '_BLOCK_BYTES', 3)
    monkeypatch.setattr(json_stream, 'MAX_CHARACTERS', 100)


def values_of(path: Path, content: str | bytes) -> list[Any]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [entry.value for entry in read_entries(path)]


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@example(values=[0.0, -1.5e-7, 12], indent=None, ascii_only=False)
@given(values=st.lists(_VALUES, max_size=6), indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans())
def test_an_array_is_read_as_the_json_module_reads_it(
    file: Path, values: list[Any], indent: int | None, ascii_only: bool
) -> None:
    block, json_stream._BLOCK_BYTES = json_stream._BLOCK_BYTES, 3
    try:
        assert values_of(file, json.dumps(values, indent=indent, ensure_ascii=ascii_only)) == values
    finally:
        json_stream._BLOCK_BYTES = block


@given(values=st.lists(st.dictionaries(st.text(max_size=3), _VALUES, max_size=3), min_size=1, max_size=6))
def test_lines_are_read_as_the_json_module_reads_them(file: Path, values: list[Any]) -> None:
    assert values_of(file, '\n\n'.join(json.dumps(value) for value in values)) == values


@pytest.mark.parametrize('content', ['[{"a": "é"}]', '{"a": "é"}\n'])
def test_a_byte_order_mark_is_no_mistake(file: Path, content: str) -> None:
    assert values_of(file, b'\xef\xbb\xbf' + content.encode()) == [{'a': 'é'}]


def test_entries_know_their_lines(file: Path) -> None:
    file.write_text('[{"a": 1},\n\n {"b":\n 2}, {"c": 3}]')
    assert [entry.line for entry in read_entries(file)] == [1, 3, 4]


@pytest.mark.parametrize(
    ('content', 'n_before', 'message'),
    [
        ('[{"a": 1},\n {"b" 2}]', 1, "line 2, column 7: Expecting ':'"),
        ('[{"a": 1}\n {"b": 2}]', 1, r"line 2, column 2: expected , or \], found '{'"),
        ('[1, 2,]', 2, 'line 1, column 7: Expecting value'),
        ('[{"a": 1}, {"b', 1, 'line 1, column 13: .*cut off'),
        ('[{"a": 1},\n', 1, 'line 2, column 1: .*cut off'),
        ('[{"a": 1}', 1, 'line 1, column 10: .*cut off'),
        ('[1] 2', 1, 'line 1, column 5: expected the end'),
        ('  \n ', 0, 'empty'),
        ('[' * 5000, 0, 'line 1, column 2: .*recursion'),
        ('[1, 1' + '1' * 5000 + ']', 1, 'line 1, column 5: .*digits'),
    ],
)
def test_a_mistake_in_an_array_has_its_place_and_the_values_before_it(
    file: Path, content: str, n_before: int, message: str
) -> None:
    file.write_text(content)
    found = []
    with pytest.raises(DatasetSyntaxError, match=message):
        for entry in read_entries(file):
            found.append(entry.value)
    assert len(found) == n_before


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        (b'{"a": 1', 'column 8'),
        (b'nonsense', 'column 1'),
        (b'{"a": "\xff"}', 'UTF-8 at byte 8'),
        (b'[' * 5000, 'recursion'),
        (b'{"a": ' + b'1' * 5000 + b'}', 'digits'),
    ],
)
def test_a_bad_line_does_not_hide_the_next(file: Path, line: bytes, message: str) -> None:
    file.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')

    first, bad, last = read_entries(file)

    assert (first.value, last.value) == ({'a': 1}, {'a': 3})
    assert bad.line == 2
    assert message in bad.error


def test_no_utf_8_in_an_array_does_not_hide_the_next(file: Path) -> None:
    file.write_bytes(b'[{"a": "\xc3\xa9"}, {"a": "\xff"}, {"a": "\\udcff"}]')

    first, bad, last = read_entries(file)

    assert (first.value, last.value) == ({'a': 'é'}, {'a': '\udcff'})
    assert bad.error == 'no UTF-8 7 characters into it'


@pytest.mark.usefixtures('small')
def test_a_record_that_is_too_long_is_refused_before_it_is_read(file: Path) -> None:
    file.write_text(json.dumps(['a', 'b' * 200]))
    with pytest.raises(DatasetSyntaxError, match='column 7'):
        list(read_entries(file))


@pytest.mark.usefixtures('small')
def test_a_line_that_is_too_long_is_left_out(file: Path) -> None:
    file.write_text(json.dumps({'a': 'b' * 250}) + '\n' + json.dumps({'a': 'b'}))

    bad, good = read_entries(file)

    assert 'more than 100 bytes' in bad.error
    assert good.value == {'a': 'b'}
    assert good.line == 2


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetMissingError, match=r'nowhere\.json is not there'):
        list(read_entries(tmp_path / 'nowhere.json'))
    with pytest.raises(DatasetMissingError, match='is a folder'):
        list(read_entries(tmp_path))
