"""The vision graph in int8 for ONNX Runtime: matrices of linear layers, and activations quantised as they come.

Each column of a matrix has its own scale; each activation one scale and zero point, found anew for every image
(``DynamicQuantizeMatMul``). That alone does not do for real CLIP towers: the visual tokens of CLIP B/16 would have a
cosine of 0.61 to the exact ones on a CPU with AVX2 (0.985 with weights of 7 bits), while this gives 0.999:

- *No saturation.* CPUs without VNNI add two neighbouring products in 16 bits. A column's scale is such that no pair of
  neighbours can exceed them, which costs a third of a bit; the usual remedy, weights of 7 bits, costs a whole one.
- *Even channels.* Before it is quantised, the graph is smoothed and its outliers are set apart (``float_graph``).
- *Means.* What rounding does to a layer's mean output on the given images is taken out of its bias.
- *Float32 where it is cheap*: the first block, whose errors go through all others, outliers, squeeze-excitation, and
  the layer that reads the tower's raw features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.build.float_graph import FloatGraph, Linear
from mobilevlm_ros.build.onnx_file import OnnxFile
from mobilevlm_ros.errors import BuildError

__all__ = ['quantize_columns', 'quantize_vision_onnx']

_CONTRIB = 'com.microsoft'
_LARGEST = 127
_SMALLEST = 1e-30
"""Weights of a column below this are zero, like a scale would become that is a 127th of it."""
Array = NDArray[np.float32]


def quantize_vision_onnx(fp32: Path, out: Path, *, calibration: Sequence[Array]) -> None:
    """Write ``out``, a graph of the same input and output, for ONNX Runtime alone.

    :param fp32: as ``write_vision_graph`` writes it in float32.
    :param calibration: pixels_nchw of real images, float32 ``[1, 3, S, S]`` each; a handful is enough.
    :raise BuildError: if there are no images, or the file is no such graph.
    """
    if not calibration:
        raise BuildError('int8 needs images to measure activations with, and there are none: give some photographs')
    graph = FloatGraph(fp32, calibration)
    graph.smooth()
    graph.set_outliers_apart()
    replace: dict[str, Callable[[OnnxFile], None]] = {}
    for linear in graph.quantizable().values():
        replace |= {node.output[0]: lambda file: None for node in linear.nodes}
        replace[linear.nodes[0].output[0]] = partial(_write_linear, graph, linear)
    graph.write(out, replace)


def _write_linear(graph: FloatGraph, linear: Linear, file: OnnxFile) -> None:
    matrix = graph.values(f'{linear.name}.weight')
    columns, scales = quantize_columns(matrix)
    shift = linear.statistics.mean @ (matrix - columns * scales)
    bias = graph.values(f'{linear.name}.bias') + shift if linear.has_bias else shift
    file.node(
        'DynamicQuantizeMatMul',
        linear.input,
        file.tensor(f'{linear.name}.columns', columns),
        file.tensor(f'{linear.name}.scales', scales),
        '',  # zero points: none
        file.tensor(f'{linear.name}.bias', bias.astype(np.float32)),
        output=linear.output,
        domain=_CONTRIB,
    )


def quantize_columns(matrix: Array) -> tuple[NDArray[np.int8], Array]:
    """Round a matrix to integers, column by column, so that pairs of products fit into 16 bits.

    Activations are 0 to 255, so products of rows 2i and 2i + 1 can add up to 255 times the sum of two weights of one
    sign; with at most 128 for this sum they stay below 2**15.

    :param matrix: float32 ``[in, out]``.
    :return: int8 ``[in, out]`` and scales float32 ``[out]``; their product is nearly the matrix.
    """
    even, odd = matrix[: matrix.shape[0] // 2 * 2 : 2], matrix[1::2]
    of_one_sign = np.where(np.sign(even) == np.sign(odd), np.abs(even + odd), np.float32(0))
    largest = np.maximum(np.abs(matrix).max(axis=0, initial=_SMALLEST), of_one_sign.max(axis=0, initial=_SMALLEST))
    scales = (largest / _LARGEST).astype(np.float32)
    return np.rint(matrix / scales).astype(np.int8), scales
