"""Vision towers, in PyTorch: transformers' CLIP of any size, and timm's for the paper's Table 8.

A tower maps ``pixels_nchw [B, 3, S, S]``, normalised, to ``[B, n_patches, feature_width]`` in row-major order of its
grid, without class and register tokens. Weights are random until somebody loads them; nothing is ever downloaded.

Source: mobilevlm/model/vision_encoder.py (``mm_vision_select_layer`` -2, ``mm_vision_select_feature`` "patch").
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from mobilevlm_ros.errors import DependencyError, SettingsError
from mobilevlm_ros.model.config import VisionConfig

__all__ = ['ClipTower', 'TimmTower', 'build_tower', 'clip_config']


def build_tower(config: VisionConfig) -> nn.Module:
    """The tower of a model, freshly initialised.

    :raise DependencyError: if it is one of timm's, and timm cannot be imported.
    :raise SettingsError: if timm has no such model.
    """
    return ClipTower(config) if config.kind == 'clip' else TimmTower(config)


def clip_config(config: VisionConfig) -> CLIPVisionConfig:
    """The same sizes, as transformers writes them."""
    return CLIPVisionConfig(
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        projection_dim=config.projection_width,
        num_hidden_layers=config.n_blocks,
        num_attention_heads=config.n_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_act=config.activation,
        layer_norm_eps=config.layer_norm_eps,
    )


class ClipTower(nn.Module):
    """CLIP's features after block ``n_run_blocks``, before its last norm; those after earlier blocks before them.

    Blocks after the last of these and the last norm are kept, as published checkpoints hold them, but never run.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        model = CLIPVisionModel(clip_config(config))
        # The first versions 5 of transformers wrap the tower once more.
        self.vision_model: Any = getattr(model, 'vision_model', model)
        self.used_blocks = config.used_blocks

    def forward(self, pixels_nchw: Tensor) -> Tensor:
        """``[B, 3, S, S]`` to ``[B, n_patches, feature_width]``.

        :raise ValueError: if the images are not of the tower's size.
        """
        inner = self.vision_model
        x: Tensor = inner.pre_layrnorm(inner.embeddings(pixels_nchw))
        # Only what is used is kept: all 24 states of CLIP L/14 at 336 pixels are 57 MB a picture.
        used = [x[:, 1:]] if self.used_blocks[0] == 0 else []
        for n_run, block in enumerate(islice(inner.encoder.layers, self.used_blocks[-1]), start=1):
            x = block(x, attention_mask=None)
            if n_run in self.used_blocks:
                used.append(x[:, 1:])
        return used[0] if len(used) == 1 else torch.cat(used, dim=-1)


class TimmTower(nn.Module):
    """The last features of a model of timm, after its last norm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        timm = _import_timm()
        if not timm.is_model(config.name):
            raise SettingsError(
                f'timm {timm.__version__} has no model {config.name!r}: see timm.list_models() for the names it knows'
            )
        # timm reads values of tensors while it builds, which the meta device does not have.
        with torch.device('cpu'):
            usual_size = timm.get_pretrained_cfg(config.name).input_size[-1]
            # Models that take images of any size have no such argument.
            size = {} if config.image_size == usual_size else {'img_size': config.image_size}
            try:
                # Drop paths are for training a tower, which stays frozen here.
                model = timm.create_model(config.name, pretrained=False, num_classes=0, drop_path_rate=0.0, **size)
            except TypeError as error:
                raise SettingsError(
                    f'{config.name} takes no images of size {config.image_size}, only of {usual_size} ({error})'
                ) from error
        self.model: Any = model
        self.n_prefix_tokens: int = getattr(model, 'num_prefix_tokens', 0)
        self.config = config

    def forward(self, pixels_nchw: Tensor) -> Tensor:
        """``[B, 3, S, S]`` to ``[B, n_patches, width]``.

        :raise SettingsError: if the model's features are not as many or as wide as the configuration says.
        """
        features: Tensor = self.model.forward_features(pixels_nchw)
        if features.ndim == 3:
            features = features[:, self.n_prefix_tokens :]
        elif features.shape[1] == self.config.width:
            features = features.flatten(2).transpose(1, 2)
        else:
            features = features.flatten(1, 2)
        expected = (self.config.n_patches, self.config.width)
        if tuple(features.shape[1:]) != expected:
            raise SettingsError(
                f'{self.config.name} gives {features.shape[1]} features of width {features.shape[2]} for an image of '
                f'{tuple(pixels_nchw.shape[2:])}; its manifest says {expected[0]} of width {expected[1]}'
            )
        return features


def _import_timm() -> Any:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises RuntimeError
        raise DependencyError(
            f'a tower of timm needs timm, and a torchvision that was built for torch {torch.__version__} ({error}). '
            'Install them together: pip install timm torchvision'
        ) from error
    return timm
