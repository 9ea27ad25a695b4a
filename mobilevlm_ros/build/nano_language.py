"""The language model of nano out of its GGUF file: its shapes, its weights and its tokenizer as Hugging Face has them.

Needs gguf; the tokenizer needs tokenizers. Quantised matrices become float32, which holds their values exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.build.llama_tensors import language_tensors
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.model.config import LanguageConfig

__all__ = ['read_byte_level_tokenizer', 'read_language_config', 'read_language_weights']

_CONTROL = 3


def read_language_config(reader: Any, n_ctx: int) -> LanguageConfig:
    """The shapes of the model in a ``gguf.GGUFReader``.

    :param n_ctx: positions that are used, at most as many as the model was trained on.
    :raise BuildError: if the file lacks a key.
    """

    def value(key: str) -> Any:
        return _field(reader, f'llama.{key}')

    names = {tensor.name for tensor in reader.tensors}
    return LanguageConfig(
        n_vocab=len(_field(reader, 'tokenizer.ggml.tokens')),
        n_embd=value('embedding_length'),
        n_layers=value('block_count'),
        n_heads=value('attention.head_count'),
        n_kv_heads=value('attention.head_count_kv'),
        n_ff=value('feed_forward_length'),
        n_ctx=n_ctx,
        rope_base=value('rope.freq_base'),
        norm_eps=value('attention.layer_norm_rms_epsilon'),
        tie_embeddings='output.weight' not in names,
    )


def read_language_weights(
    reader: Any,
    config: LanguageConfig,
    change: Callable[[str, NDArray[np.float32]], NDArray[np.float32]] = lambda name, values: values,
) -> dict[str, NDArray[np.float32]]:
    """Hugging Face's names and row order, float32.

    :param change: makes what is read of what is in the file, by its name and in its order of rows there.
    :raise BuildError: if a tensor is missing or misshapen.
    """
    from gguf.quants import dequantize

    stored = {tensor.name: tensor for tensor in reader.tensors}
    weights = {}
    for tensor in language_tensors(config):
        if tensor.name not in stored:
            raise BuildError(f'the language model lacks {tensor.name}')
        found = stored[tensor.name]
        values = np.asarray(dequantize(found.data, found.tensor_type), np.float32)
        if values.shape != tensor.shape:
            raise BuildError(f'{tensor.name} has shape {list(values.shape)}, expected {list(tensor.shape)}')
        values = change(tensor.name, values)
        weights[tensor.source] = _published_order(values, tensor.n_rope_heads) if tensor.n_rope_heads else values
    return weights


def _published_order(matrix: NDArray[np.float32], n_heads: int) -> NDArray[np.float32]:
    """The inverse of ``llama_tensors.rope_order``."""
    n_out, n_in = matrix.shape
    return matrix.reshape(n_heads, n_out // n_heads // 2, 2, n_in).swapaxes(1, 2).reshape(n_out, n_in)


def read_byte_level_tokenizer(reader: Any) -> Any:
    """The ``tokenizers.Tokenizer`` in the file: single digits, then GPT-2's pattern (``smollm`` in llama.cpp).

    :raise BuildError: if the file has another kind of vocabulary.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (_field(reader, 'tokenizer.ggml.model'), _field(reader, 'tokenizer.ggml.pre'))
    if kind != ('gpt2', 'smollm'):
        raise BuildError(f"the language model has a vocabulary of kind {kind}, expected SmolLM2's ('gpt2', 'smollm')")
    tokens, types = _field(reader, 'tokenizer.ggml.tokens'), _field(reader, 'tokenizer.ggml.token_type')
    merges = [tuple(merge.split(' ', 1)) for merge in _field(reader, 'tokenizer.ggml.merges')]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    controls = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in controls])
    return tokenizer


def _field(reader: Any, name: str) -> Any:
    if name not in reader.fields:
        raise BuildError(f'the language model lacks {name}: it is no LLaMA in GGUF')
    return reader.fields[name].contents()
