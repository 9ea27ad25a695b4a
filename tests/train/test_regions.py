"""Maps of regions: what they say of each cell, and that a damaged or hostile list is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mobilevlm_ros.errors import BadImageError, DatasetError, DatasetMissingError
from mobilevlm_ros.train.regions import UNKNOWN, Grounded, cells_of, read_grounded, save_map


def picture(folder: Path, regions: np.ndarray, n_things: int = 1) -> Grounded:
    Image.fromarray(regions).save(folder / 'map.png')
    Image.new('RGB', regions.shape[::-1], (250, 250, 250)).save(folder / 'white.png')
    things = tuple((f'thing {i}', None) for i in range(n_things))
    return Grounded('one', folder / 'white.png', folder / 'map.png', things, '')


def test_a_thing_covers_the_cells_that_it_lies_on(tmp_path: Path) -> None:
    regions = np.zeros((40, 40), np.uint8)
    regions[:20, 20:] = 1
    found = cells_of(picture(tmp_path, regions), 2, 'pad')
    assert found.shares.tolist() == [[0, 1, 0, 0]]
    assert not found.unknown.any()


def test_a_wide_picture_has_empty_cells_above_and_below(tmp_path: Path) -> None:
    regions = np.full((20, 60), UNKNOWN, np.uint8)
    found = cells_of(picture(tmp_path, regions), 3, 'pad')
    assert found.unknown.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0]


def test_a_square_is_cut_out_of_the_middle(tmp_path: Path) -> None:
    regions = np.zeros((20, 60), np.uint8)
    regions[:, 20:40] = 1
    assert cells_of(picture(tmp_path, regions), 1, 'square').shares.tolist() == [[1]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    height=st.integers(1, 90), width=st.integers(1, 90), grid=st.integers(1, 12), seed=st.integers(0, 99),
    aspect=st.sampled_from(['pad', 'square']),
)  # fmt: skip
def test_shares_of_a_cell_are_at_most_all_of_it(
    tmp_path: Path, height: int, width: int, grid: int, seed: int, aspect: str
) -> None:
    regions = np.random.default_rng(seed).choice(np.array([0, 1, 2, UNKNOWN], np.uint8), (height, width))
    found = cells_of(picture(tmp_path, regions, 2), grid, aspect)  # type: ignore[arg-type]
    assert found.shares.shape == (2, grid * grid)
    total = found.shares.sum(0) + found.unknown
    assert (total >= 0).all() and (total <= 1 + 1e-6).all()


def test_a_small_map_keeps_its_proportions(tmp_path: Path) -> None:
    save_map(np.zeros((300, 600), np.uint8), tmp_path / 'map.png')
    assert Image.open(tmp_path / 'map.png').size == (96, 48)


def test_a_map_of_more_things_than_are_listed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match='shows thing 7, but one has 1'):
        cells_of(picture(tmp_path, np.full((4, 4), 7, np.uint8)), 2, 'pad')


@pytest.mark.parametrize('content', [b'', b'no picture'])
def test_a_damaged_map_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / 'map.png').write_bytes(content)
    with pytest.raises(BadImageError, match='cannot be read'):
        cells_of(Grounded('one', tmp_path, tmp_path / 'map.png', (), ''), 2, 'pad')


def test_a_list_is_read(tmp_path: Path) -> None:
    entry = {'id': 'a', 'image': 'a.jpg', 'regions': 'a.png', 'things': [['cup', 'red'], ['dog', None]], 'place': 'sea'}
    (tmp_path / 'regions.json').write_text(json.dumps([entry]))
    (found,) = read_grounded(tmp_path / 'regions.json', tmp_path / 'images')
    assert found.image == tmp_path / 'images' / 'a.jpg'
    assert found.regions == tmp_path / 'regions' / 'a.png'
    assert found.things == (('cup', 'red'), ('dog', None))
    assert found.place == 'sea'


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('[]', 'lists no picture'),
        ('{', 'cannot be read'),
        ('{}', 'no list of pictures'),
        ('[{"id": "a"}]', '0.image'),
        ('[{"id": "a", "image": "../x", "regions": "a.png", "things": []}]', 'outside its folder'),
        ('[{"id": "a", "image": "x", "regions": "/a.png", "things": []}]', 'outside its folder'),
        ('[{"id": "a", "image": "x", "regions": "a.png", "things": [["cup", 3]]}]', 'no list of pictures'),
        ('[' * 100_000, 'cannot be read'),
    ],
)
def test_a_malformed_list_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / 'regions.json').write_text(content)
    with pytest.raises(DatasetError, match=message):
        read_grounded(tmp_path / 'regions.json', tmp_path)


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetMissingError, match='nano-data'):
        read_grounded(tmp_path / 'regions.json', tmp_path)
