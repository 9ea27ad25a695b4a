"""Every projector as an ONNX graph, against PyTorch's functions, behind a tiny tower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st
from vision_reference import cosine, projected

from mobilevlm_ros.build.tower_features import tower_features
from mobilevlm_ros.build.vision_graph import write_vision_graph
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.model.config import ProjectorConfig, VisionConfig
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.vision.onnxruntime import OnnxRuntimeVision

N_EMBD = 24
TOWER = VisionConfig('tiny', image_size=48, patch_size=8, width=16, n_heads=2, n_blocks=2, mlp_width=16)
TYPES = [
    'linear',
    'mlp1x_gelu',
    'mlp2x_gelu',
    'mlp4x_gelu',
    'ldpnet',
    'ldpnetv2',
    'pw2_dw1_dws1',
    'pw0_dw1_dws1',
    'pw1_dw0_dws0',
    'pw2_dw3_dws1',
    'pw2_dw0_dws3',
    'pw2_dws1_dw1',
]


def check(folder: Path, projector: ProjectorConfig, tower: VisionConfig, precision: str, limit: float) -> None:
    weights = tiny_models.vision_weights(tower, 5, projector, N_EMBD)
    path = folder / 'vision.onnx'
    write_vision_graph(weights, tower, projector, N_EMBD, path, precision=precision)
    image = np.random.default_rng(2).normal(size=(1, 3, tower.image_size, tower.image_size)).astype(np.float32)
    engine = OnnxRuntimeVision(path, n_threads=1)

    tokens = engine.encode(image, CancelToken())

    expected = projected(weights, projector, N_EMBD, tower_features(path, image)[None])[0]
    assert tokens.shape == expected.shape == (projector.grid_out(tower.grid) ** 2, N_EMBD)
    assert cosine(tokens, expected) >= limit


@pytest.mark.parametrize('name', TYPES)
@pytest.mark.parametrize(('precision', 'limit'), [('fp32', 0.9999999), ('fp16', 0.9999)])
def test_tokens_are_those_of_pytorch(tmp_path: Path, name: str, precision: str, limit: float) -> None:
    check(tmp_path, ProjectorConfig(name), TOWER, precision, limit)


@given(
    pointwise=st.integers(0, 3),
    blocks=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    strided_first=st.booleans(),
    grid=st.integers(1, 7),
)
@settings(max_examples=25, deadline=None)
def test_the_whole_light_family_on_every_grid(
    tmp_path_factory: pytest.TempPathFactory, pointwise: int, blocks: tuple[int, int], strided_first: bool, grid: int
) -> None:
    plain, strided = blocks
    if pointwise + plain + strided == 0:
        return
    order = f'dws{strided}_dw{plain}' if strided_first else f'dw{plain}_dws{strided}'
    tower = VisionConfig('t', image_size=8 * grid, patch_size=8, width=16, n_heads=2, n_blocks=1, mlp_width=8)
    check(tmp_path_factory.mktemp('light'), ProjectorConfig(f'pw{pointwise}_{order}'), tower, 'fp32', 0.999999)


def test_means_of_cells_need_an_even_grid(tmp_path: Path) -> None:
    tower = VisionConfig('t', image_size=24, patch_size=8, width=16, n_heads=2, n_blocks=1, mlp_width=8)
    projector = ProjectorConfig('ldpnetv2')

    with pytest.raises(BuildError, match='3 a side'):
        weights = tiny_models.vision_weights(tower, 0, projector, N_EMBD)
        write_vision_graph(weights, tower, projector, N_EMBD, tmp_path / 'v.onnx')


@pytest.mark.parametrize('name', ['linear', 'mlp3x_gelu', 'ldpnet', 'ldpnetv2', 'pw0_dw1_dws1'])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    projector = ProjectorConfig(name)
    weights = tiny_models.vision_weights(TOWER, 0, projector, N_EMBD)
    for missing in [key for key in weights if 'mm_projector' in key]:
        rest = {key: value for key, value in weights.items() if key != missing}
        with pytest.raises(BuildError, match=f'lack {missing}; expected'):
            write_vision_graph(rest, TOWER, projector, N_EMBD, tmp_path / 'v.onnx')
