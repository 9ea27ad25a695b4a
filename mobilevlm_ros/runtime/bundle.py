"""A bundle: everything that answers questions with one model on one kind of device, in one directory.

``bundle.json`` says what was built, from what, and for what; it is written last, so a directory without it is
half-written. ``open_bundle`` refuses what does not fit before anything is loaded. The description comes from a file
and is not trusted: it is checked against a schema, and names of files cannot leave the directory.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
from jsonschema.validators import extend

from mobilevlm_ros.errors import (
    BundleHashError,
    BundleIncompleteError,
    BundleMissingError,
    BundleVersionError,
)
from mobilevlm_ros.runtime.language import LanguageOptions
from mobilevlm_ros.runtime.preprocess import PreprocessSpec
from mobilevlm_ros.runtime.prompt import TEMPLATES, PromptTemplate, described_template
from mobilevlm_ros.runtime.vision.plan_key import PLAN_KEY_SCHEMA, graph_sha256
from mobilevlm_ros.types import AnswerFormat

__all__ = [
    'DESCRIPTION',
    'FORMAT_VERSION',
    'LANGUAGE_SETTINGS',
    'Bundle',
    'file_entry',
    'open_bundle',
    'sha256_of',
    'write_description',
]

DESCRIPTION = 'bundle.json'
FORMAT_VERSION = 1

_FILE = {'type': 'string', 'maxLength': 128, 'pattern': r'^[A-Za-z0-9][A-Za-z0-9._-]*\Z'}
_COUNT = {'type': 'integer', 'minimum': 1, 'maximum': 1 << 20}
_THREADS = {'type': 'integer', 'minimum': 0, 'maximum': 1024}
_SHARE = {'type': 'number', 'minimum': 0, 'maximum': 1}
_TEMPERATURE = {'type': 'number', 'minimum': 0.01, 'maximum': 100}
_CLOSED = {'yes_no': AnswerFormat.YES_NO, 'choice': AnswerFormat.CHOICE}


def _three(**limits: Any) -> dict[str, Any]:
    return {'type': 'array', 'items': {'type': 'number', **limits}, 'minItems': 3, 'maxItems': 3}


def _record(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    properties = {**required, **optional}
    return {'type': 'object', 'required': list(required), 'properties': properties, 'additionalProperties': False}


LANGUAGE_SETTINGS: dict[str, Any] = {
    'n_batch': _COUNT,
    'n_threads': _THREADS,
    'n_threads_batch': _THREADS,
    'n_gpu_layers': {'type': 'integer', 'minimum': -1, 'maximum': 1024},
    'flash_attention': {'type': 'boolean'},
    'kv_type': {'enum': ['f16', 'f32', 'q8_0']},
    'frame_cache': {'type': 'integer', 'minimum': 0, 'maximum': 1024},
}
"""What a bundle may say of how its language engine is run, and a device profile with it; ``LanguageOptions``."""

_SCHEMA = _record(
    {
        'format_version': {'const': FORMAT_VERSION},
        'name': {'type': 'string', 'minLength': 1},
        'profile': {'type': 'string', 'minLength': 1},
        'warning': {'type': 'string'},
        'generator': {'type': 'string'},
        'sources': {'type': 'array', 'items': {'type': 'string'}},
        'vision': _record(
            {
                'backend': {'enum': ['onnxruntime', 'openvino', 'tensorrt']},
                'precision': {'type': 'string'},
                'file': _FILE,
                'image_size': _COUNT,
                'n_tokens': _COUNT,
                'aspect': {'enum': ['pad', 'square']},
                'mean': _three(minimum=0, maximum=1),
                'std': _three(exclusiveMinimum=0, maximum=1),
            },
            n_threads=_THREADS,
            onnx=_FILE,
            plan_key=PLAN_KEY_SCHEMA,
        ),
        'language': _record(
            {
                'file': _FILE,
                'quantization': {'type': 'string'},
                'n_ctx': {'type': 'integer', 'minimum': 64, 'maximum': 1 << 20},
            },
            adapter=_FILE,
            **LANGUAGE_SETTINGS,
        ),
        'prompt': _record({'template': {'enum': sorted(TEMPLATES)}}, system={'type': 'string'}),
        'files': {
            'type': 'object',
            'propertyNames': _FILE,
            'additionalProperties': _record(
                {
                    'bytes': {'type': 'integer', 'minimum': 0},
                    'sha256': {'type': 'string', 'pattern': r'^[0-9a-f]{64}\Z'},
                }
            ),
        },
    },
    answers=_record(
        {},
        min_confidence=_record({}, **dict.fromkeys(_CLOSED, _SHARE)),
        temperature=_record({}, **dict.fromkeys(_CLOSED, _TEMPERATURE)),
    ),
    parity=_FILE,
)


# To JSON Schema 224.0 is an integer; to the engines it is not.
_Validator = extend(
    jsonschema.Draft202012Validator,
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine(
        'integer', lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    ),
)


@dataclass(frozen=True)
class Bundle:
    """A bundle whose description was read and whose files were checked."""

    path: Path
    description: dict[str, Any]
    hash: str

    @property
    def name(self) -> str:
        """The model."""
        return str(self.description['name'])

    @property
    def profile(self) -> str:
        """The kind of device."""
        return str(self.description['profile'])

    @property
    def warning(self) -> str:
        """What must be known before trusting the answers; empty if nothing."""
        return str(self.description['warning'])

    @property
    def model_id(self) -> str:
        """Names model, profile and content in every answer."""
        return f'{self.name}-{self.profile}@{self.hash[:12]}'

    @property
    def vision(self) -> dict[str, Any]:
        """The part about the vision engine."""
        return dict(self.description['vision'])

    @property
    def language(self) -> dict[str, Any]:
        """The part about the language engine."""
        return dict(self.description['language'])

    @property
    def vision_path(self) -> Path:
        """File of the vision engine."""
        return self.path / self.vision['file']

    @property
    def graph_sha256(self) -> str | None:
        """Hash of the graph beside a TensorRT plan, its external data included; None if there is none."""
        name = self.vision.get('onnx')
        if name is None:
            return None
        files = self.description['files']
        return graph_sha256({one: files[one]['sha256'] for one in (name, f'{name}.data') if one in files})

    @property
    def language_path(self) -> Path:
        """File of the language model."""
        return self.path / self.language['file']

    @property
    def adapter_path(self) -> Path | None:
        """File of the LoRA adapter, if there is one."""
        return self.path / self.language['adapter'] if 'adapter' in self.language else None

    @property
    def size_bytes(self) -> int:
        """Size of all files."""
        return sum(entry['bytes'] for entry in self.description['files'].values())

    @property
    def loaded_bytes(self) -> int:
        """Size of the files that are loaded: not of records, nor of the graph beside a plan."""
        vision = self.vision['file']
        loaded = {vision, f'{vision}.data', Path(vision).with_suffix('.bin').name, *self._language_files()}
        return sum(entry['bytes'] for name, entry in self.description['files'].items() if name in loaded)

    def _language_files(self) -> list[str]:
        return [self.language[key] for key in ('file', 'adapter') if key in self.language]

    def preprocess_spec(self) -> PreprocessSpec:
        """How the model wants its images."""
        vision = self.vision
        return PreprocessSpec(
            image_size=vision['image_size'],
            aspect=vision['aspect'],
            mean=tuple(vision['mean']),
            std=tuple(vision['std']),
        )

    def template(self) -> PromptTemplate:
        """How the model reads a conversation."""
        return described_template(self.description['prompt'])

    def min_confidence(self) -> dict[AnswerFormat, float]:
        """Below which confidence an answer of a closed format is unknown, as far as that was measured."""
        found = self.description.get('answers', {}).get('min_confidence', {})
        return {_CLOSED[name]: float(limit) for name, limit in found.items()}

    def temperature(self) -> dict[AnswerFormat, float]:
        """At which temperature the probabilities of a closed format are to be believed, as far as that was measured."""
        found = self.description.get('answers', {}).get('temperature', {})
        return {_CLOSED[name]: float(value) for name, value in found.items()}

    def language_options(self) -> LanguageOptions:
        """How the language engine is set up."""
        options = self.language
        for other in ('file', 'adapter', 'quantization'):
            options.pop(other, None)
        return LanguageOptions(**options)


def open_bundle(path: Path, *, verify_hashes: bool = True) -> Bundle:
    """Read and check a bundle; nothing is loaded yet.

    :param verify_hashes: compare every file with the hash in the description (about 1 s for each 1.5 GB).
    :raise BundleMissingError: if there is none.
    :raise BundleIncompleteError: if it is half-written or its description is malformed.
    :raise BundleVersionError: if its format is another.
    :raise BundleHashError: if a file is not the one that was built.
    """
    rebuild = f'Build it again: mobilevlm build MODEL --out {path}'
    if not path.is_dir():
        raise BundleMissingError(
            f'there is no bundle at {path}. Build the embedded default with `mobilevlm build nano`, '
            'or give the directory of another bundle.'
        )
    description_path = path / DESCRIPTION
    if not description_path.is_file():
        raise BundleIncompleteError(f'{path} has no {DESCRIPTION}: it is no bundle, or half-written. {rebuild}')
    try:
        raw = description_path.read_bytes()
        description = json.loads(raw, parse_constant=_refuse_constant)
    except OSError as error:
        raise BundleIncompleteError(f'{description_path} cannot be read ({error.strerror}). {rebuild}') from error
    except (ValueError, RecursionError) as error:
        raise BundleIncompleteError(f'{description_path} is not JSON ({error}). {rebuild}') from error
    version = description.get('format_version') if isinstance(description, dict) else None
    if version != FORMAT_VERSION and isinstance(version, int):
        raise BundleVersionError(
            f'{path} is a bundle of format {version}; this version of mobilevlm_ros reads format {FORMAT_VERSION}. '
            f'{rebuild}'
        )
    problem = next(iter(_Validator(_SCHEMA).iter_errors(description)), None)
    if problem is not None:
        raise BundleIncompleteError(f'{description_path}: {problem.message} at {problem.json_path}. {rebuild}')
    _check_files(path, description, verify_hashes, rebuild)
    return Bundle(path, description, hashlib.sha256(raw).hexdigest())


def _refuse_constant(name: str) -> None:
    raise ValueError(f'{name} is no number of JSON')


def _check_files(path: Path, description: dict[str, Any], verify_hashes: bool, rebuild: str) -> None:
    files: dict[str, dict[str, Any]] = description['files']
    named = [description['vision']['file'], description['language']['file']]
    named += [description['language']['adapter']] if 'adapter' in description['language'] else []
    named += [description['vision']['onnx']] if 'onnx' in description['vision'] else []
    named += [description['parity']] if 'parity' in description else []
    for name in named:
        if name not in files:
            raise BundleIncompleteError(f'{path / DESCRIPTION} names {name} but does not list it. {rebuild}')
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise BundleIncompleteError(f'{file} is missing: the bundle is half-written. {rebuild}')
        size = file.stat().st_size
        if size != entry['bytes']:
            raise BundleIncompleteError(f'{file} has {size} bytes, expected {entry["bytes"]}. {rebuild}')
    if verify_hashes:
        for name, entry in files.items():
            digest = sha256_of(path / name)
            if digest != entry['sha256']:
                raise BundleHashError(
                    f'{path / name} has SHA-256 {digest[:12]}…, expected {entry["sha256"][:12]}…: '
                    f'it is not the file that was built. {rebuild}'
                )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """The entry of one file in ``files``."""
    return {'bytes': path.stat().st_size, 'sha256': sha256_of(path)}


def write_description(path: Path, description: dict[str, Any]) -> None:
    """Make a directory of finished files a bundle.

    :raise jsonschema.ValidationError: if the description is not one; a mistake of the builder.
    """
    _Validator(_SCHEMA).validate(description)
    temporary = path / f'.{DESCRIPTION}.partial'
    try:
        temporary.write_text(json.dumps(description, indent=2, sort_keys=True) + '\n')
        temporary.replace(path / DESCRIPTION)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
