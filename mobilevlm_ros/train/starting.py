"""Where a run starts from: a checkpoint, parts that were never put together, or random weights.

Opening reads no weights. What is new (a projector, a language model from scratch) gets PyTorch's or LLaMA's usual
initialisation from the run's seed, so that the same configuration starts from the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mobilevlm_ros.errors import CheckpointKindError, SettingsError
from mobilevlm_ros.model.checkpoint import Checkpoint, LazyWeights, open_checkpoint, open_parts
from mobilevlm_ros.model.config import ModelConfig, ProjectorConfig
from mobilevlm_ros.model.conversation import CONVERSATION, names_conversation
from mobilevlm_ros.model.fetch import fetched_path
from mobilevlm_ros.model.layout import PROJECTOR_PREFIX, TOWER_PREFIX, is_junk
from mobilevlm_ros.model.manifest import known_models, read_manifest
from mobilevlm_ros.model.projectors import build_projector
from mobilevlm_ros.model.published_config import read_clip_config
from mobilevlm_ros.model.random_weights import RandomWeights
from mobilevlm_ros.model.tensor_files import open_weights
from mobilevlm_ros.runtime.prompt import TEMPLATES
from mobilevlm_ros.train.config import TrainConfig

__all__ = ['StartingPoint', 'open_start']

Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class StartingPoint:
    """The model before the first step.

    :ivar config: its shapes, and the picture and conversation rules that it will have been taught.
    :ivar tensors: under published names, read when asked for.
    :ivar origin: what it is, in a few words.
    """

    config: ModelConfig
    tensors: Weights
    tokenizer: Path
    origin: str


class _Lazy(Mapping[str, NDArray[np.float32]]):
    """Tensors of several mappings, read when asked for.

    :param places: where each tensor is.
    """

    def __init__(self, places: Mapping[str, Weights]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self._places[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def open_start(config: TrainConfig, files: ExitStack) -> StartingPoint:
    """Find the parts that the configuration names, and check that they fit each other.

    :param files: closes the checkpoint's files when the weights have been read.
    :raise SettingsError: if a part is not there, not of the kind that the stage trains, or taught otherwise than the
        data would.
    :raise CheckpointError: if a checkpoint is damaged, or its tensors have other shapes than it says.
    """
    if config.model.base is None:
        start = _random(config)
    elif config.has_images:
        start = _seeing(config, files)
    else:
        checkpoint = files.enter_context(open_checkpoint(_folder(config.model.base), kind='llm'))
        start = StartingPoint(checkpoint.config, checkpoint.tensors, checkpoint.tokenizer, str(checkpoint.path))
    taught = replace(start.config, aspect=config.data.aspect) if start.config.vision else start.config
    return replace(start, config=_with_conversation(taught, config, start.origin))


def _with_conversation(model: ModelConfig, config: TrainConfig, origin: str) -> ModelConfig:
    """The model with the conversation that it will have been taught.

    A base that names none learns that of the data; captions, packed text and maps of regions teach none, and a robot
    asks in none of Alpaca's.

    :raise SettingsError: if it was taught another one.
    """
    data = config.data
    if config.stage == 'ground' or data.records is None or data.template not in TEMPLATES or data.template == 'plain':
        return model
    if names_conversation(model) and (model.template, model.system) != (data.template, data.system):
        raise SettingsError(
            f'{origin} was taught the template {model.template} with the system text {model.system!r:.60}, but '
            f'data.template is {data.template} and data.system {data.system!r:.60}: set them as they were. To teach it '
            f'another conversation, take {CONVERSATION} out of its config.json'
        )
    return replace(model, template=data.template, system=data.system)


def _random(config: TrainConfig) -> StartingPoint:
    source = config.model
    if source.shapes is None or source.tokenizer is None:  # the configuration sees to it
        raise SettingsError('a model from scratch needs model.shapes and model.tokenizer')
    shapes = read_manifest(source.shapes)
    if (shapes.vision is not None) != config.has_images:
        kind = 'sees' if shapes.vision is not None else 'is a language model alone'
        raise SettingsError(f'model.shapes: {source.shapes} {kind}, which is not what stage {config.stage} trains')
    if not source.tokenizer.is_file():
        raise SettingsError(f'model.tokenizer: there is no file {source.tokenizer}')
    weights = RandomWeights(shapes, config.schedule.seed)
    return StartingPoint(shapes, weights, source.tokenizer, f'random weights of {source.shapes}')


def _seeing(config: TrainConfig, files: ExitStack) -> StartingPoint:
    """A model with eyes: whole, or put together from parts."""
    source = config.model
    base = _folder(source.base or '')
    opened = files.enter_context(open_checkpoint(base))
    if opened.kind == 'vlm':
        return _whole(config, opened)
    if source.vision_tower is None:
        raise SettingsError(
            f'model.base {base} is a language model alone, which stage {config.stage} gives eyes: name the folder of '
            'a CLIP as model.vision_tower, and model.projector or model.projector_type'
        )
    if not source.vision_tower.is_dir():
        raise SettingsError(
            f'model.vision_tower: there is no folder {source.vision_tower}: expected a CLIP such as '
            'openai/clip-vit-large-patch14-336, downloaded'
        )
    shapes = _shapes(config, opened)
    if source.projector is not None:
        if not source.projector.is_file():
            raise SettingsError(f'model.projector: there is no file {source.projector}: run the align stage first')
        parts = files.enter_context(open_parts(base, source.vision_tower, source.projector, shapes))
        return StartingPoint(shapes, parts.tensors, opened.tokenizer, f'{base}, {source.projector}')
    stored = open_weights(source.vision_tower).items()
    tower = LazyWeights(
        {TOWER_PREFIX + name: t for name, t in stored if name.startswith('vision_model.') and not is_junk(name)}
    )
    new = _new_projector(shapes, config.schedule.seed)
    weights = _Lazy({name: part for part in (opened.tensors, tower, new) for name in part})
    return StartingPoint(shapes, weights, opened.tokenizer, f'{base}, {source.vision_tower}, a new projector')


def _whole(config: TrainConfig, opened: Checkpoint) -> StartingPoint:
    """A checkpoint with tower and projector, or with another projector than it has."""
    source = config.model
    if source.projector is not None or source.vision_tower is not None:
        raise SettingsError(
            f'model.base {opened.path} has a vision tower and a projector already: leave out model.vision_tower and '
            'model.projector'
        )
    if source.projector_type is None:
        return StartingPoint(opened.config, opened.tensors, opened.tokenizer, str(opened.path))
    shapes = replace(opened.config, projector=ProjectorConfig(source.projector_type))
    kept = [name for name in opened.tensors if not name.startswith(PROJECTOR_PREFIX)]
    new = _new_projector(shapes, config.schedule.seed)
    weights = _Lazy(dict.fromkeys(kept, opened.tensors) | dict.fromkeys(new, new))
    return StartingPoint(shapes, weights, opened.tokenizer, f'{opened.path}, a new projector')


def _shapes(config: TrainConfig, language: Checkpoint) -> ModelConfig:
    """The shapes of a model that is put together."""
    source = config.model
    if source.shapes is not None:
        shapes = read_manifest(source.shapes)
        if shapes.vision is None:
            raise SettingsError(f'model.shapes: {source.shapes} is a language model alone, without a vision tower')
        return replace(shapes, template=language.config.template, system=language.config.system)
    if source.projector_type is None or source.vision_tower is None:
        raise SettingsError('model.shapes or model.projector_type must say what kind of projector the model has')
    tower = replace(read_clip_config(source.vision_tower), name=str(source.vision_tower), select_layer=-2)
    return replace(
        language.config, name=config.out.name, vision=tower, projector=ProjectorConfig(source.projector_type)
    )


def _new_projector(shapes: ModelConfig, seed: int) -> dict[str, NDArray[np.float32]]:
    """Initialised as PyTorch initialises its layers, like upstream's."""
    if shapes.projector is None or shapes.vision is None:
        raise CheckpointKindError(f'{shapes.name} is a language model alone: it has no projector')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build_projector(shapes.projector, shapes.vision.feature_width, shapes.language.n_embd)
    return {PROJECTOR_PREFIX + name: value.detach().numpy() for name, value in module.state_dict().items()}


def _folder(base: str) -> Path:
    """A folder, or where a model of that name was fetched to."""
    path = Path(base)
    if path.is_dir():
        return path
    if base in known_models():
        return fetched_path(base)
    raise SettingsError(
        f'model.base {base!r} is neither a folder nor a known model: run the stage before this one, or '
        '`mobilevlm fetch NAME`'
    )
