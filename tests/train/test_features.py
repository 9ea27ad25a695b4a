"""Cached features: the tower's own, found by the picture's content, gone on with, and never those of something else."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import write_picture
from tiny_models import TINY_PROJECTOR, TINY_VISION
from torch import Tensor, nn

from mobilevlm_ros.errors import BadImageError, DatasetError, DatasetMissingError, DiskSpaceError
from mobilevlm_ros.model.checkpoint import open_checkpoint
from mobilevlm_ros.model.config import LanguageConfig, ModelConfig
from mobilevlm_ros.model.publish import init_random
from mobilevlm_ros.runtime.bundle import sha256_of
from mobilevlm_ros.runtime.images import read_image
from mobilevlm_ros.runtime.preprocess import PreprocessSpec, preprocess
from mobilevlm_ros.train.features import (
    CacheIdentity,
    FeatureCache,
    FeatureReader,
    fill_cache,
    identity_of,
    load_tower,
)

LANGUAGE = LanguageConfig(n_vocab=300, n_embd=16, n_layers=1, n_heads=2, n_kv_heads=2, n_ff=16, n_ctx=64)


@pytest.fixture(scope='module', params=[(), (-4,)], ids=['one block', 'two blocks'])
def tower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, CacheIdentity]:
    """A tiny tower out of a checkpoint, with features of one or two of its blocks."""
    vision = replace(TINY_VISION, also_layers=request.param)
    config = ModelConfig('tiny', LANGUAGE, vision, TINY_PROJECTOR)
    folder = init_random(config, tmp_path_factory.mktemp('tower') / 'tiny', dtype='fp32')
    with open_checkpoint(folder) as checkpoint:
        return load_tower(checkpoint), identity_of(vision, checkpoint.vision_weights, 'pad')


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return [write_picture(tmp_path / 'images' / f'{i}.png', seed=i) for i in range(5)]


def fill(folder: Path, images: list[Path], tower: tuple[nn.Module, CacheIdentity], **options: object) -> FeatureCache:
    module, identity = tower
    return fill_cache(folder, images, module, identity, mean=TINY_VISION.mean, std=TINY_VISION.std, **options)  # type: ignore[arg-type]


def test_features_are_those_of_the_tower_on_the_runtimes_pixels(
    tmp_path: Path, images: list[Path], tower: tuple[nn.Module, CacheIdentity]
) -> None:
    cache = fill(tmp_path / 'cache', images, tower, batch=2)

    pixels = preprocess(read_image(images[3]), PreprocessSpec(32, 'pad'))
    expected = tower[0](torch.from_numpy(pixels))[0].numpy()
    np.testing.assert_allclose(cache[sha256_of(images[3])], expected, rtol=1e-3, atol=1e-4)


def test_the_reader_gives_what_training_takes(
    tmp_path: Path, images: list[Path], tower: tuple[nn.Module, CacheIdentity]
) -> None:
    reader = FeatureReader(fill(tmp_path / 'cache', images, tower))
    again = pickle.loads(pickle.dumps(reader))

    assert reader.kind == 'features'
    assert reader(images[0]).shape == reader.blank().shape == (16, tower[1].width)
    assert reader(images[0]).dtype == torch.float32
    assert torch.equal(again(images[1]), reader(images[1]))


class Counting(nn.Module):
    """A tower that counts its pictures, and fails after so many."""

    def __init__(self, inner: nn.Module, most: int = 99) -> None:
        super().__init__()
        self.inner, self.most, self.n = inner, most, 0

    def forward(self, pixels: Tensor) -> Tensor:
        self.n += len(pixels)
        if self.n > self.most:
            raise KeyboardInterrupt
        found: Tensor = self.inner(pixels)
        return found


def test_an_interrupted_run_goes_on(tmp_path: Path, images: list[Path], tower: tuple[nn.Module, CacheIdentity]) -> None:
    module, identity = tower
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / 'cache', images, (Counting(module, most=3), identity), batch=1)
    with (tmp_path / 'cache' / 'features.f16').open('ab') as file:
        file.write(b'half a row')
    with (tmp_path / 'cache' / 'keys.txt').open('a') as file:
        file.write('abc')
    counting = Counting(module)
    cache = fill(tmp_path / 'cache', images, (counting, identity), batch=1)

    assert counting.n == 2
    whole = fill(tmp_path / 'whole', images, tower, batch=1)
    for path in images:
        np.testing.assert_array_equal(cache[sha256_of(path)], whole[sha256_of(path)])


def test_the_same_picture_twice_is_computed_once(
    tmp_path: Path, images: list[Path], tower: tuple[nn.Module, CacheIdentity]
) -> None:
    copy = tmp_path / 'copy.png'
    copy.write_bytes(images[0].read_bytes())
    assert len(fill(tmp_path / 'cache', [*images, copy], tower)) == 5


@pytest.mark.parametrize('change', [{'tower': 'x' * 64}, {'aspect': 'square'}])
def test_features_of_something_else_are_refused(
    tmp_path: Path, images: list[Path], tower: tuple[nn.Module, CacheIdentity], change: dict[str, str]
) -> None:
    fill(tmp_path / 'cache', images, tower)
    with pytest.raises(DatasetError, match=next(iter(change))):
        fill(tmp_path / 'cache', images, (tower[0], replace(tower[1], **change)))  # type: ignore[arg-type]


def test_the_bound_is_kept(tmp_path: Path, images: list[Path], tower: tuple[nn.Module, CacheIdentity]) -> None:
    with pytest.raises(DiskSpaceError, match='more than'):
        fill(tmp_path / 'cache', images, tower, max_bytes=4 * tower[1].row_bytes)


def test_a_picture_that_is_not_there_is_named(
    tmp_path: Path, images: list[Path], tower: tuple[nn.Module, CacheIdentity]
) -> None:
    reader = FeatureReader(fill(tmp_path / 'cache', images[:2], tower))
    with pytest.raises(BadImageError, match='is not in the features'):
        reader(images[4])


def test_features_that_were_cut_off_are_refused(
    tmp_path: Path, images: list[Path], tower: tuple[nn.Module, CacheIdentity]
) -> None:
    fill(tmp_path / 'cache', images, tower)
    with (tmp_path / 'cache' / 'features.f16').open('ab') as file:
        file.truncate(100)
    with pytest.raises(DatasetError, match='cut off'):
        FeatureCache(tmp_path / 'cache')


def test_a_folder_without_features_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DatasetMissingError, match='mobilevlm train features'):
        FeatureCache(tmp_path)
