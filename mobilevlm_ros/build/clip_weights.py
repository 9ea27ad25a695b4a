"""CLIP weights out of the dynamically quantised ONNX file that one of nano's packages ships.

ONNX Runtime's dynamic quantisation stores each matrix as int8 with a scale and zero point for every output column, so
``(quantised - zero_point) * scale`` gives it back almost without loss. Matrices have lost their names in that file;
they are found by the name of the node that multiplies with them. Everything else kept its Hugging Face name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import BuildError

__all__ = ['clip_weights_from_quantized_onnx']

_SUFFIX = '/MatMul_quant'


def clip_weights_from_quantized_onnx(data: bytes) -> dict[str, NDArray[np.float32]]:
    """Hugging Face names to float32 tensors, matrices ``[out, in]``.

    :raise BuildError: if the file is no such ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import numpy_helper

    try:
        graph = onnx.load_model_from_string(data).graph
    except DecodeError as error:
        raise BuildError(f'the vision weights are no ONNX file ({error})') from error
    tensors: dict[str, Any] = {tensor.name: tensor for tensor in graph.initializer}
    weights = {
        name: numpy_helper.to_array(tensor).astype(np.float32)
        for name, tensor in tensors.items()
        if name.startswith('vision_model.')
    }
    for node in graph.node:
        if node.op_type == 'MatMulInteger' and node.name.endswith(_SUFFIX):
            quantized_name = node.input[1]
            base = quantized_name.removesuffix('_quantized')
            try:
                quantized, zero_point, scale = (
                    numpy_helper.to_array(tensors[name]).astype(np.float32)
                    for name in (quantized_name, f'{base}_zero_point', f'{base}_scale')
                )
            except KeyError as error:
                raise BuildError(f'the vision weights lack {error} for {node.name}') from error
            key = node.name.removesuffix(_SUFFIX).strip('/').replace('/', '.') + '.weight'
            weights[key] = np.ascontiguousarray(((quantized - zero_point) * scale).T)
    return weights
