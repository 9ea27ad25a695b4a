"""The projectors as parts of an ONNX graph: features of the tower in, embeddings of the language model out.

Names of weights are the published ones (``model.mm_projector.`` first); shapes and formulas are those of
mobilevlm/model/vision_projector.py. Values keep the order of tokens, ``[1, tokens, width]``, wherever a matrix or a
norm works on them, because that is where matrix products are fast; only depthwise convolutions see channels first.
"""

from __future__ import annotations

from mobilevlm_ros.build.graph_parts import GraphParts
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.model.config import ProjectorConfig, squeeze_width

__all__ = ['projector_graph']

_ROOT = 'model.mm_projector'
_NORM_EPS = 1e-5
"""Of the norms in depthwise blocks (timm's LayerNormAct2d)."""


def projector_graph(g: GraphParts, features: str, config: ProjectorConfig, grid: int, width: int, n_embd: int) -> str:
    """Append the projector.

    :param features: wide ``[1, grid * grid, width]``.
    :return: wide ``[1, grid_out * grid_out, n_embd]``.
    :raise BuildError: if a tensor is missing or misshapen, or the projector does not fit the grid.
    """
    x = g.narrowed(features)
    if config.family == 'linear':
        return g.widened(g.linear_from(x, _ROOT, n_embd, width))
    if config.family == 'mlp':
        names = [f'{_ROOT}.{2 * index}' for index in range(config.mlp_depth)]
        return g.widened(_pointwise(g, x, names, width, n_embd))
    if config.family == 'ldpv2':
        return _ldpv2(g, x, grid, width, n_embd)
    n_pointwise, strides = config.light_blocks or (2, (1, 2))
    names = [f'{_ROOT}.model.mlp.{2 * index + 1}' for index in range(n_pointwise)]
    x = g.widened(_pointwise(g, x, names, width, n_embd))
    n_in = n_embd if n_pointwise else width
    for index, stride in enumerate(strides):
        x = _depthwise_block(g, x, f'{_ROOT}.model.mb_block.{index + 1}.block', stride, grid, n_in, n_embd)
        grid, n_in = -(-grid // stride), n_embd
    return x


def _pointwise(g: GraphParts, x: str, names: list[str], width: int, n_embd: int) -> str:
    """Linear layers with a GELU between each two; narrow."""
    for index, name in enumerate(names):
        x = g.gelu(x) if index else x
        x = g.linear_from(x, name, n_embd, n_embd if index else width)
    return x


def _ldpv2(g: GraphParts, x: str, grid: int, width: int, n_embd: int) -> str:
    """LDPv2: two linear layers, means of 2x2 cells, a depthwise convolution that adds positions.

    The means are taken before the second linear layer, which gives the same and leaves it a quarter of the work.
    """
    if grid % 2:
        raise BuildError(
            f'LDPv2 averages cells of 2x2 features, but there are {grid} a side: choose another image_size'
        )
    side = grid // 2
    x = g.gelu(g.linear_from(x, f'{_ROOT}.mlp.mlp.0', n_embd, width))
    x = g.node('ReduceMean', g.reshape(x, side, 2, grid * n_embd), axes=[1], keepdims=0)
    x = g.node('ReduceMean', g.reshape(x, side * side, 2, n_embd), axes=[1], keepdims=0)
    x = g.linear_from(g.reshape(x, 1, side * side, n_embd), f'{_ROOT}.mlp.mlp.2', n_embd, n_embd)
    x = _channels_first(g, x, side, n_embd)
    kernel = g.narrow(f'{_ROOT}.peg.peg.0.weight', (n_embd, 1, 3, 3))
    bias = g.narrow(f'{_ROOT}.peg.peg.0.bias', (n_embd,))
    x = g.node('Add', g.node('Conv', x, kernel, bias, group=n_embd, pads=[1, 1, 1, 1]), x)
    return g.widened(_tokens(g, x, side, n_embd))


def _depthwise_block(g: GraphParts, x: str, prefix: str, stride: int, grid: int, n_in: int, n_out: int) -> str:
    """Torchvision's inverted residual of MobileNetV3 without expansion; wide ``x`` and result.

    Depthwise, norm, Hardswish; squeeze-excitation; pointwise, norm. The input is added where the shape allows it.
    """
    side = -(-grid // stride)
    kernel = g.narrow(f'{prefix}.0.0.weight', (n_in, 1, 3, 3))
    y = _channels_first(g, g.narrowed(x), grid, n_in)
    y = g.node('Conv', y, kernel, group=n_in, strides=[stride] * 2, pads=[1, 1, 1, 1])
    y = g.widened(_tokens(g, y, side, n_in))
    y = g.node('HardSwish', g.narrowed(g.layer_norm(y, f'{prefix}.0.1', n_in, _NORM_EPS)))
    y = _squeeze_excitation(g, y, f'{prefix}.1', n_in)
    matrix = g.read(f'{prefix}.2.0.weight', (n_out, n_in, 1, 1)).reshape(n_out, n_in)
    y = g.widened(g.linear(y, f'{prefix}.2.0', matrix, None))
    y = g.layer_norm(y, f'{prefix}.2.1', n_out, _NORM_EPS)
    return g.node('Add', x, y) if stride == 1 and n_in == n_out else y


def _squeeze_excitation(g: GraphParts, x: str, prefix: str, width: int) -> str:
    """Scales each channel of narrow ``x`` by what the means of all channels say."""
    squeezed = squeeze_width(width)
    gate = g.node('ReduceMean', x, axes=[1], keepdims=1)
    for name, n_out, n_in in (('fc1', squeezed, width), ('fc2', width, squeezed)):
        matrix = g.read(f'{prefix}.{name}.weight', (n_out, n_in, 1, 1)).reshape(n_out, n_in)
        gate = g.linear(gate, f'{prefix}.{name}', matrix, g.read(f'{prefix}.{name}.bias', (n_out,)))
        gate = g.node('Relu', gate) if name == 'fc1' else g.node('HardSigmoid', gate, alpha=1 / 6, beta=0.5)
    return g.node('Mul', x, gate)


def _channels_first(g: GraphParts, x: str, side: int, width: int) -> str:
    """``[1, side * side, width]`` to ``[1, width, side, side]``."""
    return g.reshape(g.node('Transpose', x, perm=[0, 2, 1]), 1, width, side, side)


def _tokens(g: GraphParts, x: str, side: int, width: int) -> str:
    """``[1, width, side, side]`` to ``[1, side * side, width]``."""
    return g.node('Transpose', g.reshape(x, 1, width, side * side), perm=[0, 2, 1])
