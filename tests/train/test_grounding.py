"""Stage ground: what a cell is taught, and that tokens then say it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from mobilevlm_ros.errors import DatasetError, SettingsError
from mobilevlm_ros.model.checkpoint import open_checkpoint
from mobilevlm_ros.model.layout import PROJECTOR_PREFIX
from mobilevlm_ros.model.mobilevlm import MobileVLM, load_mobilevlm
from mobilevlm_ros.train.config import TrainConfig
from mobilevlm_ros.train.grounding import GroundedDataset, GroundedTrainee, Words, words_of
from mobilevlm_ros.train.pixel_colours import COLOURS
from mobilevlm_ros.train.regions import UNKNOWN, Grounded
from mobilevlm_ros.train.run_log import read_log
from mobilevlm_ros.train.stage import run_stage
from mobilevlm_ros.train.tokens import open_tokenizer
from mobilevlm_ros.train.trainee import Disturbance

BLUE = (20, 60, 200)


class Blank:
    """A reader that needs no pictures."""

    kind = 'features'

    def __call__(self, path: Path) -> Tensor:
        return torch.zeros(1, 1)

    def blank(self) -> Tensor:
        return torch.zeros(1, 1)


def item(folder: Path, regions: list[list[int]], things: list[tuple[str, str | None]], place: str = '') -> dict:
    """Of a blue picture whose map is given cell by cell."""
    fine = np.array(regions, np.uint8).repeat(8, 0).repeat(8, 1)
    Image.fromarray(fine).save(folder / 'map.png')
    Image.new('RGB', fine.shape[::-1], BLUE).save(folder / 'x.png')
    picture = Grounded('one', folder / 'x.png', folder / 'map.png', tuple(things), place)
    words = Words(['cup', 'dog'], ['sea'])
    return GroundedDataset([picture], words, Blank(), len(regions), 'pad')[0]  # type: ignore[arg-type]


def test_a_cell_is_taught_what_covers_it(tmp_path: Path) -> None:
    found = item(tmp_path, [[1, 0], [2, UNKNOWN]], [('dog', None), ('cup', 'red')])
    assert found['labels'].tolist() == [2, 0, 1, -100]
    assert found['shares'][:, 0].tolist() == [1, 0, 1, 0]


def test_a_colour_is_as_told_or_else_as_its_pixels(tmp_path: Path) -> None:
    found = item(tmp_path, [[1, 0], [2, UNKNOWN]], [('dog', None), ('cup', 'red')])['colours']
    assert found.sum(1).tolist() == [1, 1, 1, 1]
    assert [COLOURS[index] for index in found.argmax(1)] == ['blue', 'blue', 'red', 'blue']


def test_padding_has_no_colour(tmp_path: Path) -> None:
    assert item(tmp_path, [[0, 0]], [])['colours'].sum(1).tolist() == [0.5]


def test_a_small_thing_is_named_by_one_cell(tmp_path: Path) -> None:
    fine = np.zeros((32, 32), np.uint8)
    fine[0:3, 0:3] = 1
    Image.fromarray(fine).save(tmp_path / 'map.png')
    Image.new('RGB', (32, 32), BLUE).save(tmp_path / 'x.png')
    picture = Grounded('one', tmp_path / 'x.png', tmp_path / 'map.png', (('dog', None),), '')
    found = GroundedDataset([picture], Words(['cup', 'dog'], []), Blank(), 2, 'pad')[0]  # type: ignore[arg-type]
    assert found['labels'].tolist() == [2, 0, 0, 0]


def test_a_place_is_told_of_what_is_unknown(tmp_path: Path) -> None:
    assert item(tmp_path, [[UNKNOWN]], [], 'sea')['place'].item() == 0
    assert item(tmp_path, [[UNKNOWN]], [])['place'].item() == -1


def test_the_words_are_in_one_order() -> None:
    def picture(*things: tuple[str, str | None], place: str = '') -> Grounded:
        return Grounded('a', Path('a'), Path('a'), things, place)

    words = words_of([picture(('dog', None), ('cup', 'red'), place='sea'), picture(('cup', 'blue'))])
    assert words.nouns == ('background', 'cup', 'dog')
    assert words.places == ('sea',)


def ground_config(folder: Path, base: Path, **sections: object) -> TrainConfig:
    return tiny_runs.config(
        folder,
        'ground',
        base,
        **{'data': {'template': 'v1'}, 'learning_rate': {'projector': 5e-3, 'language': None}} | sections,
    )


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainConfig, Path]:
    """A base, and what the stage made of it."""
    folder = tmp_path_factory.mktemp('ground')
    base = tiny_runs.write_base(folder / 'base')
    tiny_runs.write_grounded(folder)
    config = ground_config(folder, base, schedule={'max_steps': 60})
    return base, config, run_stage(config).products['model']


def model_of(folder: Path) -> tuple[MobileVLM, Path]:
    with open_checkpoint(folder) as opened:
        return load_mobilevlm(opened.config, opened.tensors), opened.tokenizer


def test_the_loss_falls(run: tuple[Path, TrainConfig, Path]) -> None:
    losses = [line['loss'] for line in read_log(run[1].out)]
    assert np.mean(losses[:3]) > 3.0 * np.mean(losses[-6:])


def test_only_the_projector_has_changed(run: tuple[Path, TrainConfig, Path]) -> None:
    with open_checkpoint(run[0]) as before, open_checkpoint(run[2]) as after:
        changed = {name for name in before.tensors if not np.array_equal(before.tensors[name], after.tensors[name])}
    assert changed
    assert all(name.startswith(PROJECTOR_PREFIX) for name in changed)


def test_tokens_are_nearest_to_the_word_for_what_is_at_their_place(run: tuple[Path, TrainConfig, Path]) -> None:
    """Measured with the loss itself: the truth costs less than the truth of another picture."""
    from mobilevlm_ros.runtime.preprocess import PreprocessSpec
    from mobilevlm_ros.train.dataset import PixelReader
    from mobilevlm_ros.train.grounding import collate_grounded
    from mobilevlm_ros.train.regions import read_grounded

    _, config, product = run
    model, tokenizer = model_of(product)
    assert config.data.records is not None
    assert config.data.images is not None
    assert model.config.vision is not None
    pictures = read_grounded(config.data.records, config.data.images)
    words = words_of(pictures)
    vision = model.config.vision
    reader = PixelReader(PreprocessSpec(vision.image_size, 'pad', vision.mean, vision.std))
    grid = round(model.config.n_visual_tokens**0.5)
    dataset = GroundedDataset(pictures, words, reader, grid, 'pad')
    trainee = GroundedTrainee(model, words, open_tokenizer(tokenizer)).eval()
    batch = collate_grounded([dataset[i] for i in range(12)])
    shifted = {name: value if name == 'pixels_nchw' else value.roll(1, 0) for name, value in batch.items()}
    with torch.no_grad():
        assert trainee(**shifted)['loss'] > 2 * trainee(**batch)['loss']


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    base = tiny_runs.write_base(tmp_path / 'base')
    tiny_runs.write_grounded(tmp_path)
    (tmp_path / 'images' / '0.png').unlink()
    with pytest.raises(DatasetError, match='picture 0 cannot be learned from'):
        run_stage(ground_config(tmp_path, base))


@pytest.mark.parametrize('rates', [{'projector': None, 'language': 1e-3}, {'projector': 1e-3, 'language': 1e-3}])
def test_it_trains_the_projector_alone(tmp_path: Path, rates: dict[str, float | None]) -> None:
    base = tiny_runs.write_base(tmp_path / 'base')
    with pytest.raises(SettingsError, match='ground trains the projector alone'):
        ground_config(tmp_path, base, learning_rate=rates)


def test_its_pictures_are_disturbed_once_and_not_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without features computed before, which leave no tower to disturb twice."""
    base = tiny_runs.write_base(tmp_path / 'base')
    tiny_runs.write_grounded(tmp_path)
    disturbed: list[int] = []
    monkeypatch.setattr(Disturbance, '__call__', lambda self, features: disturbed.append(len(features)) or features)
    data = {'template': 'v1', 'feature_noise': 0.5}
    run_stage(ground_config(tmp_path, base, data=data, schedule={'max_steps': 3}))
    assert disturbed == [4, 4, 4]


def test_a_colour_that_is_none_is_said(tmp_path: Path) -> None:
    base = tiny_runs.write_base(tmp_path / 'base')
    tiny_runs.write_grounded(tmp_path)
    listed = tmp_path / 'records.json'
    pictures = json.loads(listed.read_text())
    for picture, colour in zip(pictures, ('grey', 'beige', 'beige'), strict=False):
        picture['things'][0][1] = colour
    listed.write_text(json.dumps(pictures))
    said = Console(file=io.StringIO(), width=400)
    run_stage(ground_config(tmp_path, base, schedule={'max_steps': 1}), console=said, card_only=True)
    assert '3 things are told a colour that is none of red, orange' in said.file.getvalue()
    assert "('beige', 'grey'): their pixels say it instead" in said.file.getvalue()
