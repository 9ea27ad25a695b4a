"""CLIP vision tower and projector as one ONNX graph, written node by node from a dictionary of weights.

Keys of the tower are those of Hugging Face's CLIPVisionModel (``vision_model.`` first), of the projector those of the
published checkpoints (``model.mm_projector.`` first). The graph runs only what the model uses: blocks after the
selected one and the final norm are left out, the class token is cut off before the projector. Weights are laid out for
the runtime: q, k and v as one matrix, the attention's scale folded into q. All operators are ONNX's own, so that ONNX
Runtime, OpenVINO and TensorRT read the same file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mobilevlm_ros.build.graph_parts import GraphParts, Weights
from mobilevlm_ros.build.onnx_file import OnnxFile
from mobilevlm_ros.build.projector_graph import projector_graph
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.model.config import ProjectorConfig, VisionConfig

__all__ = ['PATCH_FEATURES', 'write_vision_graph']

PATCH_FEATURES = 'patch_features'
"""Value of the graph between tower and projector, float32 ``[1, n_patches, feature_width]``."""
_ROOT = 'vision_model'


def write_vision_graph(
    weights: Weights,
    vision: VisionConfig,
    projector: ProjectorConfig,
    n_embd: int,
    out: Path,
    *,
    precision: str = 'fp32',
) -> None:
    """Write ``pixels_nchw [1, 3, S, S] -> visual_tokens [1, n_tokens, n_embd]``.

    Input and output are float32 in either precision: preprocessing makes float32 and llama.cpp takes it, so every
    engine has the same interface. No more than one tensor is in memory at a time. Above 1.5 GB of weights there is a
    second file, ``OUT.data``, which must stay beside the first.

    :param weights: each tensor is read once.
    :param n_embd: width of a visual token.
    :param precision: ``fp32`` or ``fp16``.
    :raise BuildError: if a tensor is missing or misshapen (the message names it), the tower is none of CLIP, or
        tower and projector do not fit together.
    """
    from onnx import TensorProto, helper

    if vision.kind != 'clip':
        raise BuildError(
            f'{vision.name} is a tower of timm: these are for training and evaluation in PyTorch, and cannot be built '
            'into a bundle. Choose a model with a CLIP tower.'
        )
    with OnnxFile(out) as file:
        parts = GraphParts(file, weights, precision)
        tokens = projector_graph(parts, _tower(parts, vision), projector, vision.grid, vision.feature_width, n_embd)
        parts.node('Identity', tokens, output='visual_tokens')
        pixels, features, result = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in (
                ('pixels_nchw', [1, 3, vision.image_size, vision.image_size]),
                (PATCH_FEATURES, [1, vision.n_patches, vision.feature_width]),
                ('visual_tokens', [1, projector.grid_out(vision.grid) ** 2, n_embd]),
            )
        )
        file.finish([pixels], [result], [features])


def _tower(g: GraphParts, v: VisionConfig) -> str:
    """Patches to features, wide ``[1, n_patches, feature_width]``, class token removed."""
    kernel = g.narrow(f'{_ROOT}.embeddings.patch_embedding.weight', (v.width, 3, v.patch_size, v.patch_size))
    x = g.node('Conv', g.narrowed('pixels_nchw'), kernel, strides=[v.patch_size] * 2)
    x = g.widened(g.node('Transpose', g.reshape(x, 1, v.width, v.n_patches), perm=[0, 2, 1]))
    class_token = g.read(f'{_ROOT}.embeddings.class_embedding', (v.width,)).reshape(1, 1, v.width)
    x = g.node('Concat', g.wide_constant('class_token', class_token), x, axis=1)
    x = g.node('Add', x, g.wide(f'{_ROOT}.embeddings.position_embedding.weight', (v.n_patches + 1, v.width)))
    x = g.layer_norm(x, f'{_ROOT}.pre_layrnorm', v.width, v.layer_norm_eps)
    states = [x]
    for index in range(v.n_run_blocks):
        states.append(_block(g, states[-1], f'{_ROOT}.encoder.layers.{index}', v))
    used = [states[index] for index in v.used_blocks]
    x = used[0] if len(used) == 1 else g.node('Concat', *used, axis=-1)
    return g.node('Slice', x, g.integers(1), g.integers(v.n_patches + 1), g.integers(1), output=PATCH_FEATURES)


def _block(g: GraphParts, x: str, prefix: str, v: VisionConfig) -> str:
    """Attention and two linear layers, each behind a norm and added to wide ``x``."""
    normed = g.narrowed(g.layer_norm(x, f'{prefix}.layer_norm1', v.width, v.layer_norm_eps))
    mixed = _attention(g, normed, f'{prefix}.self_attn', v)
    mixed = g.linear_from(mixed, f'{prefix}.self_attn.out_proj', v.width, v.width)
    x = g.node('Add', x, g.widened(mixed))
    normed = g.narrowed(g.layer_norm(x, f'{prefix}.layer_norm2', v.width, v.layer_norm_eps))
    hidden = g.linear_from(normed, f'{prefix}.mlp.fc1', v.mlp_width, v.width)
    hidden = g.quick_gelu(hidden) if v.activation == 'quick_gelu' else g.gelu(hidden)
    return g.node('Add', x, g.widened(g.linear_from(hidden, f'{prefix}.mlp.fc2', v.width, v.mlp_width)))


def _attention(g: GraphParts, x: str, prefix: str, v: VisionConfig) -> str:
    """Every position looks at all; narrow ``[1, positions, width]``, before the output's linear layer."""
    n_positions, head_width = v.n_patches + 1, v.width // v.n_heads
    matrices = [g.read(f'{prefix}.{p}_proj.weight', (v.width, v.width)) for p in 'qkv']
    biases = [g.read(f'{prefix}.{p}_proj.bias', (v.width,)) for p in 'qkv']
    scale = np.float32(head_width**-0.5)
    matrices[0], biases[0] = matrices[0] * scale, biases[0] * scale
    qkv = g.linear(x, f'{prefix}.qkv', np.concatenate(matrices), np.concatenate(biases))
    # [positions, 3, heads, head_width] -> three of [heads, positions, head_width]
    split = g.node('Transpose', g.reshape(qkv, n_positions, 3, v.n_heads, head_width), perm=[1, 2, 0, 3])
    q, k, values = (g.node('Gather', split, g.index(i), axis=0) for i in range(3))
    attention = g.node('Softmax', g.node('MatMul', q, g.node('Transpose', k, perm=[0, 2, 1])), axis=-1)
    mixed = g.node('Transpose', g.node('MatMul', attention, values), perm=[1, 0, 2])
    return g.reshape(mixed, 1, n_positions, v.width)
