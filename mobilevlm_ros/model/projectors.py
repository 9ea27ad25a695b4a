"""The projectors, in PyTorch: features of a vision tower to embeddings of a language model.

Every module maps ``[B, grid * grid, width]`` to ``[B, tokens, n_embd]``, both in row-major order of the grid, and
names its parameters as published checkpoints do below ``model.mm_projector``. Knows neither towers nor language models.

Source: mobilevlm/model/vision_projector.py. The paper's formula of LDP (V1, equation 3) leaves out the Hardswish and
the squeeze-excitation that the released weights have; this follows the weights.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevlm_ros.model.config import ProjectorConfig, squeeze_width

__all__ = ['build_projector']


def build_projector(config: ProjectorConfig, width: int, n_embd: int) -> nn.Module:
    """The projector from features of ``width`` to embeddings of ``n_embd``, freshly initialised."""
    if config.family == 'linear':
        return nn.Linear(width, n_embd)
    if config.family == 'mlp':
        return nn.Sequential(*_pointwise(config.mlp_depth, width, n_embd))
    if config.family == 'ldpv2':
        return LDPv2(width, n_embd)
    n_pointwise, strides = config.light_blocks or (2, (1, 2))
    return LDP(width, n_embd, n_pointwise, strides)


def _pointwise(n_layers: int, width: int, n_embd: int) -> list[nn.Module]:
    """Linear layers with a GELU (the exact one) between each two."""
    layers: list[nn.Module] = []
    for index in range(n_layers):
        layers += [nn.GELU()] if index else []
        layers += [nn.Linear(n_embd if index else width, n_embd)]
    return layers


def _to_grid(features: Tensor) -> Tensor:
    """``[B, side * side, C]`` to ``[B, C, side, side]``."""
    n_features = features.shape[1]
    side = math.isqrt(n_features)
    return features.transpose(1, 2).unflatten(2, (side, n_features // side))


def _to_tokens(grid: Tensor) -> Tensor:
    """``[B, C, H, W]`` to ``[B, H * W, C]``."""
    return grid.flatten(2).transpose(1, 2)


class LDP(nn.Module):
    """The light downsample projector (V1), and its relatives of the paper's Table 9: pointwise layers, then blocks.

    Without pointwise layers the first block widens the features; the paper does not say what does.
    """

    def __init__(self, width: int, n_embd: int, n_pointwise: int = 2, strides: tuple[int, ...] = (1, 2)) -> None:
        super().__init__()
        n_in = n_embd if n_pointwise else width
        blocks = [
            DepthwiseBlock(n_in if index == 0 else n_embd, n_embd, stride) for index, stride in enumerate(strides)
        ]
        # Published names count from 1 in both: an identity comes first.
        self.model = nn.ModuleDict(
            {
                'mlp': nn.Sequential(nn.Identity(), *_pointwise(n_pointwise, width, n_embd)),
                'mb_block': nn.Sequential(nn.Identity(), *blocks),
            }
        )

    def forward(self, features: Tensor) -> Tensor:
        """``[B, grid * grid, width]`` to ``[B, tokens, n_embd]``."""
        return _to_tokens(self.model['mb_block'](_to_grid(self.model['mlp'](features))))


class DepthwiseBlock(nn.Module):
    """Torchvision's inverted residual of MobileNetV3 without expansion: depthwise, squeeze-excitation, pointwise.

    The input is added where the shape allows it, that is at stride 1.
    """

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(n_in, n_in, 3, stride=stride, padding=1, groups=n_in, bias=False)
        self.block = nn.Sequential(
            nn.Sequential(depthwise, ChannelNorm(n_in), nn.Hardswish()),
            SqueezeExcitation(n_in),
            nn.Sequential(nn.Conv2d(n_in, n_out, 1, bias=False), ChannelNorm(n_out)),
        )
        self.is_residual = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        """``[B, n_in, H, W]`` to ``[B, n_out, ceil(H / stride), ceil(W / stride)]``."""
        mixed: Tensor = self.block(x)
        return x + mixed if self.is_residual else mixed


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position of ``[B, C, H, W]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcitation(nn.Module):
    """Scales each channel by what the means of all channels say."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(n_channels, squeeze_width(n_channels), 1)
        self.fc2 = nn.Conv2d(squeeze_width(n_channels), n_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]``, same shape."""
        means = x.mean(dim=(2, 3), keepdim=True)
        return x * F.hardsigmoid(self.fc2(F.relu(self.fc1(means))))


class LDPv2(nn.Module):
    """The projector of V2: two linear layers, means of 2x2 cells, then a depthwise convolution that adds positions."""

    def __init__(self, width: int, n_embd: int) -> None:
        super().__init__()
        # Each stage is a module of its own in published names: mlp.mlp.0, peg.peg.0.
        self.mlp = nn.ModuleDict({'mlp': nn.Sequential(*_pointwise(2, width, n_embd))})
        self.peg = nn.ModuleDict({'peg': nn.Sequential(nn.Conv2d(n_embd, n_embd, 3, padding=1, groups=n_embd))})

    def forward(self, features: Tensor) -> Tensor:
        """``[B, grid * grid, width]`` of an even grid to ``[B, grid * grid / 4, n_embd]``."""
        x = _to_grid(self.mlp['mlp'](features))
        x = F.adaptive_avg_pool2d(x, (x.shape[2] // 2, x.shape[3] // 2))
        return _to_tokens(torch.add(x, self.peg['peg'](x)))
