"""The configuration of a training run: one YAML file, in which a mistake is found before anything is computed.

Unknown keys, wrong types and contradictions are named with the file, the key, what was found, what was expected and,
where a key looks misspelt, which one was probably meant. ``extends: FILE`` starts from another file; ``key=value``
arguments of a command come on top. Knows neither torch nor data.

Published figures stand in ``config/train/*.yaml``; the defaults here are those that all published runs share
(MobileVLM's ``scripts/train/*.sh``, arXiv 2312.16886 and 2402.03766).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.paths import shared_file

__all__ = [
    'STAGES',
    'DataConfig',
    'LearningRates',
    'LoraConfig',
    'ModelSource',
    'Parallel',
    'Saving',
    'Schedule',
    'ShardSource',
    'Stage',
    'TrainConfig',
    'differences',
    'dump_config',
    'find_config',
    'read_config',
]

Stage = Literal['llm-pretrain', 'sft', 'ground', 'align', 'instruct', 'lora', 'qlora']
STAGES: tuple[Stage, ...] = get_args(Stage)
TEXT_STAGES = ('llm-pretrain', 'sft')
ADAPTER_STAGES = ('lora', 'qlora')
_EXTENDS = 'extends'
_MAX_CHAIN = 8

AnyPath = Annotated[Path, Field(strict=False)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0.0, lt=1.0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra='forbid', strict=True, frozen=True)


class ModelSource(_Section):
    """Where the model starts from.

    :ivar base: folder of a checkpoint, or the name of a fetched one; null: random weights of ``shapes``.
    :ivar shapes: a name of ``models/``; null: the shapes of ``base``.
    :ivar tokenizer: ``tokenizer.model`` or ``tokenizer.json`` where there is no base.
    :ivar vision_tower: folder of a CLIP, where the base is a language model alone.
    :ivar projector: ``mm_projector.bin`` or ``.safetensors`` of an align stage, to start from.
    :ivar adapter: folder of an earlier run of stage ``lora``, to go on from; ``base`` is then the model beside it.
    :ivar projector_type: of a new projector with random weights, where ``projector`` is null.
    """

    base: str | None = None
    shapes: str | None = None
    tokenizer: AnyPath | None = None
    vision_tower: AnyPath | None = None
    projector: AnyPath | None = None
    adapter: AnyPath | None = None
    projector_type: str | None = None

    @model_validator(mode='after')
    def _whole(self) -> ModelSource:
        if self.base is None and (self.shapes is None or self.tokenizer is None):
            raise ValueError('without model.base there must be model.shapes and model.tokenizer: random weights')
        if self.projector is not None and self.projector_type is not None:
            raise ValueError('model.projector and model.projector_type exclude each other: a trained one or a new one')
        return self


class ShardSource(_Section):
    """A folder of packed shards, as ``mobilevlm train tokenise`` writes it, and its share of what is read."""

    path: AnyPath
    weight: Annotated[float, Field(gt=0.0)] = 1.0


class DataConfig(_Section):
    """What is read.

    :ivar records: dialogues, JSON or JSONL; for stage ``ground`` a ``regions.json``; null: ``shards``.
    :ivar format: of the records: LLaVA's, ShareGPT/Vicuna's or Alpaca's.
    :ivar images: folder that the records' image paths are below.
    :ivar features: folder with the frozen tower's features, made before; null: pixels go through the tower.
    :ivar template: conversation that dialogues are written as.
    :ivar aspect: ``square`` crops the middle, ``pad`` keeps all of a picture.
    :ivar on_bad: ``refuse`` a record that cannot be used, or ``skip`` it; both count and name it.
    :ivar group_by_modality: batches of like length, with or without images (``group_by_modality_length``).
    :ivar max_tokens: longer samples are cut, before images are put in.
    :ivar system: system turn of the template chatml.
    :ivar separate_questions: the questions of a dialogue do not see each other, only what stands before the first one
        (template chatml): several are learned from one image as if each were the only one.
    :ivar shards: packed text for ``llm-pretrain``.
    :ivar feature_noise: while learning, each of the tower's features is scaled by 1 and a normal error of this size.
    :ivar feature_dropout: while learning, each picture goes without this share of the channels of its features.
    """

    records: AnyPath | None = None
    format: Literal['llava', 'vicuna', 'alpaca'] = 'llava'
    images: AnyPath | None = None
    features: AnyPath | None = None
    template: Literal['plain', 'v1', 'alpaca', 'chatml'] = 'v1'
    aspect: Literal['pad', 'square'] = 'pad'
    on_bad: Literal['refuse', 'skip'] = 'refuse'
    group_by_modality: bool = False
    max_tokens: Positive = 2048
    system: str = ''
    separate_questions: bool = False
    shards: list[ShardSource] = []
    n_workers: Annotated[int, Field(ge=0)] = 4
    feature_noise: Annotated[float, Field(ge=0.0)] = 0.0
    feature_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0

    @model_validator(mode='after')
    def _one_source(self) -> DataConfig:
        if (self.records is None) == (not self.shards):
            raise ValueError('give either data.records (dialogues) or data.shards (packed text)')
        for name in ('system', 'separate_questions'):
            if getattr(self, name) and self.template != 'chatml':
                raise ValueError(f'data.{name} is for the template chatml, not for {self.template}')
        return self


class LearningRates(_Section):
    """Peak learning rate of each part; a part without one is frozen. The vision tower always is."""

    language: Rate | None = None
    projector: Rate | None = None


class Schedule(_Section):
    """Optimiser (AdamW), batch and length of the run.

    :ivar global_batch: samples of a step, over all processes and accumulated micro-batches.
    :ivar batch: samples at once in one process, at most.
    :ivar max_steps: stop after so many steps; null: ``epochs``.
    :ivar warmup: share of the steps (below 1) or a number of steps, over which rates rise from 0.
    :ivar final_rate: share of the peak that the cosine ends at.
    :ivar clip_norm: gradients are scaled down to this norm; 0: never.
    """

    global_batch: Positive
    batch: Positive
    epochs: Positive = 1
    max_steps: Positive | None = None
    decay: Literal['cosine', 'constant'] = 'cosine'
    warmup: Annotated[float, Field(ge=0.0)] = 0.03
    final_rate: Share = 0.0
    weight_decay: Share = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)
    epsilon: Rate = 1e-8
    clip_norm: Annotated[float, Field(ge=0.0)] = 1.0
    precision: Literal['fp32', 'bf16'] = 'bf16'
    tf32: bool = True
    checkpoint_activations: bool = True
    seed: Annotated[int, Field(ge=0)] = 42

    @model_validator(mode='before')
    @classmethod
    def _list_of_betas(cls, values: Any) -> Any:
        # YAML has no tuples.
        if isinstance(values, dict) and isinstance(values.get('betas'), list):
            return values | {'betas': tuple(values['betas'])}
        return values


class LoraConfig(_Section):
    """Low-rank adapters on the matrices of the language model; the published values.

    :ivar bits: of the frozen matrices in stage ``qlora``: 4 (nf4, double quantisation) or 8.
    """

    rank: Positive = 128
    alpha: Positive = 256
    dropout: Share = 0.05
    bits: Literal[4, 8] = 4


class Saving(_Section):
    """Checkpoints to resume from, and the product.

    :ivar every_steps: a checkpoint after so many steps, and one at the end.
    :ivar keep: so many of the newest checkpoints stay.
    :ivar dtype: of the product's weights.
    """

    every_steps: Positive = 500
    keep: Positive = 2
    dtype: Literal['bf16', 'fp16', 'fp32'] = 'bf16'
    log_every_steps: Positive = 1


class Parallel(_Section):
    """How a model is spread over processes; without either file, every process holds all of it.

    :ivar deepspeed: a JSON file, such as ``config/train/deepspeed/zero2.json``.
    :ivar fsdp: a YAML file of accelerate, such as ``config/train/fsdp.yaml``.
    """

    deepspeed: AnyPath | None = None
    fsdp: AnyPath | None = None

    @model_validator(mode='after')
    def _one(self) -> Parallel:
        if self.deepspeed is not None and self.fsdp is not None:
            raise ValueError('parallel.deepspeed and parallel.fsdp exclude each other')
        return self


class TrainConfig(_Section):
    """A whole run.

    :ivar out: folder of everything that the run writes.
    :ivar source: the file that it was read from; no key of it.
    """

    stage: Stage
    out: AnyPath
    model: ModelSource
    data: DataConfig
    learning_rate: LearningRates
    schedule: Schedule
    lora: LoraConfig | None = None
    saving: Saving = Saving()
    parallel: Parallel = Parallel()

    @model_validator(mode='after')
    def _stage_rules(self) -> TrainConfig:
        rates = self.learning_rate
        if self.stage in TEXT_STAGES:
            if rates.language is None or rates.projector is not None:
                raise ValueError(f'{self.stage} trains the language model alone: give learning_rate.language only')
        elif self.stage == 'ground' and (rates.projector is None or rates.language is not None):
            raise ValueError('ground trains the projector alone: give learning_rate.projector only')
        elif self.stage == 'align' and rates.projector is None:
            raise ValueError('align trains the projector: give learning_rate.projector')
        elif self.stage == 'instruct' and (rates.projector is None or rates.language is None):
            raise ValueError('instruct trains projector and language model: give both learning rates')
        elif self.stage in ADAPTER_STAGES and rates.language is None:
            raise ValueError(f'{self.stage} trains adapters of the language model: give learning_rate.language')
        if (self.stage in ADAPTER_STAGES) != (self.lora is not None):
            raise ValueError(f'{self.stage} {"needs" if self.lora is None else "takes no"} section lora')
        if self.model.adapter is not None and self.lora is None:
            raise ValueError(f'{self.stage} has no adapters: leave out model.adapter')
        if (self.stage == 'llm-pretrain') != bool(self.data.shards):
            raise ValueError(
                'llm-pretrain reads data.shards' if self.stage == 'llm-pretrain' else f'{self.stage} reads data.records'
            )
        if self.data.format != 'llava' and self.stage != 'sft':
            raise ValueError(f'data.format {self.data.format} is for sft; {self.stage} reads llava')
        return self

    @property
    def has_images(self) -> bool:
        """Whether it trains a model that sees."""
        return self.stage not in TEXT_STAGES


def find_config(name: str) -> Path:
    """The file of a configuration: a path, or the name of one in ``config/train`` with or without ``.yaml``.

    :raise SettingsError: if there is no such file.
    """
    path = Path(name)
    if path.is_file():
        return path
    folder = shared_file('config/train')
    for place in (folder / name, folder / f'{name}.yaml'):
        if place.is_file():
            return place
    known = sorted(file.stem for file in folder.glob('*.yaml') if file.stem != 'fsdp')
    near = difflib.get_close_matches(Path(name).name.removesuffix('.yaml'), known, 1)
    meant = f': did you mean {near[0]}?' if near else '.'
    raise SettingsError(f'there is no configuration {name}{meant} Known by name are {", ".join(known)}.')


def read_config(name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a configuration.

    :param name: as for ``find_config``.
    :param overrides: ``section.key=value``, the value in YAML.
    :raise SettingsError: if there is no such file, it is no YAML, or anything in it is wrong.
    """
    path = find_config(name)
    values = _with_bases(path, [])
    for override in overrides:
        _apply(values, override)
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise SettingsError(f'{path}: {_explained(error)}') from error


def dump_config(config: TrainConfig) -> str:
    """As YAML that ``read_config`` reads back."""
    return yaml.safe_dump(config.model_dump(mode='json'), sort_keys=False)


def differences(ours: TrainConfig, theirs: TrainConfig) -> list[str]:
    """Keys that differ and whose change would make a resumed run another run; what is saved, when and where may."""
    harmless = ('out', 'saving', 'parallel', 'data.n_workers', 'schedule.batch', 'schedule.checkpoint_activations')
    mine, other = _flat(ours.model_dump(mode='json')), _flat(theirs.model_dump(mode='json'))
    return [
        f'{key} was {other.get(key)!r} and is {mine.get(key)!r}'
        for key in sorted(mine.keys() | other.keys())
        if mine.get(key) != other.get(key) and not f'{key}.'.startswith(tuple(f'{name}.' for name in harmless))
    ]


def _flat(values: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f'{prefix}{key}.')
        else:
            found[f'{prefix}{key}'] = value
    return found


def _with_bases(path: Path, chain: list[Path]) -> dict[str, Any]:
    """The content of a file over the content of the file that it extends."""
    if path.resolve() in chain or len(chain) == _MAX_CHAIN:
        raise SettingsError(f'{path}: {_EXTENDS} goes round in a circle, or through more than {_MAX_CHAIN} files')
    try:
        content = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f'{path} is not YAML: {error}') from error
    except OSError as error:
        raise SettingsError(f'{path} cannot be read: {error.strerror}') from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SettingsError(f'{path} should be a mapping of keys, found {content!r:.80}')
    base = content.pop(_EXTENDS, None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise SettingsError(f'{path}: {_EXTENDS} is {base!r}, expected the name of a file')
    beside = path.parent / base
    found = next((place for place in (beside, Path(f'{beside}.yaml')) if place.is_file()), None)
    return _merged(_with_bases(found or find_config(base), [*chain, path.resolve()]), content)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        before = merged.get(key)
        merged[key] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def _apply(values: dict[str, Any], override: str) -> None:
    """Put one ``section.key=value`` into the values."""
    name, equals, text = override.partition('=')
    if not equals or not name:
        raise SettingsError(f'{override!r} is no key=value, such as schedule.max_steps=100')
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f'{override!r}: {text!r} is no YAML value') from error
    *sections, key = name.split('.')
    for section in sections:
        inner = values.get(section)
        # A copy, as a section may be shared with the file that it comes from; null counts as empty.
        values[section] = dict(inner) if isinstance(inner, dict) else {}
        values = values[section]
    values[key] = value


# -- what went wrong ------------------------------------------------------------------------------------------------

_EXPECTED = {
    'int_type': 'a whole number',
    'float_type': 'a number',
    'string_type': 'a text',
    'bool_type': 'true or false',
    'path_type': 'a path',
    'list_type': 'a list',
    'tuple_type': 'a list',
    'model_type': 'a section of keys',
    'dict_type': 'a section of keys',
}
_SHOWN = 5


def _explained(error: ValidationError) -> str:
    """Every problem with its key, in the order of the file."""
    found = [_problem(dict(one)) for one in error.errors(include_url=False)]
    more = f'; and {len(found) - _SHOWN} more' if len(found) > _SHOWN else ''
    return '; '.join(found[:_SHOWN]) + more


def _problem(error: dict[str, Any]) -> str:
    key = '.'.join(str(part) for part in error['loc'])
    kind, value = error['type'], error.get('input')
    if kind == 'extra_forbidden':
        known = _known_keys(error['loc'][:-1])
        section = key.rpartition('.')[0]
        near = difflib.get_close_matches(str(error['loc'][-1]), known, 1)
        meant = f': did you mean {section + "." if section else ""}{near[0]}?' if near else ''
        return f'there is no key {key}{meant} (known are {", ".join(known)})'
    if kind == 'missing':
        return f'the key {key} is missing'
    if kind == 'value_error':
        return str(error['ctx']['error'])
    if kind == 'literal_error':
        near = difflib.get_close_matches(str(value), [str(one) for one in error['ctx']['expected'].split("'")], 1)
        meant = f': did you mean {near[0]}?' if near else ''
        return f'{key} is {value!r}, expected {error["ctx"]["expected"]}{meant}'
    expected = _EXPECTED.get(kind, error['msg'].removeprefix('Input should be '))
    hint = ' (YAML takes 1e-3 for a text: write 1.0e-3)' if kind == 'float_type' and _is_number(value) else ''
    return f'{key} is {value!r:.80} ({_kind(value)}), expected {expected}{hint}'


def _known_keys(loc: Sequence[Any]) -> list[str]:
    """Keys of the section at a place."""
    model: type[BaseModel] = TrainConfig
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        inner = [one for one in (annotation, *get_args(annotation)) if isinstance(one, type)]
        model = next((one for one in inner if issubclass(one, BaseModel)), model)
    return list(model.model_fields)


def _is_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True


def _kind(value: object) -> str:
    names = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'a text', list: 'a list'}
    return 'nothing' if value is None else names.get(type(value), 'a section of keys')
