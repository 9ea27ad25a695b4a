"""The tokenizer of a checkpoint: which file it is, whether it fits, and a made-up one for random weights."""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator
from pathlib import Path

from mobilevlm_ros.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMissingError,
    DependencyError,
    SettingsError,
)

__all__ = ['TOKENIZER_JSON', 'TOKENIZER_MODEL', 'check_tokenizer', 'find_tokenizer', 'write_made_up_tokenizer']

TOKENIZER_MODEL = 'tokenizer.model'
TOKENIZER_JSON = 'tokenizer.json'

_SPACE = '▁'
_CONTROLS = ('<unk>', '<s>', '</s>')
_N_FIXED = len(_CONTROLS) + 256
_N_LEAST = _N_FIXED + 1


def find_tokenizer(folder: Path) -> Path:
    """``tokenizer.model`` (SentencePiece), or else ``tokenizer.json``.

    :raise CheckpointMissingError: if there is neither.
    """
    for name in (TOKENIZER_MODEL, TOKENIZER_JSON):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointMissingError(
        f'there is neither {TOKENIZER_MODEL} nor {TOKENIZER_JSON} in {folder}: copy it from the published model, '
        'or run `mobilevlm fetch NAME`'
    )


def check_tokenizer(path: Path, n_vocab: int) -> None:
    """That a SentencePiece model can be read, and has no more pieces than the model has embeddings.

    :raise CheckpointMissingError: if there is no such file.
    :raise CheckpointDamagedError: if it is no SentencePiece model.
    :raise CheckpointError: if it has too many pieces.
    """
    if not path.is_file():
        raise CheckpointMissingError(f'there is no tokenizer {path}')
    if path.suffix == '.json':
        return
    from sentencepiece import SentencePieceProcessor

    try:
        n_pieces = SentencePieceProcessor(model_file=str(path)).vocab_size()
    except (RuntimeError, OSError) as error:
        raise CheckpointDamagedError(f'{path} is no SentencePiece model: give a tokenizer.model') from error
    if n_pieces > n_vocab:
        raise CheckpointError(f'{path} has {n_pieces} pieces, but the model has {n_vocab} embeddings')


def write_made_up_tokenizer(path: Path, n_vocab: int) -> None:
    """Write a SentencePiece model that nobody trained, for random weights only.

    LLaMA's vocabulary cannot be shipped. This one has its form (BPE, byte fallback, ``<unk>``, ``<s>``, ``</s>`` and
    the bytes at the same ids) and its size, and every text comes back from its tokens; but a text has another number
    of tokens than with LLaMA's, so do not use it where prompts must be as long as published ones.

    :raise SettingsError: if ``n_vocab`` is too small to hold the bytes and the space.
    :raise DependencyError: if sentencepiece's format description cannot be imported.
    """
    if n_vocab < _N_LEAST:
        raise SettingsError(f'a vocabulary with byte fallback has at least {_N_LEAST} pieces, found {n_vocab}')
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise DependencyError(
            f'making up a tokenizer needs sentencepiece and protobuf ({error}): pip install sentencepiece protobuf, '
            'or give a tokenizer.model'
        ) from error
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # protobuf makes it at import
    kinds = model.SentencePiece
    for text in _CONTROLS:
        model.pieces.add(piece=text, score=0.0, type=kinds.UNKNOWN if text == '<unk>' else kinds.CONTROL)
    for value in range(256):
        model.pieces.add(piece=f'<0x{value:02X}>', score=0.0, type=kinds.BYTE)
    for rank, text in enumerate(itertools.islice(_pieces(), n_vocab - _N_FIXED)):
        model.pieces.add(piece=text, score=-float(rank), type=kinds.NORMAL)
    trainer = model.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(model.pieces)
    trainer.byte_fallback = True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer = model.normalizer_spec
    normalizer.name = 'identity'
    normalizer.add_dummy_prefix = True
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    path.write_bytes(model.SerializeToString())


def _pieces() -> Iterator[str]:
    """Characters, then words of two, three and four signs; each can be merged from those before it."""
    letters = string.ascii_lowercase
    yield _SPACE
    yield from (character for character in string.printable if character.isprintable() and character != ' ')
    for length in (2, 3, 4):
        for rest in itertools.product(letters, repeat=length - 1):
            yield _SPACE + ''.join(rest)
        for word in itertools.product(letters, repeat=length):
            yield ''.join(word)
