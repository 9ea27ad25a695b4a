"""Folders of token ids: the row is whole whatever the files, and nothing damaged is read as tokens."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_folders import write_folder

from mobilevlm_ros.errors import DatasetError, DatasetMissingError
from mobilevlm_ros.train.shards import INDEX, Position, TokenShards, read_index, shard_name

ROW = np.arange(10, 40)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    n_vocab=st.sampled_from([1000, 1 << 16, 100_000]),
)
def test_the_row_is_the_same_however_it_is_cut(
    sizes: list[int], bounds: tuple[float, float], n_vocab: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    row = np.random.default_rng(sum(sizes)).integers(0, n_vocab, sum(sizes))
    shards = TokenShards(write_folder(tmp_path_factory.mktemp('row'), row, shard_sizes=sizes, n_vocab=n_vocab))
    start, stop = sorted(int(bound * len(row)) for bound in bounds)
    stop = max(stop, start + 1)
    if stop <= len(row):
        read = shards.read(start, stop)
        assert read.dtype == np.int64
        np.testing.assert_array_equal(read, row[start:stop])
    np.testing.assert_array_equal(shards.read(0, len(shards)), row)


def test_a_shard_is_mapped_and_not_read(tmp_path: Path) -> None:
    """Eight GiB that are not there: only what is asked for takes memory."""
    folder = write_folder(tmp_path / 'big', ROW)
    n_tokens = 1 << 32
    os.truncate(folder / shard_name(0), 2 * n_tokens)
    _change(folder, lambda index: index['shards'][0].update(n_tokens=n_tokens))
    tracemalloc.start()
    shards = TokenShards(folder)
    assert shards.read(n_tokens - 4, n_tokens).tolist() == [0, 0, 0, 0]
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1_000_000


def test_pickled_it_is_opened_again_without_its_data(tmp_path: Path) -> None:
    shards = TokenShards(write_folder(tmp_path / 'row', np.arange(1000) % 999))
    shards.read(0, 1000)
    pickled = pickle.dumps(shards)
    assert len(pickled) < 500
    assert pickle.loads(pickled).read(990, 1000).tolist() == shards.read(990, 1000).tolist()


@pytest.mark.parametrize('bounds', [(-1, 2), (3, 3), (4, 2), (29, 31)])
def test_positions_outside_are_refused(bounds: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(IndexError, match='of 30'):
        TokenShards(write_folder(tmp_path / 'row', ROW)).read(*bounds)


def test_an_id_outside_the_vocabulary_is_named_and_not_given(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / 'row', ROW, shard_sizes=[20, 10])
    damaged = np.fromfile(folder / shard_name(1), dtype='<u2')
    damaged[4] = 1000
    damaged.tofile(folder / shard_name(1))
    shards = TokenShards(folder)
    assert len(shards.read(0, 24)) == 24
    with pytest.raises(DatasetError, match=r'shard-000001.bin holds token 1000 .*; the vocabulary has 1000'):
        shards.read(0, 25)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / 'row', ROW)
    os.truncate(folder / shard_name(0), 58)
    with pytest.raises(DatasetError, match=r'shard-000000.bin has 58 bytes; index.json says 60'):
        TokenShards(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / 'row', ROW, shard_sizes=[10, 20])
    (folder / shard_name(1)).unlink()
    with pytest.raises(DatasetMissingError, match=r'shard-000001.bin cannot be read'):
        TokenShards(folder)


def test_a_shard_that_vanishes_in_a_run_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / 'row', ROW)
    shards = TokenShards(folder)
    (folder / shard_name(0)).unlink()
    with pytest.raises(DatasetError, match=r'shard-000000.bin cannot be read any more'):
        shards.read(0, 1)


def test_a_folder_without_an_index_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DatasetMissingError, match=r'index.json cannot be read.*mobilevlm train tokenise'):
        TokenShards(tmp_path)


def test_an_unfinished_folder_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / 'row', ROW)
    _change(folder, lambda index: index.update(next=Position(input=0).model_dump()))
    with pytest.raises(DatasetError, match=r'is unfinished.*Run the same `mobilevlm train tokenise` again'):
        TokenShards(folder)


def test_another_version_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / 'row', ROW)
    _change(folder, lambda index: index.update(version=2))
    with pytest.raises(DatasetError, match='is of version 2; this program reads version 1'):
        read_index(folder)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda index: index.update(dtype='float32'), "dtype: Input should be 'uint16' or 'uint32'"),
        (lambda index: index.update(dtype='uint16', n_vocab=70_000), '70000 tokens, of which 2'),
        (lambda index: index.update(eos_id=1000), '1000 tokens, of which 1000 ends a text'),
        (lambda index: index.update(n_vocab=0), 'n_vocab: Input should be greater'),
        (lambda index: index.update(tokenizer_sha256='ab'), 'tokenizer_sha256: String should match'),
        (lambda index: index.update(format='other'), 'format: Input should be'),
        (lambda index: index.update(more=1), 'more: Extra inputs are not permitted'),
        (lambda index: index.pop('inputs'), 'inputs: Field required'),
        (lambda index: index['shards'][0].update(n_tokens=-1), r'shards.0.n_tokens: Input should be greater'),
        (lambda index: index['shards'][0].update(n_tokens=30.0), r'shards.0.n_tokens: Input should be a valid integer'),
        (lambda index: index['shards'][0].update(n_tokens=1 << 60), r'shards.0.n_tokens: Input should be less'),
        (lambda index: index['shards'][0].update(file='/etc/passwd'), r'shards.0.file: Extra inputs'),
    ],
)
def test_a_wrong_value_in_the_index_is_named(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / 'row', ROW)
    _change(folder, change)
    with pytest.raises(DatasetError, match=message):
        read_index(folder)


@pytest.mark.parametrize('text', ['', '{', '[1]', '"text"', 'null', '{"format": "mobilevlm-tokens"}', '[' * 100_000])
def test_an_index_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(DatasetError, match=r'index.json.*(make it again|version)'):
        read_index(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(['n_tokens', 'input', 'a']), inner),
    max_leaves=6,
)


@pytest.fixture(scope='module')
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp('fuzzed') / 'row', ROW, shard_sizes=[10, 20])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_value_in_the_index_makes_it_read_what_is_not_there(fuzzed: Path, data: st.DataObject) -> None:
    text = (fuzzed / INDEX).read_text()
    index = json.loads(text)
    place: Any = data.draw(st.sampled_from([index, *index['shards'], index['shards']]))
    keys = range(len(place)) if isinstance(place, list) else sorted(place)
    place[data.draw(st.sampled_from(keys))] = data.draw(JSON)
    try:
        (fuzzed / INDEX).write_text(json.dumps(index))
        try:
            shards = TokenShards(fuzzed)
            assert len(shards) in (0, 30)  # an index may name no shard at all
            shards.read(0, len(shards))
        except DatasetError:
            pass
    finally:
        (fuzzed / INDEX).write_text(text)


def _change(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
