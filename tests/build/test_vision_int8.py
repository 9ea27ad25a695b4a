"""The int8 graph: near the exact one where plain rounding is not, and never saturating."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_models
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from vision_reference import cosine

from mobilevlm_ros.build.float_graph import FloatGraph
from mobilevlm_ros.build.vision_graph import write_vision_graph
from mobilevlm_ros.build.vision_int8 import quantize_columns, quantize_vision_onnx
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.model.config import ProjectorConfig, VisionConfig
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.vision.onnxruntime import OnnxRuntimeVision

# Wide enough for each MLP to have outliers.
TOWER = VisionConfig('tower', image_size=48, patch_size=8, width=64, n_heads=4, n_blocks=4, mlp_width=256)
N_EMBD = 32
IMAGES = [np.random.default_rng(seed).normal(size=(1, 3, 48, 48)).astype(np.float32) for seed in range(6)]


def with_outliers(weights: tiny_models.Weights) -> tiny_models.Weights:
    """What real towers have: norms with a few huge channels, hidden units that always fire strongly."""
    for block in range(TOWER.n_blocks):
        prefix = f'vision_model.encoder.layers.{block}'
        for norm in ('layer_norm1', 'layer_norm2'):
            weights[f'{prefix}.{norm}.weight'][[3, 17]] *= 40.0
        for name in ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj', 'mlp.fc1'):
            weights[f'{prefix}.{name}.weight'] *= 0.3
            weights[f'{prefix}.{name}.weight'][:, [3, 17]] *= 0.05
        weights[f'{prefix}.mlp.fc1.bias'][7] = 60.0
        weights[f'{prefix}.mlp.fc2.weight'] *= 0.3
    return weights


def write(folder: Path, projector: ProjectorConfig = tiny_models.TINY_PROJECTOR, tower: VisionConfig = TOWER) -> Path:
    weights = with_outliers(tiny_models.vision_weights(tower, 3, projector, N_EMBD))
    write_vision_graph(weights, tower, projector, N_EMBD, folder / 'exact.onnx')
    return folder / 'exact.onnx'


def worst_cosine(exact: Path, other: Path, images: list[NDArray[np.float32]]) -> float:
    engines = [OnnxRuntimeVision(path, n_threads=1) for path in (exact, other)]
    pairs = [[engine.encode(image, CancelToken()) for engine in engines] for image in images]
    return min(cosine(one, two) for one, two in pairs)


@pytest.mark.parametrize('name', ['linear', 'mlp2x_gelu', 'ldpnet', 'ldpnetv2', 'pw0_dw1_dws1', 'pw2_dws1_dw1'])
def test_tokens_are_near_on_images_it_was_not_measured_with(tmp_path: Path, name: str) -> None:
    exact = write(tmp_path, ProjectorConfig(name))

    quantize_vision_onnx(exact, tmp_path / 'int8.onnx', calibration=IMAGES[:3])

    assert worst_cosine(exact, tmp_path / 'int8.onnx', IMAGES[3:]) >= 0.9995
    assert {path.name for path in tmp_path.iterdir()} == {'exact.onnx', 'int8.onnx'}


def test_towers_with_the_other_activation_are_split_likewise(tmp_path: Path) -> None:
    exact = write(tmp_path, tower=dataclasses.replace(TOWER, activation='gelu'))

    quantize_vision_onnx(exact, tmp_path / 'int8.onnx', calibration=IMAGES[:3])

    assert worst_cosine(exact, tmp_path / 'int8.onnx', IMAGES[3:]) >= 0.9995


def test_the_error_is_a_small_part_of_plain_rounding(tmp_path: Path) -> None:
    """The same weights through onnxruntime's own dynamic quantisation."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    exact = write(tmp_path)
    options = {'per_channel': True, 'reduce_range': True, 'weight_type': QuantType.QInt8}
    quantize_dynamic(exact, tmp_path / 'plain.onnx', op_types_to_quantize=['MatMul'], **options)
    quantize_vision_onnx(exact, tmp_path / 'ours.onnx', calibration=IMAGES[:3])

    ours, plain = (1 - worst_cosine(exact, tmp_path / name, IMAGES[3:]) for name in ('ours.onnx', 'plain.onnx'))
    assert ours <= 0.05 * plain


def test_rewriting_before_rounding_changes_nothing(tmp_path: Path) -> None:
    exact = write(tmp_path)
    graph = FloatGraph(exact, IMAGES[:2])
    graph.smooth()
    graph.set_outliers_apart()
    graph.write(tmp_path / 'rewritten.onnx')

    assert worst_cosine(exact, tmp_path / 'rewritten.onnx', IMAGES[2:]) >= 0.9999999
    shapes = {t.name: tuple(t.dims) for t in onnx.load(tmp_path / 'rewritten.onnx').graph.initializer}
    assert shapes['vision_model.encoder.layers.1.mlp.fc1.weight'] == (64, 254)
    assert shapes['vision_model.encoder.layers.1.mlp.fc1.outliers.weight'] == (64, 2)


def test_the_file_is_small_and_most_products_are_integer(tmp_path: Path) -> None:
    exact = write(tmp_path)
    quantize_vision_onnx(exact, tmp_path / 'int8.onnx', calibration=IMAGES[:1])

    operators = [node.op_type for node in onnx.load(tmp_path / 'int8.onnx').graph.node]
    # Two blocks of three run after the first, with four layers each; the projector's second layer.
    assert operators.count('DynamicQuantizeMatMul') == 2 * 4 + 1
    assert (tmp_path / 'int8.onnx').stat().st_size < 0.7 * exact.stat().st_size


def test_the_same_images_give_the_same_bytes(tmp_path: Path) -> None:
    exact = write(tmp_path)
    for name in ('one', 'other'):
        quantize_vision_onnx(exact, tmp_path / name, calibration=IMAGES[:2])

    assert (tmp_path / 'one').read_bytes() == (tmp_path / 'other').read_bytes()


MATRICES = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(-1e4, 1e4, width=32) | st.just(0.0),
)


@given(matrix=MATRICES)
@example(matrix=np.full((2, 1), 1e-30, np.float32))  # whose product is zero
@settings(deadline=None, max_examples=500)
def test_no_two_products_exceed_16_bits(matrix: NDArray[np.float32]) -> None:
    columns, _ = quantize_columns(matrix)

    assert columns.dtype == np.int8
    assert columns.min(initial=0) >= -127
    pairs = np.zeros((-(-len(matrix) // 2) * 2, matrix.shape[1]), np.int64)
    pairs[: len(matrix)] = columns
    # Whatever two activations from 0 to 255 they meet.
    most = 255 * np.maximum(pairs, 0).reshape(-1, 2, matrix.shape[1]).sum(axis=1)
    least = 255 * np.minimum(pairs, 0).reshape(-1, 2, matrix.shape[1]).sum(axis=1)
    assert most.max(initial=0) < 2**15
    assert least.min(initial=0) >= -(2**15)


@given(matrix=MATRICES)
@settings(deadline=None)
def test_rounding_is_to_the_nearest(matrix: NDArray[np.float32]) -> None:
    columns, scales = quantize_columns(matrix)

    assert (np.abs(columns * scales - matrix) <= 0.501 * scales + 1e-30).all()
    largest = np.abs(matrix).max(axis=0)
    assert (scales[largest > 1e-30] <= 2.0001 * largest[largest > 1e-30] / 127).all()


def test_without_images_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match='photographs'):
        quantize_vision_onnx(write(tmp_path), tmp_path / 'int8.onnx', calibration=[])


@pytest.mark.parametrize('content', [b'no model' * 10, b''])
def test_a_damaged_graph_is_an_error_that_leaves_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / 'bad.onnx').write_bytes(content)

    with pytest.raises(BuildError, match=r'bad\.onnx'):
        quantize_vision_onnx(tmp_path / 'bad.onnx', tmp_path / 'int8.onnx', calibration=IMAGES[:1])

    assert [path.name for path in tmp_path.iterdir()] == ['bad.onnx']


def test_a_graph_that_is_int8_already_is_an_error(tmp_path: Path) -> None:
    quantize_vision_onnx(write(tmp_path), tmp_path / 'int8.onnx', calibration=IMAGES[:1])

    with pytest.raises(BuildError, match=r'int8\.onnx is no CLIP tower in float32, or quantised already'):
        quantize_vision_onnx(tmp_path / 'int8.onnx', tmp_path / 'twice.onnx', calibration=IMAGES[:1])


def test_a_graph_in_half_precision_is_an_error(tmp_path: Path) -> None:
    weights = tiny_models.vision_weights(TOWER, 3, n_embd=N_EMBD)
    write_vision_graph(weights, TOWER, tiny_models.TINY_PROJECTOR, N_EMBD, tmp_path / 'half.onnx', precision='fp16')

    with pytest.raises(BuildError, match=r'half\.onnx is no CLIP tower in float32'):
        quantize_vision_onnx(tmp_path / 'half.onnx', tmp_path / 'int8.onnx', calibration=IMAGES[:1])


def test_pixels_of_another_size_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r'exact\.onnx takes pixels of shape .*48.*found .*32'):
        quantize_vision_onnx(
            write(tmp_path), tmp_path / 'int8.onnx', calibration=[np.zeros((1, 3, 32, 32), np.float32)]
        )
