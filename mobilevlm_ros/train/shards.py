"""Folders of token ids on disk: a small index, and shards that are mapped into memory instead of read.

A folder is one long row of ids, cut into files of bounded size; a sequence may lie across a cut, so that the size of
the files changes nothing of what is read. ``index.json`` says how many ids there are, of which tokenizer and from
which files, and how far an unfinished folder has come. Neither it nor the shards are trusted: sizes and types are
checked when a folder is opened, and every id is held against the vocabulary before it is used.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mobilevlm_ros.errors import DatasetError, DatasetMissingError

__all__ = [
    'INDEX',
    'InputFile',
    'Position',
    'Shard',
    'ShardWriter',
    'TokenIndex',
    'TokenShards',
    'is_ours',
    'read_index',
    'shard_name',
    'write_index',
]

INDEX = 'index.json'
PARTIAL = '.partial'
_FORMAT: Literal['mobilevlm-tokens'] = 'mobilevlm-tokens'
_VERSION: Literal[1] = 1
_MAX_INDEX_BYTES = 64 << 20

Count = Annotated[int, Field(ge=0, le=1 << 62)]
Sha256 = Annotated[str, Field(pattern=r'^[0-9a-f]{64}$')]


class _Part(BaseModel):
    model_config = ConfigDict(extra='forbid', strict=True, frozen=True)


class Position(_Part):
    """Where in the inputs the next shard begins.

    :ivar input: number of the file, from 0.
    :ivar offset: in bytes, of the text as it is when unpacked.
    :ivar line: number of lines before.
    :ivar inside: whether tokens of the same document stand before it.
    """

    input: Count = 0
    offset: Count = 0
    line: Count = 0
    inside: bool = False


class InputFile(_Part):
    """A file that was read: its path as given, size, and a hash of its first MiB."""

    file: str
    n_bytes: Count
    head_sha256: Sha256


class Shard(_Part):
    """One file of ids."""

    n_tokens: Annotated[int, Field(ge=1, le=1 << 48)]
    n_documents: Count


class TokenIndex(_Part):
    """What ``index.json`` says.

    :ivar dtype: of the ids, little-endian.
    :ivar eos_id: stands after every document.
    :ivar separator: the line that parts documents in text files; None: a file is a document.
    :ivar field: of JSON Lines, with the text.
    :ivar shard_tokens: a shard is closed when it has so many.
    :ivar skipped: how many lines were left out, by reason.
    :ivar examples: the first of them, by name.
    :ivar next: where to go on; None: finished.
    """

    format: Literal['mobilevlm-tokens'] = _FORMAT
    version: Literal[1] = _VERSION
    dtype: Literal['uint16', 'uint32']
    n_vocab: Annotated[int, Field(ge=1, le=1 << 31)]
    eos_id: Count
    tokenizer_sha256: Sha256
    separator: str | None
    field: str
    shard_tokens: Annotated[int, Field(ge=1)]
    inputs: list[InputFile]
    shards: list[Shard] = []
    skipped: dict[str, Count] = {}
    examples: list[str] = []
    next: Position | None = Position()

    @property
    def n_tokens(self) -> int:
        """Of all shards."""
        return sum(shard.n_tokens for shard in self.shards)

    @property
    def n_documents(self) -> int:
        """That end in these shards."""
        return sum(shard.n_documents for shard in self.shards)


def shard_name(number: int) -> str:
    """The file of shard ``number``, from 0."""
    return f'shard-{number:06d}.bin'


def is_ours(name: str) -> bool:
    """Whether a file of this name may stand in a folder of tokens."""
    name = name.removeprefix('.').removesuffix(PARTIAL)
    return name == INDEX or (name.startswith('shard-') and name.endswith('.bin'))


def read_index(folder: Path) -> TokenIndex:
    """What the folder holds, finished or not; shards are not looked at.

    :raise DatasetMissingError: if there is no index.
    :raise DatasetError: if it is damaged, or of another version.
    """
    path = folder / INDEX
    try:
        with path.open('rb') as file:
            n_bytes = os.fstat(file.fileno()).st_size
            text = file.read(min(n_bytes, _MAX_INDEX_BYTES))
    except OSError as error:
        raise DatasetMissingError(
            f'{path} cannot be read: {error.strerror}. `mobilevlm train tokenise FILE... --tokenizer FILE --out '
            f'{folder}` makes such a folder.'
        ) from error
    again = 'it is damaged, or no folder of tokens: make it again with `mobilevlm train tokenise`'
    if n_bytes > _MAX_INDEX_BYTES:
        raise DatasetError(f'{path} has {n_bytes} bytes, more than {_MAX_INDEX_BYTES}: {again}')
    try:
        fields: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f'{path} is no JSON ({error}): {again}') from error
    if isinstance(fields, dict) and fields.get('format') == _FORMAT and fields.get('version') != _VERSION:
        raise DatasetError(
            f'{path} is of version {fields.get("version")!r:.40}; this program reads version {_VERSION}: make it again'
        )
    try:
        index = TokenIndex.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = '.'.join(map(str, first['loc'])) or 'the whole'
        raise DatasetError(f'{path}: {place}: {first["msg"]}, found {first["input"]!r:.80}; {again}') from error
    if index.n_vocab > np.iinfo(index.dtype).max + 1 or index.eos_id >= index.n_vocab:
        raise DatasetError(
            f'{path}: {index.n_vocab} tokens, of which {index.eos_id} ends a text, do not fit {index.dtype}; {again}'
        )
    return index


def write_index(folder: Path, index: TokenIndex) -> None:
    """Put it in place in one step.

    :raise OSError: if it cannot be written.
    """
    partial = folder / f'.{INDEX}{PARTIAL}'
    with partial.open('w', encoding='utf-8') as file:
        file.write(json.dumps(index.model_dump(), indent=1) + '\n')
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / INDEX)


class ShardWriter:
    """Writes one shard under a temporary name; ``finish`` gives it its own.

    :raise OSError: if it cannot be made.
    """

    def __init__(self, folder: Path, number: int, dtype: str) -> None:
        self._path = folder / shard_name(number)
        self._partial = folder / f'.{shard_name(number)}{PARTIAL}'
        self._dtype = np.dtype(dtype).newbyteorder('<')
        self._file = self._partial.open('wb')
        self.n_tokens = 0
        self.n_documents = 0

    def add(self, ids: NDArray[np.uint32], n_documents: int) -> None:
        """Append ids that end ``n_documents``.

        :raise OSError: if the disk is full, for example.
        """
        self._file.write(ids.astype(self._dtype).data)
        self.n_tokens += len(ids)
        self.n_documents += n_documents

    def finish(self) -> Shard:
        """Give the file its name when all of it is on the disk.

        :raise OSError: if it does not get there.
        """
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        self._partial.replace(self._path)
        return Shard(n_tokens=self.n_tokens, n_documents=self.n_documents)

    def discard(self) -> None:
        """Remove what is unfinished."""
        with suppress(OSError):  # closing writes what is buffered, for which there may be no room
            self._file.close()
        self._partial.unlink(missing_ok=True)


class TokenShards:
    """The ids of a finished folder, by position; picklable, and cheap to open.

    :raise DatasetMissingError: if the folder or a shard is missing.
    :raise DatasetError: if the folder is unfinished or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)
        if self.index.next is not None:
            raise DatasetError(
                f'{folder} is unfinished: it ends before file {self.index.next.input + 1} of {len(self.index.inputs)}. '
                'Run the same `mobilevlm train tokenise` again; it goes on there.'
            )
        self._dtype = np.dtype(self.index.dtype).newbyteorder('<')
        self._ends = np.cumsum([shard.n_tokens for shard in self.index.shards], dtype=np.int64)
        self._maps: dict[int, NDArray[Any]] = {}
        for number, shard in enumerate(self.index.shards):
            path = folder / shard_name(number)
            expected = shard.n_tokens * self._dtype.itemsize
            try:
                found = path.stat().st_size
            except OSError as error:
                raise DatasetMissingError(f'{path} cannot be read: {error.strerror}; {INDEX} names it') from error
            if found != expected:
                raise DatasetError(f'{path} has {found} bytes; {INDEX} says {expected}: it is damaged, make it again')

    def __len__(self) -> int:
        return self.index.n_tokens

    def __reduce__(self) -> tuple[type[TokenShards], tuple[Path]]:
        return TokenShards, (self.folder,)  # a map would be pickled with all that it maps

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Ids from ``start`` up to ``stop``, int64 ``[stop - start]``, in memory of their own.

        :raise IndexError: if there are no such positions.
        :raise DatasetError: if an id is none of the vocabulary, or a shard cannot be read any more.
        """
        if not 0 <= start < stop <= len(self):
            raise IndexError(f'ids {start} to {stop} of {len(self)}')
        ids = np.empty(stop - start, dtype=np.int64)
        done = 0
        number = int(np.searchsorted(self._ends, start, side='right'))
        while done < len(ids):
            first = start + done - (int(self._ends[number - 1]) if number else 0)
            part = self._map(number)[first : first + len(ids) - done]
            ids[done : done + len(part)] = part
            if int(part.max()) >= self.index.n_vocab:
                raise DatasetError(
                    f'{self.folder / shard_name(number)} holds token {int(part.max())} among ids {first} to '
                    f'{first + len(part)}; the vocabulary has {self.index.n_vocab}. It is damaged: make it again.'
                )
            done += len(part)
            number += 1
        return ids

    def _map(self, number: int) -> NDArray[Any]:
        found = self._maps.get(number)
        if found is None:
            path, n_tokens = self.folder / shard_name(number), self.index.shards[number].n_tokens
            try:
                found = np.memmap(path, dtype=self._dtype, mode='r', shape=(n_tokens,))
            except (OSError, ValueError) as error:
                raise DatasetError(f'{path} cannot be read any more: {error}') from error
            self._maps[number] = found
        return found
