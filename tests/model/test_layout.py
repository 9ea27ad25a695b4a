"""Names and shapes of published checkpoints: counts as published, and the state dictionaries of real modules."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import tiny_checkpoints
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from mobilevlm_ros.model.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from mobilevlm_ros.model.layout import expected_tensors, is_junk, language_tensors, projector_tensors, tower_tensors

M1 = LanguageConfig()
M3 = LanguageConfig(n_embd=2560, n_layers=32, n_heads=32, n_kv_heads=32, n_ff=6912)
M7 = LanguageConfig(n_embd=4096, n_layers=32, n_heads=32, n_kv_heads=32, n_ff=11008, n_ctx=4096, norm_eps=1e-5)
CLIP = VisionConfig('openai/clip-vit-large-patch14-336')


def model(language: LanguageConfig, projector: str | None) -> ModelConfig:
    if projector is None:
        return ModelConfig('m', language)
    return ModelConfig('m', language, CLIP, ProjectorConfig(projector))


@pytest.mark.parametrize(
    ('language', 'projector', 'n_tensors', 'n_parameters'),
    [
        (M1, None, 219, 1_364_297_728),
        (M3, None, 291, 2_701_560_320),
        (M7, None, 291, 6_738_415_616),
        (M1, 'ldpnet', 634, 1_686_742_016),
        (M3, 'ldpnet', 706, 3_033_981_696),
        (M1, 'ldpnetv2', 616, 1_674_121_216),
        (M3, 'ldpnetv2', 688, 3_014_273_536),
        (M7, 'ldpnetv2', 688, 7_062_943_744),
    ],
)
def test_published_models_have_their_tensors(
    language: LanguageConfig, projector: str | None, n_tensors: int, n_parameters: int
) -> None:
    expected = expected_tensors(model(language, projector))

    assert len(expected) == n_tensors
    assert sum(prod(shape) for shape in expected.values()) == n_parameters


@pytest.mark.parametrize(
    ('projector', 'width', 'n_parameters'),
    [
        ('mlp2x_gelu', 2048, 6_295_552),
        ('mlp2x_gelu', 2560, 9_180_160),
        ('mlp2x_gelu', 4096, 20_979_712),
        ('ldpnet', 2048, 18_936_832),
        ('ldpnet', 2560, 28_913_920),
        ('ldpnet', 4096, 71_428_096),
        ('ldpnetv2', 2048, 6_316_032),
        ('ldpnetv2', 2560, 9_205_760),
        ('ldpnetv2', 4096, 21_020_672),
        ('linear', 2048, 2048 * 1024 + 2048),
        ('pw2_dw3_dws1', 2048, 18_936_832 + 2 * 6_320_640),
    ],
)
def test_projectors_have_their_parameters(projector: str, width: int, n_parameters: int) -> None:
    shapes = dict(projector_tensors(ProjectorConfig(projector), 1024, width)).values()

    assert sum(prod(shape) for shape in shapes) == n_parameters


def test_the_ldp_of_table_9_is_ldp() -> None:
    named = [dict(projector_tensors(ProjectorConfig(name), 1024, 2560)) for name in ('ldpnet', 'pw2_dw1_dws1')]

    assert named[0] == named[1]
    assert named[0]['model.mb_block.2.block.1.fc1.weight'] == (640, 2560, 1, 1)


def test_a_projector_without_pointwise_layers_widens_in_its_first_block() -> None:
    shapes = dict(projector_tensors(ProjectorConfig('pw0_dw1_dws1'), 1024, 2048))

    assert shapes['model.mb_block.1.block.0.0.weight'] == (1024, 1, 3, 3)
    assert shapes['model.mb_block.1.block.1.fc1.weight'] == (256, 1024, 1, 1)
    assert shapes['model.mb_block.1.block.2.0.weight'] == (2048, 1024, 1, 1)
    assert shapes['model.mb_block.2.block.0.0.weight'] == (2048, 1, 3, 3)


@pytest.mark.parametrize('tie', [False, True])
def test_language_tensors_are_those_of_transformers(tie: bool) -> None:
    sizes = replace(tiny_checkpoints.LANGUAGE, n_kv_heads=2, tie_embeddings=tie)
    with torch.device('meta'):
        reference = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=sizes.n_vocab,
                hidden_size=sizes.n_embd,
                intermediate_size=sizes.n_ff,
                num_hidden_layers=sizes.n_layers,
                num_attention_heads=sizes.n_heads,
                num_key_value_heads=sizes.n_kv_heads,
            )
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    if tie:
        del shapes['lm_head.weight']

    assert list(expected_tensors(ModelConfig('m', sizes)).items()) == list(shapes.items())
    assert [name for name, _ in language_tensors(sizes)][-1] == 'lm_head.weight'


def test_tower_tensors_are_those_of_transformers() -> None:
    sizes = tiny_checkpoints.VISION
    with torch.device('meta'):
        reference = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=sizes.width,
                intermediate_size=sizes.mlp_width,
                num_hidden_layers=sizes.n_blocks,
                num_attention_heads=sizes.n_heads,
                image_size=sizes.image_size,
                patch_size=sizes.patch_size,
            )
        )
    shapes = {
        name if name.startswith('vision_model.') else f'vision_model.{name}': tuple(tensor.shape)
        for name, tensor in reference.state_dict().items()
    }

    assert dict(tower_tensors(sizes)) == shapes


def test_the_output_matrix_is_the_last_tensor_as_upstream_saves_it() -> None:
    names = list(expected_tensors(model(M1, 'ldpnet')))

    assert names[0] == 'model.embed_tokens.weight'
    assert names[-1] == 'lm_head.weight'
    assert names[218] == 'model.vision_tower.vision_tower.vision_model.embeddings.class_embedding'


def test_a_tower_of_timm_is_left_out() -> None:
    tower = VisionConfig('swin', kind='timm', select_layer=-1)
    expected = expected_tensors(ModelConfig('m', M1, tower, ProjectorConfig('linear')))

    assert len(expected) == 219 + 2


@pytest.mark.parametrize(
    ('name', 'junk'),
    [
        ('model.layers.0.self_attn.rotary_emb.inv_freq', True),
        ('model.rotary_emb.inv_freq', True),
        ('model.vision_tower.vision_tower.vision_model.embeddings.position_ids', True),
        ('model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight', False),
        ('lm_head.weight', False),
    ],
)
def test_buffers_are_junk(name: str, junk: bool) -> None:
    assert is_junk(name) is junk
