"""The tensors of a LLaMA: their names at Hugging Face and in GGUF, their shapes, and llama.cpp's order of rows.

Plain data for whatever writes, adapts or measures a language model in GGUF; needs neither torch nor gguf.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from mobilevlm_ros.model.config import LanguageConfig

__all__ = ['LlamaTensor', 'language_tensors', 'rope_order']


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
    d, f, d_kv = config.n_embd, config.n_ff, config.n_kv_heads * config.head_width
    tensors = [
        LlamaTensor('model.embed_tokens.weight', 'token_embd.weight', (config.n_vocab, d)),
        LlamaTensor('model.norm.weight', 'output_norm.weight', (d,)),
    ]
    if not config.tie_embeddings:
        tensors.append(LlamaTensor('lm_head.weight', 'output.weight', (config.n_vocab, d)))
    for i in range(config.n_layers):
        for source, name, shape, n_rope_heads in (
            ('input_layernorm', 'attn_norm', (d,), 0),
            ('self_attn.q_proj', 'attn_q', (d, d), config.n_heads),
            ('self_attn.k_proj', 'attn_k', (d_kv, d), config.n_kv_heads),
            ('self_attn.v_proj', 'attn_v', (d_kv, d), 0),
            ('self_attn.o_proj', 'attn_output', (d, d), 0),
            ('post_attention_layernorm', 'ffn_norm', (d,), 0),
            ('mlp.gate_proj', 'ffn_gate', (f, d), 0),
            ('mlp.up_proj', 'ffn_up', (f, d), 0),
            ('mlp.down_proj', 'ffn_down', (d, f), 0),
        ):
            tensors.append(
                LlamaTensor(f'model.layers.{i}.{source}.weight', f'blk.{i}.{name}.weight', shape, n_rope_heads)
            )
    return tensors


def rope_order(matrix: NDArray[Any], n_heads: int) -> NDArray[Any]:
    """Rows ``[out, in]`` as llama.cpp's rope expects them.

    Hugging Face rotates the first half of a head's rows against the second half, llama.cpp each even row against the
    odd one after it.
    """
    n_out, n_in = matrix.shape
    return matrix.reshape(n_heads, 2, n_out // n_heads // 2, n_in).swapaxes(1, 2).reshape(n_out, n_in)
