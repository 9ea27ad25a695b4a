"""Weights out of a file that ONNX Runtime's own dynamic quantisation wrote."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tiny_models
from quantized_tower import write_quantized_tower

from mobilevlm_ros.build.clip_weights import clip_weights_from_quantized_onnx
from mobilevlm_ros.errors import BuildError

TOWER = {name: value for name, value in tiny_models.vision_weights().items() if name.startswith('vision_model.')}
MATRICES = [name for name, value in TOWER.items() if value.ndim == 2 and 'embedding' not in name]


@pytest.fixture(scope='module')
def quantized(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp('quantized') / 'tower.onnx'
    write_quantized_tower(path, tiny_models.vision_weights())
    return path.read_bytes()


def test_every_tensor_comes_back_under_its_name(quantized: bytes) -> None:
    weights = clip_weights_from_quantized_onnx(quantized)

    assert set(weights) == set(TOWER)
    assert {name: value.shape for name, value in weights.items()} == {
        name: value.shape for name, value in TOWER.items()
    }
    assert {value.dtype for value in weights.values()} == {np.dtype(np.float32)}


def test_what_is_no_matrix_is_exact(quantized: bytes) -> None:
    weights = clip_weights_from_quantized_onnx(quantized)

    for name in TOWER.keys() - set(MATRICES):
        np.testing.assert_array_equal(weights[name], TOWER[name])


@pytest.mark.parametrize('name', MATRICES[:6])
def test_matrices_are_within_half_a_step(quantized: bytes, name: str) -> None:
    weights = clip_weights_from_quantized_onnx(quantized)

    step = np.abs(TOWER[name]).max(axis=1, keepdims=True) / 127
    assert (np.abs(weights[name] - TOWER[name]) <= 0.51 * step).all()


@pytest.mark.parametrize('data', [b'\xff\xff\xff\xff', b'<html>not here</html>'], ids=['bytes', 'html'])
def test_what_is_no_onnx_file_is_refused(data: bytes) -> None:
    with pytest.raises(BuildError, match='no ONNX file'):
        clip_weights_from_quantized_onnx(data)


@pytest.mark.parametrize('part', ['scale', 'zero_point'])
def test_a_matrix_without_its_scale_is_named(quantized: bytes, part: str) -> None:
    model = onnx.load_model_from_string(quantized)
    gone = next(t for t in model.graph.initializer if t.name.startswith('onnx::MatMul') and t.name.endswith(part))
    model.graph.initializer.remove(gone)

    with pytest.raises(BuildError, match=f'lack .*{part}.* for /vision_model/.*MatMul_quant'):
        clip_weights_from_quantized_onnx(model.SerializeToString())
