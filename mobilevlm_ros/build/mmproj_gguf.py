"""Vision tower and projector as the ``mmproj`` GGUF that llama.cpp's own programs load.

For users of llama.cpp, and for measuring against it; this project's runtime never reads it. Names, types and keys are
those of llama.cpp's ``tools/mtmd/legacy-models/convert_image_encoder_to_gguf.py``, the ``ffn_down``/``ffn_up`` swap
included, which its loader undoes. What llama.cpp (as in llama-cpp-python 0.3.36) computes from such a file is not what
the published model computes, see ``DEFECTS``. One of its defects is avoided here: it runs one block of the tower fewer
than the file has, unless ``clip.vision.feature_layer`` names the last one, so this key is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.build.gguf_file import OnProgress, Storage, TensorEntry, Weights, read_tensor, write_gguf
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.model.layout import PROJECTOR_PREFIX, projector_tensors, tower_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from mobilevlm_ros.model.config import ModelConfig, ProjectorConfig, VisionConfig

__all__ = ['DEFECTS', 'mmproj_entries', 'write_mmproj_gguf']

DEFECTS = (
    'llama.cpp does not compute from this file what the published model computes: it puts the class token after the '
    'patches, so that each patch gets the position of its neighbour, the first is lost and the class token is fed as '
    'an image token (ggml-org/llama.cpp issue 25814); its GELU is the approximation by tanh; it pads a picture after '
    'resizing it instead of before. Older versions run one block of the tower fewer (issue 25817) and resize '
    'bilinearly. Its answers are worse than those of the bundle.'
)
"""What a user of the file should be told."""

_GRID = 24
"""Patches a side; llama.cpp's graphs of LDP and LDPv2 have it as a constant."""

_BLOCK_NAMES = {
    'self_attn.q_proj': 'attn_q',
    'self_attn.k_proj': 'attn_k',
    'self_attn.v_proj': 'attn_v',
    'self_attn.out_proj': 'attn_out',
    'layer_norm1': 'ln1',
    'layer_norm2': 'ln2',
    'mlp.fc1': 'ffn_down',
    'mlp.fc2': 'ffn_up',
}
_PROJECTORS = {'ldp': 'ldp', 'ldpv2': 'ldpv2', 'mlp': 'mlp'}
"""Families of projectors, and what llama.cpp calls them."""


def write_mmproj_gguf(
    weights: Weights,
    config: ModelConfig,
    out: Path,
    *,
    dtype: Literal['f16', 'f32'] = 'f16',
    on_progress: OnProgress = lambda done, total: None,
) -> None:
    """Write the file.

    :param weights: float32; the tower under transformers' names (``vision_model.*``), the projector under published
        ones (``model.mm_projector.*``).
    :param dtype: of matrices; vectors are float32 and kernels of convolutions float16 always.
    :param on_progress: told of bytes written.
    :raise BuildError: if llama.cpp has no such tower or projector, a tensor is missing or misshapen, or the disk is
        full.
    :raise DependencyError: if gguf is missing.
    """
    vision, projector = _checked(config)

    def add_metadata(writer: Any) -> None:
        writer.add_bool('clip.has_text_encoder', False)
        writer.add_bool('clip.has_vision_encoder', True)
        writer.add_bool('clip.has_llava_projector', True)
        writer.add_file_type(1 if dtype == 'f16' else 0)
        writer.add_name(vision.name)
        writer.add_description('image encoder for LLaVA')
        writer.add_string('clip.projector_type', _PROJECTORS[projector.family])
        writer.add_uint32('clip.vision.image_size', vision.image_size)
        writer.add_uint32('clip.vision.patch_size', vision.patch_size)
        writer.add_uint32('clip.vision.embedding_length', vision.width)
        writer.add_uint32('clip.vision.feed_forward_length', vision.mlp_width)
        writer.add_uint32('clip.vision.projection_dim', vision.projection_width)
        writer.add_uint32('clip.vision.attention.head_count', vision.n_heads)
        writer.add_float32('clip.vision.attention.layer_norm_epsilon', vision.layer_norm_eps)
        writer.add_uint32('clip.vision.block_count', vision.n_run_blocks)
        writer.add_array('clip.vision.feature_layer', [vision.n_run_blocks])
        writer.add_array('clip.vision.image_mean', list(vision.mean))
        writer.add_array('clip.vision.image_std', list(vision.std))
        writer.add_bool('clip.use_gelu', vision.activation == 'gelu')

    write_gguf(out, 'clip', add_metadata, list(mmproj_entries(weights, config, dtype)), on_progress)


def _checked(config: ModelConfig) -> tuple[VisionConfig, ProjectorConfig]:
    """Tower and projector, if llama.cpp can run them."""
    vision, projector = config.vision, config.projector
    if vision is None or projector is None:
        raise BuildError(f'{config.name} is a language model alone: it has no vision tower to write')
    if vision.kind != 'clip':
        raise BuildError(f'the tower {vision.name} is none of CLIP, which is what llama.cpp runs')
    if vision.also_layers:
        raise BuildError(
            f'{config.name} uses the features after blocks {", ".join(map(str, vision.used_blocks))} of its tower side '
            "by side; llama.cpp's LLaVA path has those of one block"
        )
    if projector.family not in _PROJECTORS or (projector.family == 'mlp' and projector.mlp_depth != 2):
        raise BuildError(f'llama.cpp has no projector {projector.type}; it has mlp2x_gelu, ldpnet and ldpnetv2')
    if projector.family != 'mlp' and vision.grid != _GRID:
        raise BuildError(
            f'{vision.name} has {vision.grid} patches a side; llama.cpp computes {projector.type} for {_GRID} only'
        )
    return vision, projector


def mmproj_entries(weights: Weights, config: ModelConfig, dtype: Storage) -> Iterator[TensorEntry]:
    """The tensors of the file.

    :raise BuildError: if llama.cpp has no such tower or projector.
    """
    vision, projector = _checked(config)
    for key, shape in projector_tensors(projector, vision.width, config.language.n_embd):
        yield _entry(weights, PROJECTOR_PREFIX + key, shape, _projector_name(key), dtype)
    for key, shape in tower_tensors(vision):
        name = _tower_name(key, vision.n_run_blocks)
        if name:
            yield _entry(weights, key, shape, name, dtype)


def _projector_name(key: str) -> str:
    """``mlp.mlp.0.weight`` (LDPv2), ``model.mlp.1.weight`` (LDP) or ``0.weight`` (MLP), as llama.cpp names it."""
    for published, collapsed in (('mlp.mlp.', 'model.mlp.'), ('peg.peg.', 'model.peg.')):
        if key.startswith(published):
            return f'mm.{collapsed}{key.removeprefix(published)}'
    return f'mm.{key}'


def _tower_name(key: str, n_run_blocks: int) -> str:
    """llama.cpp's name; empty for what does not run: the last block and the last norm."""
    fixed = {
        'embeddings.class_embedding': 'v.class_embd',
        'embeddings.patch_embedding.weight': 'v.patch_embd.weight',
        'embeddings.position_embedding.weight': 'v.position_embd.weight',
        'pre_layrnorm.weight': 'v.pre_ln.weight',
        'pre_layrnorm.bias': 'v.pre_ln.bias',
    }
    inner = key.removeprefix('vision_model.')
    if not inner.startswith('encoder.layers.'):
        return fixed.get(inner, '')
    _, _, index, part = inner.split('.', 3)
    module, _, what = part.rpartition('.')
    return f'v.blk.{index}.{_BLOCK_NAMES[module]}.{what}' if int(index) < n_run_blocks else ''


def _entry(weights: Weights, key: str, shape: tuple[int, ...], name: str, dtype: Storage) -> TensorEntry:
    # 1x1 convolutions become matrices, depthwise kernels lose their one input.
    written = shape if name == 'v.patch_embd.weight' else tuple(n for n in shape if n != 1)
    # llama.cpp convolves with float16 kernels only.
    storage: Storage = 'f32' if len(written) == 1 else dtype if len(written) == 2 else 'f16'
    return TensorEntry(name, written, storage, _reader(weights, key, shape, written))


def _reader(
    weights: Weights, key: str, shape: tuple[int, ...], written: tuple[int, ...]
) -> Callable[[], NDArray[np.float32]]:
    return lambda: read_tensor(weights, key, shape).reshape(written)
