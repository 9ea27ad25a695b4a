"""Packed text: what sequence i is, whoever asks, in whatever order, after whatever stop."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_folders import write_folder
from torch.utils.data import DataLoader, Subset

from mobilevlm_ros.errors import DatasetError, DatasetMissingError, SettingsError
from mobilevlm_ros.train.packed import PackedDataset, Source
from mobilevlm_ros.train.shards import INDEX

N_TOKENS = 8
SIZES = (83, 40, 165)
"""Ids of the three sources: 10, 5 and 20 sequences, and some ids that fill none."""


@pytest.fixture(scope='module')
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three sources whose ids say where they stand: 1000 times the source, and the position."""
    root = tmp_path_factory.mktemp('sources')
    return [
        write_folder(root / str(n), 1000 * n + np.arange(size), shard_sizes=[size - 13, 13], n_vocab=5000)
        for n, size in enumerate(SIZES)
    ]


def dataset(
    folders: list[Path], weights: tuple[float, ...] = (0.5, 0.2, 0.3), seed: int = 1, length: int = 200
) -> PackedDataset:
    sources = [Source(folder, weight) for folder, weight in zip(folders, weights, strict=False)]
    return PackedDataset(sources, n_tokens=N_TOKENS, seed=seed, length=length)


def first_ids(data: PackedDataset) -> list[int]:
    return [int(data[i]['input_ids'][0]) for i in range(len(data))]


def test_an_item_is_a_stretch_of_its_source_with_itself_as_labels(folders: list[Path]) -> None:
    data = dataset(folders)
    for i in range(len(data)):
        item, place = data[i], data.place(i)
        start = 1000 * place.source + N_TOKENS * place.sequence
        assert item['input_ids'].tolist() == list(range(start, start + N_TOKENS))
        assert item['labels'].tolist() == item['input_ids'].tolist()
        assert item['input_ids'].dtype == item['labels'].dtype == torch.int64


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**64), wanted=st.lists(st.integers(0, 199), min_size=1, max_size=20))
def test_an_item_depends_on_seed_and_number_only(folders: list[Path], seed: int, wanted: list[int]) -> None:
    one, other = dataset(folders, seed=seed), dataset(folders, seed=seed)
    whole = first_ids(one)
    assert [int(other[i]['input_ids'][0]) for i in wanted] == [whole[i] for i in wanted]


def test_the_order_is_this_one_on_every_machine(folders: list[Path]) -> None:
    """Golden: runs that were begun before resume with the same data."""
    assert first_ids(dataset(folders))[:12] == [32, 2112, 16, 1024, 56, 2008, 64, 1032, 72, 2072, 0, 2104]


def test_another_seed_gives_another_order_of_the_same_mixture(folders: list[Path]) -> None:
    ours, theirs = dataset(folders, seed=1), dataset(folders, seed=2)
    assert [ours.place(i).source for i in range(200)] == [theirs.place(i).source for i in range(200)]
    assert first_ids(ours) != first_ids(theirs)


def test_a_source_is_read_to_its_end_before_it_is_read_again_in_another_order(folders: list[Path]) -> None:
    data = dataset(folders, length=400)
    read: dict[tuple[int, int], list[int]] = {}
    for i in range(len(data)):
        place = data.place(i)
        read.setdefault((place.source, place.epoch), []).append(place.sequence)
    for (source, epoch), sequences in read.items():
        n_sequences = data.n_sequences(source)
        assert n_sequences == SIZES[source] // N_TOKENS
        if (source, epoch + 1) in read:
            assert sorted(sequences) == list(range(n_sequences))
        assert max(Counter(sequences).values()) == 1
    assert read[0, 0] != read[0, 1] != read[0, 2]
    assert data.epochs() == [200 / 10, 80 / 5, 120 / 20]


def test_every_prefix_has_the_mixture(folders: list[Path]) -> None:
    data = dataset(folders, weights=(67.7, 15, 4.5))
    counts = [0, 0, 0]
    for i in range(len(data)):
        counts[data.place(i).source] += 1
        for count, weight in zip(counts, (67.7, 15, 4.5), strict=True):
            assert abs(count - (i + 1) * weight / 87.2) < 1


@pytest.mark.parametrize('n_workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_goes_on_reads_what_it_would_have_read(folders: list[Path], n_workers: int) -> None:
    data = dataset(folders, length=48)
    whole = [batch['input_ids'] for batch in DataLoader(data, batch_size=4)]
    rest = Subset(dataset(folders, length=48), range(5 * 4, 48))
    going_on: Any = DataLoader(rest, batch_size=4, num_workers=n_workers)
    assert [batch['input_ids'].tolist() for batch in going_on] == [batch.tolist() for batch in whole[5:]]


def test_it_can_be_given_to_other_processes(folders: list[Path]) -> None:
    data = dataset(folders)
    data[0]
    again = pickle.loads(pickle.dumps(data))
    assert first_ids(again) == first_ids(data)


def test_a_number_outside_is_refused(folders: list[Path]) -> None:
    data = dataset(folders, length=3)
    assert len(list(data)) == 3  # type: ignore[call-overload]
    for i in (-1, 3):
        with pytest.raises(IndexError, match='of 3'):
            data[i]


def test_a_source_without_one_sequence_is_named(folders: list[Path], tmp_path: Path) -> None:
    small = write_folder(tmp_path / 'small', np.arange(7))
    with pytest.raises(DatasetError, match=r'small has 7 tokens, less than one sequence of 8'):
        dataset([folders[0], small])


def test_sources_of_different_tokenizers_are_not_mixed(folders: list[Path], tmp_path: Path) -> None:
    other = write_folder(tmp_path / 'other', np.arange(50), mark='f')
    with pytest.raises(DatasetError, match=r'other and .* were made with different tokenizers'):
        dataset([folders[0], other])
    assert dataset(folders).tokenizer_sha256 == '0' * 64


def test_a_vocabulary_larger_than_the_models_is_refused(folders: list[Path]) -> None:
    def made(n_vocab: int) -> PackedDataset:
        return PackedDataset([Source(folders[0])], n_tokens=8, seed=0, length=1, n_vocab=n_vocab)

    assert len(made(5000)) == 1
    with pytest.raises(DatasetError, match='a vocabulary of 5000, the model has 4999'):
        made(4999)


def test_what_sources_and_weights_refuse_is_refused_at_once(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DatasetMissingError, match=INDEX):
        dataset([tmp_path / 'missing'])
    with pytest.raises(SettingsError, match='above zero'):
        dataset(folders, weights=(1, 0, 1))
    with pytest.raises(SettingsError, match='found 0'):
        dataset([])
