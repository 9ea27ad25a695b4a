"""What a vision engine must compute for an image, from the graph in the bundle's file.

Counts matrix products and convolutions of an ONNX graph or an OpenVINO model, two operations for each multiply-add;
everything else is a few parts in a thousand. Weights are not read, only their shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevlm_ros.bench.limits import Product
from mobilevlm_ros.errors import DependencyError, EngineError

__all__ = ['VisionCost', 'read_vision_cost']

# After the last softmax, four products end the last block of a transformer: values, output, and the two of its MLP.
_TAIL = 4
_SMALL = 4096


@dataclass(frozen=True)
class VisionCost:
    """Costs of a vision tower with its projector.

    :ivar tower_flops: of one image; what follows the tower's last block is counted as the projector.
    :ivar n_patches: positions that the patch embedding gives; 0 if the graph does not begin with one.
    :ivar product: the product that costs most, ``[m, k] x [k, n]``.
    :ivar int8: whether most of it is multiplied in int8.
    """

    file_bytes: int
    tower_flops: int
    projector_flops: int
    n_patches: int
    product: Product
    int8: bool

    @property
    def flops(self) -> int:
        """Of one image."""
        return self.tower_flops + self.projector_flops


@dataclass(frozen=True)
class _Step:
    """One product, convolution or softmax, in the order of the graph."""

    kind: str
    flops: int = 0
    product: Product = (0, 0, 0)
    int8: bool = False
    positions: int = 0


def read_vision_cost(path: Path) -> VisionCost | None:
    """Read the costs of an ``.onnx`` file or an OpenVINO ``.xml``.

    A TensorRT plan does not tell; the graph beside it that it was made from does.

    :return: None if neither file tells.

    :raise DependencyError: if the library that reads the file is missing.
    :raise EngineError: if the file is damaged, or multiplies nothing.
    """
    readers = {'.onnx': _onnx_steps, '.xml': _openvino_steps}
    if path.suffix not in readers:
        path = path.with_suffix('.onnx')
        if not path.is_file():
            return None
    steps = readers[path.suffix](path)
    products = [step for step in steps if step.flops]
    if not products:
        raise EngineError(f'{path} has no matrix product of known shape: it is no vision engine. Rebuild the bundle.')
    last_softmax = max((index for index, step in enumerate(steps) if step.kind == 'softmax'), default=len(steps))
    after = [step for step in steps[last_softmax:] if step.flops][_TAIL:]
    projector = sum(step.flops for step in after)
    total = sum(step.flops for step in products)
    # Attention's products have one for each head; the ceiling is measured on the largest plain one.
    greatest = max(products, key=lambda step: step.flops if step.kind == 'product' else 0)
    first = products[0]
    file_bytes = path.stat().st_size
    for companion in (path.with_suffix('.bin'), Path(f'{path}.data')):
        file_bytes += companion.stat().st_size if companion.is_file() else 0
    return VisionCost(
        file_bytes=file_bytes,
        tower_flops=total - projector,
        projector_flops=projector,
        n_patches=first.positions if first.kind == 'convolution' else 0,
        product=greatest.product,
        int8=2 * sum(step.flops for step in products if step.int8) > total,
    )


def _matrix_step(left: list[int], out: list[int], k: int, int8: bool) -> _Step:
    elements = math.prod(out)
    m = elements // out[-1] if len(left) <= 3 else out[-2]
    return _Step('product', 2 * elements * k, (m, k, out[-1]), int8)


def _onnx_steps(path: Path) -> list[_Step]:
    try:
        import onnx
    except ImportError as error:
        raise DependencyError(f'reading {path.name} needs onnx ({error}). Install it with: pip install onnx') from error
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises classes of its own
        raise EngineError(f'{path} cannot be read as ONNX ({error}). Rebuild the bundle.') from error
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    for tensor in model.graph.initializer:
        # Shapes are all that inference needs of a weight; with a gigabyte of them it would need three.
        if math.prod(tensor.dims) > _SMALL:
            for field in ('raw_data', 'float_data', 'int32_data'):
                tensor.ClearField(field)
    contributed = _as_plain_products(model.graph)
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and all(dim.HasField('dim_value') for dim in dims):
            shapes.setdefault(value.name, [dim.dim_value for dim in dims])
    maker = {name: node for node in graph.node for name in node.output}
    return [step for node in graph.node if (step := _onnx_step(node, shapes, maker, contributed)) is not None]


def _as_plain_products(graph: Any) -> set[str]:
    """Write ONNX Runtime's own int8 products as plain ones, whose shapes can be inferred; returns their outputs."""
    outputs = set()
    for node in graph.node:
        if node.op_type == 'DynamicQuantizeMatMul':
            node.op_type, node.domain = 'MatMul', ''
            del node.input[2:]
            outputs.add(node.output[0])
    return outputs


def _onnx_step(node: Any, shapes: dict[str, list[int]], maker: dict[str, Any], contributed: set[str]) -> _Step | None:
    kind = node.op_type
    if kind == 'Softmax':
        return _Step('softmax')
    if kind not in ('MatMul', 'MatMulInteger', 'Gemm', 'QLinearMatMul', 'Conv', 'ConvInteger', 'QLinearConv'):
        return None
    right_name = node.input[3 if kind.startswith('QLinear') else 1]
    left, right, out = (shapes.get(name) for name in (node.input[0], right_name, node.output[0]))
    if left is None or right is None or out is None:
        return None
    int8 = (
        node.output[0] in contributed
        or 'Integer' in kind
        or 'QLinear' in kind
        or getattr(maker.get(right_name), 'op_type', '') == 'DequantizeLinear'
    )
    if 'Conv' in kind:
        return _convolution_step(right, out, int8)
    transposed = kind == 'Gemm' and any(a.name == 'transA' and a.i for a in node.attribute)
    return _matrix_step(left, out, left[0] if transposed else left[-1], int8)


def _convolution_step(weights: list[int], out: list[int], int8: bool) -> _Step:
    """Of weights ``[out, in / groups, height, width]`` and an output ``[1, out, rows, columns]``."""
    n_out, n_in, height, width = weights
    positions = out[2] * out[3]
    k = n_in * height * width
    # As a product this would be one row a position; depthwise ones are no product worth measuring.
    return _Step('convolution', 2 * positions * n_out * k * out[0], (positions, k, n_out), int8, positions)


def _openvino_steps(path: Path) -> list[_Step]:
    try:
        import openvino
    except ImportError as error:
        raise DependencyError(
            f'reading {path.name} needs openvino ({error}). Install it with: pip install openvino'
        ) from error
    try:
        operations = openvino.Core().read_model(path).get_ordered_ops()
    except RuntimeError as error:
        raise EngineError(f'{path} cannot be read by OpenVINO ({error}). Rebuild the bundle.') from error
    return [step for operation in operations if (step := _openvino_step(operation)) is not None]


def _openvino_step(operation: Any) -> _Step | None:
    kind = operation.get_type_name()
    if kind == 'Softmax':
        return _Step('softmax')
    if kind not in ('MatMul', 'Convolution', 'GroupConvolution', 'ScaledDotProductAttention'):
        return None
    shapes = [[int(n) for n in port.get_shape()] for port in (operation.input(0), operation.input(1))]
    out = [int(n) for n in operation.output(0).get_shape()]
    int8 = _openvino_quantized(operation)
    if kind == 'ScaledDotProductAttention':
        # Scores and values: two products, with the softmax between them.
        queries, keys = shapes
        return _Step('softmax', 4 * math.prod(queries) * keys[-2], (queries[-2], queries[-1], keys[-2]), int8)
    if kind == 'Convolution':
        return _convolution_step(shapes[1], out, int8)
    if kind == 'GroupConvolution':
        groups, n_out, n_in, height, width = shapes[1]
        return _convolution_step([groups * n_out, n_in, height, width], out, int8)
    transposed = operation.get_attributes().get('transpose_a', False)
    return _matrix_step(shapes[0], out, shapes[0][-2] if transposed else shapes[0][-1], int8)


def _openvino_quantized(operation: Any) -> bool:
    """Whether the left side comes out of a quantisation: FakeQuantize, as NNCF writes it."""
    source = operation.input(0).get_source_output().get_node()
    return source.get_type_name() == 'FakeQuantize'
