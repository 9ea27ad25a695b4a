"""Tiny random checkpoints in every published layout, written with torch and safetensors themselves.

Nothing here goes through the code that writes checkpoints in the package, so that reading is tested on its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch
from numpy.typing import NDArray

from mobilevlm_ros.model.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from mobilevlm_ros.model.layout import PROJECTOR_PREFIX, TOWER_PREFIX, expected_tensors

Weights = dict[str, NDArray[np.float32]]

DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16, 'fp32': torch.float32}
LAYOUTS = ('bin', 'bin-shards', 'safetensors', 'safetensors-shards')
VOCABULARY = tiny_models.vocabulary()
LANGUAGE = LanguageConfig(n_vocab=len(VOCABULARY[0]), n_embd=64, n_layers=2, n_heads=4, n_kv_heads=4, n_ff=128)
VISION = VisionConfig(
    'tiny/clip', image_size=32, patch_size=8, width=32, n_heads=4, n_blocks=3, mlp_width=64, projection_width=16
)


def config(projector: str | None = 'ldpnetv2', language: LanguageConfig = LANGUAGE) -> ModelConfig:
    """A tiny model; None: a language model alone."""
    if projector is None:
        return ModelConfig('tiny', language)
    return ModelConfig('tiny', language, VISION, ProjectorConfig(projector))


def random_tensors(model: ModelConfig, seed: int = 0) -> Weights:
    """Random values under published names; matrices scaled so that activations neither vanish nor explode."""
    random = np.random.default_rng(seed)
    tensors: Weights = {}
    for name, shape in expected_tensors(model).items():
        if len(shape) == 1:
            centre = 1.0 if name.endswith('weight') else 0.0
            values = random.normal(centre, 0.1, shape)
        else:
            scale = 1.0 if 'embed_tokens' in name or 'embeddings' in name else np.prod(shape[1:]) ** -0.5
            values = random.normal(0.0, scale, shape)
        tensors[name] = values.astype(np.float32)
    return tensors


def config_json(model: ModelConfig, dtype: str = 'bf16') -> dict[str, Any]:
    """What a published ``config.json`` says about a model, with this project's field about an unnamed tower."""
    language = model.language
    fields: dict[str, Any] = {
        'architectures': ['MobileLlamaForCausalLM' if model.vision else 'LlamaForCausalLM'],
        'hidden_act': 'silu',
        'hidden_size': language.n_embd,
        'intermediate_size': language.n_ff,
        'max_position_embeddings': language.n_ctx,
        'model_type': 'mobilevlm' if model.vision else 'llama',
        'num_attention_heads': language.n_heads,
        'num_hidden_layers': language.n_layers,
        'num_key_value_heads': language.n_kv_heads,
        'rms_norm_eps': language.norm_eps,
        'rope_scaling': None,
        'tie_word_embeddings': language.tie_embeddings,
        'torch_dtype': {'fp16': 'float16', 'bf16': 'bfloat16', 'fp32': 'float32'}[dtype],
        'vocab_size': language.n_vocab,
    }
    if model.vision and model.projector:
        tower = dataclasses.asdict(model.vision)
        fields |= {
            'image_aspect_ratio': model.aspect,
            'mm_hidden_size': model.vision.width,
            'mm_projector_type': model.projector.type,
            'mm_use_im_patch_token': False,
            'mm_use_im_start_end': False,
            'mm_vision_config': {name: tower[name] for name in tower if name not in ('name', 'select_layer')},
            'mm_vision_select_feature': 'patch',
            'mm_vision_select_layer': model.vision.select_layer,
            'mm_vision_tower': model.vision.name,
            'vision_tower_type': 'clip',
        }
    return fields


def write(
    folder: Path,
    model: ModelConfig | None = None,
    *,
    layout: str = 'bin',
    dtype: str = 'bf16',
    tensors: Mapping[str, NDArray[np.float32]] | None = None,
    **changed: Any,
) -> Weights:
    """Write a checkpoint; returns its values, rounded to the type they are stored in.

    :param layout: one of ``LAYOUTS``; shards are two files and an index.
    :param tensors: other tensors than random ones of the expected names.
    :param changed: fields of ``config.json`` that differ.
    """
    model = model or config()
    folder.mkdir(parents=True, exist_ok=True)
    values = dict(random_tensors(model) if tensors is None else tensors)
    stored = {name: torch.from_numpy(value).to(DTYPES[dtype]) for name, value in values.items()}
    write_json(folder / 'config.json', config_json(model, dtype) | changed)
    write_tokenizer(folder / 'tokenizer.model')
    suffix = layout.removesuffix('-shards')
    stem = 'model' if suffix == 'safetensors' else 'pytorch_model'
    if layout == suffix:
        write_file(folder / f'{stem}.{suffix}', stored)
    else:
        names = list(stored)
        placed: dict[str, str] = {}
        for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
            shard = f'{stem}-{i:05d}-of-00002.{suffix}'
            write_file(folder / shard, {name: stored[name] for name in part})
            placed |= dict.fromkeys(part, shard)
        total = sum(t.nbytes for t in stored.values())
        write_json(folder / f'{stem}.{suffix}.index.json', {'metadata': {'total_size': total}, 'weight_map': placed})
    return {name: tensor.float().numpy() for name, tensor in stored.items()}


def write_clip(folder: Path, vision: VisionConfig = VISION, seed: int = 7) -> Weights:
    """Write a whole CLIP as transformers does, text tower and buffers included; returns the tower's values."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = random_tensors(config('linear'), seed)
    tower = {n.removeprefix(TOWER_PREFIX): v for n, v in everything.items() if n.startswith(TOWER_PREFIX)}
    stored = {name: torch.from_numpy(value) for name, value in tower.items()}
    stored['vision_model.embeddings.position_ids'] = torch.arange(vision.n_patches + 1)[None]
    stored['text_model.final_layer_norm.weight'] = torch.ones(4)
    stored['logit_scale'] = torch.tensor(1.0)
    torch.save(stored, folder / 'pytorch_model.bin')
    described = {
        'hidden_size': vision.width,
        'image_size': vision.image_size,
        'intermediate_size': vision.mlp_width,
        'num_attention_heads': vision.n_heads,
        'num_hidden_layers': vision.n_blocks,
        'patch_size': vision.patch_size,
        'projection_dim': vision.projection_width,
    }
    write_json(folder / 'config.json', {'model_type': 'clip', 'vision_config': described})
    return tower


def write_projector(path: Path, model: ModelConfig, seed: int = 9) -> Weights:
    """Write what a first training stage leaves; returns its values under published names."""
    everything = random_tensors(model, seed)
    values = {name: value for name, value in everything.items() if name.startswith(PROJECTOR_PREFIX)}
    write_file(path, {name: torch.from_numpy(value) for name, value in values.items()})
    return values


def write_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one file of tensors, of the kind that its name says."""
    if path.suffix == '.safetensors':
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {'format': 'pt'})
    else:
        torch.save(dict(tensors), path)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n')


def write_tokenizer(path: Path) -> None:
    """Write the tiny vocabulary of ``tiny_models`` as a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    for text, score, kind in zip(*VOCABULARY, strict=True):
        model.pieces.add(piece=text.decode(), score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(VOCABULARY[0])
    trainer.byte_fallback = True
    model.normalizer_spec.name = 'identity'
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    path.write_bytes(model.SerializeToString())
