"""A device profile: how a model is built for one kind of device (``engines/*.yaml``).

A profile names the vision backend and its precision, the quantisation of the language model, how both are run, and how
far from PyTorch the result may be. It is checked against a schema when it is read, so that a misspelt key is an error
with its name and not a setting that does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.paths import shared_file
from mobilevlm_ros.runtime.bundle import LANGUAGE_SETTINGS

__all__ = ['ParityLimits', 'Profile', 'VisionTarget', 'known_profiles', 'read_profile']

PRECISIONS = {
    'onnxruntime': ('fp32', 'int8'),
    'openvino': ('fp32', 'bf16', 'int8'),
    'tensorrt': ('fp16', 'fp32'),
}
"""What each vision backend can be built in."""
_DEFAULT_VISION_COSINE = {'fp32': 0.99999, 'fp16': 0.999, 'bf16': 0.999}

_COSINE = {'type': 'number', 'minimum': 0, 'maximum': 1}
_SCHEMA: dict[str, Any] = {
    'type': 'object',
    'required': ['name', 'device', 'vision', 'language'],
    'additionalProperties': False,
    'properties': {
        'name': {'type': 'string', 'pattern': '^[a-z0-9-]+$'},
        'device': {'type': 'string', 'minLength': 1},
        'tested': {'type': 'string', 'minLength': 1},
        'memory_mib': {'type': 'integer', 'minimum': 64},
        'vision': {
            'type': 'object',
            'required': ['backend', 'precision'],
            'additionalProperties': False,
            'properties': {
                'backend': {'enum': sorted(PRECISIONS)},
                'precision': {'enum': sorted({p for ps in PRECISIONS.values() for p in ps})},
                'n_threads': {'type': 'integer', 'minimum': 0, 'maximum': 1024},
            },
        },
        'language': {
            'type': 'object',
            'required': ['quantization'],
            'additionalProperties': False,
            'properties': {
                'quantization': {'type': 'string'},
                'n_ctx': {'type': 'integer', 'minimum': 64, 'maximum': 1 << 20},
                **LANGUAGE_SETTINGS,
            },
        },
        'parity': {
            'type': 'object',
            'additionalProperties': False,
            'properties': {'vision_cosine': _COSINE, 'logits_cosine': _COSINE},
        },
    },
}


@dataclass(frozen=True)
class VisionTarget:
    """Which engine runs vision tower and projector."""

    backend: str
    precision: str
    n_threads: int = 0


@dataclass(frozen=True)
class ParityLimits:
    """How far from PyTorch a bundle may be.

    :ivar vision_cosine: smallest cosine between its visual tokens and PyTorch's, image by image.
    :ivar logits_cosine: the same of the language model's logits less their mean, over the positions of an answer.
    """

    vision_cosine: float
    logits_cosine: float


@dataclass(frozen=True)
class Profile:
    """One kind of device.

    :ivar device: what it is, for people.
    :ivar tested: what has been run of it, for people; empty if nothing.
    :ivar memory_mib: what a loaded bundle may take; 0: whatever it takes.
    :ivar language: settings of the language engine (``LanguageOptions``), perhaps with a smaller ``n_ctx``.
    """

    name: str
    device: str
    vision: VisionTarget
    quantization: str
    parity: ParityLimits
    tested: str = ''
    memory_mib: int = 0
    language: dict[str, Any] = field(default_factory=dict)


def known_profiles() -> list[str]:
    """Names of the profiles that are shipped."""
    return sorted(path.stem for path in shared_file('engines').glob('*.yaml'))


def read_profile(name: str) -> Profile:
    """A shipped profile by its name, or one's own by the path of its file.

    :raise BuildError: if there is none, or its file is malformed; the message names the key.
    """
    if name.endswith('.yaml'):
        path = Path(name)
    elif name in known_profiles():
        path = shared_file(f'engines/{name}.yaml')
    else:
        raise BuildError(
            f'there is no device profile {name!r}; the profiles are: {", ".join(known_profiles())}. '
            'Or give the path of a .yaml file of your own.'
        )
    try:
        content = yaml.safe_load(path.read_text(encoding='utf-8'))
    except OSError as error:
        raise BuildError(f'the profile {path} cannot be read: {error.strerror}') from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BuildError(f'{path} is not YAML: {error}') from error
    problem = next(iter(jsonschema.Draft202012Validator(_SCHEMA).iter_errors(content)), None)
    if problem is not None:
        raise BuildError(f'{path}: {problem.message} at {problem.json_path}')
    return _profile(path, content)


def _profile(path: Path, content: dict[str, Any]) -> Profile:
    vision = VisionTarget(**content['vision'])
    possible = PRECISIONS[vision.backend]
    if vision.precision not in possible:
        raise BuildError(
            f'{path}: the backend {vision.backend} is built in {" or ".join(possible)}, found {vision.precision}'
        )
    limits = content.get('parity', {})
    if 'vision_cosine' not in limits and vision.precision not in _DEFAULT_VISION_COSINE:
        raise BuildError(f'{path}: precision {vision.precision} needs its limit, parity.vision_cosine')
    language = dict(content['language'])
    return Profile(
        name=content['name'],
        device=content['device'],
        vision=vision,
        quantization=language.pop('quantization'),
        parity=ParityLimits(
            limits.get('vision_cosine', _DEFAULT_VISION_COSINE.get(vision.precision, 0.0)),
            limits.get('logits_cosine', 0.0),
        ),
        tested=content.get('tested', ''),
        memory_mib=content.get('memory_mib', 0),
        language=language,
    )
