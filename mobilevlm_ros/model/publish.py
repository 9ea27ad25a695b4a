"""Writes checkpoints in the published layout: one file or shards, ``.bin`` or safetensors, in any of three types.

A checkpoint is written into ``OUT.partial`` beside its place, one tensor at a time, and renamed when it is whole:
whatever interrupts the writing leaves nothing that looks like a checkpoint. Room on the disk is checked first.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mobilevlm_ros.errors import CheckpointError, CheckpointShapeError, DiskSpaceError
from mobilevlm_ros.model.checkpoint import Dtype
from mobilevlm_ros.model.config import ModelConfig
from mobilevlm_ros.model.layout import TOWER_PREFIX, expected_tensors, is_junk
from mobilevlm_ros.model.manifest import read_manifest
from mobilevlm_ros.model.random_weights import RandomWeights
from mobilevlm_ros.model.side_files import side_files
from mobilevlm_ros.model.tensor_writers import BYTES, FileFormat, write_bin, write_safetensors
from mobilevlm_ros.model.tokenizer_files import (
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    check_tokenizer,
    write_made_up_tokenizer,
)

__all__ = ['MAX_SHARD_BYTES', 'OnProgress', 'init_random', 'write_checkpoint']

MAX_SHARD_BYTES = 10_000_000_000
"""As transformers split the published models: V2-7B into two files, smaller ones not at all."""

Weights = Mapping[str, NDArray[np.float32]]
OnProgress = Callable[[int, int], None]
"""Told bytes of weights that are done, and bytes in all."""
Shapes = dict[str, tuple[int, ...]]

_TORCH_DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16, 'fp32': torch.float32}
_STEMS = {'bin': 'pytorch_model', 'safetensors': 'model'}
_SMALL_FILES_BYTES = 8 << 20


def write_checkpoint(
    out: Path,
    config: ModelConfig,
    tensors: Weights,
    tokenizer: Path | None,
    *,
    dtype: Dtype = 'bf16',
    file_format: FileFormat = 'bin',
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: OnProgress = lambda done, total: None,
) -> Path:
    """Write a checkpoint, of a whole model or of a language model alone; each tensor is asked for once.

    :param out: the folder to make; it must not exist, or be empty.
    :param tensors: values under published names; buffers that loading ignores are left out.
    :param tokenizer: a ``tokenizer.model`` or ``tokenizer.json`` to copy; None: a made-up one, for random weights only.
    :param max_shard_bytes: what does not fit is split, at tensors.
    :raise CheckpointError: if ``out`` is taken or cannot be written, or a value does not fit ``dtype``.
    :raise CheckpointShapeError: if a tensor is missing, unknown or misshapen.
    :raise CheckpointMissingError: if there is no such tokenizer.
    :raise DiskSpaceError: if there is no room for it.
    """
    shapes = _shapes(config, tensors)
    n_bytes = {name: prod(shape) * BYTES[dtype] for name, shape in shapes.items()}
    total = sum(n_bytes.values())
    if tokenizer is not None:
        check_tokenizer(tokenizer, config.language.n_vocab)
    _check_place(out, total + _SMALL_FILES_BYTES)
    done = 0

    def read(name: str) -> memoryview:
        nonlocal done
        on_progress(done, total)
        data = _encoded(name, tensors[name], shapes[name], dtype)
        done += n_bytes[name]
        return data

    write = {'bin': write_bin, 'safetensors': write_safetensors}[file_format]
    partial = out.with_name(f'{out.name}.partial')
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        shards = _shards(n_bytes, max_shard_bytes)
        names = _shard_names(file_format, len(shards))
        for file_name, shard in zip(names, shards, strict=True):
            write(partial / file_name, {name: shapes[name] for name in shard}, dtype, read)
        if len(shards) > 1:
            placed = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
            (partial / f'{_STEMS[file_format]}.{file_format}.index.json').write_text(_index(placed, total))
        for file_name, text in side_files(config, dtype).items():
            (partial / file_name).write_text(text)
        if tokenizer is None:
            write_made_up_tokenizer(partial / TOKENIZER_MODEL, config.language.n_vocab)
        else:
            kept = TOKENIZER_JSON if tokenizer.suffix == '.json' else TOKENIZER_MODEL
            shutil.copyfile(tokenizer, partial / kept)
        partial.replace(out)
    except BaseException as error:  # Ctrl-C too: nothing half-written stays
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise _write_error(out, error) from error
        raise
    on_progress(total, total)
    return out


def init_random(
    model: str | ModelConfig,
    out: Path,
    *,
    dtype: Dtype = 'bf16',
    seed: int = 0,
    tokenizer: Path | None = None,
    file_format: FileFormat = 'bin',
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: OnProgress = lambda done, total: None,
) -> Path:
    """Write a full-size checkpoint with random weights in the published layout, for benchmarks and tests.

    It says ``-random`` in its name: nothing that it answers means anything.

    :param model: a name of ``models/``, or shapes.
    :param tokenizer: a ``tokenizer.model`` to copy; None: a made-up one of the same size, with which a prompt has
        another number of tokens than with LLaMA's.
    :raise SettingsError: if there is no model of that name.
    :raise CheckpointError: as ``write_checkpoint``, or if the model has a tower of timm.
    :raise DiskSpaceError: if there is no room for it.
    """
    config = read_manifest(model) if isinstance(model, str) else model
    if config.vision is not None and config.vision.kind == 'timm':
        raise CheckpointError(
            f'{config.name} has a tower of timm, whose tensors are not listed here: random weights can be made for '
            'CLIP towers only'
        )
    config = replace(config, name=f'{config.name}-random', repo='', revision='')
    return write_checkpoint(
        out,
        config,
        RandomWeights(config, seed),
        tokenizer,
        dtype=dtype,
        file_format=file_format,
        max_shard_bytes=max_shard_bytes,
        on_progress=on_progress,
    )


def _shapes(config: ModelConfig, tensors: Weights) -> Shapes:
    """What is to be written, in published order."""
    shapes = expected_tensors(config)
    found = set(tensors)  # asking a Mapping whether it holds a name may compute the value
    missing = [name for name in shapes if name not in found]
    if missing:
        raise CheckpointShapeError(f'{missing[0]} {list(shapes[missing[0]])} is missing from the weights to be written')
    for name in tensors:
        if name in shapes or is_junk(name) or (name == 'lm_head.weight' and config.language.tie_embeddings):
            continue
        if config.vision is None or config.vision.kind != 'timm' or not name.startswith(TOWER_PREFIX):
            raise CheckpointShapeError(f'{name} is no tensor of {config.name}: it would be lost')
        shapes[name] = tensors[name].shape
    return shapes


def _encoded(name: str, values: NDArray[np.float32], shape: tuple[int, ...], dtype: str) -> memoryview:
    """The bytes of one tensor in the type that is stored."""
    if values.shape != shape:
        raise CheckpointShapeError(f'{name} has shape {list(values.shape)}, expected {list(shape)}')
    owned = np.require(values, np.float32, ('C_CONTIGUOUS', 'WRITEABLE'))
    stored = torch.from_numpy(owned).to(_TORCH_DTYPES[dtype])
    if dtype == 'fp16' and bool(stored.isinf().any()) and bool(np.isfinite(owned).all()):
        raise CheckpointError(f'{name} has values up to {np.abs(owned).max():.3g}, too large for fp16: write bf16')
    return stored.reshape(-1).view(torch.uint8).numpy().data


def _shards(n_bytes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names, split where a file would grow over the limit; a larger tensor has a file of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, n in n_bytes.items():
        if shards[-1] and size + n > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n
    return shards


def _shard_names(file_format: str, n: int) -> list[str]:
    stem = _STEMS[file_format]
    if n == 1:
        return [f'{stem}.{file_format}']
    return [f'{stem}-{i:05d}-of-{n:05d}.{file_format}' for i in range(1, n + 1)]


def _index(placed: Mapping[str, str], total: int) -> str:
    """The text that says which file holds which tensor."""
    index = {'metadata': {'total_size': total}, 'weight_map': placed}
    return json.dumps(index, indent=2, sort_keys=True) + '\n'


def _check_place(out: Path, needed: int) -> None:
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise CheckpointError(f'{out} exists already: remove it, or choose another place')
        parent = out.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise _write_error(out, error) from error
    if free < needed:
        raise DiskSpaceError(
            f'{out} takes {_mib(needed)}, but {parent} has {_mib(free)} free: free some space or choose another place'
        )


def _write_error(out: Path, error: OSError) -> CheckpointError | DiskSpaceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError(f'the disk is full; {out} was not written: free some space or choose another place')
    return CheckpointError(f'{out} cannot be written: {error.strerror or error}')


def _mib(n_bytes: int) -> str:
    return f'{-(-n_bytes >> 20)} MiB'
