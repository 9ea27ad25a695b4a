"""A vocabulary out of ``tokenizer.json``, the file of Hugging Face's tokenizers library.

Two of the many things that such a file can describe are the same in llama.cpp: a SentencePiece BPE model with byte
fallback that was converted (LLaMA's), and byte-level BPE with the splitting rules of GPT-2 or SmolLM2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobilevlm_ros.build.tokenizer_parts import (
    ADDED_SCORE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    AddedToken,
    TokenizerSettings,
    TokenTable,
    Vocabulary,
    put_added,
    read_json,
)
from mobilevlm_ros.errors import BuildError

__all__ = ['vocabulary_from_json']

Merges = list[tuple[str, str]]


def vocabulary_from_json(path: Path, n_vocab: int, settings: TokenizerSettings) -> Vocabulary:
    """The vocabulary in ``tokenizer.json``.

    :raise BuildError: if the file is missing or malformed, has more tokens than the model, or is of a kind that
        llama.cpp would tokenize differently.
    """
    if not path.is_file():
        raise BuildError(f'{path} is missing: get the checkpoint again')
    content = read_json(path)
    model = content.get('model')
    if not isinstance(model, dict):
        raise BuildError(f'{path} describes no tokenizer: get the checkpoint again')
    vocab, merges = model.get('vocab'), model.get('merges')
    if model.get('type', 'BPE') != 'BPE' or not isinstance(vocab, dict) or not isinstance(merges, list):
        raise BuildError(
            f'{path} holds a tokenizer of type {model.get("type")!r}, expected BPE with a vocabulary and merges: '
            'give tokenizer.model if there is one'
        )
    tokens = TokenTable(path, n_vocab)
    for text, token in vocab.items():
        tokens.put(token, text, 0.0, NORMAL)
    make = _llama if model.get('byte_fallback') else _byte_level
    return make(path, content, tokens, [_pair(path, merge) for merge in merges], settings)


def _pair(path: Path, merge: object) -> tuple[str, str]:
    """One merge: ``"left right"`` in older files, a pair in newer ones."""
    parts = merge.split(' ') if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        raise BuildError(f'{path} has the merge {merge!r}, expected a pair of tokens')
    return parts[0], parts[1]


def _added(content: dict[str, Any], settings: TokenizerSettings) -> list[AddedToken]:
    listed = content.get('added_tokens')
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    own: list[AddedToken] = [(entry.get('id'), entry.get('content'), bool(entry.get('special'))) for entry in entries]
    known = {token for token, _, _ in own if isinstance(token, int)}
    return own + [entry for entry in settings.added if entry[0] not in known]


# -- SentencePiece, converted -------------------------------------------------------------------------------------


def _llama(
    path: Path, content: dict[str, Any], tokens: TokenTable, merges: Merges, settings: TokenizerSettings
) -> Vocabulary:
    ranks = _ranks(path, tokens, merges)
    for number, piece in tokens.texts.items():
        is_byte = len(piece) == 6 and piece.startswith(b'<0x') and piece.endswith(b'>')
        tokens.types[number] = BYTE if is_byte else NORMAL
        # A piece that no merge makes is a character: merged last, in the order of ids.
        tokens.scores[number] = 0.0 if is_byte else -float(ranks.get(piece.decode(), len(ranks) + number))
    for token, text, special in _added(content, settings):
        # Those that the model was trained with (<unk>, <s>, </s>) are listed as added too.
        trained = special and token in tokens.texts
        tokens.put(token, text, 0.0 if trained else ADDED_SCORE, CONTROL if special else USER_DEFINED)
    named = content['model'].get('unk_token')
    unknown = tokens.id_of(named if isinstance(named, str) else settings.names.get('unk_token', '<unk>'))
    if unknown is not None:
        tokens.scores[unknown], tokens.types[unknown] = 0.0, UNKNOWN
    padding = tokens.id_of(settings.names.get('pad_token'))
    return Vocabulary(
        'llama',
        *tokens.lists(),
        bos=tokens.id_of(settings.names.get('bos_token', '<s>')),
        eos=tokens.id_of(settings.names.get('eos_token', '</s>')),
        padding=unknown if padding is None else padding,
        unknown=unknown,
        add_bos=settings.add_bos is not False,
        add_eos=settings.add_eos is True,
        add_space_prefix=_adds_space(path, content),
    )


def _ranks(path: Path, tokens: TokenTable, merges: Merges) -> dict[str, int]:
    """Order in which pieces are merged; SentencePiece's scores are minus this.

    SentencePiece merges any two neighbours that make a piece, so a converted list holds every split of a piece into
    two others. One that lacks some was trained by another program, and llama.cpp would merge what that one does not.
    """
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    texts = {text.decode() for text in tokens.texts.values()}
    listed = set(merges)
    for piece in ranks:
        for end in range(1, len(piece)):
            left, right = piece[:end], piece[end:]
            if left in texts and right in texts and (left, right) not in listed:
                raise BuildError(
                    f'{path} never merges {left!r} and {right!r} though {piece!r} is a token: it was not converted '
                    'from a SentencePiece model, so llama.cpp would tokenize differently. Give tokenizer.model if '
                    'there is one.'
                )
    return ranks


def _adds_space(path: Path, content: dict[str, Any]) -> bool:
    """Whether a text gets a space in front; spaces are ``▁`` in the tokens."""
    normalizers = _steps(content.get('normalizer'), 'normalizers')
    splitters = _steps(content.get('pre_tokenizer'), 'pretokenizers')
    kinds = [step.get('type') for step in normalizers]
    if any(kind not in ('Prepend', 'Replace') for kind in kinds):
        raise BuildError(f'{path} normalizes texts by {kinds}, which llama.cpp does not')
    if [step.get('type') for step in splitters] not in ([], ['Metaspace']):
        raise BuildError(f'{path} cuts texts into words, which llama.cpp does not for a SentencePiece vocabulary')
    return 'Prepend' in kinds or any(step.get('prepend_scheme', 'always') != 'never' for step in splitters)


def _steps(description: object, name: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which is one step, a ``Sequence`` of them, or nothing."""
    if not isinstance(description, dict):
        return []
    steps = description.get(name) if description.get('type') == 'Sequence' else [description]
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


# -- byte level ---------------------------------------------------------------------------------------------------


def _byte_level(
    path: Path, content: dict[str, Any], tokens: TokenTable, merges: Merges, settings: TokenizerSettings
) -> Vocabulary:
    splitter = _splitter(path, content)
    put_added(tokens, _added(content, settings))
    return Vocabulary(
        'gpt2',
        *tokens.lists(),
        bos=tokens.id_of(settings.names.get('bos_token')),
        eos=tokens.id_of(settings.names.get('eos_token')),
        padding=tokens.id_of(settings.names.get('pad_token')),
        unknown=tokens.id_of(settings.names.get('unk_token')),
        add_bos=settings.add_bos is True,
        add_eos=settings.add_eos is True,
        merges=[f'{left} {right}' for left, right in merges],
        splitter=splitter,
    )


def _splitter(path: Path, content: dict[str, Any]) -> str:
    """llama.cpp's name of the rule that cuts a text into words (src/llama-vocab.cpp)."""
    steps = _steps(content.get('pre_tokenizer'), 'pretokenizers')
    kinds = [step.get('type') for step in steps]
    plain = bool(steps) and steps[-1].get('use_regex', True) and not steps[-1].get('add_prefix_space', True)
    if plain and content.get('normalizer') is None:
        if kinds == ['ByteLevel']:
            return 'gpt-2'
        if kinds == ['Digits', 'ByteLevel'] and steps[0].get('individual_digits'):
            return 'smollm'
    raise BuildError(
        f"{path} cuts texts into words by {kinds}; those that are known to be the same in llama.cpp are GPT-2's and "
        "SmolLM2's"
    )
