"""What the vision tower's and the projectors' graphs are made of: linear layers, norms and activations from weights.

In ``fp16`` the matrices, and what is multiplied with them, are float16; sums that run through the whole tower and norms
stay float32. A norm squares its input: features of real CLIP towers reach some hundreds, whose squares float16 cannot
hold. Attention's scores need no such care, since their scale is folded into q and softmax subtracts the largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.build.onnx_file import OnnxFile
from mobilevlm_ros.errors import BuildError

__all__ = ['GraphParts', 'Weights']

_TYPES: dict[str, Any] = {'fp32': np.float32, 'fp16': np.float16}
Weights = Mapping[str, NDArray[np.float32]]


class GraphParts:
    """Appends nodes to a graph; every method returns the name of a value.

    "Wide" values are float32, "narrow" ones are of the precision that was asked for. In fp32 they are the same.

    :param weights: Hugging Face names to tensors; each is read once.
    :param precision: ``fp32`` or ``fp16``.
    :raise BuildError: if it is another precision.
    """

    def __init__(self, file: OnnxFile, weights: Weights, precision: str) -> None:
        self._file = file
        self._weights = weights
        if precision not in _TYPES:
            raise BuildError(f'a graph cannot be written in {precision!r}; expected one of: {", ".join(_TYPES)}')
        self._narrow = _TYPES[precision]

    def node(self, op: str, *inputs: str, output: str = '', **attributes: Any) -> str:
        """One operator."""
        return self._file.node(op, *inputs, output=output, **attributes)

    def read(self, key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A tensor of the weights.

        :raise BuildError: if it is missing, misshapen, or not finite.
        """
        value = self._weights.get(key)
        if value is None:
            raise BuildError(f'the weights lack {key}; expected a tensor of shape {shape}')
        if value.shape != shape:
            raise BuildError(f'{key} has shape {value.shape}, expected {shape}')
        value = value.astype(np.float32, copy=False)
        if not np.isfinite(value).all():
            raise BuildError(f'{key} holds values that are not finite: the checkpoint is damaged')
        return value

    def wide(self, key: str, shape: tuple[int, ...]) -> str:
        """A tensor of the weights as a float32 constant."""
        return self._file.tensor(key, self.read(key, shape))

    def narrow(self, key: str, shape: tuple[int, ...]) -> str:
        """A tensor of the weights as a narrow constant."""
        return self.constant(key, self.read(key, shape))

    def constant(self, name: str, value: NDArray[np.float32]) -> str:
        """Given values as a narrow constant.

        :raise BuildError: if float16 cannot hold one.
        """
        largest = float(np.abs(value).max())
        if largest > float(np.finfo(self._narrow).max):
            raise BuildError(f'{name} holds {largest:.3g}, more than float16 can: choose a profile with fp32')
        return self._file.tensor(name, value.astype(self._narrow))

    def wide_constant(self, name: str, value: NDArray[np.float32]) -> str:
        """Given values as a float32 constant."""
        return self._file.tensor(name, value)

    def scalar(self, value: float) -> str:
        """A narrow number."""
        return self._file.tensor(f'number_{value}', np.asarray(value, self._narrow))

    def integers(self, *values: int) -> str:
        """A vector of int64."""
        return self._file.tensor('x'.join(['integers', *map(str, values)]), np.asarray(values, np.int64))

    def index(self, value: int) -> str:
        """An int64."""
        return self._file.tensor(f'index_{value}', np.asarray(value, np.int64))

    def narrowed(self, x: str) -> str:
        """A wide value made narrow."""
        return self._cast(x, self._narrow)

    def widened(self, x: str) -> str:
        """A narrow value made wide."""
        return self._cast(x, np.float32)

    def _cast(self, x: str, dtype: Any) -> str:
        from onnx import helper

        if self._narrow is np.float32:
            return x
        return self.node('Cast', x, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def linear(self, x: str, name: str, matrix: NDArray[np.float32], bias: NDArray[np.float32] | None) -> str:
        """``x @ matrix.T + bias`` of narrow ``x``, with ``matrix [out, in]`` as PyTorch stores it."""
        product = self.node('MatMul', x, self.constant(f'{name}.weight', matrix.T))
        return product if bias is None else self.node('Add', product, self.constant(f'{name}.bias', bias))

    def linear_from(self, x: str, prefix: str, n_out: int, n_in: int) -> str:
        """A linear layer of the weights on narrow ``x``."""
        matrix = self.read(f'{prefix}.weight', (n_out, n_in))
        return self.linear(x, prefix, matrix, self.read(f'{prefix}.bias', (n_out,)))

    def layer_norm(self, x: str, prefix: str, width: int, eps: float) -> str:
        """Layer norm over the last axis of wide ``x``; wide."""
        scale, bias = self.wide(f'{prefix}.weight', (width,)), self.wide(f'{prefix}.bias', (width,))
        return self.node('LayerNormalization', x, scale, bias, axis=-1, epsilon=eps)

    def reshape(self, x: str, *shape: int) -> str:
        """The same values in another shape."""
        return self.node('Reshape', x, self.integers(*shape))

    def quick_gelu(self, x: str) -> str:
        """OpenAI CLIP's activation, x * sigmoid(1.702 x)."""
        return self.node('Mul', x, self.node('Sigmoid', self.node('Mul', x, self.scalar(1.702))))

    def gelu(self, x: str) -> str:
        """The exact GELU, x * (1 + erf(x / sqrt 2)) / 2, in the form that engines recognise."""
        erf = self.node('Erf', self.node('Div', x, self.scalar(float(np.sqrt(2.0)))))
        return self.node('Mul', self.node('Mul', x, self.node('Add', erf, self.scalar(1.0))), self.scalar(0.5))
