"""A bundle whose projector has random weights: what a model answers that was never taught to see.

Everything else stays: tower, language model, adapter and prompt. So the difference to the bundle itself is what its
projector has learned.
"""

from __future__ import annotations

import os
import shutil
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.build.onnx_file import data_file
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.runtime.bundle import DESCRIPTION, Bundle, file_entry, open_bundle, write_description

__all__ = ['write_untrained']

_ROOT = 'model.mm_projector.'
_WARNING = 'the projector has random weights: the answers have nothing to do with the picture'


def write_untrained(bundle: Bundle, out: Path, seed: int = 0) -> Bundle:
    """Copy a bundle, with another projector; files that stay are linked where the disk can.

    :param out: folder to make.
    :raise BuildError: if the bundle's graph is not one of ONNX Runtime in floating point, or ``out`` is there.
    """
    import onnx
    from onnx import numpy_helper

    graph_path = bundle.vision_path
    if bundle.vision['backend'] != 'onnxruntime':
        raise BuildError(
            f'the vision engine of {bundle.path} is one of {bundle.vision["backend"]}, whose projector cannot be '
            'exchanged: build the model for the profile cpu'
        )
    model = onnx.load(graph_path)
    tensors = {one.name: one for one in model.graph.initializer if one.name.startswith(_ROOT)}
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    if not tensors or any(one.data_type not in floats for one in tensors.values()):
        raise BuildError(
            f'{graph_path} holds no projector in floating point (its precision is {bundle.vision["precision"]}): build '
            'the model for the profile cpu'
        )
    random = np.random.default_rng(seed)
    shapes = {name: tuple(one.dims) for name, one in tensors.items()}
    for name, tensor in tensors.items():
        old = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(_initial(name, shapes, random).astype(old.dtype), name))
    try:
        out.mkdir(parents=True)
        left_out = {graph_path.name, data_file(graph_path).name, bundle.description.get('parity'), 'reference.npz'}
        names = [name for name in bundle.description['files'] if name not in left_out]
        for name in names:
            _link(bundle.path / name, out / name)
        is_split = data_file(graph_path).exists()
        onnx.save(model, out / graph_path.name, save_as_external_data=is_split, location=f'{graph_path.name}.data')
        names += [graph_path.name, *([f'{graph_path.name}.data'] if is_split else [])]
        description: dict[str, Any] = {key: value for key, value in bundle.description.items() if key != 'parity'}
        description |= {'name': f'{bundle.name}-untrained', 'warning': _WARNING}
        description['files'] = {name: file_entry(out / name) for name in sorted(names)}
        write_description(out, description)
    except OSError as error:
        raise BuildError(f'{out / DESCRIPTION} cannot be written: {error.strerror or error}') from error
    return open_bundle(out, verify_hashes=False)


def _initial(name: str, shapes: dict[str, tuple[int, ...]], random: np.random.Generator) -> NDArray[np.float64]:
    """As PyTorch initialises its layers: uniform within 1 / sqrt(inputs), norms with 1 and 0."""
    shape = shapes[name]
    root, _, kind = name.rpartition('.')
    weight = shapes.get(f'{root}.weight', ())
    if len(weight) < 2:
        return np.full(shape, 1.0 if kind == 'weight' else 0.0)
    # Matrices lie in the graph as [inputs, outputs], kernels as [outputs, inputs, height, width].
    n_inputs = weight[0] if len(weight) == 2 else prod(weight[1:])
    return random.uniform(-(n_inputs**-0.5), n_inputs**-0.5, shape)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
