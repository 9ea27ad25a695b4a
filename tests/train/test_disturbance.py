"""Features are disturbed while a model learns, and only then."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_runs
import torch
from torch import Tensor

from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.model.checkpoint import open_checkpoint
from mobilevlm_ros.model.mobilevlm import MobileVLM, load_mobilevlm
from mobilevlm_ros.train.config import read_config
from mobilevlm_ros.train.trainee import Disturbance, Trainee


def test_nothing_is_done_unless_asked() -> None:
    features = torch.randn(2, 4, 8)
    assert torch.equal(Disturbance()(features), features)


def test_noise_is_a_share_of_each_feature() -> None:
    torch.manual_seed(0)
    features = torch.full((4, 50, 100), 10.0)
    features[..., 0] = 0
    found = Disturbance(noise=0.5)(features)
    assert not found[..., 0].any()
    assert found[..., 1:].mean().item() == pytest.approx(10, rel=0.02)
    assert found[..., 1:].std().item() == pytest.approx(5, rel=0.02)


def test_a_picture_goes_without_whole_channels() -> None:
    torch.manual_seed(0)
    found = Disturbance(left_out=0.25)(torch.ones(8, 5, 400))
    assert torch.equal(found, found[:, :1].expand_as(found))
    assert sorted(found.unique().tolist()) == pytest.approx([0, 4 / 3])
    assert found.mean().item() == pytest.approx(1, rel=0.05)
    assert not torch.equal(found[0], found[1])


@pytest.fixture(scope='module')
def model(tmp_path_factory: pytest.TempPathFactory) -> MobileVLM:
    with open_checkpoint(tiny_runs.write_base(tmp_path_factory.mktemp('disturbed') / 'base')) as opened:
        return load_mobilevlm(opened.config, opened.tensors)


def encoded(trainee: Trainee, pixels: Tensor) -> Tensor:
    return trainee.model.encode_images(pixels)


def test_it_stops_when_learning_stops(model: MobileVLM) -> None:
    assert model.config.vision is not None
    pixels = torch.randn(1, 3, model.config.vision.image_size, model.config.vision.image_size)
    plain = model.encode_images(pixels)
    trainee = Trainee(model, disturbance=Disturbance(0.5, 0.2))
    assert torch.equal(encoded(trainee.eval(), pixels), plain)
    assert not torch.allclose(encoded(trainee.train(), pixels), plain)


@pytest.mark.parametrize('wrong', ['data.feature_noise=-1', 'data.feature_dropout=1', 'data.feature_dropout=much'])
def test_a_share_that_cannot_be_is_refused(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=wrong.partition('=')[0]):
        read_config('nano-ground', [f'out={tmp_path}', wrong])
