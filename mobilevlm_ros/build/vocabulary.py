"""A vocabulary for llama.cpp, read from what checkpoints carry: ``tokenizer.model`` or ``tokenizer.json``.

llama.cpp tokenizes as the original does with three kinds: SentencePiece BPE with byte fallback (``tokenizer.model``;
LLaMA's), the same as Hugging Face writes it (``tokenizer.json``), and byte-level BPE (``tokenizer.json``; SmolLM2's,
GPT-2's). What would come out differently is refused. The files are untrusted: whatever is malformed is a ``BuildError``
that says what was found.

Rules after llama.cpp's ``convert_legacy_llama.py`` and ``conversion/base.py``.
"""

from __future__ import annotations

from pathlib import Path

from mobilevlm_ros.build.tokenizer_json import vocabulary_from_json
from mobilevlm_ros.build.tokenizer_parts import TokenizerSettings, TokenTable, Vocabulary, put_added, read_settings
from mobilevlm_ros.errors import BuildError, DependencyError

__all__ = ['Vocabulary', 'read_vocabulary']


def read_vocabulary(path: Path, n_vocab: int) -> Vocabulary:
    """The vocabulary in ``tokenizer.model`` or ``tokenizer.json``, with what the files beside it add.

    :param n_vocab: tokens that the model has; ids without a token become ``[PADn]``.
    :raise BuildError: if the file is missing or malformed, has more tokens than the model, or is of a kind that
        llama.cpp would tokenize differently.
    :raise DependencyError: if sentencepiece is missing.
    """
    settings = read_settings(path.parent)
    if path.suffix == '.json':
        return vocabulary_from_json(path, n_vocab, settings)
    return _from_sentencepiece(path, n_vocab, settings)


def _from_sentencepiece(path: Path, n_vocab: int, settings: TokenizerSettings) -> Vocabulary:
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2 as messages
    except ImportError as error:
        raise DependencyError(
            f'reading {path.name} needs sentencepiece and protobuf ({error}). '
            'Install them with: pip install sentencepiece protobuf'
        ) from error
    # Its classes are made when it is imported, unseen by mypy.
    model = getattr(messages, 'ModelProto')()  # noqa: B009
    try:
        model.ParseFromString(path.read_bytes())
    except OSError as error:
        raise BuildError(f'cannot read {path}: {error.strerror}. Get the checkpoint again.') from error
    except DecodeError as error:
        raise BuildError(f'{path} is no SentencePiece model ({error}): get the checkpoint again') from error
    if not model.pieces:
        raise BuildError(f'{path} holds no tokens: it is no SentencePiece model, get the checkpoint again')
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != trainer.BPE:
        name = trainer.ModelType.Name(trainer.model_type)
        raise BuildError(f'{path} is a SentencePiece model of type {name}; llama.cpp merges by score, which is BPE')
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise BuildError(f'{path} normalizes texts ({normalizer.name!r}), which llama.cpp does not')
    tokens = TokenTable(path, n_vocab)
    for token, piece in enumerate(model.pieces):
        tokens.put(token, piece.piece, piece.score, piece.type)
    put_added(tokens, settings.added)
    bos, eos, padding, unknown = (
        token if 0 <= token < len(model.pieces) else None
        for token in (trainer.bos_id, trainer.eos_id, trainer.pad_id, trainer.unk_id)
    )
    return Vocabulary(
        'llama',
        *tokens.lists(),
        bos=bos,
        eos=eos,
        # LLaMA has no padding token; MobileVLM pads with the unknown one.
        padding=unknown if padding is None else padding,
        unknown=unknown,
        add_bos=settings.add_bos is not False,
        add_eos=settings.add_eos is True,
        add_space_prefix=normalizer.add_dummy_prefix,
    )
