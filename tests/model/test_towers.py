"""Vision towers: the features that published models use, of transformers' CLIP and of timm."""

from __future__ import annotations

import builtins
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionModel

from mobilevlm_ros.errors import DependencyError
from mobilevlm_ros.model.config import VisionConfig
from mobilevlm_ros.model.manifest import known_models, open_manifest, read_manifest
from mobilevlm_ros.model.towers import build_tower, clip_config

TINY = VisionConfig(
    'tiny', image_size=32, patch_size=8, width=32, n_heads=4, n_blocks=3, mlp_width=64, projection_width=16
)
OF_TIMM = [name for name in known_models() if (vision := read_manifest(name).vision) and vision.kind == 'timm']


def pixels(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


# -- CLIP ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('select_layer', [-1, -2, -3, -4])
@pytest.mark.parametrize('activation', ['quick_gelu', 'gelu'])
def test_features_are_the_selected_hidden_state_without_the_class_token(select_layer: int, activation: Any) -> None:
    tower = build_tower(replace(TINY, select_layer=select_layer, activation=activation)).eval()
    whole = CLIPVisionModel(clip_config(replace(TINY, activation=activation))).eval()
    getattr(whole, 'vision_model', whole).load_state_dict(tower.get_submodule('vision_model').state_dict())

    expected = whole(pixels(), output_hidden_states=True).hidden_states[select_layer][:, 1:]
    torch.testing.assert_close(tower(pixels()), expected)


@pytest.mark.parametrize('also_layers', [(-4,), (-3,), (-4, -3)])
def test_features_of_earlier_blocks_come_before_the_selected_ones(also_layers: tuple[int, ...]) -> None:
    tower = build_tower(replace(TINY, also_layers=also_layers)).eval()
    whole = CLIPVisionModel(clip_config(TINY)).eval()
    getattr(whole, 'vision_model', whole).load_state_dict(tower.get_submodule('vision_model').state_dict())

    states = whole(pixels(), output_hidden_states=True).hidden_states
    expected = torch.cat([states[layer][:, 1:] for layer in (*also_layers, -2)], dim=-1)
    torch.testing.assert_close(tower(pixels()), expected)


def test_the_last_block_and_the_last_norm_are_there_but_do_not_run() -> None:
    tower = build_tower(TINY).eval()
    expected = tower(pixels())

    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if 'encoder.layers.2.' in name or 'post_layernorm' in name:
                parameter.fill_(float('nan'))

    torch.testing.assert_close(tower(pixels()), expected)


def test_published_names_and_counts() -> None:
    with torch.device('meta'):
        tower = build_tower(VisionConfig('openai/clip-vit-large-patch14-336'))
    state = tower.state_dict()

    assert len(state) == 391
    assert sum(value.numel() for value in state.values()) == 303_507_456
    assert tuple(state['vision_model.embeddings.position_embedding.weight'].shape) == (577, 1024)
    assert {'vision_model.pre_layrnorm.bias', 'vision_model.encoder.layers.23.self_attn.out_proj.weight'} < set(state)


@pytest.mark.parametrize(('image_size', 'patch_size', 'n_patches'), [(32, 16, 4), (48, 8, 36)])
def test_other_sizes_give_other_grids(image_size: int, patch_size: int, n_patches: int) -> None:
    config = replace(TINY, image_size=image_size, patch_size=patch_size)

    assert build_tower(config)(pixels(image_size)).shape == (2, n_patches, 32)


def test_an_image_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match='48'):
        build_tower(TINY)(pixels(48))


# -- timm ---------------------------------------------------------------------------------------------------------


def run_timm(*towers: dict[str, Any]) -> list[dict[str, Any]]:
    """What ``timm_process.py`` finds of each tower."""
    script = Path(__file__).with_name('timm_process.py')
    lines = [json.dumps(tower) for tower in towers]
    result = subprocess.run([sys.executable, str(script), *lines], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
def test_features_of_timm_are_the_patches_in_row_major_order() -> None:
    vit, registers, pyramid, wrong, unknown, other_size = run_timm(
        {'name': 'vit_tiny_patch16_224', 'image_size': 96, 'patch_size': 16, 'width': 192},
        {'name': 'vit_wee_patch16_reg1_gap_256', 'image_size': 64, 'patch_size': 16, 'width': 256},
        {'name': 'pvt_v2_b0', 'image_size': 224, 'patch_size': 4, 'stride': 32, 'width': 256},
        {'name': 'vit_tiny_patch16_224', 'image_size': 96, 'patch_size': 16, 'width': 256},
        {'name': 'hf-hub:timm/vit_tiny_patch16_224.augreg_in21k'},
        {'name': 'mobilenetv3_small_050', 'image_size': 96, 'patch_size': 32, 'width': 288},
    )

    assert (vit['inner_shape'], vit['shape']) == ([1, 37, 192], [1, 36, 192])  # a class token
    assert (registers['inner_shape'], registers['shape']) == ([1, 17, 256], [1, 16, 256])  # a register
    assert (pyramid['inner_shape'], pyramid['shape']) == ([1, 256, 7, 7], [1, 49, 256])
    assert vit['is_row_major'] and registers['is_row_major'] and pyramid['is_row_major']
    assert wrong['error'].startswith('SettingsError: vit_tiny_patch16_224 gives 36 features of width 192')
    assert unknown['error'].startswith('SettingsError: timm ')
    assert "has no model 'hf-hub:" in unknown['error']  # which would have been a download
    assert other_size['error'].startswith('SettingsError: mobilenetv3_small_050 takes no images of size 96')


def architecture(vision: VisionConfig) -> tuple[str, int]:
    return vision.name.partition('.')[0], vision.image_size


@pytest.fixture(scope='module')
def table_8() -> dict[tuple[str, int], dict[str, Any]]:
    """What each architecture of Table 8 gives; rows that differ in weights alone share one."""
    keys = ('name', 'image_size', 'patch_size', 'stride', 'width', 'n_heads')
    towers = {architecture(vision): vision for name in OF_TIMM if (vision := read_manifest(name).vision)}
    found = run_timm(*({key: getattr(vision, key) for key in keys} for vision in towers.values()))
    return dict(zip(towers, found, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize('name', OF_TIMM)
def test_every_tower_of_table_8_is_one_of_timm(name: str, table_8: dict[tuple[str, int], dict[str, Any]]) -> None:
    vision = read_manifest(name).vision
    assert vision is not None

    found = table_8[architecture(vision)]

    assert found['shape'] == [1, vision.n_patches, vision.width]
    assert found['is_row_major']
    assert found['n_prefix_tokens'] == int(vision.class_token)
    language, mlp = 1_364_297_728, (vision.width + 1 + 2048 + 1) * 2048
    assert open_manifest(name).n_parameters == found['n_parameters'] + language + mlp


@pytest.mark.parametrize('error', [ImportError('no torchvision'), RuntimeError('torchvision::nms does not exist')])
def test_without_a_usable_timm_the_message_says_what_to_install(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any) -> Any:
        if name == 'timm':
            raise error
        return real(name, *arguments)

    monkeypatch.setattr(builtins, '__import__', refuse)
    with pytest.raises(DependencyError, match=re.escape(str(error)) + '.*pip install timm torchvision'):
        build_tower(replace(TINY, kind='timm', select_layer=-1))
