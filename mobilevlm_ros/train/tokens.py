"""Tokenizers for training: the two files that a checkpoint may have, behind one small interface.

Text is never read as control tokens unless the caller asks for it. Where control tokens are read, the text between them
is tokenised piece by piece, each as if it were a text of its own: so does the slow LLaMA tokenizer with its ``legacy``
setting, which every published MobileVLM was trained with, and whose dummy space after each ``</s>`` the published loss
masks count on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from mobilevlm_ros.errors import CheckpointDamagedError, CheckpointMissingError, DependencyError
from mobilevlm_ros.model.tokenizer_files import find_tokenizer

__all__ = ['Tokenizer', 'open_tokenizer']

_SETTINGS = ('tokenizer_config.json', 'special_tokens_map.json')
"""The files beside ``tokenizer.json`` that name its special tokens; the first that does is believed."""


class Tokenizer(Protocol):
    """What templates and data need of a vocabulary; can be pickled, for the loader's processes."""

    @property
    def bos_id(self) -> int:
        """The token that starts a text."""
        ...

    @property
    def eos_id(self) -> int:
        """The token that ends an answer."""
        ...

    @property
    def pad_id(self) -> int:
        """The token that fills a batch; it may be one that also occurs in texts."""
        ...

    @property
    def n_vocab(self) -> int:
        """Number of tokens."""
        ...

    @property
    def adds_bos(self) -> bool:
        """Whether the model was taught with ``bos_id`` before every text."""
        ...

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of ``text``, without a start token.

        :param special: read the names of control tokens in ``text`` as these tokens.
        """
        ...


def open_tokenizer(path: Path) -> Tokenizer:
    """Open ``tokenizer.model``, ``tokenizer.json``, or the one of them that a folder has.

    :raise CheckpointMissingError: if there is no such file, or nothing beside ``tokenizer.json`` names its end token.
    :raise CheckpointDamagedError: if it cannot be read.
    :raise DependencyError: if the library that reads it is not installed.
    """
    if path.is_dir():
        path = find_tokenizer(path)
    if not path.is_file():
        raise CheckpointMissingError(f'there is no tokenizer {path}: give a tokenizer.model or a tokenizer.json')
    return JsonTokenizer(path) if path.suffix == '.json' else SentencePieceTokenizer(path)


class SentencePieceTokenizer:
    """``tokenizer.model``: LLaMA's, with the rules of the slow tokenizer. As published, padding is ``<unk>``."""

    adds_bos = True

    def __init__(self, path: Path) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise DependencyError(f'reading {path} needs sentencepiece ({error}): pip install sentencepiece') from error
        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise CheckpointDamagedError(f'{path} is no SentencePiece model: give a tokenizer.model') from error
        model = self._model
        self.bos_id, self.eos_id, self.pad_id = int(model.bos_id()), int(model.eos_id()), int(model.unk_id())
        self.n_vocab = int(model.vocab_size())
        if min(self.bos_id, self.eos_id, self.pad_id) < 0:
            raise CheckpointDamagedError(f"{path} lacks a start, an end or an unknown token; expected LLaMA's form")
        self._controls = {str(model.id_to_piece(token)): token for token in (self.pad_id, self.bos_id, self.eos_id)}

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """See ``Tokenizer``."""
        if not special:
            return [int(token) for token in self._model.encode(text)]
        tokens: list[int] = []
        for part in _split(text, self._controls):
            tokens += [part] if isinstance(part, int) else [int(token) for token in self._model.encode(part)]
        return tokens


class JsonTokenizer:
    """``tokenizer.json``, of the tokenizers library; the files beside it name the special tokens."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise DependencyError(f'reading {path} needs tokenizers ({error}): pip install tokenizers') from error
        try:
            self._library = Library.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every damage
            raise CheckpointDamagedError(f'{path} is no tokenizer.json: {error}') from error
        self._library.no_truncation()
        self._library.no_padding()
        self.n_vocab = int(self._library.get_vocab_size(with_added_tokens=True))
        added = self._library.get_added_tokens_decoder().items()
        self._controls = {str(token.content): int(number) for number, token in added if token.special}
        names = _special_names(path.parent)
        eos = names.get('eos_token')
        if eos is None:
            raise CheckpointMissingError(
                f'nothing beside {path} says which token ends an answer: put the tokenizer_config.json of the same '
                'checkpoint there'
            )
        self.eos_id = self._token(path, eos)
        self.bos_id = self._token(path, names.get('bos_token', eos))
        self.pad_id = self._token(path, names.get('pad_token') or names.get('unk_token') or eos)
        self.adds_bos = self._library.encode('', add_special_tokens=True).ids[:1] == [self.bos_id]

    def _token(self, path: Path, name: str) -> int:
        token = self._library.token_to_id(name)
        if token is None:
            raise CheckpointDamagedError(f'{path} has no token {name!r}, which the files beside it name')
        return int(token)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """See ``Tokenizer``."""
        self._library.encode_special_tokens = True  # as text; set each time, because pickling forgets it
        tokens: list[int] = []
        for part in _split(text, self._controls) if special else (text,):
            if isinstance(part, int):
                tokens.append(part)
            else:
                tokens += self._library.encode(part, add_special_tokens=False).ids
        return tokens


def _split(text: str, controls: Mapping[str, int]) -> Iterator[str | int]:
    """Stretches of text, and control tokens between them; the longest name wins."""
    if not controls:
        yield text
        return
    names = '|'.join(re.escape(name) for name in sorted(controls, key=len, reverse=True))
    for part in re.split(f'({names})', text):
        if part in controls:
            yield controls[part]
        elif part:
            yield part


def _special_names(folder: Path) -> dict[str, str]:
    """Names of the special tokens by their use, such as ``eos_token``.

    :raise CheckpointDamagedError: if a file that should name them cannot be read.
    """
    names: dict[str, str] = {}
    for file in _SETTINGS:
        path = folder / file
        if not path.is_file():
            continue
        try:
            content: Any = json.loads(path.read_text(encoding='utf-8'))
        except (OSError, ValueError) as error:
            raise CheckpointDamagedError(f'{path} cannot be read: {error}') from error
        for key, value in content.items() if isinstance(content, dict) else ():
            name = value.get('content') if isinstance(value, dict) else value
            if key.endswith('_token') and isinstance(name, str):
                names.setdefault(key, name)
    return names
