"""Writes a checkpoint with all that its base says of its tokenizer.

``publish.write_checkpoint`` writes LLaMA's special tokens beside every tokenizer. A base with another vocabulary names
its own, and a product that forgot them would be trained on, and asked, with tokens that its model never saw.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import CheckpointError
from mobilevlm_ros.model.checkpoint import Dtype
from mobilevlm_ros.model.config import ModelConfig
from mobilevlm_ros.model.publish import OnProgress, write_checkpoint
from mobilevlm_ros.train.checkpoints import publish_folder

__all__ = ['write_whole']

_COPIED = ('tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json')
_CONFIG = 'config.json'
_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')


def write_whole(
    out: Path,
    config: ModelConfig,
    tensors: Mapping[str, NDArray[np.float32]],
    tokenizer: Path,
    *,
    dtype: Dtype,
    on_progress: OnProgress = lambda done, total: None,
) -> Path:
    """Write the checkpoint beside its place and rename it when it is whole.

    :param tokenizer: a file of the base; what is said of it stands in the same folder.
    :raise CheckpointError: if ``out`` is taken or cannot be written, or as ``write_checkpoint``.
    :raise DiskSpaceError: if there is no room for it.
    """
    if out.is_dir() and any(out.iterdir()):
        raise CheckpointError(f'{out} exists already: remove it, or choose another place')
    making = out.with_name(f'{out.name}.new')
    shutil.rmtree(making, ignore_errors=True)
    try:
        write_checkpoint(making, config, tensors, tokenizer, dtype=dtype, on_progress=on_progress)
        for name in _COPIED:
            if (tokenizer.parent / name).is_file():
                shutil.copyfile(tokenizer.parent / name, making / name)
        _copy_ids(tokenizer.parent / _CONFIG, making / _CONFIG)
        publish_folder(making, out)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return out


def _copy_ids(base: Path, ours: Path) -> None:
    """Ids of special tokens, as far as the base names them."""
    if not base.is_file():
        return
    said = json.loads(base.read_text(encoding='utf-8'))
    content = json.loads(ours.read_text(encoding='utf-8'))
    content |= {name: said[name] for name in _IDS if isinstance(said.get(name), int)}
    ours.write_text(json.dumps(content, indent=2, sort_keys=True) + '\n', encoding='utf-8')
