"""Opens a published checkpoint: what it is, and its tensors, checked by name and shape and read one at a time.

Takes MobileVLM, LLaVA-1.5 and LLaMA folders in upstream's layout, and the parts of a model that was never put
together: a language model, a CLIP and the projector of a first training stage. Opening reads no weights, so that a
folder of 14 GB opens in a moment, and whatever is wrong with it is known before anything is computed.

Where the weights of the vision tower come from: every published MobileVLM file holds a copy of them, and that copy is
used. When a CLIP folder is given, a model with an LDP, MLP or linear projector takes the tower from there, as
upstream's loader always does for V1; one with LDPv2 keeps its own copy, as upstream's does for V2. A file without a
copy (LLaVA-1.5's) needs the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import (
    CheckpointError,
    CheckpointKindError,
    CheckpointMissingError,
    CheckpointShapeError,
)
from mobilevlm_ros.model.config import OF_USE, ModelConfig
from mobilevlm_ros.model.layout import PROJECTOR_PREFIX, TOWER_PREFIX, expected_tensors, is_junk
from mobilevlm_ros.model.published_config import CONFIG, read_clip_config, read_model_config
from mobilevlm_ros.model.tensor_files import StoredTensor, open_tensor_file, open_weights
from mobilevlm_ros.model.tokenizer_files import find_tokenizer

__all__ = ['Checkpoint', 'Dtype', 'Kind', 'LazyWeights', 'open_checkpoint', 'open_parts']

Kind = Literal['vlm', 'llm']
Dtype = Literal['fp16', 'bf16', 'fp32']
Weights = Mapping[str, NDArray[np.float32]]

_KINDS = {'vlm': 'a vision-language model', 'llm': 'a language model alone'}
_CLIP_PREFIX = 'vision_model.'
_SHOWN = 3
_DTYPES: tuple[Dtype, ...] = ('fp16', 'bf16', 'fp32')


class LazyWeights(Mapping[str, NDArray[np.float32]]):
    """Tensors by name, each read from its file, as float32, every time it is asked for."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = dict(stored)
        self._closed = False

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        """The values.

        :raise KeyError: if there is no such tensor.
        :raise CheckpointDamagedError: if the file cannot give them.
        :raise CheckpointError: if the checkpoint was closed.
        """
        if self._closed:
            raise CheckpointError(f'{name} was asked of a checkpoint that is closed: read it inside the with block')
        return self._stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored  # without reading it, as Mapping would

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it.

        :raise KeyError: if there is no such tensor.
        """
        return self._stored[name].shape

    def close(self) -> None:
        """Let go of the files."""
        self._closed = True
        self._stored.clear()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose configuration, names and shapes are right.

    :ivar path: the folder; the language model's where it was put together from parts.
    :ivar kind: ``vlm``, or ``llm`` for a language model alone.
    :ivar dtype: the type that most of its values are stored in.
    :ivar tensors: published names to values, without buffers and unknown tensors.
    :ivar vision_weights: ``vision_model.*`` and ``model.mm_projector.*``; empty for a language model alone.
    :ivar language_weights: under the names of transformers' LlamaForCausalLM.
    :ivar tokenizer: ``tokenizer.model`` or ``tokenizer.json``.
    :ivar warnings: what is odd about it but does no harm.
    """

    path: Path
    config: ModelConfig
    kind: Kind
    dtype: Dtype
    tensors: LazyWeights
    vision_weights: LazyWeights
    language_weights: LazyWeights
    tokenizer: Path
    warnings: tuple[str, ...]

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files; tensors cannot be read any more."""
        for weights in (self.tensors, self.vision_weights, self.language_weights):
            weights.close()


def open_checkpoint(path: Path, *, kind: Kind | None = None, vision_tower: Path | None = None) -> Checkpoint:
    """Open the checkpoint in a folder.

    :param kind: what it must be; None: either.
    :param vision_tower: a CLIP folder; see above for when its weights are used.
    :raise CheckpointMissingError: if there is no such folder, or it lacks its configuration, weights or tokenizer.
    :raise CheckpointDamagedError: if a file is truncated or malformed.
    :raise CheckpointKindError: if it is of another kind than asked for, an adapter, or quantised.
    :raise CheckpointShapeError: if a tensor is missing or has another shape or type than the configuration says.
    :raise CheckpointError: if the model needs what this project does not compute.
    """
    _check_folder(path)
    config = read_model_config(path, vision_tower=vision_tower)
    found: Kind = 'llm' if config.vision is None else 'vlm'
    if kind not in (None, found):
        raise CheckpointKindError(_wrong_kind(path, found, config))
    stored = open_weights(path)
    warnings: list[str] = []
    if config.projector is not None:
        if not any(name.startswith(PROJECTOR_PREFIX) for name in stored):
            raise CheckpointKindError(
                f'the {CONFIG} of {path} describes a vision-language model, but its weights have no projector: they '
                'are a language model alone, or an adapter'
            )
        has_tower = any(name.startswith(TOWER_PREFIX) for name in stored)
        if vision_tower is not None and has_tower and 'v2' in config.projector.type:
            warnings.append(f'{vision_tower} is not used: a model with {config.projector.type} keeps its own tower')
        elif vision_tower is not None:
            stored = {name: tensor for name, tensor in stored.items() if not name.startswith(TOWER_PREFIX)}
            stored |= _clip_weights(vision_tower)
        elif not has_tower:
            raise CheckpointMissingError(
                f'the weights in {path} have no vision tower: give the folder of '
                f'{config.vision.name if config.vision else "its CLIP"} as vision tower'
            )
    return _checked(path, config, stored, find_tokenizer(path), warnings)


def open_parts(language: Path, vision: Path, projector: Path, config: ModelConfig) -> Checkpoint:
    """Open a model that was never put together: a LLaMA folder, a CLIP folder and a projector.

    :param projector: ``mm_projector.bin`` or ``.safetensors`` of a first training stage.
    :param config: of the whole model; its shapes are compared with those of the parts.
    :raise CheckpointMissingError: if a part or a file of it is missing.
    :raise CheckpointDamagedError: if a file is truncated or malformed.
    :raise CheckpointKindError: if a part is something else.
    :raise CheckpointShapeError: if the parts do not have the tensors that ``config`` says.
    """
    if config.vision is None:
        raise CheckpointKindError(f'{config.name} is a language model alone: it has no parts')
    _check_folder(language)
    found = read_model_config(language)
    if found.vision is not None:
        raise CheckpointKindError(_wrong_kind(language, 'vlm', found))
    # Lengths of context and details of rotary positions are the language model's own.
    if replace(found.language, n_ctx=config.language.n_ctx) != config.language:
        raise CheckpointShapeError(f'{language} is {found.language}; {config.name} has {config.language}')
    told = {name: getattr(config.vision, name) for name in OF_USE}
    tower = replace(read_clip_config(vision), **told)
    if replace(tower, mean=config.vision.mean, std=config.vision.std) != config.vision:
        raise CheckpointShapeError(f'{vision} is {tower}; {config.name} has {config.vision}')
    stored = open_weights(language) | _clip_weights(vision) | _projector_weights(projector)
    return _checked(language, config, stored, find_tokenizer(language), [])


def _check_folder(path: Path) -> None:
    if path.is_file():
        raise CheckpointMissingError(f'{path} is a file: give the folder that holds it, with {CONFIG} and tokenizer')
    if not path.is_dir():
        raise CheckpointMissingError(
            f'there is no folder {path}: download a checkpoint with `mobilevlm fetch NAME`, or give another folder'
        )
    if (path / 'adapter_config.json').is_file() and not any(path.glob('pytorch_model*')):
        raise CheckpointKindError(f'{path} is a LoRA adapter, not a whole model: merge it into its base model first')


def _wrong_kind(path: Path, found: Kind, config: ModelConfig) -> str:
    if found == 'llm':
        return (
            f'{path} is a language model alone ({config.language.n_layers} blocks of LLaMA, no mm_vision_tower in its '
            f'{CONFIG}); expected {_KINDS["vlm"]} such as mobilevlm_v2-1.7b'
        )
    return f'{path} is a vision-language model; expected {_KINDS["llm"]} such as MobileLLaMA'


def _clip_weights(folder: Path) -> dict[str, StoredTensor]:
    """The tower of a CLIP folder under published names; its text tower, if there, is left out."""
    stored = open_weights(folder)
    found = {TOWER_PREFIX + name: tensor for name, tensor in stored.items() if name.startswith(_CLIP_PREFIX)}
    if not found:
        raise CheckpointKindError(f'the weights in {folder} have no {_CLIP_PREFIX}*: expected a CLIP of transformers')
    return found


def _projector_weights(path: Path) -> dict[str, StoredTensor]:
    """Tensors under published names, whatever a trainer put before them."""
    mark = PROJECTOR_PREFIX.removeprefix('model.')
    stored = open_tensor_file(path)
    found = {PROJECTOR_PREFIX + name.rpartition(mark)[2]: t for name, t in stored.items() if mark in name}
    if not found:
        raise CheckpointKindError(f'{path} has no tensors called *{mark}*: expected a trained projector')
    return found


def _checked(
    path: Path, config: ModelConfig, stored: Mapping[str, StoredTensor], tokenizer: Path, warnings: list[str]
) -> Checkpoint:
    """The checkpoint, if it has every tensor that it must have, in its shape."""
    expected = expected_tensors(config)
    problems: list[str] = []
    free_tower = config.vision is not None and config.vision.kind == 'timm'
    kept: dict[str, StoredTensor] = {}
    for name, shape in expected.items():
        if name not in stored:
            where = ', '.join(sorted({str(tensor.path) for tensor in stored.values()}))
            problems.append(f'{name} {list(shape)} is missing from {where}')
        elif (tensor := stored[name]).shape != shape:
            problems.append(f'{name} in {tensor.path} has shape {list(tensor.shape)}, expected {list(shape)}')
        elif tensor.dtype not in _DTYPES:
            problems.append(f'{name} in {tensor.path} is of type {tensor.dtype}, expected fp16, bf16 or fp32')
        else:
            kept[name] = tensor
    if problems:
        more = f' (and {len(problems) - _SHOWN} more)' if len(problems) > _SHOWN else ''
        raise CheckpointShapeError(
            f'{"; ".join(problems[:_SHOWN])}{more}. The weights do not fit {path / CONFIG}: download them again.'
        )
    unknown = []
    for name, tensor in stored.items():
        if free_tower and name.startswith(TOWER_PREFIX) and not is_junk(name):
            kept[name] = tensor
        elif name not in expected and not is_junk(name) and name != 'lm_head.weight':
            unknown.append(name)
    if unknown:
        more = f' and {len(unknown) - _SHOWN} more' if len(unknown) > _SHOWN else ''
        warnings.append(f'{path} holds tensors that are not used: {", ".join(unknown[:_SHOWN])}{more}')
    sizes = {dtype: sum(prod(t.shape) for t in kept.values() if t.dtype == dtype) for dtype in _DTYPES}
    vision = {name: t for name, t in kept.items() if name.startswith((TOWER_PREFIX, PROJECTOR_PREFIX))}
    return Checkpoint(
        path=path,
        config=config,
        kind='llm' if config.vision is None else 'vlm',
        dtype=max(_DTYPES, key=lambda dtype: sizes[dtype]),
        tensors=LazyWeights(kept),
        vision_weights=LazyWeights({name.removeprefix(TOWER_PREFIX): t for name, t in vision.items()}),
        language_weights=LazyWeights({name: t for name, t in kept.items() if name not in vision}),
        tokenizer=tokenizer,
        warnings=tuple(warnings),
    )
