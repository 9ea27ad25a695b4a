"""What reading a vocabulary is made of: tokens by id, the files beside a tokenizer, and the vocabulary itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mobilevlm_ros.errors import BuildError

__all__ = [
    'ADDED_SCORE',
    'BYTE',
    'CONTROL',
    'NORMAL',
    'UNKNOWN',
    'USER_DEFINED',
    'AddedToken',
    'TokenTable',
    'TokenizerSettings',
    'Vocabulary',
    'put_added',
    'read_json',
    'read_settings',
]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""What a token is, as SentencePiece and llama.cpp number it."""
ADDED_SCORE = -1000.0
_PADDING_SCORE = -10000.0


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, and how texts are made of them.

    :ivar kind: llama.cpp's name: ``llama`` merges by score with byte fallback, ``gpt2`` by a list of merges.
    :ivar types: ``NORMAL`` and its fellows.
    :ivar padding: the token that fills a batch; None: there is none, as for the other single tokens.
    :ivar add_bos: whether a text is begun with ``bos``.
    :ivar add_space_prefix: whether a space is put before a text (``llama``).
    :ivar merges: for ``gpt2``, pairs as ``left right``.
    :ivar splitter: for ``gpt2``, llama.cpp's name of the rule that cuts a text into words.
    """

    kind: Literal['llama', 'gpt2']
    tokens: Sequence[bytes]
    scores: Sequence[float]
    types: Sequence[int]
    bos: int | None = 1
    eos: int | None = 2
    padding: int | None = None
    unknown: int | None = 0
    add_bos: bool = True
    add_eos: bool = False
    add_space_prefix: bool = True
    merges: Sequence[str] = field(default=())
    splitter: str = ''

    def __post_init__(self) -> None:
        """:raise BuildError: if llama.cpp would refuse it, or end the process over it (tokens that occur twice)."""
        n = len(self.tokens)
        if not n or len(self.scores) != n or len(self.types) != n:
            raise BuildError(f'the vocabulary has {n} tokens, {len(self.scores)} scores and {len(self.types)} types')
        twice = next((token for token, count in Counter(self.tokens).items() if count > 1), None)
        if twice is not None:
            raise BuildError(f'the vocabulary has the token {twice.decode(errors="replace")!r} twice')
        for name, token in (('start', self.bos), ('end', self.eos), ('padding', self.padding)):
            if token is not None and not 0 <= token < n:
                raise BuildError(f'the {name} token is {token}, the vocabulary has {n} tokens')
        if self.kind == 'llama':
            byte_tokens = {text for text, kind in zip(self.tokens, self.types, strict=True) if kind == BYTE}
            missing = [value for value in range(256) if f'<0x{value:02X}>'.encode() not in byte_tokens]
            if missing:
                raise BuildError(
                    f'the vocabulary lacks {len(missing)} of the 256 byte tokens (<0x{missing[0]:02X}>): llama.cpp '
                    'reads SentencePiece vocabularies with byte fallback only'
                )

    def add_to(self, writer: Any) -> None:
        """Add the keys ``tokenizer.ggml.*`` to a ``gguf.GGUFWriter``; for a LLaMA the nine of published files."""
        writer.add_tokenizer_model(self.kind)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.kind == 'llama':
            writer.add_token_scores(list(self.scores))
            if not self.add_space_prefix:
                writer.add_add_space_prefix(False)
        else:
            writer.add_tokenizer_pre(self.splitter)
            writer.add_token_merges(list(self.merges))
        # llama.cpp takes 0 for a LLaMA's unknown token unless it is told otherwise.
        unknown = None if self.kind == 'llama' and self.unknown == 0 else self.unknown
        for token, add in (
            (self.bos, writer.add_bos_token_id),
            (self.eos, writer.add_eos_token_id),
            (self.padding, writer.add_pad_token_id),
            (unknown, writer.add_unk_token_id),
        ):
            if token is not None:
                add(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)


AddedToken = tuple[object, object, bool]
"""Id, text, and whether it is a control token; the first two as found, not looked at."""


class TokenTable:
    """Collects tokens by id.

    :param path: where they come from, for messages.
    """

    def __init__(self, path: Path, n_vocab: int) -> None:
        self._path = path
        self._n_vocab = n_vocab
        self.texts: dict[int, bytes] = {}
        self.scores: dict[int, float] = {}
        self.types: dict[int, int] = {}

    def put(self, token: object, text: object, score: float, kind: int) -> None:
        """Set what a token is.

        :raise BuildError: if it is none, or the model has no such token.
        """
        if not isinstance(token, int) or isinstance(token, bool) or not isinstance(text, str):
            raise BuildError(f'{self._path} has the token {text!r} with the id {token!r}, expected a text and a number')
        if not 0 <= token < self._n_vocab:
            raise BuildError(
                f'{self._path} has the token {text!r} with the id {token}, the model has {self._n_vocab} tokens: '
                'tokenizer and weights do not belong together'
            )
        try:
            self.texts[token] = text.encode()
        except UnicodeEncodeError as error:
            raise BuildError(f'{self._path}: the token {token} is no text ({error})') from error
        self.scores[token] = score
        self.types[token] = kind

    def lists(self) -> tuple[list[bytes], list[float], list[int]]:
        """Texts, scores and types by id; ids that have no token are ``[PADn]``."""
        ids = range(self._n_vocab)
        return (
            [self.texts.get(i, f'[PAD{i}]'.encode()) for i in ids],
            [self.scores.get(i, _PADDING_SCORE) for i in ids],
            [self.types.get(i, UNUSED) for i in ids],
        )

    def id_of(self, text: str | None) -> int | None:
        """The id of a token, None if there is none."""
        wanted = text.encode(errors='replace') if text else None
        return next((token for token, found in self.texts.items() if found == wanted), None)


def put_added(tokens: TokenTable, added: Iterable[AddedToken]) -> None:
    """Tokens that were added after training: found in a text before it is split, control tokens only when asked for.

    :raise BuildError: if one is none, or the model has no such token.
    """
    for token, text, special in added:
        if isinstance(token, int) and tokens.types.get(token) in (UNKNOWN, CONTROL, BYTE):
            continue  # tokenizer_config.json lists some that the tokenizer has anyway
        tokens.put(token, text, ADDED_SCORE, CONTROL if special else USER_DEFINED)


@dataclass(frozen=True)
class TokenizerSettings:
    """What the files beside a tokenizer say.

    :ivar names: texts of ``bos_token``, ``eos_token``, ``pad_token`` and ``unk_token``, as far as given.
    :ivar add_bos: None: nothing is said.
    """

    names: dict[str, str]
    add_bos: bool | None
    add_eos: bool | None
    added: list[AddedToken]


def read_settings(folder: Path) -> TokenizerSettings:
    """Read ``tokenizer_config.json``, ``special_tokens_map.json`` and ``added_tokens.json``, as far as they are there.

    :raise BuildError: if one of them is no JSON.
    """
    config = read_json(folder / 'tokenizer_config.json')
    specials = read_json(folder / 'special_tokens_map.json')
    names = {}
    for role in ('bos_token', 'eos_token', 'pad_token', 'unk_token'):
        for source in (specials, config):
            value = source.get(role)
            text = value.get('content') if isinstance(value, dict) else value
            if isinstance(text, str):
                names[role] = text
    added: dict[object, tuple[object, bool]] = {
        token if isinstance(token, int) else repr(token): (text, False)
        for text, token in read_json(folder / 'added_tokens.json').items()
    }
    decoder = config.get('added_tokens_decoder')
    for number, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and number.isdecimal() and len(number) < 10:
            added[int(number)] = (entry.get('content'), bool(entry.get('special')))
    add_bos, add_eos = config.get('add_bos_token'), config.get('add_eos_token')
    return TokenizerSettings(
        names,
        add_bos if isinstance(add_bos, bool) else None,
        add_eos if isinstance(add_eos, bool) else None,
        [(token, text, special) for token, (text, special) in added.items()],
    )


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a file; an empty one if there is no such file.

    :raise BuildError: if the file is no JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise BuildError(f'cannot read {path}: {error.strerror}') from error
    except (ValueError, RecursionError) as error:
        raise BuildError(f'{path} is no JSON ({error}): get the checkpoint again') from error
    if not isinstance(content, dict):
        raise BuildError(f'{path} should hold a mapping, found {type(content).__name__}')
    return content
