"""The small files of a published checkpoint, as texts: configuration, generation, special tokens, tokenizer.

For MobileVLM V2-1.7B all four have the fields and the lengths of the published ones (JSON, two spaces, sorted, a
newline at the end); the configurations of V1-1.7B and of MobileLLaMA-1.4B have the published lengths. Those of the 3B
models carry stray fields upstream, which are not written.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from mobilevlm_ros.model.config import OF_USE, ModelConfig, ProjectorConfig, VisionConfig
from mobilevlm_ros.model.conversation import conversation_fields
from mobilevlm_ros.model.published_config import CONFIG, OWN_TOWER_FIELD, known_tower

__all__ = ['side_files']

_VERSION = '4.33.1'
"""Of transformers, as the published files say: upstream's loader is pinned to it."""
_TORCH_DTYPES = {'fp16': 'float16', 'bf16': 'bfloat16', 'fp32': 'float32'}
_BOS, _EOS, _UNK = '<s>', '</s>', '<unk>'


def side_files(config: ModelConfig, dtype: str) -> dict[str, str]:
    """Name to content of every small file, for weights stored as ``fp16``, ``bf16`` or ``fp32``."""
    contents = {
        CONFIG: _config(config, dtype),
        'generation_config.json': {
            '_from_model_config': True,
            'bos_token_id': 1,
            'eos_token_id': 2,
            'pad_token_id': 0,
            'transformers_version': _VERSION,
        },
        'special_tokens_map.json': {
            'bos_token': _token(_BOS),
            'eos_token': _token(_EOS),
            'pad_token': _UNK,
            'unk_token': _token(_UNK),
        },
        'tokenizer_config.json': {
            'add_bos_token': True,
            'add_eos_token': False,
            'bos_token': {'__type': 'AddedToken', **_token(_BOS)},
            'clean_up_tokenization_spaces': False,
            'eos_token': {'__type': 'AddedToken', **_token(_EOS)},
            'legacy': True,
            'model_max_length': config.language.n_ctx,
            'pad_token': None,
            'padding_side': 'right',
            'sp_model_kwargs': {},
            'spaces_between_special_tokens': False,
            'tokenizer_class': 'LlamaTokenizer',
            'unk_token': {'__type': 'AddedToken', **_token(_UNK)},
            'use_default_system_prompt': True,
        },
    }
    return {name: json.dumps(content, indent=2, sort_keys=True) + '\n' for name, content in contents.items()}


def _token(text: str) -> dict[str, Any]:
    return {'content': text, 'lstrip': False, 'normalized': True, 'rstrip': False, 'single_word': False}


def _config(config: ModelConfig, dtype: str) -> Mapping[str, Any]:
    language = config.language
    fields: dict[str, Any] = {
        'architectures': ['LlamaForCausalLM'],
        'bos_token_id': 1,
        'eos_token_id': 2,
        'hidden_act': 'silu',
        'hidden_size': language.n_embd,
        'initializer_range': 0.02,
        'intermediate_size': language.n_ff,
        'max_position_embeddings': language.n_ctx,
        'max_sequence_length': language.n_ctx,
        'model_type': 'llama',
        'num_attention_heads': language.n_heads,
        'num_hidden_layers': language.n_layers,
        'num_key_value_heads': language.n_kv_heads,
        'pad_token_id': 0,
        'pretraining_tp': 1,
        'rms_norm_eps': language.norm_eps,
        'rope_scaling': None,
        'rope_theta': language.rope_base,
        'tie_word_embeddings': language.tie_embeddings,
        'torch_dtype': _TORCH_DTYPES[dtype],
        'transformers_version': _VERSION,
        'use_cache': True,
        'vocab_size': language.n_vocab,
    }
    if config.vision is not None and config.projector is not None:
        fields |= _vision_fields(config, config.vision, config.projector)
    return fields | conversation_fields(config)


def _vision_fields(config: ModelConfig, vision: VisionConfig, projector: ProjectorConfig) -> dict[str, Any]:
    layers = [*vision.also_layers, vision.select_layer]
    fields: dict[str, Any] = {
        '_name_or_path': config.repo or config.name,
        'architectures': ['MobileLlamaForCausalLM'],
        'freeze_mm_mlp_adapter': False,
        'image_aspect_ratio': config.aspect,
        'image_grid_pinpoints': None,
        'mm_hidden_size': vision.feature_width,
        'mm_projector_type': projector.type,
        'mm_use_im_patch_token': False,
        'mm_use_im_start_end': False,
        'mm_vision_select_feature': 'patch',
        'mm_vision_select_layer': layers if vision.also_layers else vision.select_layer,
        'mm_vision_tower': vision.name,
        'model_type': 'mobilevlm',
        'tune_mm_mlp_adapter': False,
        'use_mm_proj': True,
        'vision_tower_type': vision.kind,
    }
    if projector.family == 'ldpv2':
        fields['mm_projector_lr'] = None  # the second version's training has this setting, the first's has not
    known = known_tower(vision.name)
    told = {name: getattr(vision, name) for name in OF_USE}
    if known is None or dataclasses.replace(known, **told) != vision:
        tower = dataclasses.asdict(vision)
        fields[OWN_TOWER_FIELD] = {name: tower[name] for name in tower if name not in told}
    return fields
