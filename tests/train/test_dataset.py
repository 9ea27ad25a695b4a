"""Records as tensors: images as the robot preprocesses them, padding that nobody trains on, nothing bad trained on."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import write_picture
from torch import Tensor
from torch.utils.data import DataLoader

from mobilevlm_ros.errors import BadImageError, DatasetError, SettingsError
from mobilevlm_ros.model.tokenizer_files import write_made_up_tokenizer
from mobilevlm_ros.runtime.images import read_image
from mobilevlm_ros.runtime.preprocess import PreprocessSpec, preprocess
from mobilevlm_ros.train.dataset import DialogueDataset, PixelReader, collate
from mobilevlm_ros.train.records import Record
from mobilevlm_ros.train.templates import IGNORED, IMAGE, Turn, encode_dialogue
from mobilevlm_ros.train.tokens import Tokenizer, open_tokenizer

SPEC = PreprocessSpec(16)


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp('made_up') / 'tokenizer.model'
    write_made_up_tokenizer(path, 1000)
    return open_tokenizer(path)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return write_picture(tmp_path / 'a.png', width=40, height=30)


def shown(image: Path, *, name: str = 'shown') -> Record:
    return Record(name, image, (Turn('human', '<image>\nwhat?'), Turn('gpt', 'a cat')), 'data.json:1')


SAID = Record('said', None, (Turn('human', 'hello to you'), Turn('gpt', 'hi')), 'data.json:2')


class FeatureReader:
    """Features that tell which image they are of."""

    kind: Literal['features'] = 'features'

    def __call__(self, path: Path) -> Tensor:
        return torch.full((4, 2), len(path.name), dtype=torch.float16)

    def blank(self) -> Tensor:
        return torch.zeros(4, 2, dtype=torch.float16)


def test_an_item_has_the_templates_ids_and_labels(tokenizer: Tokenizer, picture: Path) -> None:
    record = shown(picture)

    item = DialogueDataset([record], tokenizer, 'v1', read_image=PixelReader(SPEC))[0]

    encoded = encode_dialogue(record.turns, 'v1', tokenizer, 2048)
    assert item['input_ids'].tolist() == encoded.input_ids
    assert item['labels'].tolist() == encoded.labels
    assert item['input_ids'].dtype == item['labels'].dtype == torch.int64


@pytest.mark.parametrize('aspect', ['pad', 'square'])
def test_pixels_are_those_that_the_robot_sees(tokenizer: Tokenizer, picture: Path, aspect: Any) -> None:
    spec = PreprocessSpec(16, aspect)

    item = DialogueDataset([shown(picture)], tokenizer, 'v1', read_image=PixelReader(spec))[0]

    assert item['pixels'].dtype == torch.float32
    np.testing.assert_array_equal(item['pixels'].numpy(), preprocess(read_image(picture), spec)[0])


def test_padding_and_cropping_differ(picture: Path) -> None:
    assert not torch.equal(
        PixelReader(PreprocessSpec(16, 'pad'))(picture), PixelReader(PreprocessSpec(16, 'square'))(picture)
    )


def test_a_text_only_item_has_no_image(tokenizer: Tokenizer, picture: Path) -> None:
    dataset = DialogueDataset([shown(picture), SAID], tokenizer, 'v1', read_image=PixelReader(SPEC))

    assert set(dataset[0]) == {'input_ids', 'labels', 'pixels'}
    assert set(dataset[1]) == {'input_ids', 'labels'}


def test_an_image_whose_place_was_cut_off_is_not_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    record = shown(tmp_path / 'unread.png')

    item = DialogueDataset([record], tokenizer, 'v1', read_image=PixelReader(SPEC), max_tokens=5)[0]

    assert IMAGE not in item['input_ids']
    assert 'pixels' not in item


def test_lengths_are_words_negative_without_an_image(tokenizer: Tokenizer, picture: Path) -> None:
    dataset = DialogueDataset([shown(picture), SAID], tokenizer, 'v1', read_image=PixelReader(SPEC))

    assert dataset.modality_lengths == [4, -4]


def test_images_need_a_reader(tokenizer: Tokenizer, picture: Path) -> None:
    with pytest.raises(SettingsError, match='record shown has an image'):
        DialogueDataset([SAID, shown(picture)], tokenizer, 'v1')


# -- what cannot be trained on ------------------------------------------------------------------------------------


@pytest.fixture(params=['missing', 'empty', 'cut off', 'no image'])
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / 'broken.png'
    if request.param == 'empty':
        path.touch()
    elif request.param == 'cut off':
        path.write_bytes(write_picture(tmp_path / 'whole.png').read_bytes()[:1000])
    elif request.param == 'no image':
        path.write_text('<html>404 not found</html>')
    return path


def test_a_broken_image_ends_the_run_by_name(tokenizer: Tokenizer, broken: Path) -> None:
    dataset = DialogueDataset([shown(broken)], tokenizer, 'v1', read_image=PixelReader(SPEC))

    with pytest.raises(DatasetError, match=r'record shown \(data\.json:1\).*broken\.png'):
        dataset[0]


def test_a_broken_image_is_skipped_and_named(
    tokenizer: Tokenizer, broken: Path, picture: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [shown(broken), shown(picture)]
    dataset = DialogueDataset(records, tokenizer, 'v1', read_image=PixelReader(SPEC), on_bad='skip')

    with caplog.at_level(logging.WARNING):
        batch = dataset.collate([dataset[0], dataset[1]])

    assert set(batch['labels'][0].tolist()) == {IGNORED}
    assert batch['attention_mask'][0].sum() == 1
    assert IMAGE not in batch['input_ids'][0]
    assert not batch['pixels_nchw'][0].any()
    assert 'record shown (data.json:1) is left out' in caplog.text
    assert 'broken.png' in caplog.text


def test_a_dialogue_that_the_template_cannot_hold_is_treated_alike(tokenizer: Tokenizer) -> None:
    with pytest.raises(DatasetError, match=r'record said .*not a caption'):
        DialogueDataset([SAID], tokenizer, 'plain')[0]
    assert DialogueDataset([SAID], tokenizer, 'plain', on_bad='skip')[0]['labels'].tolist() == [IGNORED]


def test_a_masked_dialogue_is_named(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    record = Record('odd', None, (Turn('human', 'hello'), Turn('gpt', 'a</s>b')), 'data.json:3')

    with caplog.at_level(logging.WARNING):
        item = DialogueDataset([record], tokenizer, 'v1')[0]

    assert set(item['labels'].tolist()) == {IGNORED}
    assert 'record odd (data.json:3) is not trained on' in caplog.text


def test_a_failure_that_is_no_fault_of_the_data_is_not_skipped(tokenizer: Tokenizer, picture: Path) -> None:
    with pytest.raises(SettingsError):
        DialogueDataset([shown(picture)], tokenizer, 'v7', read_image=PixelReader(SPEC), on_bad='skip')[0]


# -- batches ------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), pad_id=st.integers(0, 3))
def test_padding_is_on_the_right_and_not_trained_on(lengths: list[int], pad_id: int) -> None:
    """Even where the padding's id also stands in the text."""
    items = [{'input_ids': torch.arange(n) % 4, 'labels': torch.arange(n) % 4} for n in lengths]

    batch = collate(items, pad_id=pad_id)

    longest = max(lengths)
    assert set(batch) == {'input_ids', 'labels', 'attention_mask'}
    for row, n in enumerate(lengths):
        assert batch['input_ids'][row].tolist() == [*(token % 4 for token in range(n)), *[pad_id] * (longest - n)]
        assert batch['labels'][row].tolist() == [*(token % 4 for token in range(n)), *[IGNORED] * (longest - n)]
        assert batch['attention_mask'][row].tolist() == [True] * n + [False] * (longest - n)


def test_a_sample_without_an_image_gets_a_blank_one(tokenizer: Tokenizer, picture: Path) -> None:
    dataset = DialogueDataset([SAID, shown(picture)], tokenizer, 'v1', read_image=PixelReader(SPEC))

    batch = dataset.collate([dataset[0], dataset[1]])

    assert batch['pixels_nchw'].shape == (2, 3, 16, 16)
    assert not batch['pixels_nchw'][0].any()
    assert torch.equal(batch['pixels_nchw'][1], dataset[1]['pixels'])
    assert torch.equal(collate([dataset[0], dataset[1]])['pixels_nchw'], batch['pixels_nchw'])


def test_a_batch_of_text_has_blank_images_where_the_model_sees(tokenizer: Tokenizer, picture: Path) -> None:
    dataset = DialogueDataset([SAID, shown(picture)], tokenizer, 'v1', read_image=PixelReader(SPEC))

    assert dataset.collate([dataset[0]] * 2)['pixels_nchw'].shape == (2, 3, 16, 16)
    assert 'pixels_nchw' not in collate([dataset[0]] * 2)


def test_features_stand_for_pixels(tokenizer: Tokenizer, picture: Path) -> None:
    dataset = DialogueDataset([shown(picture), SAID], tokenizer, 'v1', read_image=FeatureReader())

    batch = dataset.collate([dataset[0], dataset[1]])

    assert batch['features'].dtype == torch.float16
    assert batch['features'].tolist() == [[[5, 5]] * 4, [[0, 0]] * 4]


def test_images_of_one_batch_must_have_one_shape() -> None:
    ids = {'input_ids': torch.ones(2, dtype=torch.int64), 'labels': torch.ones(2, dtype=torch.int64)}
    with pytest.raises(DatasetError, match=r'\(3, 4, 4\).*\(3, 8, 8\)'):
        collate([{**ids, 'pixels': torch.ones(3, 4, 4)}, {**ids, 'pixels': torch.ones(3, 8, 8)}])
    with pytest.raises(DatasetError, match=r'features.*pixels'):
        collate([{**ids, 'pixels': torch.ones(3, 4, 4)}, {**ids, 'features': torch.ones(3, 8)}])


def test_batches_pad_with_the_vocabularys_own_token(tokenizer: Tokenizer) -> None:
    dataset = DialogueDataset([SAID, SAID], tokenizer, 'v1')
    items = [dataset[0], {key: value[:3] for key, value in dataset[1].items()}]

    assert set(dataset.collate(items)['input_ids'][1, 3:].tolist()) == {tokenizer.pad_id}


def test_a_loaders_processes_can_read_it(tokenizer: Tokenizer, picture: Path) -> None:
    dataset = DialogueDataset([shown(picture), SAID] * 2, tokenizer, 'v1', read_image=PixelReader(SPEC))

    copy: DialogueDataset = pickle.loads(pickle.dumps(dataset))
    batches = list(DataLoader(copy, batch_size=2, num_workers=1, collate_fn=copy.collate))

    assert [tuple(batch['pixels_nchw'].shape) for batch in batches] == [(2, 3, 16, 16)] * 2


def test_readers_raise_the_runtimes_error(tmp_path: Path) -> None:
    with pytest.raises(BadImageError):
        PixelReader(SPEC)(tmp_path / 'nowhere.png')
