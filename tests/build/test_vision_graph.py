"""The graph of tower and projector: equal to PyTorch in either precision, and refused by name if a weight is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from vision_reference import cosine, features_of, tokens_of

from mobilevlm_ros.build.tower_features import tower_features
from mobilevlm_ros.build.vision_graph import PATCH_FEATURES, write_vision_graph
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.model.config import ProjectorConfig, VisionConfig
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.vision.onnxruntime import OnnxRuntimeVision

SHAPE = tiny_models.TINY_VISION
PROJECTOR = tiny_models.TINY_PROJECTOR
N_EMBD = tiny_models.TinyLlama.n_embd
USED = sorted(
    name
    for name in tiny_models.vision_weights()
    # The last block and the final norm do not run.
    if f'layers.{SHAPE.n_run_blocks}.' not in name and 'post_layernorm' not in name
)


def pixels(size: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(1, 3, size, size)).astype(np.float32)


def write(path: Path, weights: Any = None, vision: VisionConfig = SHAPE, **options: Any) -> Path:
    out = path / 'vision.onnx'
    weights = tiny_models.vision_weights(vision) if weights is None else weights
    write_vision_graph(weights, vision, PROJECTOR, N_EMBD, out, **options)
    return out


def encode(path: Path, image: NDArray[np.float32]) -> NDArray[np.float32]:
    engine = OnnxRuntimeVision(path, n_threads=1)
    try:
        return engine.encode(image, CancelToken())
    finally:
        engine.close()


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'select_layer': -1},
        {'select_layer': -4},
        {'also_layers': (-3,)},
        {'also_layers': (-4, -3), 'select_layer': -1},
        {'activation': 'gelu', 'layer_norm_eps': 1e-3},
        {'image_size': 56, 'patch_size': 14, 'n_heads': 2},
        {'image_size': 64, 'patch_size': 16, 'width': 24, 'n_heads': 3, 'mlp_width': 40},
        {'image_size': 128, 'patch_size': 32, 'n_blocks': 5},
    ],
    ids=str,
)
@pytest.mark.parametrize(('precision', 'limit'), [('fp32', 0.9999999), ('fp16', 0.9999)])
def test_visual_tokens_are_those_of_pytorch(
    tmp_path: Path, changes: dict[str, Any], precision: str, limit: float
) -> None:
    vision = dataclasses.replace(SHAPE, **changes)
    weights = tiny_models.vision_weights(vision, seed=1)
    path = write(tmp_path, weights, vision, precision=precision)
    image = pixels(vision.image_size)

    expected = tokens_of(weights, vision, PROJECTOR, N_EMBD, image)
    assert cosine(encode(path, image), expected) >= limit
    assert cosine(tower_features(path, image), features_of(weights, vision, image)) >= limit


@pytest.mark.parametrize(('size', 'patch'), [(224, 14), (224, 16), (224, 32), (336, 14), (384, 16), (384, 32)])
def test_the_sizes_of_published_towers_fit(tmp_path: Path, size: int, patch: int) -> None:
    vision = dataclasses.replace(SHAPE, image_size=size, patch_size=patch, n_blocks=2, width=8, mlp_width=8)
    out = tmp_path / 'v.onnx'
    projector = ProjectorConfig('ldpnet')
    write_vision_graph(tiny_models.vision_weights(vision, 0, projector, 8), vision, projector, 8, out)

    engine = OnnxRuntimeVision(out, n_threads=1)
    side = -(-(size // patch) // 2)
    assert (engine.image_size, engine.n_tokens, engine.n_embd) == (size, side * side, 8)


def test_large_features_do_not_overflow_in_half_precision(tmp_path: Path) -> None:
    """Real towers have features of some hundreds, whose squares float16 cannot hold."""
    weights = tiny_models.vision_weights()
    name = 'vision_model.encoder.layers.0.mlp.fc2.bias'
    weights[name] = weights[name] + np.where(np.arange(SHAPE.width) == 3, np.float32(1000.0), np.float32(0.0))
    image = pixels(SHAPE.image_size)
    assert np.abs(features_of(weights, SHAPE, image)).max() > 500

    tokens = encode(write(tmp_path, weights, precision='fp16'), image)

    assert cosine(tokens, tokens_of(weights, SHAPE, PROJECTOR, N_EMBD, image)) >= 0.9999


def test_half_precision_has_half_precision_weights_and_float32_doors(tmp_path: Path) -> None:
    model = onnx.load(write(tmp_path, precision='fp16'))

    doors = [*model.graph.input, *model.graph.output]
    assert {value.type.tensor_type.elem_type for value in doors} == {onnx.TensorProto.FLOAT}
    types = {t.name: t.data_type for t in model.graph.initializer}
    matrices = {name: kind for name, kind in types.items() if name in USED and '.mlp.' in name}
    assert set(matrices.values()) == {onnx.TensorProto.FLOAT16}


def test_a_weight_that_half_precision_cannot_hold_is_named(tmp_path: Path) -> None:
    weights = tiny_models.vision_weights()
    name = 'vision_model.encoder.layers.0.mlp.fc1.weight'
    weights[name] = weights[name] * 1e6

    with pytest.raises(BuildError, match=rf'{name} holds .*more than float16 can'):
        write(tmp_path, weights, precision='fp16')


def test_only_operators_of_onnx_itself(tmp_path: Path) -> None:
    """The same file goes to OpenVINO and TensorRT."""
    model = onnx.load(write(tmp_path))

    assert {node.domain for node in model.graph.node} == {''}
    assert [opset.domain for opset in model.opset_import] == ['']


def test_the_graph_has_one_input_and_one_output(tmp_path: Path) -> None:
    model = onnx.load(write(tmp_path))

    onnx.checker.check_model(model, full_check=True)
    (graph_input,), (graph_output,) = model.graph.input, model.graph.output
    shapes = [[d.dim_value for d in value.type.tensor_type.shape.dim] for value in (graph_input, graph_output)]
    assert (graph_input.name, graph_output.name) == ('pixels_nchw', 'visual_tokens')
    assert shapes == [[1, 3, 32, 32], [1, 4, 64]]
    assert PATCH_FEATURES in {name for node in model.graph.node for name in node.output}


@pytest.mark.parametrize('name', USED)
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    weights = tiny_models.vision_weights()
    del weights[name]

    with pytest.raises(BuildError, match=f'lack {name}; expected a tensor of shape'):
        write(tmp_path, weights)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('name', USED)
def test_a_misshapen_tensor_is_named(tmp_path: Path, name: str) -> None:
    weights = tiny_models.vision_weights()
    weights[name] = np.zeros((*weights[name].shape, 2), np.float32)

    with pytest.raises(BuildError, match=rf'{name} has shape \(.*, 2\), expected \('):
        write(tmp_path, weights)


@given(name=st.sampled_from(USED), bad=st.sampled_from([np.nan, np.inf, -np.inf]), place=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_a_value_that_is_not_finite_is_named(
    tmp_path_factory: pytest.TempPathFactory, name: str, bad: float, place: int
) -> None:
    weights = tiny_models.vision_weights()
    weights[name].flat[place % weights[name].size] = bad

    with pytest.raises(BuildError, match=f'{name} holds values that are not finite'):
        write(tmp_path_factory.mktemp('bad'), weights)


def test_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"'int4'; expected one of: fp32, fp16"):
        write(tmp_path, precision='int4')


def test_a_tower_of_timm_is_refused(tmp_path: Path) -> None:
    vision = VisionConfig('swin_tiny', kind='timm', select_layer=-1, image_size=224, patch_size=4, stride=32)

    with pytest.raises(BuildError, match=r'swin_tiny.*CLIP tower'):
        write(tmp_path, {}, vision)


def test_what_does_not_run_need_not_be_there(tmp_path: Path) -> None:
    weights = tiny_models.vision_weights()
    whole = write(tmp_path, weights).read_bytes()

    assert write(tmp_path, {name: weights[name] for name in USED}).read_bytes() == whole


def test_every_tensor_is_read_once(tmp_path: Path) -> None:
    class Counting(Mapping[str, Any]):
        def __init__(self) -> None:
            self.tensors, self.reads = tiny_models.vision_weights(), []

        def __getitem__(self, name: str) -> Any:
            self.reads.append(name)
            return self.tensors[name]

        def __iter__(self) -> Iterator[str]:
            return iter(self.tensors)

        def __len__(self) -> int:
            return len(self.tensors)

    weights = Counting()
    write(tmp_path, weights)

    assert sorted(weights.reads) == USED


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    one, other = (write(tmp_path, tiny_models.vision_weights(seed=3)).read_bytes() for _ in range(2))

    assert one == other


def test_half_precision_weights_are_widened(tmp_path: Path) -> None:
    weights = {name: tensor.astype(np.float16) for name, tensor in tiny_models.vision_weights().items()}

    model = onnx.load(write(tmp_path, weights))

    assert {t.data_type for t in model.graph.initializer} == {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
