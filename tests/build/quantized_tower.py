"""A tiny CLIP tower in the form of nano's vision package: ONNX, dynamically quantised by ONNX Runtime itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny_models


def write_quantized_tower(path: Path, weights: tiny_models.Weights) -> None:
    """Matrices become int8 under lost names; everything else keeps its Hugging Face name."""
    from onnx import TensorProto, helper, numpy_helper, save
    from onnxruntime.quantization import QuantType, quantize_dynamic

    nodes, initializers, inputs, outputs = [], [], [], []
    for index, (name, tensor) in enumerate(sorted(weights.items())):
        if not name.startswith('vision_model.'):
            continue
        is_matrix = tensor.ndim == 2 and 'embedding' not in name
        stored = f'onnx::MatMul_{index}' if is_matrix else name
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(tensor.T if is_matrix else tensor), stored))
        result = f'y{index}'
        if is_matrix:
            inputs.append(helper.make_tensor_value_info(f'x{index}', TensorProto.FLOAT, [1, tensor.shape[1]]))
            block, _, rest = name.removesuffix('.weight').partition('.layers.')
            number, _, part = rest.partition('.')
            node_name = f'/{block.replace(".", "/")}/layers.{number}/{part.replace(".", "/")}/MatMul'
            nodes.append(helper.make_node('MatMul', [f'x{index}', stored], [result], name=node_name))
            outputs.append(helper.make_tensor_value_info(result, TensorProto.FLOAT, [1, tensor.shape[0]]))
        else:
            nodes.append(helper.make_node('Identity', [stored], [result], name=f'keep_{index}'))
            outputs.append(helper.make_tensor_value_info(result, TensorProto.FLOAT, list(tensor.shape)))
    graph = helper.make_graph(nodes, 'tower', inputs, outputs, initializers)
    plain = path.with_suffix('.plain.onnx')
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8), plain)
    quantize_dynamic(plain, path, per_channel=True, weight_type=QuantType.QInt8)
    plain.unlink()
