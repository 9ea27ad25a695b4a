"""The float32 vision graph, taken apart to be quantised: its linear layers, and rewritings that change no result.

Channels that are always large make all others coarse once they share a scale. Two remedies are exact in float32:

- *Smoothing* (SmoothQuant, arXiv 2211.10438, with migration strength 0.5): scales move from activations into the
  matrix that reads them, because what comes before takes their inverse: a norm, or v before attention's output.
- *Outliers*: behind the activation of an MLP nothing can take an inverse, and a few hidden units reach 50 times the
  usual. They become a small MLP of their own beside the large one (LLM.int8, arXiv 2208.07339, splits likewise).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.build.activations import InputStatistics, input_statistics
from mobilevlm_ros.build.onnx_file import OnnxFile
from mobilevlm_ros.build.vision_graph import PATCH_FEATURES
from mobilevlm_ros.errors import BuildError

__all__ = ['FloatGraph', 'Linear']

_MIGRATION = 0.5
"""How much of a channel's peak moves into the matrix; 0: nothing, 1: all."""
_OUTLIER_SHARE = 128
"""One of so many hidden units is an outlier."""
_BLOCK = re.compile(r'(vision_model\.encoder\.layers\.\d+)\.')
_EXACT = re.compile(r'vision_model\.encoder\.layers\.0\.|.*\.mb_block\.\d+\.block\.1\.fc[12]\Z')
"""The first block, whose errors go through all others, and squeeze-excitation, which works on one row."""
Array = NDArray[np.float32]


@dataclass
class Linear:
    """A linear layer, ``input @ matrix + bias``.

    :ivar name: of its weights, without ``.weight``.
    :ivar nodes: a MatMul, then perhaps an Add.
    :ivar statistics: of its input.
    """

    name: str
    nodes: list[Any]
    statistics: InputStatistics

    @property
    def input(self) -> str:
        """The value that it reads."""
        return str(self.nodes[0].input[0])

    @property
    def output(self) -> str:
        """The value that it makes."""
        return str(self.nodes[-1].output[0])

    @property
    def has_bias(self) -> bool:
        """Whether something is added to the product."""
        return len(self.nodes) == 2

    @property
    def stays_exact(self) -> bool:
        """Whether it should stay in float32, where this is cheap and rounding is not."""
        return self.input == PATCH_FEATURES or _EXACT.match(self.name) is not None


class FloatGraph:
    """A graph that ``write_vision_graph`` wrote in float32, in memory, with what real images make of it.

    :param images: pixels_nchw, float32 ``[1, 3, S, S]``, at least one.
    :raise BuildError: if the file is no such graph, or an image has another size.
    """

    def __init__(self, path: Path, images: Sequence[Array]) -> None:
        import onnx
        from google.protobuf.message import DecodeError

        try:
            model = onnx.load(str(path))
        except (OSError, DecodeError, onnx.checker.ValidationError) as error:
            raise BuildError(f'{path} is no ONNX graph ({error}): export it again') from error
        self._protos = {tensor.name: tensor for tensor in model.graph.initializer}
        self._changed: dict[str, NDArray[Any]] = {}
        self.inputs, self.outputs = list(model.graph.input), list(model.graph.output)
        found = self._find_linears(model.graph.node)
        blocks = dict.fromkeys(match.group(1) for name, _ in found if (match := _BLOCK.match(name)))
        types = {self._protos[f'{name}.weight'].data_type for name, _ in found}
        if not blocks or types != {onnx.TensorProto.FLOAT} or any(node.domain for node in model.graph.node):
            raise BuildError(f'{path} is no CLIP tower in float32, or quantised already: export it again')
        size = tuple(axis.dim_value for axis in self.inputs[0].type.tensor_type.shape.dim)
        for image in images:
            if image.shape != size:
                raise BuildError(f'{path} takes pixels of shape {size}; found an image of {image.shape}')
        values = list(dict.fromkeys(nodes[0].input[0] for _, nodes in found))
        statistics = input_statistics(model, path.parent, values, images)
        self.linears = {name: Linear(name, nodes, statistics[nodes[0].input[0]]) for name, nodes in found}
        self.nodes: list[Any] = list(model.graph.node)
        self.blocks: list[str] = list(blocks)

    def _find_linears(self, nodes: Sequence[Any]) -> list[tuple[str, list[Any]]]:
        readers = {name: node for node in nodes for name in node.input}
        found = []
        for node in nodes:
            if node.op_type == 'MatMul' and node.input[1] in self._protos:
                name, reader = node.input[1].removesuffix('.weight'), readers[node.output[0]]
                has_bias = reader.op_type == 'Add' and reader.input[1] == f'{name}.bias'
                found.append((name, [node, reader] if has_bias else [node]))
        return found

    def tensor(self, name: str) -> NDArray[Any] | None:
        """A constant of the graph; None if it is none."""
        from onnx import numpy_helper

        if name in self._changed:
            return self._changed[name]
        return numpy_helper.to_array(self._protos[name]) if name in self._protos else None

    def values(self, name: str) -> Array:
        """A constant that must be there.

        :raise BuildError: if it is not.
        """
        value = self.tensor(name)
        if value is None:
            raise BuildError(f'the graph lacks {name}: export it again')
        return value

    def smooth(self) -> None:
        """Let no channel of a linear layer's input be much larger than the others, in every block of the tower."""
        for block in self.blocks:
            for norm, name in (('layer_norm1', 'self_attn.qkv'), ('layer_norm2', 'mlp.fc1')):
                self._multiply(f'{block}.{norm}', 1 / self._take_scales(f'{block}.{name}'))
            scales = self._take_scales(f'{block}.self_attn.out_proj')
            of_qk = np.ones(2 * scales.size, np.float32)
            self._multiply(f'{block}.self_attn.qkv', np.concatenate([of_qk, 1 / scales]))

    def _multiply(self, name: str, factors: NDArray[Any]) -> None:
        """Multiply what a norm or a linear layer gives."""
        for part in (f'{name}.weight', f'{name}.bias'):
            self._changed[part] = self.values(part) * factors

    def _take_scales(self, name: str) -> Array:
        """Multiply a layer's matrix by scales; returns these, by which its input must be divided."""
        linear, matrix = self.linears[name], self.values(f'{name}.weight')
        peak, strength = np.maximum(linear.statistics.peak, 1e-5), np.maximum(np.abs(matrix).max(axis=1), 1e-5)
        scales = peak**_MIGRATION / strength ** (1 - _MIGRATION)
        scales = (scales / np.exp(np.log(scales).mean())).astype(np.float32)
        self._changed[f'{name}.weight'] = matrix * scales[:, None]
        linear.statistics = InputStatistics(linear.statistics.peak / scales, linear.statistics.mean / scales)
        return scales

    def set_outliers_apart(self) -> None:
        """Split the hidden units of largest peaks off every MLP of the tower; ``linears`` lists only the large part."""
        for block in self.blocks:
            fc1, fc2 = self.linears[f'{block}.mlp.fc1'], self.linears[f'{block}.mlp.fc2']
            n_outliers = fc2.statistics.peak.size // _OUTLIER_SHARE
            if n_outliers:
                apart = np.sort(np.argsort(fc2.statistics.peak)[-n_outliers:])
                self._split_mlp(fc1, fc2, apart)

    def _split_mlp(self, fc1: Linear, fc2: Linear, apart: NDArray[np.int64]) -> None:
        from onnx import helper

        split_axes = {f'{fc1.name}.weight': 1, f'{fc1.name}.bias': 0, f'{fc2.name}.weight': 0}
        for name, axis in split_axes.items():
            value = self.values(name)
            self._changed[name] = np.delete(value, apart, axis)
            self._changed[_beside(name)] = np.take(value, apart, axis)
        fc2.statistics = InputStatistics(np.delete(fc2.statistics.peak, apart), np.delete(fc2.statistics.mean, apart))
        # The same nodes once more, on values of their own, up to a second product that is added to the first.
        first, last = self._index(fc1.nodes[0]), self._index(fc2.nodes[0])
        nodes = self.nodes[first : last + 1]
        own = {name for node in nodes for name in node.output} | set(split_axes)
        copies = []
        for node in nodes:
            copy = type(node)()
            copy.CopyFrom(node)
            copy.name = _beside(node.name)
            copy.input[:] = [_beside(name) if name in own else name for name in node.input]
            copy.output[:] = [_beside(name) for name in node.output]
            copies.append(copy)
        total, large = fc2.output, f'{fc2.name}.large'
        fc2.nodes[-1].output[0] = large
        at = self._index(fc2.nodes[-1]) + 1
        self.nodes[at:at] = [
            *copies,
            helper.make_node('Add', [large, copies[-1].output[0]], [total], name=f'{total}.sum'),
        ]

    def quantizable(self) -> dict[str, Linear]:
        """Layers to compute in int8, by the name of their product."""
        return {linear.nodes[0].output[0]: linear for linear in self.linears.values() if not linear.stays_exact}

    def write(self, out: Path, replace: Mapping[str, Callable[[OnnxFile], None]] | None = None) -> None:
        """Write the graph as it is now.

        :param replace: names of values, and what appends other nodes in place of the one that makes it.
        """
        replace = replace or {}
        with OnnxFile(out) as file:
            for node in self.nodes:
                if node.output[0] in replace:
                    replace[node.output[0]](file)
                    continue
                for name in node.input:
                    if (value := self.tensor(name)) is not None:
                        file.tensor(name, value)
                file.nodes.append(node)
            file.finish(self.inputs, self.outputs)

    def _index(self, node: Any) -> int:
        return next(index for index, other in enumerate(self.nodes) if other is node)


def _beside(name: str) -> str:
    """The name of a value's or a layer's counterpart among the outliers."""
    stem, dot, part = name.rpartition('.')
    return f'{stem}.outliers.{part}' if dot and part in ('weight', 'bias') else f'{name}.outliers'
