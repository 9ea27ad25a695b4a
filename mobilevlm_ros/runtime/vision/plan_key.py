"""What a TensorRT plan was built for: the one TensorRT, the one kind of GPU and the one graph that it fits.

TensorRT itself refuses a foreign plan with an assertion of its own, or takes it with a warning and then fails. So the
key is stored beside the plan (``vision.plan_key`` in ``bundle.json``) and compared before TensorRT sees a byte of it.
The key comes from a file and is not trusted. Knows neither TensorRT nor CUDA: it is plain data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jsonschema

from mobilevlm_ros.errors import BundleIncompleteError, PlanMismatchError

__all__ = ['PLAN_KEY_SCHEMA', 'REBUILD', 'PlanKey', 'check_plan', 'graph_sha256']

REBUILD = 'mobilevlm build MODEL --profile jetson-orin --out DIR'
"""How a plan is built again, as long as nobody knows the model and the place."""

_PROPERTIES: dict[str, Any] = {
    'flavour': {'enum': ['tensorrt', 'tensorrt_rtx']},
    'tensorrt': {'type': 'string', 'maxLength': 64, 'pattern': r'^[0-9]+\.[0-9]+[0-9A-Za-z.+-]*\Z'},
    'gpu': {'type': 'string', 'maxLength': 256, 'pattern': r'^[!-~][ -~]*\Z'},
    'compute_capability': {'type': 'string', 'maxLength': 8, 'pattern': r'^[0-9]+\.[0-9]+\Z'},
    'onnx_sha256': {'type': 'string', 'pattern': r'^[0-9a-f]{64}\Z'},
    'precision': {'enum': ['fp16', 'fp32']},
}
PLAN_KEY_SCHEMA: dict[str, Any] = {
    'type': 'object',
    'required': list(_PROPERTIES),
    'properties': _PROPERTIES,
    'additionalProperties': False,
}
"""JSON Schema of ``PlanKey.to_dict()``."""

_TITLES = {
    'flavour': 'library',
    'tensorrt': 'TensorRT',
    'gpu': 'GPU',
    'compute_capability': 'compute capability',
    'onnx_sha256': 'ONNX graph (SHA-256)',
    'precision': 'precision',
}


@dataclass(frozen=True)
class PlanKey:
    """What a plan was built for, or what is here.

    :ivar flavour: the library, ``tensorrt`` or ``tensorrt_rtx``.
    :ivar tensorrt: its version, as it says itself; a plan fits no other.
    :ivar gpu: name of the GPU, as CUDA says it (all Jetson Orin modules: ``Orin``).
    :ivar compute_capability: of the GPU, such as ``8.7``.
    :ivar onnx_sha256: of the graph from which the plan was built (``graph_sha256``).
    :ivar precision: in which the graph computes, ``fp16`` or ``fp32``.
    """

    flavour: str
    tensorrt: str
    gpu: str
    compute_capability: str
    onnx_sha256: str
    precision: str

    def to_dict(self) -> dict[str, str]:
        """For ``bundle.json``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: object) -> PlanKey:
        """Out of ``bundle.json``.

        :raise BundleIncompleteError: if it is not what ``to_dict`` gives.
        """
        problem = next(iter(jsonschema.Draft202012Validator(PLAN_KEY_SCHEMA).iter_errors(raw)), None)
        if problem is not None:
            raise BundleIncompleteError(
                f'the key of the TensorRT plan is malformed: {problem.message} at {problem.json_path}. '
                f'Build the bundle again: {REBUILD}'
            )
        assert isinstance(raw, dict)
        return cls(**raw)


def graph_sha256(hashes: Mapping[str, str]) -> str:
    """One hash of an ONNX graph that may have its weights in further files.

    :param hashes: SHA-256 of each file by its name; the hash of a single file is that of the graph.
    """
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256(repr(sorted(hashes.items())).encode()).hexdigest()


def check_plan(key: PlanKey, here: PlanKey, *, rebuild: str = REBUILD) -> None:
    """Refuse a plan that does not fit what is here, before anything is loaded.

    :param here: the TensorRT and the GPU of this machine, and the graph that lies beside the plan now.
    :param rebuild: the command that builds the plan again.
    :raise PlanMismatchError: if they differ; the message names all that does, found and expected.
    """
    found, expected = key.to_dict(), here.to_dict()
    different = [name for name in _TITLES if found[name] != expected[name]]
    if different:
        reasons = [f'{_TITLES[name]} {_short(found[name])}, here is {_short(expected[name])}' for name in different]
        raise PlanMismatchError(
            f'the TensorRT plan was built for {"; ".join(reasons)}. Build it again on this machine: {rebuild}'
        )


def _short(value: str) -> str:
    return f'{value[:12]}…' if len(value) == 64 else value
