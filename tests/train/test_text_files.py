"""Text out of files: the same documents in any chunks, places to go on from, and lines that cannot be used."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilevlm_ros.errors import DatasetError, DatasetMissingError
from mobilevlm_ros.train import text_files
from mobilevlm_ros.train.shards import Position
from mobilevlm_ros.train.text_files import Chunk, find_inputs, read_chunks

LINES = st.lists(st.text(st.sampled_from('ab é€😀\t'), max_size=30), max_size=12)
"""Lines with characters of one to four bytes."""


def chunks_of(
    paths: list[Path], start: Position | None = None, separator: str | None = None, chunk_bytes: int = 1 << 18
) -> list[Chunk]:
    return list(read_chunks(paths, start or Position(), separator=separator, field='text', chunk_bytes=chunk_bytes))


def documents(chunks: list[Chunk]) -> list[str]:
    """Whole documents; the end of an unfinished one stands last, with a mark."""
    found, text = [], ''
    for piece in (piece for chunk in chunks for piece in chunk.pieces):
        text += piece.text
        if piece.ends_document:
            found.append(text)
            text = ''
    return [*found, f'{text} …'] if text else found


def problems(chunks: list[Chunk]) -> list[tuple[str, str]]:
    return [(Path(problem.place).name, problem.kind) for chunk in chunks for problem in chunk.problems]


@settings(max_examples=120, deadline=None)
@given(lines=LINES, chunk_bytes=st.integers(4, 60), separator=st.sampled_from([None, '', 'a', '€']))
def test_chunks_change_nothing(
    lines: list[str], chunk_bytes: int, separator: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp('text') / 'some.txt'
    # Of blank characters at a document's start, only whole lines are left out whatever the chunks.
    path.write_text('\n'.join(line.lstrip() for line in lines), encoding='utf-8', newline='')
    whole = chunks_of([path], separator=separator)
    cut = chunks_of([path], separator=separator, chunk_bytes=chunk_bytes)
    assert documents(cut) == documents(whole)
    assert problems(cut) == problems(whole) == []
    size = max((len(piece.text.encode()) for chunk in cut for piece in chunk.pieces), default=0)
    assert size <= 3 * chunk_bytes


@settings(max_examples=80, deadline=None)
@given(lines=LINES, chunk_bytes=st.integers(4, 60), separator=st.sampled_from([None, '', 'a']), as_json=st.booleans())
def test_reading_goes_on_after_any_chunk(
    lines: list[str], chunk_bytes: int, separator: str | None, as_json: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp('text')
    paths = [folder / f'{n}.{"jsonl" if as_json else "txt"}' for n in range(2)]
    for path in paths:
        text = '\n'.join(json.dumps({'text': line}) for line in lines) if as_json else '\n'.join(lines)
        path.write_text(text, encoding='utf-8', newline='')
    whole = chunks_of(paths, separator=separator, chunk_bytes=chunk_bytes)
    for done, chunk in enumerate(whole, start=1):
        assert chunks_of(paths, chunk.after, separator, chunk_bytes) == whole[done:]


def test_a_file_is_a_document_unless_a_line_parts_it(tmp_path: Path) -> None:
    path = tmp_path / 'stories.txt'
    path.write_text('One.\nMore.\n<|end|>\n\nTwo.\n<|end|>\n<|end|>\nThree <|end|>\n')
    assert documents(chunks_of([path])) == [path.read_text()]
    assert documents(chunks_of([path], separator='<|end|>')) == ['One.\nMore.\n', 'Two.\n', 'Three <|end|>\n']


def test_blank_lines_may_part_documents(tmp_path: Path) -> None:
    path = tmp_path / 'some.txt'
    path.write_bytes(b'\r\n\r\none\r\nmore\r\n\r\n\r\ntwo')
    assert documents(chunks_of([path], separator='')) == ['one\r\nmore\r\n', 'two']


def test_empty_files_have_no_documents(tmp_path: Path) -> None:
    for name in ('a.txt', 'b.jsonl', 'c.md'):
        (tmp_path / name).write_text('' if name < 'c' else ' \n\t\n')
    chunks = chunks_of(find_inputs([tmp_path], tmp_path / 'out'))
    assert documents(chunks) == []
    assert chunks[-1].after == Position(input=3)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / 'a.txt').write_text('one', encoding='utf-8-sig')
    (tmp_path / 'b.jsonl').write_text('{"text": "two"}', encoding='utf-8-sig')
    chunks = chunks_of(find_inputs([tmp_path], tmp_path / 'out'))
    assert documents(chunks) == ['one', 'two']
    assert problems(chunks) == []


def test_lines_that_cannot_be_used_are_named_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / 'some.jsonl'
    lines = [
        b'{"text": "good"}',
        b'{"text": "half',
        b'["text"]',
        b'{"content": "elsewhere"}',
        b'{"text": 3}',
        b'',
        b'{"text": " \\n"}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": ' + b'[' * 100_000,
        b'{"text": "good, too", "meta": {}}',
    ]
    path.write_bytes(b'\n'.join(lines))
    chunks = chunks_of([path])
    assert documents(chunks) == ['good', 'good, too']
    assert problems(chunks) == [
        ('some.jsonl:2', 'no JSON'),
        ('some.jsonl:3', "no text under 'text'"),
        ('some.jsonl:4', "no text under 'text'"),
        ('some.jsonl:5', "no text under 'text'"),
        ('some.jsonl:7', 'empty text'),
        ('some.jsonl:8', 'not UTF-8'),
        ('some.jsonl:9', 'no valid Unicode'),
        ('some.jsonl:10', 'no JSON'),
    ]


def test_a_line_that_is_no_text_is_left_out_of_its_document(tmp_path: Path) -> None:
    path = tmp_path / 'some.txt'
    path.write_bytes(b'one\n\xff\xfe\ntwo\n')
    chunks = chunks_of([path])
    assert documents(chunks) == ['one\ntwo\n']
    assert problems(chunks) == [('some.txt:2', 'not UTF-8')]


def test_a_line_of_json_beyond_the_limit_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, 'MAX_LINE_BYTES', 1 << 10)
    path = tmp_path / 'some.jsonl'
    path.write_text('{"text": "%s"}\n{"text": "short"}\n' % ('x' * 5000))
    chunks = chunks_of([path], chunk_bytes=100)
    assert documents(chunks) == ['short']
    assert problems(chunks) == [('some.jsonl:1', 'longer than 0 MiB')]


@pytest.mark.parametrize(('suffix', 'pack'), [('.gz', gzip.compress), ('.bz2', bz2.compress), ('.xz', lzma.compress)])
def test_packed_files_are_the_same(suffix: str, pack: object, tmp_path: Path) -> None:
    plain, packed = tmp_path / 'a.jsonl', tmp_path / f'a.jsonl{suffix}'
    plain.write_text(''.join(json.dumps({'text': f'document {i}'}) + '\n' for i in range(50)))
    packed.write_bytes(pack(plain.read_bytes()))  # type: ignore[operator]
    whole = chunks_of([plain], chunk_bytes=200)
    again = chunks_of([packed], chunk_bytes=200)
    assert len(whole) > 5
    assert [chunk.pieces for chunk in again] == [chunk.pieces for chunk in whole]
    assert chunks_of([packed], again[2].after, chunk_bytes=200) == again[3:]
    assert again[-1].n_read == packed.stat().st_size


@pytest.mark.parametrize(
    ('suffix', 'pack'),
    [('.gz', gzip.compress), ('.bz2', bz2.compress), ('.xz', lzma.compress), ('.gz', lambda text: text)],
)
def test_a_damaged_packed_file_is_named(suffix: str, pack: object, tmp_path: Path) -> None:
    path = tmp_path / f'a.txt{suffix}'
    path.write_bytes(pack(bytes(range(256)) * 40)[:-20])  # type: ignore[operator]
    with pytest.raises(DatasetError, match=rf'a.txt{suffix} cannot be read to its end'):
        chunks_of([path])


def test_memory_is_bounded_by_the_chunk(tmp_path: Path) -> None:
    lines, line = tmp_path / 'lines.txt', tmp_path / 'line.txt'
    lines.write_text('some words of a long text\n' * 100_000)
    line.write_text('word ' * 500_000)
    tracemalloc.start()
    n_characters = 0
    for chunk in read_chunks([lines, line], Position(), separator=None, field='text', chunk_bytes=1 << 16):
        n_characters += sum(len(piece.text) for piece in chunk.pieces)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n_characters == lines.stat().st_size + line.stat().st_size
    assert peak_bytes < 1_000_000


def test_folders_are_searched_for_text_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ('b.jsonl.gz', 'a/z.txt', 'a/picture.png', 'c.parquet', 'c4.json.gz'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in find_inputs([tmp_path], tmp_path / 'out')] == ['z.txt', 'b.jsonl.gz', 'c4.json.gz']


@pytest.mark.parametrize(
    ('name', 'error', 'message'),
    [
        ('missing.txt', DatasetMissingError, 'there is no file'),
        ('folder', DatasetMissingError, r'there is no text in .*folder; expected files such as .txt'),
        ('a.parquet', DatasetError, 'not known to be text by its name; expected files such as .txt'),
        ('a.jsonl.zst', DatasetError, r'run `zstd -d .*a.jsonl.zst` first'),
    ],
)
def test_inputs_that_are_none_are_named(name: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    (tmp_path / 'folder').mkdir()
    for there in ('a.parquet', 'a.jsonl.zst'):
        (tmp_path / there).touch()
    with pytest.raises(error, match=message):
        find_inputs([tmp_path / name], tmp_path / 'out')
