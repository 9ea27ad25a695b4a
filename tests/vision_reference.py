"""What tower and projector compute, by transformers' CLIP and PyTorch's own functions in float64: a reference.

Written apart from ``mobilevlm_ros.model``, from the published architecture, so that one mistake is not made twice.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mobilevlm_ros.model.config import ProjectorConfig, VisionConfig

Weights = dict[str, NDArray[np.float32]]


def cosine(one: Any, other: Any) -> float:
    """Between two arrays as wholes."""
    a, b = (np.asarray(value, np.float64).ravel() for value in (one, other))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def features_of(weights: Weights, vision: VisionConfig, pixels_nchw: NDArray[np.float32]) -> NDArray[np.float64]:
    """The selected hidden states side by side, without the class token, ``[1, n_patches, feature_width]``."""
    torch = pytest.importorskip('torch', reason='needs torch and transformers as references: make venv-dev')
    transformers = pytest.importorskip('transformers')
    config = transformers.CLIPVisionConfig(
        hidden_size=vision.width,
        intermediate_size=vision.mlp_width,
        num_hidden_layers=vision.n_blocks,
        num_attention_heads=vision.n_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_act=vision.activation,
        layer_norm_eps=vision.layer_norm_eps,
    )
    tower = transformers.CLIPVisionModel(config).double().eval()
    expects_prefix = any(name.startswith('vision_model.') for name in tower.state_dict())
    state = {
        name if expects_prefix else name.removeprefix('vision_model.'): torch.from_numpy(value).double()
        for name, value in weights.items()
        if name.startswith('vision_model.')
    }
    missing, unexpected = tower.load_state_dict(state, strict=False)
    assert not unexpected
    assert all('position_ids' in name for name in missing)
    with torch.no_grad():
        states = tower(torch.from_numpy(pixels_nchw).double(), output_hidden_states=True).hidden_states
        chosen = [states[layer][:, 1:].numpy() for layer in (*vision.also_layers, vision.select_layer)]
        features: NDArray[np.float64] = np.concatenate(chosen, axis=-1)
    return features


def tokens_of(
    weights: Weights,
    vision: VisionConfig,
    projector: ProjectorConfig,
    n_embd: int,
    pixels_nchw: NDArray[np.float32],
) -> NDArray[np.float64]:
    """Visual tokens ``[n_tokens, n_embd]``."""
    return projected(weights, projector, n_embd, features_of(weights, vision, pixels_nchw))[0]


def projected(weights: Weights, config: ProjectorConfig, n_embd: int, features: NDArray[Any]) -> NDArray[np.float64]:
    """The projector alone, ``[1, n, width]`` to ``[1, m, n_embd]``."""
    torch = pytest.importorskip('torch', reason='needs torch as a reference: make venv-dev')
    f = torch.nn.functional
    root = 'model.mm_projector'
    w = {name.removeprefix(f'{root}.'): torch.from_numpy(v).double() for name, v in weights.items() if root in name}

    def linears(x: Any, names: list[str]) -> Any:
        for index, name in enumerate(names):
            x = f.linear(f.gelu(x) if index else x, w[f'{name}weight'], w[f'{name}bias'])
        return x

    def grid(x: Any) -> Any:
        side = int(x.shape[1] ** 0.5)
        return x.permute(0, 2, 1).reshape(1, -1, side, side)

    def channel_norm(x: Any, name: str) -> Any:
        mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        scale, bias = (w[f'{name}.{kind}'][None, :, None, None] for kind in ('weight', 'bias'))
        return (x - mean) / torch.sqrt(variance + 1e-5) * scale + bias

    def block(x: Any, name: str, stride: int) -> Any:
        y = f.conv2d(x, w[f'{name}.0.0.weight'], stride=stride, padding=1, groups=x.shape[1])
        y = f.hardswish(channel_norm(y, f'{name}.0.1'))
        gate = f.adaptive_avg_pool2d(y, 1)
        gate = f.relu(f.conv2d(gate, w[f'{name}.1.fc1.weight'], w[f'{name}.1.fc1.bias']))
        gate = f.hardsigmoid(f.conv2d(gate, w[f'{name}.1.fc2.weight'], w[f'{name}.1.fc2.bias']))
        y = channel_norm(f.conv2d(y * gate, w[f'{name}.2.0.weight']), f'{name}.2.1')
        return y + x if stride == 1 and y.shape == x.shape else y

    with torch.no_grad():
        x = torch.from_numpy(np.asarray(features, np.float64))
        if config.type == 'linear':
            x = linears(x, [''])
        elif config.type.startswith('mlp'):
            x = linears(x, [f'{2 * index}.' for index in range(int(config.type[3]))])
        elif config.type == 'ldpnetv2':
            x = grid(linears(x, ['mlp.mlp.0.', 'mlp.mlp.2.']))
            x = f.adaptive_avg_pool2d(x, x.shape[2] // 2)
            x = x + f.conv2d(x, w['peg.peg.0.weight'], w['peg.peg.0.bias'], padding=1, groups=n_embd)
            x = x.flatten(2).permute(0, 2, 1)
        else:
            name = 'pw2_dw1_dws1' if config.type == 'ldpnet' else config.type
            counts = re.findall(r'(pw|dws|dw)(\d)', name)
            strides = [2 if kind == 'dws' else 1 for kind, count in counts[1:] for _ in range(int(count))]
            x = grid(linears(x, [f'model.mlp.{2 * index + 1}.' for index in range(int(counts[0][1]))]))
            for index, stride in enumerate(strides):
                x = block(x, f'model.mb_block.{index + 1}.block', stride)
            x = x.flatten(2).permute(0, 2, 1)
    result: NDArray[np.float64] = x.numpy()
    return result
