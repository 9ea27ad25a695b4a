"""Results on disk: what a killed run leaves, a full disk, and what is damaged."""

from __future__ import annotations

import errno
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mobilevlm_ros.errors import DiskSpaceError, EvaluationError
from mobilevlm_ros.evaluate.results import RESULTS, ResultsWriter, read_results, read_run, write_run


def rows(n: int, start: int = 0) -> list[dict[str, object]]:
    return [{'key': f'seen/q/{number}', 'answer': 'ja — \ud800' if number == 1 else 'no'} for number in range(start, n)]


def write(out: Path, n: int, start: int = 0) -> None:
    with ResultsWriter(out) as writer:
        for row in rows(n, start):
            writer.add(row)


def keys(out: Path) -> list[str]:
    return [row['key'] for row in read_results(out)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / 'out', 3)
    assert keys(tmp_path / 'out') == ['seen/q/0', 'seen/q/1', 'seen/q/2']


def test_a_run_that_goes_on_appends_and_knows_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, 2)
    with ResultsWriter(tmp_path) as writer:
        assert 'seen/q/1' in writer
        assert 'seen/q/2' not in writer
        assert writer.n_rows == 2
        writer.add(rows(3)[2])
        assert writer.n_rows == 3
    assert len(keys(tmp_path)) == 3


@pytest.mark.parametrize('rest', [b'{"key": "seen/q/9", "ans', b'x' * 200_000])
def test_a_line_that_was_cut_off_is_left_out_and_overwritten(tmp_path: Path, rest: bytes) -> None:
    write(tmp_path, 2)
    with (tmp_path / RESULTS).open('ab') as file:
        file.write(rest)
    assert len(keys(tmp_path)) == 2
    write(tmp_path, 3, start=2)
    assert keys(tmp_path) == ['seen/q/0', 'seen/q/1', 'seen/q/2']


@pytest.mark.parametrize('line', ['not json', '[1]', '{"answer": "no key"}', '[' * 100_000])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    write(tmp_path, 1)
    with (tmp_path / RESULTS).open('a') as file:
        file.write(f'{line}\n')
    with pytest.raises(EvaluationError, match='line 2'):
        list(read_results(tmp_path))
    with pytest.raises(EvaluationError, match='line 2'):
        ResultsWriter(tmp_path)


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """The kernel refuses to write further, in the middle of a line if need be, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_named_and_keeps_what_was_there(tmp_path: Path) -> None:
    line = len(json.dumps({'key': 'k000', 'answer': 'a' * 100})) + 1
    written = 0
    with (
        files_of_at_most(4 * line + line // 2),
        pytest.raises(DiskSpaceError, match='kept'),
        ResultsWriter(tmp_path) as writer,
    ):
        for number in range(10):
            writer.add({'key': f'k{number:03}', 'answer': 'a' * 100})
            written += 1
    assert written == 4
    assert (tmp_path / RESULTS).stat().st_size == 4 * line, 'no half line'
    assert keys(tmp_path) == ['k000', 'k001', 'k002', 'k003']


def test_a_description_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, {'n_done': 1})

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(DiskSpaceError):
        write_run(tmp_path, {'n_done': 2})
    assert read_run(tmp_path)['n_done'] == 1
    assert [path.name for path in tmp_path.iterdir()] == ['run.json']


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match='no evaluation'):
        read_run(tmp_path)


@pytest.mark.parametrize('text', ['{', '[]', '{"format_version": 99}'])
def test_a_description_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / 'run.json').write_text(text)
    with pytest.raises(EvaluationError, match=r'run\.json'):
        read_run(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(EvaluationError, match='cannot be written'):
        ResultsWriter(tmp_path / 'file' / 'out')
