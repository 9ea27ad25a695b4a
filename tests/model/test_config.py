"""Shapes of models: what follows from them, and what no model can have."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.model.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig, squeeze_width

CLIP = VisionConfig('openai/clip-vit-large-patch14-336')


@pytest.mark.parametrize(
    ('name', 'family'),
    [
        ('linear', 'linear'),
        ('mlp1x_gelu', 'mlp'),
        ('mlp2x_gelu', 'mlp'),
        ('ldpnet', 'ldp'),
        ('ldpnetv2', 'ldpv2'),
        ('ldpnetv2_any', 'ldpv2'),
        ('pw0_dw1_dws1', 'light'),
        ('pw2_dws1_dw1', 'light'),
    ],
)
def test_a_projector_is_known_by_its_published_name(name: str, family: str) -> None:
    assert ProjectorConfig(name).family == family


@pytest.mark.parametrize(
    'name',
    ['', 'identity', 'mlp0x_gelu', 'mlp2x_gelu ', 'mlp2x_relu', 'pw0_dw0_dws0', 'pw0_dws0_dw0', 'pw2_dw1', 'LDPNet'],
)
def test_an_unknown_projector_is_named(name: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(f'unknown projector {name!r}')):
        ProjectorConfig(name)


@given(st.text(max_size=20))
def test_any_text_is_a_projector_or_a_settings_error(name: str) -> None:
    try:
        assert ProjectorConfig(name).grid_out(24) >= 1
    except SettingsError as error:
        assert repr(name) in str(error)


@given(n_pointwise=st.integers(0, 9), n_plain=st.integers(0, 9), n_strided=st.integers(0, 9), grid=st.integers(1, 64))
def test_only_strided_blocks_shrink_the_grid(n_pointwise: int, n_plain: int, n_strided: int, grid: int) -> None:
    if n_pointwise + n_plain + n_strided == 0:
        return
    first = ProjectorConfig(f'pw{n_pointwise}_dws{n_strided}_dw{n_plain}')
    last = ProjectorConfig(f'pw{n_pointwise}_dw{n_plain}_dws{n_strided}')

    assert first.grid_out(grid) == last.grid_out(grid) == -(-grid // 2**n_strided)


def test_strided_blocks_come_in_the_order_of_the_name() -> None:
    assert ProjectorConfig('pw2_dw3_dws1').light_blocks == (2, (1, 1, 1, 2))
    assert ProjectorConfig('pw2_dws1_dw1').light_blocks == (2, (2, 1))


@pytest.mark.parametrize(('width', 'squeezed'), [(2048, 512), (2560, 640), (4096, 1024), (16, 8), (52, 16), (72, 24)])
def test_squeeze_is_the_multiple_of_8_nearest_to_a_quarter(width: int, squeezed: int) -> None:
    assert squeeze_width(width) == squeezed


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'image_size': 337}, '337 is no multiple of the grid step 14'),
        ({'image_size': 0}, 'image_size must be at least 1, found 0'),
        ({'width': -8}, 'width must be at least 1, found -8'),
        ({'n_heads': 3}, '3 heads do not divide a width of 1024'),
        ({'select_layer': 0}, 'select_layer must be between -25 and -1, found 0'),
        ({'select_layer': -26}, 'select_layer must be between -25 and -1, found -26'),
        ({'class_token': False}, 'class_token must be true'),
        ({'kind': 'timm'}, 'select_layer of a timm tower must be -1, found -2'),
        ({'also_layers': (-2,)}, 'from -25 to before select_layer -2, found [-2]'),
        ({'also_layers': (-1,)}, 'from -25 to before select_layer -2, found [-1]'),
        ({'also_layers': (-26,)}, 'from -25 to before select_layer -2, found [-26]'),
        ({'also_layers': (-5, -5)}, 'also_layers must be ascending'),
        ({'also_layers': (-3, -5)}, 'also_layers must be ascending'),
        ({'kind': 'timm', 'select_layer': -1, 'also_layers': (-2,)}, 'of a timm tower must be none, found [-2]'),
    ],
)
def test_a_tower_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        replace(CLIP, **change)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'n_heads': 3}, '3 heads and 16 key-value heads do not divide a width of 2048'),
        ({'n_kv_heads': 5}, '16 heads and 5 key-value heads do not divide'),
        ({'n_kv_heads': 0}, 'n_kv_heads must be at least 1, found 0'),
        ({'n_layers': 0}, 'n_layers must be at least 1, found 0'),
    ],
)
def test_a_language_model_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        replace(LanguageConfig(), **change)


@pytest.mark.parametrize('lacking', ['vision', 'projector'])
def test_tower_and_projector_come_together(lacking: str) -> None:
    whole = ModelConfig('m', vision=CLIP, projector=ProjectorConfig('ldpnet'))

    with pytest.raises(SettingsError, match='m needs both a vision tower and a projector'):
        replace(whole, **{lacking: None})


def test_ldpv2_needs_an_even_grid() -> None:
    odd = replace(CLIP, image_size=350)

    with pytest.raises(SettingsError, match='a grid of 25 a side'):
        ModelConfig('m', vision=odd, projector=ProjectorConfig('ldpnetv2'))
    assert ModelConfig('m', vision=odd, projector=ProjectorConfig('ldpnet')).n_visual_tokens == 13 * 13


@given(select_layer=st.integers(-25, -1))
def test_blocks_that_run_are_counted_as_transformers_counts_hidden_states(select_layer: int) -> None:
    # hidden_states has the input of the first block, then the output of each of 24.
    assert replace(CLIP, select_layer=select_layer).n_run_blocks == range(25)[select_layer]


def test_features_of_several_blocks_lie_side_by_side() -> None:
    tower = replace(CLIP, also_layers=(-25, -24, -10))

    assert tower.used_blocks == (0, 1, 15, 23)
    assert tower.n_run_blocks == 23
    assert (tower.width, tower.feature_width) == (1024, 4096)
    assert (CLIP.used_blocks, CLIP.feature_width) == ((23,), 1024)
