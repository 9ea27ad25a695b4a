"""Reads the ``config.json`` of a published checkpoint, and of a CLIP folder, into this project's shapes.

The file is not trusted: every value that is used is checked for type and range, and whatever would make the model
compute something else than the shapes say (scaled positions, biases, quantised weights) is refused by name. Fields
that change nothing are ignored, among them the stray ones of lit-gpt in the 3B models, whose ``n_head`` is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mobilevlm_ros.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointKindError,
    SettingsError,
)
from mobilevlm_ros.model.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from mobilevlm_ros.model.conversation import read_conversation
from mobilevlm_ros.model.json_files import read_json_object, shown

__all__ = ['CONFIG', 'OWN_TOWER_FIELD', 'known_tower', 'read_clip_config', 'read_model_config']

CONFIG = 'config.json'
OWN_TOWER_FIELD = 'mm_vision_config'
"""This project's addition to ``config.json``: the shapes of a tower that upstream has no name for."""

_LANGUAGE_TYPES = ('llama',)
_VLM_TYPES = ('mobilevlm', 'llava', 'llava_llama')
_TOWERS = {
    tower.name: tower
    for tower in (
        VisionConfig('openai/clip-vit-large-patch14-336'),
        VisionConfig('openai/clip-vit-large-patch14', image_size=224),
        *(
            VisionConfig(
                f'openai/clip-vit-base-patch{patch}',
                image_size=224,
                patch_size=patch,
                width=768,
                n_heads=12,
                n_blocks=12,
                mlp_width=3072,
                projection_width=512,
            )
            for patch in (16, 32)
        ),
    )
}


def known_tower(name: str) -> VisionConfig | None:
    """The tower that upstream calls so, or whose folder is called so; None if it is none of OpenAI's."""
    short = name.replace('\\', '/').rstrip('/').rpartition('/')[2]
    return next((tower for tower in _TOWERS.values() if tower.name.endswith(f'/{short}')), None) if short else None


def read_model_config(folder: Path, *, vision_tower: Path | None = None) -> ModelConfig:
    """The shapes of the checkpoint in ``folder``; those of a language model alone have no tower.

    :param vision_tower: a CLIP folder whose shapes stand instead of those that the name of the tower implies.
    :raise CheckpointMissingError: if there is no ``config.json``.
    :raise CheckpointDamagedError: if it is not one, or a value is missing, of a wrong type or out of range.
    :raise CheckpointKindError: if it describes something that is neither a MobileVLM, a LLaVA nor a LLaMA.
    :raise CheckpointError: if the model needs what this project does not compute.
    """
    fields = _Fields(folder / CONFIG, read_json_object(folder / CONFIG))
    model_type = fields.text('model_type', 'llama')
    if model_type not in _LANGUAGE_TYPES + _VLM_TYPES:
        raise CheckpointKindError(
            f'{fields.path} is of a model of type {model_type!r}; expected mobilevlm, llava or llama'
        )
    if fields.present('text_config'):
        raise CheckpointKindError(
            f"{fields.path} is of transformers' own LLaVA layout (text_config); expected upstream's, with mm_ fields"
        )
    if fields.present('quantization_config'):
        raise CheckpointKindError(
            f'{fields.path} is of quantised weights; expected fp16, bf16 or fp32: take the original checkpoint, '
            'this project quantises when it builds'
        )
    name = folder.resolve().name
    language = _language(fields)
    template, system = read_conversation(fields.values, fields.path)
    if not fields.present('mm_vision_tower') and not fields.present('mm_projector_type'):
        if model_type in _VLM_TYPES:
            raise CheckpointDamagedError(f'{fields.path} is of type {model_type} but has no mm_vision_tower')
        return ModelConfig(name, language, template=template, system=system)
    aspect = fields.text('image_aspect_ratio', 'square')
    return ModelConfig(
        name,
        language,
        _vision(fields, vision_tower),
        _projector(fields),
        # Upstream pads for "pad" alone, and crops for every other word.
        aspect='pad' if aspect == 'pad' else 'square',
        template=template,
        system=system,
    )


def read_clip_config(folder: Path) -> VisionConfig:
    """The shapes of the vision tower in a folder of transformers' CLIP, whole or vision model alone.

    :raise CheckpointMissingError: if there is no ``config.json``.
    :raise CheckpointDamagedError: if a value is missing, of a wrong type or out of range.
    :raise CheckpointKindError: if it is no CLIP.
    :raise CheckpointError: if its activation is neither OpenAI's nor LAION's.
    """
    path = folder / CONFIG
    whole = _Fields(path, read_json_object(path))
    model_type = whole.text('model_type', '')
    if model_type not in ('clip', 'clip_vision_model'):
        raise CheckpointKindError(f'{path} is of a model of type {model_type!r}; expected a CLIP (clip)')
    inner = whole.values.get('vision_config', {}) if model_type == 'clip' else whole.values
    if not isinstance(inner, dict):
        raise CheckpointDamagedError(f'{path}: vision_config must be an object, found {shown(inner)}')
    fields = _Fields(path, inner)
    try:
        # The defaults are those of transformers' CLIPVisionConfig, whose files leave them out.
        return VisionConfig(
            folder.resolve().name,
            image_size=fields.integer('image_size', 1, 1 << 14, 224),
            patch_size=fields.integer('patch_size', 1, 1 << 10, 32),
            width=fields.integer('hidden_size', 1, 1 << 16, 768),
            n_heads=fields.integer('num_attention_heads', 1, 1 << 10, 12),
            n_blocks=fields.integer('num_hidden_layers', 1, 1 << 10, 12),
            mlp_width=fields.integer('intermediate_size', 1, 1 << 18, 3072),
            projection_width=fields.integer('projection_dim', 1, 1 << 16, 512),
            layer_norm_eps=fields.number('layer_norm_eps', 0.0, 1.0, 1e-5),
            activation=_activation(fields, 'hidden_act'),
            select_layer=-1,
        )
    except SettingsError as error:
        raise CheckpointDamagedError(f'{path}: {error}') from error


class _Fields:
    """The values of one configuration, each checked when it is asked for; null counts as absent."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    def present(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self._bad(name, value, f'an integer between {low} and {high}')
        return value

    def integers(self, name: str, low: int, high: int, default: int) -> list[int]:
        """One, or a list of at least one."""
        values = self.values.get(name)
        if not isinstance(values, list):
            return [self.integer(name, low, high, default)]
        if not values or not all(type(value) is int and low <= value <= high for value in values):
            raise self._bad(name, values, f'one or more integers between {low} and {high}')
        return values

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self._value(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low < value <= high:
            raise self._bad(name, value, f'a number above {low} and up to {high}')
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self._bad(name, value, 'true or false')
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._value(name, default)
        if not isinstance(value, str) or len(value) > 512:
            raise self._bad(name, value, 'a text')
        return value

    def expect(self, name: str, value: object, default: object) -> None:
        """Refuse a model that computes something else.

        :raise CheckpointError: if the field has another value.
        """
        found = self._value(name, default)
        if found != value or isinstance(found, bool) is not isinstance(value, bool):
            raise CheckpointError(
                f'{self.path}: {name} is {shown(found)}; this project computes models with {value!r} only'
            )

    def _value(self, name: str, default: object) -> Any:
        if self.present(name):
            return self.values[name]
        if default is None:
            raise CheckpointDamagedError(f'{self.path} lacks {name}: it is no config.json of a published checkpoint')
        return default

    def _bad(self, name: str, value: object, expected: str) -> CheckpointDamagedError:
        return CheckpointDamagedError(f'{self.path}: {name} must be {expected}, found {shown(value)}')


def _language(fields: _Fields) -> LanguageConfig:
    fields.expect('hidden_act', 'silu', 'silu')
    for name in ('attention_bias', 'mlp_bias'):
        fields.expect(name, False, False)
    if fields.present('rope_scaling'):
        raise CheckpointError(
            f'{fields.path}: rope_scaling is {shown(fields.values["rope_scaling"])}; this project computes plain '
            'rotary positions only'
        )
    heads = fields.integer('num_attention_heads', 1, 1 << 10)
    width = fields.integer('hidden_size', 1, 1 << 16)
    try:
        language = LanguageConfig(
            n_vocab=fields.integer('vocab_size', 1, 1 << 20),
            n_embd=width,
            n_layers=fields.integer('num_hidden_layers', 1, 1 << 10),
            n_heads=heads,
            n_kv_heads=fields.integer('num_key_value_heads', 1, 1 << 10, heads),
            n_ff=fields.integer('intermediate_size', 1, 1 << 18),
            # Upstream reports max_sequence_length where there is one.
            n_ctx=fields.integer(
                'max_sequence_length', 1, 1 << 20, fields.integer('max_position_embeddings', 1, 1 << 20, 2048)
            ),
            rope_base=_rope_base(fields),
            norm_eps=fields.number('rms_norm_eps', 0.0, 1.0, 1e-6),
            tie_embeddings=fields.flag('tie_word_embeddings', False),
        )
    except SettingsError as error:
        raise CheckpointDamagedError(f'{fields.path}: {error}') from error
    fields.expect('head_dim', language.head_width, language.head_width)
    return language


def _rope_base(fields: _Fields) -> float:
    """``rope_theta``, which transformers 5 writes into an object of its own."""
    newer = fields.values.get('rope_parameters')
    if isinstance(newer, dict):
        fields = _Fields(fields.path, newer)
        fields.expect('rope_type', 'default', 'default')
    return fields.number('rope_theta', 0.0, 1e12, 10000.0)


def _vision(fields: _Fields, folder: Path | None) -> VisionConfig:
    name = fields.text('mm_vision_tower')
    fields.expect('mm_vision_select_feature', 'patch', 'patch')
    fields.expect('mm_use_im_start_end', False, False)
    own = fields.values.get(OWN_TOWER_FIELD)
    if folder is not None:
        tower = replace(read_clip_config(folder), name=name)
    elif own is not None:
        tower = _own_tower(_Fields(fields.path, own if isinstance(own, dict) else {}), name)
    else:
        fields.expect('vision_tower_type', 'clip', 'clip')
        known = known_tower(name)
        if known is None:
            raise CheckpointError(
                f'{fields.path} names the vision tower {shown(name)}, whose shapes are not known here; known are '
                f'{", ".join(_TOWERS)}. Give the folder of the tower (config.json and weights) as vision tower.'
            )
        tower = known
    *also, selected = fields.integers('mm_vision_select_layer', -1025, 1025, -1)
    try:
        return replace(tower, select_layer=selected, also_layers=tuple(also))
    except SettingsError as error:
        raise CheckpointDamagedError(f'{fields.path}: mm_vision_select_layer: {error}') from error


def _own_tower(fields: _Fields, name: str) -> VisionConfig:
    kind = fields.text('kind', 'clip')
    if kind not in ('clip', 'timm'):
        raise CheckpointDamagedError(f'{fields.path}: {OWN_TOWER_FIELD}.kind must be clip or timm, found {kind!r}')
    try:
        return VisionConfig(
            name,
            kind='clip' if kind == 'clip' else 'timm',
            image_size=fields.integer('image_size', 1, 1 << 14),
            patch_size=fields.integer('patch_size', 1, 1 << 10),
            width=fields.integer('width', 1, 1 << 16),
            n_heads=fields.integer('n_heads', 1, 1 << 10),
            n_blocks=fields.integer('n_blocks', 1, 1 << 10),
            mlp_width=fields.integer('mlp_width', 1, 1 << 18),
            projection_width=fields.integer('projection_width', 0, 1 << 16),
            layer_norm_eps=fields.number('layer_norm_eps', 0.0, 1.0, 1e-5),
            activation=_activation(fields, 'activation'),
            select_layer=-1,
            class_token=fields.flag('class_token', True),
            stride=fields.integer('stride', 0, 1 << 10, 0),
            mean=_three(fields, 'mean'),
            std=_three(fields, 'std'),
        )
    except SettingsError as error:
        raise CheckpointDamagedError(f'{fields.path}: {OWN_TOWER_FIELD}: {error}') from error


def _activation(fields: _Fields, name: str) -> Literal['quick_gelu', 'gelu']:
    found = fields.text(name, 'quick_gelu')
    if found not in ('quick_gelu', 'gelu'):
        raise CheckpointError(
            f'{fields.path}: {name} is {shown(found)}; this project computes quick_gelu and gelu only'
        )
    return 'gelu' if found == 'gelu' else 'quick_gelu'


def _three(fields: _Fields, name: str) -> tuple[float, float, float]:
    value = fields.values.get(name)
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(isinstance(x, int | float) and not isinstance(x, bool) and 0 < x <= 1 for x in value)
    ):
        raise CheckpointDamagedError(
            f'{fields.path}: {OWN_TOWER_FIELD}.{name} must be three numbers above 0 and up to 1, found {shown(value)}'
        )
    return float(value[0]), float(value[1]), float(value[2])


def _projector(fields: _Fields) -> ProjectorConfig:
    try:
        return ProjectorConfig(fields.text('mm_projector_type', 'linear'))
    except SettingsError as error:
        raise CheckpointError(f'{fields.path}: {error}') from error
