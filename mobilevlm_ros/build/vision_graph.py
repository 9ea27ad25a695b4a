"""CLIP vision tower and LDPv2 projector as one ONNX graph, written node by node from a dictionary of weights.

Keys of the tower are those of Hugging Face's CLIPVisionModel (``vision_model.`` first), of the projector those of the
published MobileVLM V2 checkpoints (``model.mm_projector.`` first). The graph runs only what the model uses: the last
block and the final norm are left out (``mm_vision_select_layer`` -2), the class token is cut off before the projector.
Weights are laid out for the runtime: q, k and v as one matrix, the attention's scale folded into q.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import BuildError

__all__ = ['VisionShape', 'vision_graph']

_OPSET = 17
_IR_VERSION = 8
Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class VisionShape:
    """Sizes of a tower and its projector.

    :ivar n_blocks: blocks of the tower that run: one fewer than it has.
    :ivar pool: side of the cells that the projector averages.
    """

    image_size: int
    patch_size: int
    width: int
    n_heads: int
    n_blocks: int
    mlp_width: int
    n_embd: int
    pool: int = 2
    layer_norm_eps: float = 1e-5

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size

    @property
    def n_tokens(self) -> int:
        """Visual tokens of an image."""
        return (self.grid // self.pool) ** 2


class _Graph:
    """Collects nodes and weights; every method returns the name of a value."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._n_values = 0

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        self._n_values += 1
        output = f'{op.lower()}_{self._n_values}'
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: NDArray[Any]) -> str:
        from onnx import numpy_helper

        self.initializers.append(numpy_helper.from_array(np.asarray(value, order='C'), name))
        return name

    def read(self, key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        value = self._weights.get(key)
        if value is None:
            raise BuildError(f'the weights lack {key}; expected a tensor of shape {shape}')
        if value.shape != shape:
            raise BuildError(f'{key} has shape {value.shape}, expected {shape}')
        return value.astype(np.float32)

    def weight(self, key: str, shape: tuple[int, ...]) -> str:
        return self.constant(key, self.read(key, shape))

    def linear(self, x: str, name: str, matrix: NDArray[np.float32], bias: NDArray[np.float32]) -> str:
        """``x @ matrix.T + bias``, with ``matrix [out, in]`` as PyTorch stores it."""
        product = self.node('MatMul', x, self.constant(f'{name}.weight', matrix.T))
        return self.node('Add', product, self.constant(f'{name}.bias', bias))

    def linear_from(self, x: str, prefix: str, n_out: int, n_in: int) -> str:
        matrix = self.read(f'{prefix}.weight', (n_out, n_in))
        return self.linear(x, prefix, matrix, self.read(f'{prefix}.bias', (n_out,)))

    def layer_norm(self, x: str, prefix: str, width: int, eps: float) -> str:
        scale, bias = self.weight(f'{prefix}.weight', (width,)), self.weight(f'{prefix}.bias', (width,))
        return self.node('LayerNormalization', x, scale, bias, axis=-1, epsilon=eps)

    def reshape(self, x: str, *shape: int) -> str:
        name = f'shape_{len(self.initializers)}'
        return self.node('Reshape', x, self.constant(name, np.asarray(shape, np.int64)))

    def scalar(self, value: float) -> str:
        return self.constant(f'scalar_{len(self.initializers)}', np.asarray(value, np.float32))


def vision_graph(weights: Weights, shape: VisionShape) -> Any:
    """The ONNX model, ``pixels_nchw [1, 3, S, S] -> visual_tokens [1, n_tokens, n_embd]``, float32.

    :raise BuildError: if a tensor is missing or misshapen; the message names it.
    """
    from onnx import TensorProto, checker, helper

    graph = _Graph(weights)
    features = _tower(graph, shape)
    tokens = _ldpv2(graph, features, shape)
    graph.nodes.append(helper.make_node('Identity', [tokens], ['visual_tokens'], name='visual_tokens'))
    size = shape.image_size
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            'vision',
            [helper.make_tensor_value_info('pixels_nchw', TensorProto.FLOAT, [1, 3, size, size])],
            [helper.make_tensor_value_info('visual_tokens', TensorProto.FLOAT, [1, shape.n_tokens, shape.n_embd])],
            graph.initializers,
        ),
        opset_imports=[helper.make_opsetid('', _OPSET)],
        ir_version=_IR_VERSION,
        producer_name='mobilevlm_ros',
    )
    checker.check_model(model, full_check=True)
    return model


def _tower(g: _Graph, s: VisionShape) -> str:
    """Patches to features ``[1, grid * grid, width]``, class token removed."""
    root = 'vision_model'
    n_patches = s.grid * s.grid
    kernel = g.weight(f'{root}.embeddings.patch_embedding.weight', (s.width, 3, s.patch_size, s.patch_size))
    x = g.node('Conv', 'pixels_nchw', kernel, strides=[s.patch_size] * 2)
    x = g.node('Transpose', g.reshape(x, 1, s.width, n_patches), perm=[0, 2, 1])
    class_token = g.read(f'{root}.embeddings.class_embedding', (s.width,)).reshape(1, 1, s.width)
    x = g.node('Concat', g.constant('class_token', class_token), x, axis=1)
    x = g.node('Add', x, g.weight(f'{root}.embeddings.position_embedding.weight', (n_patches + 1, s.width)))
    x = g.layer_norm(x, f'{root}.pre_layrnorm', s.width, s.layer_norm_eps)
    for index in range(s.n_blocks):
        x = _block(g, x, f'{root}.encoder.layers.{index}', s)
    starts = g.constant('patches_from', np.asarray([1], np.int64))
    ends = g.constant('patches_to', np.asarray([n_patches + 1], np.int64))
    return g.node('Slice', x, starts, ends, g.constant('patches_axis', np.asarray([1], np.int64)))


def _block(g: _Graph, x: str, prefix: str, s: VisionShape) -> str:
    n_positions = s.grid * s.grid + 1
    head_width = s.width // s.n_heads
    normed = g.layer_norm(x, f'{prefix}.layer_norm1', s.width, s.layer_norm_eps)
    matrices = [g.read(f'{prefix}.self_attn.{p}_proj.weight', (s.width, s.width)) for p in 'qkv']
    biases = [g.read(f'{prefix}.self_attn.{p}_proj.bias', (s.width,)) for p in 'qkv']
    scale = np.float32(head_width**-0.5)
    matrices[0], biases[0] = matrices[0] * scale, biases[0] * scale
    qkv = g.linear(normed, f'{prefix}.self_attn.qkv', np.concatenate(matrices), np.concatenate(biases))
    # [1, positions, 3, heads, head_width] -> three of [1, heads, positions, head_width]
    split = g.node('Transpose', g.reshape(qkv, n_positions, 3, s.n_heads, head_width), perm=[1, 2, 0, 3])
    q, k, v = (
        g.node('Gather', split, g.constant(f'{prefix}.take_{name}', np.asarray(i, np.int64)), axis=0)
        for i, name in enumerate('qkv')
    )
    attention = g.node('Softmax', g.node('MatMul', q, g.node('Transpose', k, perm=[0, 2, 1])), axis=-1)
    mixed = g.node('Transpose', g.node('MatMul', attention, v), perm=[1, 0, 2])
    mixed = g.reshape(mixed, 1, n_positions, s.width)
    x = g.node('Add', x, g.linear_from(mixed, f'{prefix}.self_attn.out_proj', s.width, s.width))
    normed = g.layer_norm(x, f'{prefix}.layer_norm2', s.width, s.layer_norm_eps)
    hidden = g.linear_from(normed, f'{prefix}.mlp.fc1', s.mlp_width, s.width)
    hidden = _quick_gelu(g, hidden)
    return g.node('Add', x, g.linear_from(hidden, f'{prefix}.mlp.fc2', s.width, s.mlp_width))


def _quick_gelu(g: _Graph, x: str) -> str:
    """CLIP's activation, x * sigmoid(1.702 x)."""
    return g.node('Mul', x, g.node('Sigmoid', g.node('Mul', x, g.scalar(1.702))))


def _gelu(g: _Graph, x: str) -> str:
    """The exact GELU, x * (1 + erf(x / sqrt 2)) / 2."""
    erf = g.node('Erf', g.node('Div', x, g.scalar(float(np.sqrt(2.0)))))
    return g.node('Mul', g.node('Mul', x, g.node('Add', erf, g.scalar(1.0))), g.scalar(0.5))


def _ldpv2(g: _Graph, features: str, s: VisionShape) -> str:
    """LDPv2 (mobilevlm/model/vision_projector.py): two linear layers, average pooling, depthwise positions."""
    root = 'model.mm_projector'
    side = s.grid // s.pool
    x = _gelu(g, g.linear_from(features, f'{root}.mlp.mlp.0', s.n_embd, s.width))
    x = g.linear_from(x, f'{root}.mlp.mlp.2', s.n_embd, s.n_embd)
    x = g.reshape(g.node('Transpose', x, perm=[0, 2, 1]), 1, s.n_embd, s.grid, s.grid)
    x = g.node('AveragePool', x, kernel_shape=[s.pool] * 2, strides=[s.pool] * 2)
    kernel = g.weight(f'{root}.peg.peg.0.weight', (s.n_embd, 1, 3, 3))
    bias = g.weight(f'{root}.peg.peg.0.bias', (s.n_embd,))
    x = g.node('Add', g.node('Conv', x, kernel, bias, group=s.n_embd, pads=[1, 1, 1, 1]), x)
    return g.node('Transpose', g.reshape(x, 1, s.n_embd, side * side), perm=[0, 2, 1])
