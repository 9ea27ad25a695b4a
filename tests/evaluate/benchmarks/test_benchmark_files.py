"""Files from anywhere: every size bounded, every error with its place."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_benchmarks import png, write_image

from mobilevlm_ros.errors import BadImageError, BenchmarkError
from mobilevlm_ros.evaluate.benchmarks import files, items
from mobilevlm_ros.evaluate.benchmarks.files import Record, find_image, read_document, read_lines, read_table
from mobilevlm_ros.evaluate.benchmarks.items import Base64Image, FileImage, read_answers


def written(folder: Path, text: str | bytes, name: str = 'file') -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_lines_are_read_with_their_numbers(tmp_path: Path) -> None:
    path = written(tmp_path, '\ufeff{"a": "é"}\r\n\n{"a": 1}')
    assert [(one.values, one.place) for one in read_lines(path)] == [
        ({'a': 'é'}, f'{path}, line 1'),
        ({'a': 1}, f'{path}, line 3'),
    ]


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{"a": 1}\n{"a":\n', r'line 2: no JSON at .*column'),
        ('[1]\n', r'line 1: expected an object, found \[1\]'),
        (b'{"a": "\xff"}\n', 'no UTF-8'),
        ('[' * 100_000 + '\n', 'line 1: no JSON'),
        ('{"a": ' + '9' * 10_000 + '}\n', 'line 1: no JSON'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        list(read_lines(written(tmp_path, text)))


def test_long_lines_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, 'MAX_LINE_CHARACTERS', 20)
    path = written(tmp_path, '{"a": "0123456789"}\n' + 'x' * 1000)
    lines = read_lines(path)
    next(lines)
    with pytest.raises(BenchmarkError, match='line 2, has more than 20 characters'):
        next(lines)


def test_documents_have_a_largest_size_and_number_of_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_document(written(tmp_path, '{"a": [1, 2]}')) == {'a': [1, 2]}
    with pytest.raises(BenchmarkError, match='line 2, column 1'):
        read_document(written(tmp_path, '{"a":\n}'))
    with pytest.raises(BenchmarkError, match='cannot be read'):
        read_document(tmp_path / 'nowhere')
    monkeypatch.setattr(files, 'MAX_VALUES', 10)
    with pytest.raises(BenchmarkError, match='some 12 values; at most 10'):
        read_document(written(tmp_path, '[' + '[],' * 5 + '[]]'))
    monkeypatch.setattr(files, 'MAX_DOCUMENT_BYTES', 10)
    with pytest.raises(BenchmarkError, match='12 bytes; at most 10'):
        read_document(written(tmp_path, '"0123456789"'))


# A lone \r would end a row for the csv module that writes.
_CELLS = st.text(st.characters(codec='utf-8', exclude_characters='\r\0'), max_size=8)


@given(st.lists(st.lists(_CELLS, min_size=3, max_size=3), max_size=4))
def test_a_table_reads_back_whatever_cells_hold(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]
) -> None:
    path = tmp_path_factory.mktemp('table') / 'table.tsv'
    with path.open('w', encoding='utf-8', newline='') as file:
        csv.writer(file, delimiter='\t', lineterminator='\n').writerows([['a', 'b', 'c'], *rows])
    before = csv.field_size_limit()
    assert [list(record.values.values()) for record in read_table(path)] == rows
    assert csv.field_size_limit() == before


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r'row 2 has 1 cells, expected 2 \(a, b\)'):
        list(read_table(written(tmp_path, 'a\tb\n1\t2\n3\n')))
    with pytest.raises(BenchmarkError, match='is empty'):
        list(read_table(written(tmp_path, '')))
    with pytest.raises(BenchmarkError, match='no table with tabulators'):
        list(read_table(written(tmp_path, 'a\tb\n1\t"never closed\n')))


def test_a_huge_cell_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, 'MAX_CELL_CHARACTERS', 100)
    list(read_table(written(tmp_path, 'a\tb\n1\t' + 'x' * 100 + '\n')))
    with pytest.raises(BenchmarkError, match=r'line 2: .*field larger'):
        list(read_table(written(tmp_path, 'a\tb\n1\t' + 'x' * 101 + '\n')))
    monkeypatch.setattr(files, '_MAX_ROW_CHARACTERS', 150)
    with pytest.raises(BenchmarkError, match='line 2, has more than 150'):
        list(read_table(written(tmp_path, 'a\tb\n' + 'x\t' * 100)))
    with pytest.raises(BenchmarkError, match='field larger'):  # over many lines, too
        list(read_table(written(tmp_path, 'a\tb\n1\t"' + 'x\n' * 100)))


def test_values_are_checked_one_by_one() -> None:
    record = Record({'t': 'x', 'n': 3, 'b': True, 'l': ['a', 1], 'none': None}, 'here')
    assert (record.text('t'), record.whole('n'), record.identity('n'), record.identity('t')) == ('x', 3, 3, 'x')
    for read, key in (
        (record.text, 'n'),
        (record.whole, 't'),
        (record.whole, 'b'),
        (record.identity, 'b'),
        (record.texts, 'l'),
        (record.text, 'none'),
        (record.text, 'missing'),
    ):
        with pytest.raises(BenchmarkError, match=f'here: "{key}"'):
            read(key)


@pytest.mark.parametrize('name', ['../a.png', '/etc/passwd', 'b/../../a.png', '', '.', 'a\0.png'])
def test_images_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(BenchmarkError, match='does not lie in'):
        find_image(tmp_path, name, 'here')


def test_images_are_decoded_as_published(tmp_path: Path) -> None:
    write_image(tmp_path / 'a.png', 'blue')
    assert FileImage(tmp_path / 'a.png').read().shape == (24, 40, 3)
    assert Base64Image(png('blue'), 'here').read()[0, 0].tolist() == [0, 0, 255]


def test_huge_images_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, 'MAX_IMAGE_BYTES', 50)
    write_image(tmp_path / 'a.png')
    with pytest.raises(BadImageError, match=r'a\.png.*at most 50'):
        FileImage(tmp_path / 'a.png').read()
    monkeypatch.setattr(items, 'MAX_SIDE', 20)
    with pytest.raises(BadImageError, match='24x16'):
        Base64Image(png(), 'here').read()


@pytest.mark.parametrize('text', ['', 'no base64!', 'é', 'AAAA', png()[:60]])
def test_a_damaged_image_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadImageError, match='row 3'):
        Base64Image(text, 'table, row 3').read()
    with pytest.raises(BadImageError, match=r'broken\.png'):
        FileImage(written(tmp_path, text, 'broken.png')).read()


@pytest.mark.parametrize('record', ['{"question_id": 1, "text": "x"}', '{"question_id": [], "prompt": "", "text": ""}'])
def test_answers_need_all_parts(tmp_path: Path, record: Any) -> None:
    with pytest.raises(BenchmarkError, match='line 1'):
        list(read_answers(written(tmp_path, record)))
