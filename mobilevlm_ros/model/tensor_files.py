"""Files of weights, read one tensor at a time: torch's ``.bin``, safetensors, and sharded sets of either.

Opening reads names, types and shapes only. The bytes of a tensor are read when it is asked for, so memory holds one
tensor, whatever the size of the file. Files are not trusted: pickles go through torch's ``weights_only`` loader, after
the archive around them was checked; an index cannot name files outside its folder.
"""

from __future__ import annotations

import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mobilevlm_ros.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMissingError,
    CheckpointShapeError,
)
from mobilevlm_ros.model.json_files import read_json_object

__all__ = ['StoredTensor', 'find_weights', 'open_tensor_file', 'open_weights']

_SINGLE = ('model.safetensors', 'pytorch_model.bin')
_INDEX_SUFFIX = '.index.json'
_SHARD = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.(?:bin|safetensors)\Z')
_MAX_PICKLE_BYTES = 64 << 20
_DTYPES = {torch.float16: 'fp16', torch.bfloat16: 'bf16', torch.float32: 'fp32'}
_SAFETENSORS_DTYPES = {'F16': 'fp16', 'BF16': 'bf16', 'F32': 'fp32'}
_LFS_POINTER = b'version https://git-lfs'


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    :ivar name: as the file calls it.
    :ivar dtype: ``fp16``, ``bf16`` or ``fp32``; another type under torch's or safetensors' own name.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], torch.Tensor]

    def read(self) -> NDArray[np.float32]:
        """Its values, widened to float32, in memory of their own.

        :raise CheckpointShapeError: if they are of a type that is not read.
        :raise CheckpointDamagedError: if the file cannot give them.
        """
        if self.dtype not in _DTYPES.values():
            raise CheckpointShapeError(
                f'{self.name} in {self.path} is of type {self.dtype}; expected fp16, bf16 or fp32'
            )
        try:
            found = self.load().detach()
            values = np.empty(self.shape, dtype=np.float32)
            torch.from_numpy(values).copy_(found)
        except Exception as error:  # torch and safetensors raise what they please about a bad file
            raise CheckpointDamagedError(f'{self.name} cannot be read from {self.path}: {_reason(error)}') from error
        return values


Stored = dict[str, StoredTensor]


def find_weights(folder: Path) -> Path:
    """The file of weights in a folder, or the index of its shards; safetensors first, as transformers does.

    :raise CheckpointMissingError: if there is none.
    """
    for name in _SINGLE:
        for path in (folder / name, folder / (name + _INDEX_SUFFIX)):
            if path.is_file():
                return path
    names = ', '.join(name + suffix for name in _SINGLE for suffix in ('', _INDEX_SUFFIX))
    raise CheckpointMissingError(
        f'there are no weights in {folder}; expected one of {names}. `mobilevlm fetch NAME` downloads a checkpoint.'
    )


def open_weights(folder: Path) -> Stored:
    """All tensors of a folder, without their bytes.

    :raise CheckpointMissingError: if there are none, or a shard is missing.
    :raise CheckpointDamagedError: if a file is truncated or malformed.
    :raise CheckpointShapeError: if a shard lacks a tensor that the index says it holds.
    """
    path = find_weights(folder)
    if not path.name.endswith(_INDEX_SUFFIX):
        return open_tensor_file(path)
    found: Stored = {}
    placed = _read_index(path)
    for shard in sorted(set(placed.values())):
        if not (folder / shard).is_file():
            raise CheckpointMissingError(f'{folder / shard} is missing, which {path.name} names: download it again')
        held = open_tensor_file(folder / shard)
        for name in (name for name, where in placed.items() if where == shard):
            if name not in held:
                raise CheckpointShapeError(f'{folder / shard} lacks {name}, which {path.name} says it holds')
            found[name] = held[name]
    return found


def open_tensor_file(path: Path) -> Stored:
    """The tensors of one file, without their bytes.

    :raise CheckpointMissingError: if there is no such file.
    :raise CheckpointDamagedError: if it is truncated, malformed, or holds more than tensors.
    """
    try:
        with path.open('rb') as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise CheckpointMissingError(f'{path} cannot be read: {error.strerror}') from error
    if start == _LFS_POINTER:
        raise CheckpointDamagedError(f'{path} is a pointer of Git LFS, not the file itself: run `git lfs pull`')
    if path.name.endswith('.safetensors'):
        return _open_safetensors(path)
    return _open_bin(path)


def _read_index(path: Path) -> Mapping[str, str]:
    """Which file holds which tensor."""
    placed = read_json_object(path).get('weight_map')
    if not isinstance(placed, dict) or not placed:
        raise CheckpointDamagedError(f'{path} has no weight_map: download it again')
    for name, shard in placed.items():
        if not isinstance(shard, str) or not _SHARD.match(shard):
            raise CheckpointDamagedError(
                f'{path} places {name!r:.80} in {shard!r:.80}; expected the plain name of a .bin or .safetensors file '
                'in the same folder'
            )
    return placed


def _open_safetensors(path: Path) -> Stored:
    from safetensors import SafetensorError, safe_open

    again = 'the file is truncated or damaged: download it again'
    try:
        file = safe_open(path, framework='pt')
        described = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        shapes = {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in described.items()}
    except (SafetensorError, OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise CheckpointDamagedError(
            f'{path} ({path.stat().st_size} bytes) cannot be opened ({_reason(error)}): {again}'
        ) from error
    except BaseException as error:
        # A panic in Rust is no Exception to Python.
        if type(error).__name__ != 'PanicException':
            raise
        raise CheckpointDamagedError(f'{path} cannot be opened ({_reason(error)}): {again}') from error

    def loader(name: str) -> Callable[[], torch.Tensor]:
        return lambda: file.get_tensor(name)

    return {
        name: StoredTensor(path, name, shape, _SAFETENSORS_DTYPES.get(dtype, dtype), loader(name))
        for name, (shape, dtype) in shapes.items()
    }


def _open_bin(path: Path) -> Stored:
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about types of tensors that are refused below anyway
            found = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointDamagedError(
            f'{path} cannot be opened ({_reason(error)}): it is damaged, or holds more than tensors, which is not '
            'loaded because it could run code'
        ) from error
    if isinstance(found, dict) and isinstance(found.get('state_dict'), dict):
        found = found['state_dict']
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise CheckpointDamagedError(f'{path} holds no dictionary of names and tensors')
    return {name: _stored(path, name, value) for name, value in found.items()}


def _stored(path: Path, name: str, value: Any) -> StoredTensor:
    if not isinstance(value, torch.Tensor):
        raise CheckpointDamagedError(f'{path} holds a {type(value).__name__} under {name!r:.80}; expected a tensor')
    if value.layout != torch.strided or value.device.type != 'cpu' or value.is_quantized:
        raise CheckpointDamagedError(f'{path} holds {name!r:.80} as no plain tensor: {value.layout}, {value.device}')
    dtype = _DTYPES.get(value.dtype, str(value.dtype).removeprefix('torch.'))
    return StoredTensor(path, name, tuple(value.shape), dtype, lambda: value)


def _check_archive(path: Path) -> None:
    """That a ``.bin`` is a whole archive whose parts can be mapped into memory as they are.

    :raise CheckpointDamagedError: if it is not.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, struct.error, ValueError, OSError, NotImplementedError, EOFError) as error:
        with path.open('rb') as file:
            is_archive = file.read(2) == b'PK'
        if is_archive:
            raise CheckpointDamagedError(
                f'{path} is truncated or damaged: it has {size} bytes and no list of contents at its end '
                f'({_reason(error)}). Download it again.'
            ) from error
        raise CheckpointDamagedError(
            f'{path} ({size} bytes) is no file that torch.save has written since version 1.6. If it is an old one, '
            f'rewrite it: python3 -c "import torch; p = {str(path)!r}; '
            'torch.save(torch.load(p, weights_only=True), p)"'
        ) from error
    for member in members:
        is_pickle = member.filename.endswith('/data.pkl')
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise CheckpointDamagedError(f'{path}: {member.filename!r:.80} is compressed; torch.save stores it plain')
        if member.header_offset + member.file_size > size:
            raise CheckpointDamagedError(
                f'{path} is truncated: {member.filename!r:.80} ends after byte '
                f'{member.header_offset + member.file_size}, the file has {size}. Download it again.'
            )
        if is_pickle and member.file_size > _MAX_PICKLE_BYTES:
            raise CheckpointError(f'{path}: a list of tensors of {member.file_size} bytes is refused')


def _reason(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
