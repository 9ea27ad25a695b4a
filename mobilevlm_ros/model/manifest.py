"""Manifests: the models that this project knows by name, one YAML file each below ``models/``.

A manifest holds the shapes of a model (``ModelConfig``), where and under which licence it is published, how many
parameters it has, and what is known of its weight files. The files are checked as strictly as if a stranger had
written them: an unknown key or a value of the wrong type is refused, with the file and the key. ``models/nano`` is put
together from other parts and has a manifest of its own kind (``build.nano``). Knows neither torch nor weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.model.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from mobilevlm_ros.paths import shared_file
from mobilevlm_ros.runtime.prompt import TEMPLATES

__all__ = ['Manifest', 'PublishedFile', 'known_models', 'open_manifest', 'read_manifest', 'read_manifest_files']

ABLATIONS = 'ablations'
_NAME = re.compile(rf'(?:{ABLATIONS}/)?([a-z0-9][a-z0-9._-]*)\Z')
_SHA256 = re.compile(r'[0-9a-f]{64}\Z')
_PARTS = {'vision': VisionConfig, 'projector': ProjectorConfig, 'language': LanguageConfig}
_KINDS = {int: 'a whole number', float: 'a number (with a point: 1.0e-6)', str: 'a text', bool: 'true or false'}

Config = TypeVar('Config')


@dataclass(frozen=True)
class PublishedFile:
    """What is known of a published file; None and empty where nothing is."""

    n_bytes: int | None = None
    sha256: str = ''


@dataclass(frozen=True)
class Manifest:
    """One manifest.

    :ivar n_parameters: parameters of the whole model.
    :ivar licence: of the published weights; empty if there are none.
    :ivar files: by name in the published repository; weights first.
    """

    config: ModelConfig
    n_parameters: int
    licence: str
    files: Mapping[str, PublishedFile]


def read_manifest(name: str) -> ModelConfig:
    """The shapes of a model, by its name; an ablation's with or without ``ablations/`` before it.

    :raise SettingsError: if there is no such model, or its manifest is malformed.
    """
    return open_manifest(name).config


def read_manifest_files(name: str) -> Mapping[str, PublishedFile]:
    """What is known of the published files of a model; empty if nobody published it.

    :raise SettingsError: as ``read_manifest``.
    """
    return open_manifest(name).files


def known_models() -> list[str]:
    """Every name that ``read_manifest`` takes, sorted, ablations last."""
    folder = shared_file('models')
    ablations = sorted(f'{ABLATIONS}/{path.stem}' for path in (folder / ABLATIONS).glob('*.yaml'))
    return sorted(path.stem for path in folder.glob('*.yaml')) + ablations


def open_manifest(name: str) -> Manifest:
    """All of a manifest.

    :raise SettingsError: as ``read_manifest``.
    """
    path = _find(name)
    try:
        content = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f'{path} is not YAML: {error}') from error
    try:
        return _manifest(content, path.stem)
    except SettingsError as error:
        raise SettingsError(f'{path}: {error}') from error


def _find(name: str) -> Path:
    match = _NAME.match(name)
    if match:
        for place in (f'{name}.yaml', f'{ABLATIONS}/{match.group(1)}.yaml'):
            path = shared_file('models') / place
            if path.is_file():
                return path
    known = [one for one in known_models() if not one.startswith(ABLATIONS)]
    raise SettingsError(
        f'there is no model {name!r}; the models are {", ".join(known)}, and the ablations in models/{ABLATIONS}'
    )


def _manifest(content: Any, name: str) -> Manifest:
    keys = _mapping(content, 'the manifest')
    parts: dict[str, Any] = {key: _record(kind, keys.pop(key), key) for key, kind in _PARTS.items() if key in keys}
    n_parameters = _typed(int, keys.pop('parameters', None), 'parameters')
    licence = _typed(str, keys.pop('licence', ''), 'licence')
    files = {
        _typed(str, file, 'a name in files'): _published_file(known, f'files.{file}')
        for file, known in _mapping(keys.pop('files', {}), 'files').items()
    }
    if 'language' not in parts:
        raise SettingsError('the key language is missing: every model has one')
    config = _record(ModelConfig, keys, '', **parts)
    if config.name != name:
        raise SettingsError(f'name is {config.name!r}, expected {name!r} as the file is called')
    if config.template not in TEMPLATES:
        raise SettingsError(f'template is {config.template!r}, expected one of {", ".join(TEMPLATES)}')
    return Manifest(config, n_parameters, licence, files)


def _published_file(content: Any, where: str) -> PublishedFile:
    known = _mapping(content, where)
    n_bytes = _typed(int, known.pop('bytes'), f'{where}.bytes') if 'bytes' in known else None
    sha256 = _typed(str, known.pop('sha256', ''), f'{where}.sha256')
    if known:
        raise SettingsError(f'unknown key {where}.{next(iter(known))}; known are bytes and sha256')
    if n_bytes is not None and n_bytes < 1:
        raise SettingsError(f'{where}.bytes is {n_bytes}, expected at least 1')
    if sha256 and not _SHA256.match(sha256):
        raise SettingsError(f'{where}.sha256 is {sha256!r}, expected 64 hexadecimal digits in lower case')
    return PublishedFile(n_bytes, sha256)


def _record(kind: type[Config], content: Any, where: str, **given: Any) -> Config:
    """A dataclass from the keys of a mapping; ``given`` are fields that have been read already."""
    keys = _mapping(content, where or 'the manifest')
    types = {name: of for name, of in get_type_hints(kind).items() if name not in given and name not in _PARTS}
    prefix = f'{where}.' if where else ''
    for key in keys:
        if key not in types:
            raise SettingsError(f'unknown key {prefix}{key}; known are {", ".join(types)}')
    for field in fields(kind):  # type: ignore[arg-type]
        if field.default is MISSING and field.default_factory is MISSING and field.name not in keys:
            raise SettingsError(f'the key {prefix}{field.name} is missing')
    values = {key: _typed(types[key], value, f'{prefix}{key}') for key, value in keys.items()}
    try:
        return kind(**values, **given)
    except SettingsError as error:
        raise SettingsError(f'{where}: {error}' if where else str(error)) from error


def _mapping(content: Any, where: str) -> dict[Any, Any]:
    if not isinstance(content, dict):
        raise SettingsError(f'{where} should be a mapping, found {content!r}')
    return dict(content)


def _typed(kind: Any, value: Any, where: str) -> Any:
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise SettingsError(f'{where} is {value!r}, expected one of {", ".join(get_args(kind))}')
    if get_origin(kind) is tuple and get_args(kind)[-1] is ...:
        if isinstance(value, list):
            return tuple(_typed(get_args(kind)[0], one, where) for one in value)
        raise SettingsError(f'{where} is {value!r}, expected a list')
    if get_origin(kind) is tuple:
        if isinstance(value, list) and len(value) == len(get_args(kind)):
            return tuple(_typed(of, one, where) for of, one in zip(get_args(kind), value, strict=True))
        raise SettingsError(f'{where} is {value!r}, expected a list of {len(get_args(kind))} numbers')
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # not isinstance: a bool is no number
        raise SettingsError(f'{where} is {value!r}, expected {_KINDS[kind]}')
    return value
