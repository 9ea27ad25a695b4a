"""Names and shapes of the tensors in a published checkpoint, from the shapes of the model alone.

Knows neither torch nor files. The names are those of upstream's state dictionary (mobilevlm/model/mobilevlm.py,
vision_encoder.py and vision_projector.py), in its order: language model, vision tower, projector, output matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

from mobilevlm_ros.model.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig, squeeze_width

__all__ = [
    'PROJECTOR_PREFIX',
    'TOWER_PREFIX',
    'expected_tensors',
    'is_junk',
    'language_tensors',
    'projector_tensors',
    'tower_tensors',
]

TOWER_PREFIX = 'model.vision_tower.vision_tower.'
"""What a published checkpoint puts before the names of the vision tower's own tensors."""
PROJECTOR_PREFIX = 'model.mm_projector.'

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]

# Buffers that old versions of transformers saved along; they follow from the configuration.
_JUNK = ('rotary_emb.inv_freq', 'rotary_emb.cos_cached', 'rotary_emb.sin_cached', 'position_ids')


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor that a checkpoint of this model holds: published name to shape.

    The tensors of a tower of timm are left out: timm alone knows their names.
    """
    *body, head = language_tensors(config.language)
    named = dict(body)
    if config.vision is not None and config.projector is not None:
        named |= {TOWER_PREFIX + name: shape for name, shape in tower_tensors(config.vision)}
        inner = projector_tensors(config.projector, config.vision.feature_width, config.language.n_embd)
        named |= {PROJECTOR_PREFIX + name: shape for name, shape in inner}
    if not config.language.tie_embeddings:
        named[head[0]] = head[1]
    return named


def is_junk(name: str) -> bool:
    """Whether a tensor of this name is a buffer that loading ignores."""
    return name.endswith(_JUNK)


def language_tensors(config: LanguageConfig) -> Named:
    """Names and shapes of transformers' LlamaForCausalLM; the output matrix comes last."""
    d, f = config.n_embd, config.n_ff
    kv = config.head_width * config.n_kv_heads
    yield 'model.embed_tokens.weight', (config.n_vocab, d)
    for i in range(config.n_layers):
        block = f'model.layers.{i}'
        yield f'{block}.self_attn.q_proj.weight', (d, d)
        yield f'{block}.self_attn.k_proj.weight', (kv, d)
        yield f'{block}.self_attn.v_proj.weight', (kv, d)
        yield f'{block}.self_attn.o_proj.weight', (d, d)
        yield f'{block}.mlp.gate_proj.weight', (f, d)
        yield f'{block}.mlp.up_proj.weight', (f, d)
        yield f'{block}.mlp.down_proj.weight', (d, f)
        yield f'{block}.input_layernorm.weight', (d,)
        yield f'{block}.post_attention_layernorm.weight', (d,)
    yield 'model.norm.weight', (d,)
    yield 'lm_head.weight', (config.n_vocab, d)


def tower_tensors(config: VisionConfig) -> Named:
    """Names and shapes of transformers' CLIPVisionModel (``vision_model.*``); nothing for a tower of timm."""
    if config.kind != 'clip':
        return
    w, patch = config.width, config.patch_size
    yield 'vision_model.embeddings.class_embedding', (w,)
    yield 'vision_model.embeddings.patch_embedding.weight', (w, 3, patch, patch)
    yield 'vision_model.embeddings.position_embedding.weight', (config.n_patches + 1, w)
    yield from _affine('vision_model.pre_layrnorm', (w,))  # upstream's spelling
    for i in range(config.n_blocks):
        block = f'vision_model.encoder.layers.{i}'
        for name in ('k_proj', 'v_proj', 'q_proj', 'out_proj'):
            yield from _affine(f'{block}.self_attn.{name}', (w, w))
        yield from _affine(f'{block}.layer_norm1', (w,))
        yield from _affine(f'{block}.mlp.fc1', (config.mlp_width, w))
        yield from _affine(f'{block}.mlp.fc2', (w, config.mlp_width))
        yield from _affine(f'{block}.layer_norm2', (w,))
    yield from _affine('vision_model.post_layernorm', (w,))


def projector_tensors(config: ProjectorConfig, width: int, n_embd: int) -> Named:
    """Names and shapes below ``model.mm_projector.``, from features of ``width`` to embeddings of ``n_embd``."""
    if config.family == 'linear':
        yield 'weight', (n_embd, width)
        yield 'bias', (n_embd,)
    elif config.family == 'mlp':
        yield from _pointwise('', range(0, 2 * config.mlp_depth, 2), width, n_embd)
    elif config.family == 'ldpv2':
        yield from _pointwise('mlp.mlp.', (0, 2), width, n_embd)
        yield from _affine('peg.peg.0', (n_embd, 1, 3, 3))
    else:
        n_pointwise, strides = config.light_blocks or (2, (1, 2))
        yield from _pointwise('model.mlp.', range(1, 2 * n_pointwise, 2), width, n_embd)
        n_in = n_embd if n_pointwise else width
        for i in range(1, len(strides) + 1):
            yield from _depthwise_block(f'model.mb_block.{i}.block', n_in, n_embd)
            n_in = n_embd


def _affine(name: str, shape: Shape) -> Named:
    yield f'{name}.weight', shape
    yield f'{name}.bias', shape[:1]


def _pointwise(prefix: str, indices: range | tuple[int, ...], n_in: int, n_out: int) -> Named:
    for i in indices:
        yield from _affine(f'{prefix}{i}', (n_out, n_in))
        n_in = n_out


def _depthwise_block(prefix: str, n_in: int, n_out: int) -> Named:
    """Torchvision's inverted residual without expansion: depthwise, squeeze-excitation, pointwise."""
    squeezed = squeeze_width(n_in)
    yield f'{prefix}.0.0.weight', (n_in, 1, 3, 3)
    yield from _affine(f'{prefix}.0.1', (n_in,))
    yield from _affine(f'{prefix}.1.fc1', (squeezed, n_in, 1, 1))
    yield from _affine(f'{prefix}.1.fc2', (n_in, squeezed, 1, 1))
    yield f'{prefix}.2.0.weight', (n_out, n_in, 1, 1)
    yield from _affine(f'{prefix}.2.1', (n_out,))
