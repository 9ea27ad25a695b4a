"""Folders of token ids for tests, and what is in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.train.shards import ShardWriter, TokenIndex, write_index


def write_folder(
    folder: Path,
    ids: NDArray[np.integer],
    *,
    shard_sizes: list[int] | None = None,
    n_vocab: int = 1000,
    mark: str = '0',
) -> Path:
    """A finished folder that holds ``ids``, in shards of these sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = 'uint16' if n_vocab <= 1 << 16 else 'uint32'
    shards, done = [], 0
    for number, size in enumerate(shard_sizes or [len(ids)]):
        writer = ShardWriter(folder, number, dtype)
        writer.add(ids[done : done + size].astype(np.uint32), 0)
        shards.append(writer.finish())
        done += size
    assert done == len(ids)
    index = TokenIndex(
        dtype=dtype,
        n_vocab=n_vocab,
        eos_id=2,
        tokenizer_sha256=mark * 64,
        separator=None,
        field='text',
        shard_tokens=1,
        inputs=[],
        shards=shards,
        next=None,
    )
    write_index(folder, index)
    return folder
