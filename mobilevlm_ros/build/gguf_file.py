"""A GGUF file, written tensor by tensor: one tensor in memory at a time, and a whole file under its name or none.

Weights may be a lazy mapping of many gigabytes; each tensor is read once, in the order of the file. The file grows
under a temporary name beside its place, and is renamed when it is complete and on the disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.build.stages import check_room
from mobilevlm_ros.errors import BuildError, DependencyError

__all__ = ['OnProgress', 'Storage', 'TensorEntry', 'Weights', 'atomic_file', 'load_gguf', 'read_tensor', 'write_gguf']

Weights = Mapping[str, NDArray[np.float32]]
"""Tensors under their names; values may be read from a file when they are asked for."""
Storage = Literal['f32', 'f16', 'q8_0']
OnProgress = Callable[[float, float], None]
"""Told how much of how much is done."""

_BLOCK = {'f32': (1, 4), 'f16': (1, 2), 'q8_0': (32, 34)}
"""Values of a block, and bytes that it takes."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to be written.

    :ivar shape: outermost dimension first, as numpy has it.
    :ivar read: gives the values in float32; called once.
    """

    name: str
    shape: tuple[int, ...]
    storage: Storage
    read: Callable[[], NDArray[np.float32]]

    @property
    def n_bytes(self) -> int:
        """Bytes in the file, without padding."""
        n_values, n_bytes = _BLOCK[self.storage]
        return prod(self.shape) // n_values * n_bytes


def load_gguf() -> Any:
    """The module ``gguf``.

    :raise DependencyError: if it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise DependencyError(
            f'building a language model needs gguf, which is not installed ({error}). Install it with: pip install gguf'
        ) from error
    return gguf


def read_tensor(weights: Weights, key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """One tensor, looked at before it is used.

    :raise BuildError: if it is missing or misshapen.
    """
    try:
        value = weights[key]
    except KeyError as error:
        raise BuildError(f'the weights lack {key}; expected a tensor of shape {shape}') from error
    if value.shape != shape:
        raise BuildError(f'{key} has shape {tuple(value.shape)}, expected {shape}')
    return value


@contextmanager
def atomic_file(out: Path) -> Iterator[Path]:
    """A temporary name beside ``out``; what stands there becomes ``out`` at the end, or goes if anything fails.

    :raise BuildError: if the file cannot be written.
    """
    partial = out.with_name(f'.{out.name}.partial')
    try:
        yield partial
        with partial.open('rb+') as written:
            os.fsync(written.fileno())
        partial.replace(out)
    except OSError as error:
        # numpy tells of a full disk without saying so: "N requested and 0 written".
        raise BuildError(
            f'cannot write {out}: {error.strerror or error}. Free some space, or choose another place with --out.'
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_gguf(
    out: Path,
    architecture: str,
    add_metadata: Callable[[Any], None],
    tensors: Sequence[TensorEntry],
    on_progress: OnProgress = lambda done, total: None,
) -> None:
    """Write ``out``.

    :param add_metadata: adds keys to a ``gguf.GGUFWriter``.
    :param on_progress: told of bytes written.
    :raise BuildError: if a tensor is missing, misshapen, or has values that its storage cannot hold, or the disk is
        full.
    :raise DependencyError: if gguf is missing.
    """
    gguf = load_gguf()
    total = sum(tensor.n_bytes for tensor in tensors)
    check_room(out.parent, total, out.name)
    with atomic_file(out) as partial:
        writer = gguf.GGUFWriter(partial, architecture)
        add_metadata(writer)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.storage.upper()]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            done = 0
            for tensor in tensors:
                writer.write_tensor_data(_stored(gguf, tensor))
                done += tensor.n_bytes
                on_progress(done, total)
        finally:
            writer.close()


def _stored(gguf: Any, tensor: TensorEntry) -> NDArray[Any]:
    """The values as they lie in the file."""
    values = np.ascontiguousarray(tensor.read(), dtype=np.float32)
    if values.shape != tensor.shape:
        raise BuildError(f'{tensor.name} has shape {values.shape}, expected {tensor.shape}')
    if not np.isfinite(values).all():
        raise BuildError(f'{tensor.name} holds values that are not finite: the weights are damaged, get them again')
    if tensor.storage == 'f32':
        return values
    if tensor.storage == 'q8_0':
        quantized: NDArray[np.uint8] = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        return quantized
    with np.errstate(over='ignore'):
        halves = values.astype(np.float16)
    if not np.isfinite(halves).all():
        raise BuildError(f'{tensor.name} holds {np.abs(values).max():g}, more than float16 can: write it as f32')
    return halves
