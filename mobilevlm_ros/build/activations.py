"""What flows through a graph's linear layers on real images: the peaks and means that quantising needs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ['InputStatistics', 'input_statistics']


@dataclass
class InputStatistics:
    """Of one value, for each entry of its last axis, over all rows and images.

    :ivar peak: largest absolute value, float32 ``[width]``.
    :ivar mean: float32 ``[width]``.
    """

    peak: NDArray[np.float32]
    mean: NDArray[np.float32]


def input_statistics(
    model: Any, folder: Path, values: Sequence[str], images: Sequence[NDArray[np.float32]]
) -> dict[str, InputStatistics]:
    """Run a graph and watch some of its values.

    :param model: ModelProto with one input; it is extended and restored.
    :param folder: where a copy of the model may lie meanwhile.
    :param values: names of ``[1, rows, width]``.
    :param images: inputs, at least one.
    """
    import onnx
    import onnxruntime as ort
    from onnx import helper

    nodes, outputs = model.graph.node, model.graph.output
    n_nodes, n_outputs = len(nodes), len(outputs)
    with tempfile.TemporaryDirectory(dir=folder, prefix='.watched-') as inside:
        path = Path(inside) / 'watched.onnx'
        for index, value in enumerate(values):
            nodes.append(helper.make_node('Abs', [value], [f'size_{index}']))
            nodes.append(helper.make_node('ReduceMax', [f'size_{index}'], [f'peak_{index}'], axes=[0, 1], keepdims=0))
            nodes.append(helper.make_node('ReduceMean', [value], [f'mean_{index}'], axes=[0, 1], keepdims=0))
            outputs.extend(onnx.ValueInfoProto(name=f'{kind}_{index}') for kind in ('peak', 'mean'))
        try:
            # Beside the graph, since one file of more than 2 GB cannot be.
            _save(model, path)
        finally:
            del nodes[n_nodes:], outputs[n_outputs:]
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        names = [f'{kind}_{index}' for index in range(len(values)) for kind in ('peak', 'mean')]
        runs = [session.run(names, {session.get_inputs()[0].name: pixels_nchw}) for pixels_nchw in images]
    return {
        value: InputStatistics(
            np.max([run[2 * index] for run in runs], axis=0), np.mean([run[2 * index + 1] for run in runs], axis=0)
        )
        for index, value in enumerate(values)
    }


def _save(model: Any, path: Path) -> None:
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.save_model(copy, str(path), save_as_external_data=True, location='watched.data')
