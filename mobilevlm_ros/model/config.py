"""The shapes of a model: vision tower, projector and language model, as plain data.

Knows neither torch nor files of weights, so that building and reporting can read a model's shapes where neither is
installed. A manifest (``models/*.yaml``) and a published ``config.json`` both become a ``ModelConfig``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.runtime.preprocess import CLIP_MEAN, CLIP_STD

__all__ = ['OF_USE', 'LanguageConfig', 'ModelConfig', 'ProjectorConfig', 'VisionConfig', 'squeeze_width']

_LIGHT = re.compile(r'pw(\d)_dw(\d)_dws(\d)\Z')
_LIGHT_STRIDED_FIRST = re.compile(r'pw(\d)_dws(\d)_dw(\d)\Z')
_MLP = re.compile(r'mlp([1-9])x_gelu\Z')


def _check_positive(sizes: object, *names: str) -> None:
    for name in names:
        if getattr(sizes, name) < 1:
            raise SettingsError(f'{name} must be at least 1, found {getattr(sizes, name)}')


OF_USE = ('name', 'select_layer', 'also_layers')
"""What a model says of its tower; the other fields of ``VisionConfig`` are the tower's own."""


@dataclass(frozen=True)
class VisionConfig:
    """A vision tower.

    :ivar kind: ``clip`` (transformers' CLIPVisionModel) or ``timm``.
    :ivar name: a model of the Hugging Face hub for ``clip``, of timm for ``timm``.
    :ivar n_blocks: blocks that the tower has; one fewer runs when ``select_layer`` is -2.
    :ivar activation: between the two layers of a block; OpenAI's towers have ``quick_gelu``, LAION's ``gelu``.
    :ivar select_layer: whose output is used, counted as transformers counts hidden states; a timm tower has but -1,
        its last output with its last norm.
    :ivar also_layers: hidden states before that one, counted likewise, earliest first: the features of a patch are
        those of all these blocks side by side, as transformers' LLaVA has it with a list of ``vision_feature_layer``.
    :ivar class_token: whether the tower puts one before the patches.
    :ivar stride: pixels of the input for one step of the tower's last grid; ``patch_size`` unless the tower shrinks
        its grid as it goes (Swin, Twins). Of these ``n_blocks`` counts all stages, ``width``, ``n_heads`` and
        ``mlp_width`` are the last stage's.
    """

    name: str
    kind: Literal['clip', 'timm'] = 'clip'
    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    n_heads: int = 16
    n_blocks: int = 24
    mlp_width: int = 4096
    projection_width: int = 768
    layer_norm_eps: float = 1e-5
    activation: Literal['quick_gelu', 'gelu'] = 'quick_gelu'
    select_layer: int = -2
    class_token: bool = True
    stride: int = 0
    also_layers: tuple[int, ...] = ()
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        """:raise SettingsError: if the sizes contradict each other."""
        _check_positive(self, 'image_size', 'patch_size', 'width', 'n_heads', 'n_blocks', 'mlp_width')
        if self.image_size % self.grid_step:
            raise SettingsError(f'image_size {self.image_size} is no multiple of the grid step {self.grid_step}')
        if self.kind == 'clip' and not -self.n_blocks - 1 <= self.select_layer <= -1:
            raise SettingsError(f'select_layer must be between {-self.n_blocks - 1} and -1, found {self.select_layer}')
        layers = (*self.also_layers, self.select_layer)
        if layers[0] < -self.n_blocks - 1 or any(one >= other for one, other in pairwise(layers)):
            raise SettingsError(
                f'also_layers must be ascending, from {-self.n_blocks - 1} to before select_layer {self.select_layer}, '
                f'found {list(self.also_layers)}'
            )
        if self.kind == 'timm' and self.also_layers:
            raise SettingsError(f'also_layers of a timm tower must be none, found {list(self.also_layers)}')
        if self.kind == 'clip' and not self.class_token:
            raise SettingsError("class_token must be true: every tower of transformers' CLIPVisionModel has one")
        if self.kind == 'timm' and self.select_layer != -1:
            raise SettingsError(f'select_layer of a timm tower must be -1, found {self.select_layer}')
        if self.width % self.n_heads:
            raise SettingsError(f'{self.n_heads} heads do not divide a width of {self.width}')

    @property
    def grid_step(self) -> int:
        """Pixels of the input for one feature."""
        return self.stride or self.patch_size

    @property
    def grid(self) -> int:
        """Features a side."""
        return self.image_size // self.grid_step

    @property
    def n_patches(self) -> int:
        """Features of an image, without the class token."""
        return self.grid * self.grid

    @property
    def n_run_blocks(self) -> int:
        """Blocks that run: up to the one of ``select_layer``."""
        return self.n_blocks + 1 + self.select_layer

    @property
    def used_blocks(self) -> tuple[int, ...]:
        """After how many blocks the features are taken, ascending; the last is ``n_run_blocks``."""
        return tuple(self.n_blocks + 1 + layer for layer in (*self.also_layers, self.select_layer))

    @property
    def feature_width(self) -> int:
        """Width of what the projector is given for each patch."""
        return self.width * len(self.used_blocks)


@dataclass(frozen=True)
class ProjectorConfig:
    """A projector, named as published checkpoints name theirs (``mm_projector_type``).

    ``linear``; ``mlpNx_gelu``; a name that starts with ``ldpnetv2`` (LDPv2) or else ``ldpnet`` (LDP); and, for the
    ablations of the paper's Table 9, ``pwA_dwB_dwsC``: A pointwise layers, then B blocks of stride 1, then C of
    stride 2, ``pw2_dw1_dws1`` being LDP itself; ``pwA_dwsC_dwB`` in this project's spelling puts the strided ones
    first. Counts have one digit; there must be a layer that widens features to the language model's width, so not
    all of them are 0.
    """

    type: str = 'linear'

    def __post_init__(self) -> None:
        """:raise SettingsError: if there is no such projector."""
        _ = self.family

    @property
    def family(self) -> Literal['linear', 'mlp', 'ldp', 'ldpv2', 'light']:
        """Which of the modules it is."""
        if self.type == 'linear':
            return 'linear'
        if _MLP.match(self.type):
            return 'mlp'
        if self.type.startswith('ldpnetv2'):
            return 'ldpv2'
        if self.type.startswith('ldpnet'):
            return 'ldp'
        if self.light_blocks is not None:
            return 'light'
        raise SettingsError(
            f'unknown projector {self.type!r}; known are linear, mlpNx_gelu, ldpnet, ldpnetv2 and pwA_dwB_dwsC'
        )

    @property
    def mlp_depth(self) -> int:
        """Linear layers of ``mlpNx_gelu``."""
        match = _MLP.match(self.type)
        return int(match.group(1)) if match else 0

    @property
    def light_blocks(self) -> tuple[int, tuple[int, ...]] | None:
        """Pointwise layers, and the stride of each depthwise block in order; None for other families."""
        if match := _LIGHT.match(self.type):
            n_pointwise, n_plain, n_strided = map(int, match.groups())
            strides = (1,) * n_plain + (2,) * n_strided
        elif match := _LIGHT_STRIDED_FIRST.match(self.type):
            n_pointwise, n_strided, n_plain = map(int, match.groups())
            strides = (2,) * n_strided + (1,) * n_plain
        else:
            return None
        return (n_pointwise, strides) if n_pointwise or strides else None

    def grid_out(self, grid: int) -> int:
        """Visual tokens a side for ``grid`` features a side."""
        if self.family == 'ldpv2':
            return grid // 2
        strides = {'ldp': (1, 2)}.get(self.family, (self.light_blocks or (0, ()))[1])
        for stride in strides:
            grid = -(-grid // stride)
        return grid


def squeeze_width(width: int) -> int:
    """Channels between the two convolutions of a squeeze-excitation over ``width`` channels.

    The multiple of 8 that is nearest to a quarter, never more than a tenth below it (torchvision's MobileNetV3).
    """
    nearest = max(8, (width // 4 + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * (width // 4) else nearest


@dataclass(frozen=True)
class LanguageConfig:
    """A model of the LLaMA architecture; the defaults are MobileLLaMA-1.4B."""

    n_vocab: int = 32000
    n_embd: int = 2048
    n_layers: int = 24
    n_heads: int = 16
    n_kv_heads: int = 16
    n_ff: int = 5632
    n_ctx: int = 2048
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        """:raise SettingsError: if the sizes contradict each other."""
        _check_positive(self, 'n_vocab', 'n_embd', 'n_layers', 'n_heads', 'n_kv_heads', 'n_ff', 'n_ctx')
        if self.n_embd % self.n_heads or self.n_heads % self.n_kv_heads:
            raise SettingsError(
                f'{self.n_heads} heads and {self.n_kv_heads} key-value heads do not divide a width of {self.n_embd}'
            )

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_heads


@dataclass(frozen=True)
class ModelConfig:
    """A whole model; a language model alone has neither ``vision`` nor ``projector``.

    :ivar template: conversation that it was taught (``runtime.prompt.TEMPLATES``).
    :ivar system: its system text; empty: the template's own.
    :ivar repo: where it is published, ``owner/name`` on the Hugging Face hub; empty if nowhere.
    :ivar revision: the published commit that the name stands for.
    :ivar warning: what must be known before trusting its answers.
    """

    name: str
    language: LanguageConfig = field(default_factory=LanguageConfig)
    vision: VisionConfig | None = None
    projector: ProjectorConfig | None = None
    aspect: Literal['pad', 'square'] = 'pad'
    template: str = 'v1'
    system: str = ''
    repo: str = ''
    revision: str = ''
    warning: str = ''

    def __post_init__(self) -> None:
        """:raise SettingsError: if it has a tower without a projector or the other way round, or they do not fit."""
        if (self.vision is None) != (self.projector is None):
            raise SettingsError(f'{self.name} needs both a vision tower and a projector, or neither')
        if self.vision and self.projector and self.projector.family == 'ldpv2' and self.vision.grid % 2:
            raise SettingsError(
                f'{self.projector.type} averages cells of 2x2 features, which a grid of {self.vision.grid} a side does '
                'not have: choose an image_size that makes the grid even'
            )

    @property
    def n_visual_tokens(self) -> int:
        """Visual tokens of one image; 0 for a language model alone."""
        if self.vision is None or self.projector is None:
            return 0
        return self.projector.grid_out(self.vision.grid) ** 2
