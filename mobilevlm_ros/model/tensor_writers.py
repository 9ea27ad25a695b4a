"""Writes files of weights one tensor at a time: safetensors, and the archives that ``torch.save`` makes.

Both are written front to back with known sizes, so a file of 10 GB needs the memory of its largest tensor. Neither
writer renames or cleans up: that is for whoever makes a whole checkpoint.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

__all__ = ['BYTES', 'FileFormat', 'write_bin', 'write_safetensors']

FileFormat = Literal['bin', 'safetensors']
Shapes = Mapping[str, tuple[int, ...]]
Read = Callable[[str], memoryview]
"""Gives the bytes of a tensor, little-endian, row by row."""

BYTES = {'fp16': 2, 'bf16': 2, 'fp32': 4}
_SAFETENSORS_DTYPES = {'fp16': 'F16', 'bf16': 'BF16', 'fp32': 'F32'}
_STORAGES: dict[str, Any] = {
    'fp16': torch.HalfStorage,
    'bf16': torch.BFloat16Storage,
    'fp32': torch.FloatStorage,
}
_ALIGNMENT = 64


def write_safetensors(path: Path, shapes: Shapes, dtype: str, read: Read) -> None:
    """Write a safetensors file; its header says ``pt``, as transformers wants it.

    :raise OSError: if it cannot be written.
    """
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * BYTES[dtype]
        header[name] = {'dtype': _SAFETENSORS_DTYPES[dtype], 'shape': list(shape), 'data_offsets': [start, end]}
    described = json.dumps(header, separators=(',', ':')).encode()
    described += b' ' * (-len(described) % 8)
    with path.open('wb') as file:
        file.write(struct.pack('<Q', len(described)) + described)
        for name in shapes:
            file.write(read(name))


def write_bin(path: Path, shapes: Shapes, dtype: str, read: Read) -> None:
    """Write what ``torch.save`` writes for a dictionary of names and tensors.

    :raise OSError: if it cannot be written.
    """
    root = path.stem
    with path.open('wb') as file, zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED) as archive:

        def add(name: str, data: bytes | memoryview) -> None:
            info = zipfile.ZipInfo(f'{root}/{name}')
            info.file_size = len(data)
            # Tensors start at multiples of 64 bytes, as torch's do, so that they can be mapped into memory.
            start = file.tell() + 30 + len(info.filename) + 4
            info.extra = struct.pack('<2sH', b'FB', -start % _ALIGNMENT) + b'Z' * (-start % _ALIGNMENT)
            with archive.open(info, 'w') as member:
                member.write(data)

        add('data.pkl', _pickled(shapes, dtype))
        add('byteorder', b'little')
        for i, name in enumerate(shapes):
            add(f'data/{i}', read(name))
        add('version', b'3\n')


@dataclass(frozen=True)
class _Storage:
    """Stands in a pickle for the bytes of one tensor."""

    key: str
    dtype: str
    n_values: int


@dataclass(frozen=True)
class _Tensor:
    """Pickles as a contiguous tensor does."""

    storage: _Storage
    shape: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        stride = tuple(prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, stride, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> tuple[Any, ...] | None:
        if isinstance(obj, _Storage):
            return 'storage', _STORAGES[obj.dtype], obj.key, 'cpu', obj.n_values
        return None


def _pickled(shapes: Shapes, dtype: str) -> bytes:
    tensors = {
        name: _Tensor(_Storage(str(i), dtype, prod(shape)), shape) for i, (name, shape) in enumerate(shapes.items())
    }
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(tensors)
    return buffer.getvalue()
