"""Text files to folders of tokens: what is in them, and that stopping, a full disk and other inputs do no harm."""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from vocabularies import write_chatml

from mobilevlm_ros.errors import CheckpointMissingError, DatasetError, DiskSpaceError, RecordError
from mobilevlm_ros.model.tokenizer_files import write_made_up_tokenizer
from mobilevlm_ros.train import shards as shards_module
from mobilevlm_ros.train import tokenise as tokenise_module
from mobilevlm_ros.train.shards import TokenShards, read_index, shard_name
from mobilevlm_ros.train.tokenise import add_tokenise_arguments, run_tokenise, tokenise
from mobilevlm_ros.train.tokens import open_tokenizer

STORIES = [f'Story {number} is about a robot.\n' + 'It looks at the table.\n' * (number % 5) for number in range(40)]


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token a byte."""
    return write_chatml(tmp_path_factory.mktemp('tokenizer'))


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """Forty short documents in three files, with a broken line."""
    folder = tmp_path / 'text'
    folder.mkdir()
    for number in range(2):
        lines = [json.dumps({'text': story}) for story in STORIES[number * 15 : number * 15 + 15]]
        lines[3:3] = ['{broken'] if number else []
        (folder / f'{number}.jsonl').write_text('\n'.join(lines) + '\n')
    (folder / '2.txt').write_text('--\n'.join(STORIES[30:]))
    return [folder]


class StoppedAfter:
    """A reporter that stands for Ctrl-C after some chunks."""

    def __init__(self, n_chunks: int) -> None:
        self._left = n_chunks

    def step(self, text: str) -> None:
        pass

    def progress(self, done: float, total: float) -> None:
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt


def documents(folder: Path, tokenizer: Path) -> list[str]:
    """Texts of a folder that end with the end token."""
    from tokenizers import Tokenizer

    shards, library = TokenShards(folder), Tokenizer.from_file(str(tokenizer))
    found: list[list[int]] = [[]]
    for token in shards.read(0, len(shards)).tolist():
        if token == shards.index.eos_id:
            found.append([])
        else:
            found[-1].append(token)
    assert found.pop() == []  # an end token stands last
    return [library.decode(ids) for ids in found]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_documents_come_in_order_each_with_the_end_token(inputs: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    index = tokenise(inputs, tokenizer, tmp_path / 'out', separator='--', shard_tokens=400, chunk_bytes=100)
    assert documents(tmp_path / 'out', tokenizer) == STORIES
    assert index == read_index(tmp_path / 'out')
    assert (index.n_documents, index.n_tokens) == (40, sum(len(story) + 1 for story in STORIES))
    assert (index.dtype, index.n_vocab) == ('uint16', open_tokenizer(tokenizer).n_vocab)
    assert [Path(file.file).name for file in index.inputs] == ['0.jsonl', '1.jsonl', '2.txt']


def test_shards_have_their_size_to_within_a_chunk(inputs: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    index = tokenise(inputs, tokenizer, tmp_path / 'out', separator='--', shard_tokens=400, chunk_bytes=100)
    *full, last = [shard.n_tokens for shard in index.shards]
    assert len(full) > 4
    assert all(400 <= size < 400 + 300 for size in full)
    assert last <= 700


def test_a_vocabulary_of_llamas_form_gives_its_tokens(tmp_path: Path) -> None:
    tokenizer = tmp_path / 'tokenizer.model'
    write_made_up_tokenizer(tokenizer, 1000)
    (tmp_path / 'a.txt').write_text('The door is open.')
    tokenise([tmp_path / 'a.txt'], tokenizer, tmp_path / 'out')
    shards = TokenShards(tmp_path / 'out')
    assert shards.read(0, len(shards)).tolist() == [*open_tokenizer(tokenizer).encode('The door is open.'), 2]


def test_names_of_control_tokens_in_texts_are_text(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / 'a.txt').write_text('an <|im_end|> in a text')
    index = tokenise([tmp_path / 'a.txt'], tokenizer, tmp_path / 'out')
    assert documents(tmp_path / 'out', tokenizer) == ['an <|im_end|> in a text']
    assert index.n_documents == 1


@pytest.mark.parametrize('n_chunks', [0, 1, 5, 9, 14, 20])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    n_chunks: int, inputs: list[Path], tokenizer: Path, tmp_path: Path
) -> None:
    tokenise(inputs, tokenizer, tmp_path / 'whole', separator='--', shard_tokens=400, chunk_bytes=100)
    out = tmp_path / 'out'
    with pytest.raises(KeyboardInterrupt):
        tokenise(
            inputs,
            tokenizer,
            out,
            separator='--',
            shard_tokens=400,
            chunk_bytes=100,
            reporter=StoppedAfter(n_chunks),
        )
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob('shard-*')}
    assert bool(finished) == (n_chunks >= 5)
    tokenise(inputs, tokenizer, out, separator='--', shard_tokens=400, chunk_bytes=100)
    assert contents(out) == contents(tmp_path / 'whole')
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(tokenizer: Path, tmp_path: Path) -> None:
    """A real process and SIGKILL, once shards are there."""
    text, out = tmp_path / 'a.txt', tmp_path / 'out'
    text.write_text(''.join(f'{number} is a number.\n' for number in range(60_000)))
    command = ['-c', RUN, str(text), '--tokenizer', str(tokenizer), '--out', str(out), '--shard-tokens', '100000']
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (out / 'index.json').exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)  # a shard counts once the index names it
    process.kill()
    assert process.wait() == -signal.SIGKILL
    n_finished = len(read_index(out).shards)
    assert n_finished >= 1
    with pytest.raises(DatasetError, match='is unfinished'):
        TokenShards(out)
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    whole = tokenise([text], tokenizer, tmp_path / 'whole', shard_tokens=100_000)
    assert contents(out) == contents(tmp_path / 'whole')
    assert len(whole.shards) > n_finished


RUN = """
import argparse
from mobilevlm_ros.train.tokenise import add_tokenise_arguments, run_tokenise
parser = argparse.ArgumentParser()
add_tokenise_arguments(parser)
if __name__ == '__main__':
    raise SystemExit(run_tokenise(parser.parse_args()))
"""


def test_a_full_disk_is_named_and_finished_shards_are_kept(
    inputs: list[Path], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenise(inputs, tokenizer, tmp_path / 'whole', separator='--', shard_tokens=400, chunk_bytes=100)
    out, left = tmp_path / 'out', iter(range(4))

    def fsync(_: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(shards_module.os, 'fsync', fsync)
        with pytest.raises(DiskSpaceError, match=r'out is full; 2 finished shards are kept: free some space and run'):
            tokenise(inputs, tokenizer, out, separator='--', shard_tokens=400, chunk_bytes=100)
    assert sorted(path.name for path in out.iterdir()) == ['index.json', shard_name(0), shard_name(1)]
    tokenise(inputs, tokenizer, out, separator='--', shard_tokens=400, chunk_bytes=100)
    assert contents(out) == contents(tmp_path / 'whole')


def test_a_finished_folder_is_left_as_it_is(inputs: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / 'out'
    first = tokenise(inputs, tokenizer, out)
    written = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert tokenise(inputs, tokenizer, out) == first
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == written


def test_the_result_may_lie_among_the_inputs(inputs: list[Path], tokenizer: Path) -> None:
    out = inputs[0] / 'tokens'
    first = tokenise(inputs, tokenizer, out)
    assert tokenise(inputs, tokenizer, out) == first


def test_moved_inputs_are_known_again(inputs: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    first = tokenise(inputs, tokenizer, tmp_path / 'out')
    moved = shutil.move(inputs[0], tmp_path / 'moved')
    assert tokenise([Path(moved)], tokenizer, tmp_path / 'out') == first


@pytest.mark.parametrize('what', ['inputs', 'tokenizer', 'separator', 'field', 'shard size'])
def test_a_folder_made_otherwise_is_not_mixed_up(
    what: str, inputs: list[Path], tokenizer: Path, tmp_path: Path
) -> None:
    out = tmp_path / 'out'
    tokenise(inputs, tokenizer, out)
    other = shutil.copytree(tokenizer.parent, tmp_path / 'other') / tokenizer.name
    other.write_text(other.read_text() + ' ')
    if what == 'inputs':
        (inputs[0] / '3.txt').write_text('more')
    with pytest.raises(DatasetError, match=f'was made with another {what} .*choose another --out'):
        tokenise(
            inputs,
            other if what == 'tokenizer' else tokenizer,
            out,
            separator='==' if what == 'separator' else None,
            field='content' if what == 'field' else 'text',
            shard_tokens=7 if what == 'shard size' else tokenise_module.SHARD_TOKENS,
        )


def test_a_folder_with_other_files_is_refused(inputs: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'thesis.tex').touch()
    with pytest.raises(DatasetError, match=r"holds other files, such as 'thesis.tex'"):
        tokenise(inputs, tokenizer, tmp_path / 'out')


def test_two_processes_do_not_write_one_folder(inputs: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / 'out').mkdir()
    held = os.open(tmp_path / 'out', os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DatasetError, match='another process is writing'):
            tokenise(inputs, tokenizer, tmp_path / 'out')
    finally:
        os.close(held)


def test_a_place_that_cannot_be_written_is_named(inputs: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / 'out').touch()
    with pytest.raises(DatasetError, match='out cannot be written: File exists'):
        tokenise(inputs, tokenizer, tmp_path / 'out')


def test_bad_lines_are_counted_also_across_a_stop(inputs: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tokenise(inputs, tokenizer, tmp_path / 'out', shard_tokens=400, chunk_bytes=100, reporter=StoppedAfter(20))
    index = tokenise(inputs, tokenizer, tmp_path / 'out', shard_tokens=400, chunk_bytes=100)
    assert index.skipped == {'no JSON': 1}
    assert index.examples == [f'{inputs[0] / "1.jsonl"}:4: no JSON']


def test_bad_lines_may_be_refused(inputs: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r'no JSON: .*1.jsonl:4; --on-bad skip') as caught:
        tokenise(inputs, tokenizer, tmp_path / 'out', on_bad='refuse')
    assert caught.value.kind == 'no JSON'
    assert list((tmp_path / 'out').iterdir()) == []


def test_inputs_without_a_document_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / 'a.jsonl').write_text('[\n  {"text": "an array"},\n  {"text": "of two",}\n]\n')
    with pytest.raises(DatasetError, match=r'no document in 1 files; 4 lines were left out.*a.jsonl:1: no JSON'):
        tokenise([tmp_path / 'a.jsonl'], tokenizer, tmp_path / 'out')


def test_a_missing_tokenizer_is_named_before_anything_is_written(inputs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissingError, match=r'there is no tokenizer .*missing.model'):
        tokenise(inputs, tmp_path / 'missing.model', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


class LargeVocabulary:
    """More tokens than 16 bits count; its texts are numbers."""

    bos_id, eos_id, pad_id, n_vocab, adds_bos = 0, 1, 2, 70_000, False

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return [int(word) for word in text.split()]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tokenise_module, 'open_tokenizer', lambda _: LargeVocabulary())
    yield


@pytest.mark.usefixtures('large')
def test_a_large_vocabulary_takes_four_bytes(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / 'a.txt').write_text('69999 65536 3')
    index = tokenise([tmp_path / 'a.txt'], tokenizer, tmp_path / 'out')
    assert index.dtype == 'uint32'
    assert TokenShards(tmp_path / 'out').read(0, 4).tolist() == [69999, 65536, 3, 1]


@pytest.mark.usefixtures('large')
@pytest.mark.parametrize('text', ['70000', '-1', str(1 << 40)])
def test_a_tokenizer_that_leaves_its_vocabulary_is_refused(text: str, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / 'a.txt').write_text(text)
    with pytest.raises(DatasetError, match=r'its vocabulary has 70000: its file is damaged'):
        tokenise([tmp_path / 'a.txt'], tokenizer, tmp_path / 'out')


@pytest.mark.slow
def test_several_processes_give_the_same_bytes(inputs: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    for n_workers in (1, 2):
        out = tmp_path / f'out{n_workers}'
        tokenise(inputs, tokenizer, out, separator='--', shard_tokens=400, chunk_bytes=100, n_workers=n_workers)
    assert contents(tmp_path / 'out1') == contents(tmp_path / 'out2')


def test_the_command_says_what_it_made_and_left_out(
    inputs: list[Path], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_tokenise_arguments(parser)
    out = tmp_path / 'out'
    options = [str(inputs[0]), '--tokenizer', str(tokenizer), '--out', str(out)]
    assert run_tokenise(parser.parse_args(options)) == 0
    said = capsys.readouterr()
    assert said.out == f'{out}\n'
    assert '31 documents in 1 shards, uint16' in said.err
    assert '1 lines were left out: 1 no JSON' in said.err
    assert '1.jsonl:4: no JSON' in said.err
