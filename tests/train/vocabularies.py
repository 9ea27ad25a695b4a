"""Tokenizer files for tests: LLaMA's vocabulary where it is at hand, and a small one of ChatML's kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from mobilevlm_ros.paths import cache_dir

LLAMA = cache_dir() / 'vocab' / 'ggml-vocab-llama-spm.gguf'


def write_llama(path: Path) -> Path:
    """``tokenizer.model`` with LLaMA's 32000 pieces, rebuilt from llama.cpp's test file; skips where that is missing.

    The rebuilt model gives the ids of llama.cpp's own 47 test vectors (test_tokens.py).
    """
    if not LLAMA.is_file():
        pytest.skip(f"LLaMA's vocabulary is not at {LLAMA}; `make venv-dev` puts it there")
    import gguf
    from sentencepiece import sentencepiece_model_pb2

    fields = gguf.GGUFReader(LLAMA).fields
    tokens, scores, types = (fields[f'tokenizer.ggml.{name}'] for name in ('tokens', 'scores', 'token_type'))
    model = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(tokens.data, scores.data, types.data, strict=True):
        model.pieces.add(
            piece=bytes(tokens.parts[token]).decode(),
            score=float(scores.parts[score][0]),
            type=int(types.parts[kind][0]),
        )
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = trainer.BPE, len(model.pieces), True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer.name, normalizer.add_dummy_prefix, normalizer.escape_whitespaces = 'identity', True, True
    normalizer.remove_extra_whitespaces = False
    path.write_bytes(model.SerializeToString())
    return path


def write_chatml(folder: Path, words: Sequence[str] = ()) -> Path:
    """``tokenizer.json`` of SmolLM2's kind with one token a byte, and the file beside it that names special tokens.

    :param words: tokens besides the bytes, with their beginnings; llama.cpp needs one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    controls = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = {word[:end]: (word[: end - 1], word[end - 1]) for word in words for end in range(2, len(word) + 1)}
    vocab = {text: number for number, text in enumerate([*controls, *signs, *merges])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges.values())))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(controls)
    path = folder / 'tokenizer.json'
    tokenizer.save(str(path))
    names = {'bos_token': '<|im_start|>', 'eos_token': '<|im_end|>', 'pad_token': '<|im_end|>'}
    (folder / 'tokenizer_config.json').write_text(json.dumps(names))
    return path
