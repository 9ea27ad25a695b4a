"""A LLaMA's weights, shapes and vocabulary as a GGUF that llama.cpp runs.

One tensor is in memory at a time, and the file is whole or not there. The metadata are those of published MobileLLaMA
files (23 keys for a SentencePiece vocabulary), and no more: no chat template, since the runtime brings its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.build.gguf_file import OnProgress, Storage, TensorEntry, Weights, load_gguf, read_tensor, write_gguf
from mobilevlm_ros.build.llama_tensors import LlamaTensor, language_tensors, rope_order
from mobilevlm_ros.build.vocabulary import Vocabulary, read_vocabulary
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.model.config import LanguageConfig

__all__ = ['add_language_metadata', 'write_language_gguf']

_FILE_TYPE = {'f32': 0, 'f16': 1}
"""``LLAMA_FTYPE`` of llama.h."""


def write_language_gguf(
    weights: Weights,
    config: LanguageConfig,
    tokenizer: Path | Vocabulary,
    out: Path,
    *,
    dtype: Literal['f16', 'f32'] = 'f16',
    name: str,
    on_progress: OnProgress = lambda done, total: None,
) -> None:
    """Write the language model.

    :param weights: float32 under Hugging Face's names, matrices ``[out, in]``; each is read once. Tables of rotary
        frequencies, which old checkpoints hold, are ignored, and so is the output matrix of tied embeddings.
    :param tokenizer: ``tokenizer.model`` or ``tokenizer.json``, or a vocabulary that was read.
    :param dtype: of the matrices; vectors are float32 always.
    :param name: of the model, as llama.cpp shows it.
    :param on_progress: told of bytes written.
    :raise BuildError: if a tensor is missing, misshapen, not finite or unknown, the tokenizer does not fit, or the disk
        is full.
    :raise DependencyError: if gguf or sentencepiece is missing.
    """
    tensors = language_tensors(config)
    _refuse_unknown(weights, tensors, config)
    vocabulary = tokenizer if isinstance(tokenizer, Vocabulary) else read_vocabulary(tokenizer, config.n_vocab)
    if len(vocabulary.tokens) != config.n_vocab:
        raise BuildError(f'the vocabulary has {len(vocabulary.tokens)} tokens, the model {config.n_vocab}')

    def add_metadata(writer: Any) -> None:
        add_language_metadata(writer, config, vocabulary, name)
        writer.add_file_type(_FILE_TYPE[dtype])
        writer.add_quantization_version(load_gguf().GGML_QUANT_VERSION)

    entries = [
        TensorEntry(tensor.name, tensor.shape, _storage(tensor, dtype), _reader(weights, tensor)) for tensor in tensors
    ]
    write_gguf(out, 'llama', add_metadata, entries, on_progress)


def add_language_metadata(writer: Any, config: LanguageConfig, vocabulary: Vocabulary, name: str) -> None:
    """Say in a ``gguf.GGUFWriter`` what the model is: its name, shapes and vocabulary."""
    writer.add_name(name)
    writer.add_vocab_size(config.n_vocab)
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.n_ff)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_base)
    vocabulary.add_to(writer)


def _storage(tensor: LlamaTensor, dtype: Storage) -> Storage:
    return dtype if len(tensor.shape) > 1 else 'f32'


def _reader(weights: Weights, tensor: LlamaTensor) -> Callable[[], NDArray[np.float32]]:
    def read() -> NDArray[np.float32]:
        value = read_tensor(weights, tensor.source, tensor.shape)
        return rope_order(value, tensor.n_rope_heads) if tensor.n_rope_heads else value

    return read


def _refuse_unknown(weights: Weights, tensors: list[LlamaTensor], config: LanguageConfig) -> None:
    """A tensor that is left out, such as a bias, would give a model that answers wrongly without a word."""
    known = {tensor.source for tensor in tensors}
    missing = [key for key in known if key not in weights]
    if missing:
        raise BuildError(f'the weights lack {len(missing)} tensors of {len(known)}, {min(missing)} among them')
    if config.tie_embeddings:
        known.add('lm_head.weight')
    unknown = [key for key in weights if key not in known and not key.endswith('.rotary_emb.inv_freq')]
    if unknown:
        raise BuildError(
            f'the weights hold {len(unknown)} tensors that a LLaMA of these shapes does not have, {min(unknown)} among '
            'them: give the manifest that belongs to the checkpoint'
        )
