"""Costs of vision engines from their graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_models
from onnx import TensorProto, helper

from mobilevlm_ros.bench.vision_cost import read_vision_cost
from mobilevlm_ros.build.vision_int8 import quantize_vision_onnx
from mobilevlm_ros.errors import EngineError


def write_full_size(path: Path) -> None:
    """The products of CLIP ViT-L/14-336 (23 blocks) and of LDP for 2048 channels: sizes of weights, no values."""
    nodes: list[onnx.NodeProto] = []
    weights: list[TensorProto] = []

    def weight(name: str, *shape: int) -> str:
        weights.append(TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT))
        return name

    def add(kind: str, *inputs: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, inputs, [f'x{len(nodes)}'], **attributes))
        return str(nodes[-1].output[0])

    def shape(x: str, *sides: int) -> str:
        name = f'shape{len(weights)}'
        weights.append(helper.make_tensor(name, TensorProto.INT64, [len(sides)], sides))
        return add('Reshape', x, name)

    width, n, heads, d = 1024, 577, 16, 2048
    x = add('Conv', 'pixels_nchw', weight('patches', width, 3, 14, 14), strides=[14, 14])
    x = add('Transpose', shape(x, 1, width, 576), perm=[0, 2, 1])
    x = add('Concat', weight('class', 1, 1, width), x, axis=1)
    for block in range(23):
        q, k, v = (
            add(
                'Transpose',
                shape(add('MatMul', x, weight(f'{block}{p}', width, width)), 1, n, heads, 64),
                perm=[0, 2, 3, 1] if p == 'k' else [0, 2, 1, 3],
            )
            for p in 'qkv'
        )
        mixed = add('MatMul', add('Softmax', add('MatMul', q, k)), v)
        x = shape(add('Transpose', mixed, perm=[0, 2, 1, 3]), 1, n, width)
        x = add('MatMul', x, weight(f'{block}o', width, width))
        x = add('MatMul', x, weight(f'{block}up', width, 4 * width))
        x = add('MatMul', x, weight(f'{block}down', 4 * width, width))
    weights += [helper.make_tensor(name, TensorProto.INT64, [1], [value]) for name, value in (('one', 1), ('end', n))]
    x = add('Slice', x, 'one', 'end', 'one')
    x = add('MatMul', x, weight('mlp1', width, d))
    x = add('MatMul', x, weight('mlp3', d, d))
    x = shape(add('Transpose', x, perm=[0, 2, 1]), 1, d, 24, 24)
    for stride in (1, 2):
        x = add('Conv', x, weight(f'dw{stride}', d, 1, 3, 3), group=d, strides=[stride] * 2, pads=[1] * 4)
        x = add('Conv', x, weight(f'pw{stride}', d, d, 1, 1))
    x = add('Transpose', shape(x, 1, d, 144), perm=[0, 2, 1])
    graph = helper.make_graph(
        nodes,
        'full',
        [helper.make_tensor_value_info('pixels_nchw', TensorProto.FLOAT, [1, 3, 336, 336])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, [1, 144, d])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)]), path)


def tiny_flops() -> tuple[int, int]:
    """Of the tiny tower and its LDPv2, by hand."""
    s = tiny_models.TINY_VISION
    patches, n, w = s.grid**2, s.grid**2 + 1, s.width
    block = n * 4 * w * w + 2 * n * n * w + n * 2 * w * s.mlp_width
    tower = patches * 3 * s.patch_size**2 * w + s.n_run_blocks * block
    d, n_tokens = tiny_models.TinyLlama.n_embd, tiny_models.TINY_PROJECTOR.grid_out(s.grid) ** 2
    # The graph pools before the second linear layer, which gives the same for a quarter of its work.
    projector = patches * w * d + n_tokens * (d * d + 9 * d)
    return 2 * tower, 2 * projector


def test_a_full_size_tower_costs_what_is_known_of_it(tmp_path: Path) -> None:
    write_full_size(tmp_path / 'vision.onnx')
    cost = read_vision_cost(tmp_path / 'vision.onnx')
    assert cost is not None
    assert cost.flops == pytest.approx(379e9, rel=0.01)
    assert cost.projector_flops == pytest.approx(2 * 6.66e9, rel=0.01)
    assert cost.n_patches == 576
    assert cost.product in ((577, 1024, 4096), (577, 4096, 1024))
    assert not cost.int8


def test_a_real_graph_costs_what_it_multiplies(tiny_bundle: Path) -> None:
    cost = read_vision_cost(tiny_bundle / 'vision.onnx')
    assert cost is not None
    assert (cost.tower_flops, cost.projector_flops) == tiny_flops()
    assert cost.n_patches == tiny_models.TINY_VISION.grid**2


def test_int8_products_are_seen(tiny_bundle: Path, tmp_path: Path) -> None:
    quantization = pytest.importorskip('onnxruntime.quantization')
    quantization.quantize_dynamic(tiny_bundle / 'vision.onnx', tmp_path / 'int8.onnx', op_types_to_quantize=['MatMul'])
    cost, before = (read_vision_cost(path) for path in (tmp_path / 'int8.onnx', tiny_bundle / 'vision.onnx'))
    assert cost is not None
    assert before is not None
    assert cost.int8
    assert cost.flops == before.flops


def test_openvino_multiplies_the_same(tiny_bundle: Path, tmp_path: Path) -> None:
    openvino = pytest.importorskip('openvino', reason='needs openvino: pip install openvino')
    openvino.save_model(openvino.convert_model(tiny_bundle / 'vision.onnx'), tmp_path / 'vision.xml')
    cost = read_vision_cost(tmp_path / 'vision.xml')
    assert cost is not None
    assert (cost.tower_flops, cost.projector_flops) == tiny_flops()
    assert cost.file_bytes > (tmp_path / 'vision.bin').stat().st_size


def test_a_plan_is_told_by_the_graph_beside_it(tiny_bundle: Path, tmp_path: Path) -> None:
    plan = tmp_path / 'vision.plan'
    plan.write_bytes(b'plan')
    assert read_vision_cost(plan) is None
    (tmp_path / 'vision.onnx').write_bytes((tiny_bundle / 'vision.onnx').read_bytes())
    cost = read_vision_cost(plan)
    assert cost is not None
    assert cost.tower_flops == tiny_flops()[0]


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / 'vision.onnx').write_bytes(b'no graph at all')
    with pytest.raises(EngineError, match=r'vision\.onnx'):
        read_vision_cost(tmp_path / 'vision.onnx')


def test_the_int8_engine_of_a_bundle_costs_what_its_graph_costs(tiny_bundle: Path, tmp_path: Path) -> None:
    pixels = [np.random.default_rng(seed).normal(size=(1, 3, 32, 32)).astype(np.float32) for seed in range(3)]
    quantize_vision_onnx(tiny_bundle / 'vision.onnx', tmp_path / 'int8.onnx', calibration=pixels)
    cost, before = (read_vision_cost(path) for path in (tmp_path / 'int8.onnx', tiny_bundle / 'vision.onnx'))
    assert cost is not None
    assert before is not None
    # Some hidden units are computed apart, in float32.
    assert cost.tower_flops == pytest.approx(before.tower_flops, rel=0.05)
    assert cost.projector_flops == pytest.approx(before.projector_flops, rel=0.05)
