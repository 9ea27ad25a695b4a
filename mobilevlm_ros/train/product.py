"""What a run leaves: a checkpoint in the published layout, a projector, or an adapter.

Frozen weights are copied from where the run started, bit by bit; only what learned is taken from memory. So the vision
tower of a product is its base's to the last bit, and a run on cached features needs no tower at all.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mobilevlm_ros.model.conversation import write_conversation
from mobilevlm_ros.model.layout import PROJECTOR_PREFIX
from mobilevlm_ros.model.mobilevlm import published_name
from mobilevlm_ros.model.publish import OnProgress
from mobilevlm_ros.model.side_files import side_files
from mobilevlm_ros.train.checkpoints import publish_folder
from mobilevlm_ros.train.config import TrainConfig
from mobilevlm_ros.train.lora import save_adapter
from mobilevlm_ros.train.starting import StartingPoint
from mobilevlm_ros.train.whole import write_whole

__all__ = ['ADAPTER', 'MODEL', 'PROJECTOR', 'write_product']

MODEL = 'model'
PROJECTOR = 'projector'
ADAPTER = 'adapter'
_LORA_MARK = '.lora_'
_DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': torch.float32}

Weights = Mapping[str, NDArray[np.float32]]


class _Trained(Mapping[str, NDArray[np.float32]]):
    """The weights that a run started from, and those that learned in their place."""

    def __init__(self, start: Weights, learned: Mapping[str, torch.Tensor]) -> None:
        self._start = start
        self._learned = learned

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name in self._learned:
            values: NDArray[np.float32] = self._learned[name].float().numpy()
            return values
        return self._start[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._start)

    def __len__(self) -> int:
        return len(self._start)


def write_product(
    config: TrainConfig,
    start: StartingPoint,
    trained: Mapping[str, torch.Tensor],
    adapter: Mapping[str, Any] | None,
    *,
    on_progress: OnProgress = lambda done, total: None,
) -> dict[str, Path]:
    """Write everything that the stage leaves, each folder renamed when it is whole.

    :param trained: names of ``Trainee``'s parameters to values.
    :param adapter: peft's settings, for a run with adapters.
    :return: ``model``, ``projector`` and ``adapter``, as far as there are any; a model that is its base is not written.
    :raise CheckpointError: if it cannot be written.
    :raise DiskSpaceError: if there is no room for it.
    """
    plain = {name.removeprefix('model.'): value for name, value in trained.items()}
    learned = {published_name(name): value for name, value in plain.items() if _LORA_MARK not in name}
    written: dict[str, Path] = {}
    if adapter is not None:
        halves = {
            name.removeprefix('language.').replace('.default.', '.'): value
            for name, value in plain.items()
            if _LORA_MARK in name
        }

        def write(folder: Path) -> None:
            save_adapter(folder, adapter, halves, learned)
            write_conversation(folder, start.config)

        written['adapter'] = _in_place(config.out / ADAPTER, write)
    projector = {name: value for name, value in learned.items() if name.startswith(PROJECTOR_PREFIX)}
    if projector and len(projector) == len(trained):
        written['projector'] = _in_place(
            config.out / PROJECTOR, lambda folder: _write_projector(folder, config, start, projector)
        )
    if learned:
        model = config.out / MODEL
        shutil.rmtree(model, ignore_errors=True)  # of an earlier end of this run
        weights = _Trained(start.tensors, learned)
        written['model'] = write_whole(
            model, start.config, weights, start.tokenizer, dtype=config.saving.dtype, on_progress=on_progress
        )
    return written


def _in_place(folder: Path, write: Any) -> Path:
    """Write a folder beside its place and rename it."""
    partial = folder.with_name(f'{folder.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write(partial)
        publish_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_projector(
    folder: Path, config: TrainConfig, start: StartingPoint, projector: Mapping[str, torch.Tensor]
) -> None:
    """What stage 1 saves upstream, names with their prefix, and the same as safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    values = {name: value.to(_DTYPES[config.saving.dtype]).contiguous() for name, value in projector.items()}
    torch.save(values, folder / 'mm_projector.bin')
    save_file(values, folder / 'mm_projector.safetensors', metadata={'format': 'pt'})
    (folder / 'config.json').write_text(side_files(start.config, config.saving.dtype)['config.json'])
