"""The ONNX graph: refuses weights that do not fit, by name. That its numbers are right is tested with its engine."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tiny_models

from mobilevlm_ros.build.vision_graph import VisionShape, vision_graph
from mobilevlm_ros.errors import BuildError

SHAPE = tiny_models.TINY_VISION
USED = sorted(
    name
    for name in tiny_models.vision_weights()
    # The last block and the final norm do not run.
    if f'layers.{SHAPE.n_blocks}.' not in name and 'post_layernorm' not in name
)


def test_sizes_follow_from_the_image() -> None:
    shape = VisionShape(image_size=224, patch_size=16, width=768, n_heads=12, n_blocks=11, mlp_width=3072, n_embd=576)

    assert (shape.grid, shape.n_tokens) == (14, 49)


def test_the_graph_has_one_input_and_one_output() -> None:
    model = vision_graph(tiny_models.vision_weights(), SHAPE)

    onnx.checker.check_model(model, full_check=True)
    (graph_input,), (graph_output,) = model.graph.input, model.graph.output
    shapes = [[d.dim_value for d in value.type.tensor_type.shape.dim] for value in (graph_input, graph_output)]
    assert (graph_input.name, graph_output.name) == ('pixels_nchw', 'visual_tokens')
    assert shapes == [[1, 3, 32, 32], [1, 4, 64]]


@pytest.mark.parametrize('name', USED)
def test_a_missing_tensor_is_named(name: str) -> None:
    weights = tiny_models.vision_weights()
    del weights[name]

    with pytest.raises(BuildError, match=f'lack {name}; expected a tensor of shape'):
        vision_graph(weights, SHAPE)


@pytest.mark.parametrize('name', USED)
def test_a_misshapen_tensor_is_named(name: str) -> None:
    weights = tiny_models.vision_weights()
    weights[name] = np.zeros((*weights[name].shape, 2), np.float32)

    with pytest.raises(BuildError, match=rf'{name} has shape \(.*, 2\), expected \('):
        vision_graph(weights, SHAPE)


def test_what_does_not_run_need_not_be_there() -> None:
    weights = tiny_models.vision_weights()
    only_used = {name: weights[name] for name in USED}

    assert vision_graph(only_used, SHAPE).SerializeToString() == vision_graph(weights, SHAPE).SerializeToString()


def test_the_same_weights_give_the_same_bytes() -> None:
    one, other = (vision_graph(tiny_models.vision_weights(seed=3), SHAPE) for _ in range(2))

    assert one.SerializeToString() == other.SerializeToString()


def test_half_precision_weights_are_widened() -> None:
    weights = {name: tensor.astype(np.float16) for name, tensor in tiny_models.vision_weights().items()}

    model = vision_graph(weights, SHAPE)

    assert {t.data_type for t in model.graph.initializer} == {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
