"""The tensors of a LLaMA in GGUF: their names, their shapes, and llama.cpp's order of rows.

Plain data for whatever writes, adapts or measures a language model in GGUF; needs neither torch nor gguf.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from mobilevlm_ros.model import layout
from mobilevlm_ros.model.config import LanguageConfig

__all__ = ['LlamaTensor', 'language_tensors', 'rope_order']

_NAMES = {
    'model.embed_tokens': 'token_embd',
    'model.norm': 'output_norm',
    'lm_head': 'output',
    'input_layernorm': 'attn_norm',
    'self_attn.q_proj': 'attn_q',
    'self_attn.k_proj': 'attn_k',
    'self_attn.v_proj': 'attn_v',
    'self_attn.o_proj': 'attn_output',
    'post_attention_layernorm': 'ffn_norm',
    'mlp.gate_proj': 'ffn_gate',
    'mlp.up_proj': 'ffn_up',
    'mlp.down_proj': 'ffn_down',
}


@dataclass(frozen=True)
class LlamaTensor:
    """One tensor of a language model.

    :ivar source: its name at Hugging Face.
    :ivar name: its name in GGUF.
    :ivar shape: as PyTorch has it, matrices ``(out, in)``.
    :ivar n_rope_heads: heads whose rows llama.cpp wants in another order (``rope_order``); 0: rows stay.
    """

    source: str
    name: str
    shape: tuple[int, ...]
    n_rope_heads: int = 0


def language_tensors(config: LanguageConfig) -> list[LlamaTensor]:
    """Every tensor that a GGUF of this model holds: 9 a layer and 3, or 2 where the output matrix is the embedding."""
    n_rope_heads = {'attn_q': config.n_heads, 'attn_k': config.n_kv_heads}
    tensors = []
    for source, shape in layout.language_tensors(config):
        module = source.removesuffix('.weight')
        if module.startswith('model.layers.'):
            _, _, index, part = module.split('.', 3)
            name = _NAMES[part]
            tensors.append(LlamaTensor(source, f'blk.{index}.{name}.weight', shape, n_rope_heads.get(name, 0)))
        elif not (config.tie_embeddings and module == 'lm_head'):
            tensors.append(LlamaTensor(source, f'{_NAMES[module]}.weight', shape))
    return tensors


def rope_order(matrix: NDArray[Any], n_heads: int) -> NDArray[Any]:
    """Rows ``[out, in]`` as llama.cpp's rope expects them.

    Hugging Face rotates the first half of a head's rows against the second half, llama.cpp each even row against the
    odd one after it.
    """
    n_out, n_in = matrix.shape
    return matrix.reshape(n_heads, 2, n_out // n_heads // 2, n_in).swapaxes(1, 2).reshape(n_out, n_in)
