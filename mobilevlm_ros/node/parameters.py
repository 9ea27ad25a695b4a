"""The node's parameters: one table that declares, describes, bounds and validates them.

Values are checked twice: each by its range when it is set, and all together, because some depend on each other. The
table is also the documentation: ``ros2 param describe`` shows it, and a test compares ``config/vqa.yaml`` with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.node import Node

from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.runtime.ahead import AheadSettings
from mobilevlm_ros.runtime.asking import MIN_CONFIDENCE, AssistantSettings
from mobilevlm_ros.runtime.sampling import SamplingSettings

__all__ = ['PARAMETERS', 'CameraSettings', 'NodeSettings', 'Parameter', 'declare', 'is_live', 'read', 'settings_from']


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    :ivar live: whether it may change while the node is active.
    :ivar limits: lowest and highest value, for numbers.
    """

    name: str
    default: Any
    description: str
    live: bool = False
    limits: tuple[float, float] | None = None


PARAMETERS = (
    Parameter('autostart', True, 'Configure and activate at start; false leaves that to a lifecycle manager.'),
    Parameter(
        'bundle',
        '',
        'Directory of the bundle; empty: the embedded default (mobilevlm build nano); '
        '"fake": no model, to try out the graph.',
    ),
    Parameter('verify_bundle', True, 'Compare the files of the bundle with their hashes before loading.'),
    Parameter('camera_names', ['camera'], 'Names of the cameras; each has parameters cameras.NAME.topic and .type.'),
    Parameter('queue_size', 4, 'Questions that may wait besides the one being answered.', limits=(1, 64)),
    Parameter(
        'frame_cache',
        4,
        'Recent frames whose state is kept; memory for each: visual tokens and KV state.',
        limits=(0, 64),
    ),
    Parameter('diagnostics_period_s', 1.0, 'Period of /diagnostics, in seconds.', limits=(0.1, 60.0)),
    Parameter(
        'max_frame_age_s',
        2.0,
        'A frame older than this when a question is taken up is refused (STALE); for questions that name no limit.',
        live=True,
        limits=(0.001, 86400.0),
    ),
    Parameter(
        'deadline_s',
        30.0,
        'Time for an answer, waiting included; for questions that name none. 0: none.',
        live=True,
        limits=(0.0, 86400.0),
    ),
    Parameter(
        'max_tokens', 128, 'Longest answer, in tokens; for questions that name none.', live=True, limits=(1, 8192)
    ),
    Parameter(
        'min_confidence',
        -1.0,
        'A closed question answered less confidently gets the code UNKNOWN; 0: none does; below 0: as the bundle says, '
        f'or {MIN_CONFIDENCE}.',
        live=True,
        limits=(-1.0, 1.0),
    ),
    Parameter(
        'temperature',
        0.0,
        'Sampling temperature; 0: greedy, the same answer every time.',
        live=True,
        limits=(0.0, 10.0),
    ),
    Parameter(
        'top_k',
        0,
        'Sampling: only the best k tokens; 0: all. Needs temperature above 0.',
        live=True,
        limits=(0, 100000),
    ),
    Parameter(
        'top_p', 1.0, 'Sampling: smallest set of best tokens with this much probability.', live=True, limits=(0.0, 1.0)
    ),
    Parameter(
        'min_p', 0.0, 'Sampling: tokens below this share of the best one are out.', live=True, limits=(0.0, 0.999)
    ),
    Parameter('seed', 0, 'Sampling: the seed of every answer.', live=True, limits=(0, 2**31 - 1)),
    Parameter(
        'encode_ahead_duty',
        0.0,
        'Largest share of the time that may go into encoding new frames while nobody asks, so that a question about '
        'one is answered without that delay. 0: off.',
        live=True,
        limits=(0.0, 1.0),
    ),
    Parameter(
        'encode_ahead_max_lag_s',
        1.0,
        'With encode_ahead_duty: a question takes the frame that was encoded ahead if the newest one arrived at most '
        'this much later; max_frame_age_s holds all the same. 0: only if it is the newest.',
        live=True,
        limits=(0.0, 86400.0),
    ),
    Parameter('threads', 0, 'Threads of the language engine; 0: as the bundle says.', live=True, limits=(0, 1024)),
)

_CAMERA_PARAMETERS = (
    ('topic', 'Topic of the camera, raw or compressed images; relative names are remapped as usual.'),
    ('type', 'auto: by the type that is published; or raw, or compressed.'),
    ('encode_ahead', 'Whether encode_ahead_duty may be spent on this camera. May change at any time.'),
)
_LIVE = {parameter.name for parameter in PARAMETERS if parameter.live}
_CAMERA_TYPES = ('auto', 'raw', 'compressed')


@dataclass(frozen=True)
class CameraSettings:
    """One camera: its name, topic, image type (``auto``, ``raw`` or ``compressed``), and whether to encode it ahead."""

    name: str
    topic: str
    type: str
    encode_ahead: bool = True


@dataclass(frozen=True)
class NodeSettings:
    """All parameters, validated."""

    autostart: bool
    bundle: str
    verify_bundle: bool
    cameras: tuple[CameraSettings, ...]
    queue_size: int
    frame_cache: int
    diagnostics_period_s: float
    max_frame_age_s: float
    deadline_s: float | None
    assistant: AssistantSettings
    ahead: AheadSettings


def declare(node: Node) -> None:
    """Declare all parameters; those of the cameras follow from ``camera_names``."""
    for parameter in PARAMETERS:
        node.declare_parameter(parameter.name, parameter.default, _descriptor(parameter))
    declare_cameras(node)


def declare_cameras(node: Node) -> None:
    """Declare the parameters of the cameras that ``camera_names`` lists and that are not declared yet."""
    names = list(node.get_parameter('camera_names').value or [])
    for name in names:
        defaults = {'topic': 'image' if len(names) == 1 else f'{name}/image', 'type': 'auto', 'encode_ahead': True}
        for key, description in _CAMERA_PARAMETERS:
            full_name = f'cameras.{name}.{key}'
            if not node.has_parameter(full_name):
                node.declare_parameter(full_name, defaults[key], ParameterDescriptor(description=description))


def _descriptor(parameter: Parameter) -> ParameterDescriptor:
    when = 'May change at any time.' if parameter.live else 'Read when the node is configured or activated.'
    descriptor = ParameterDescriptor(description=f'{parameter.description} {when}')
    if parameter.limits is not None:
        low, high = parameter.limits
        if isinstance(parameter.default, int):
            descriptor.integer_range = [IntegerRange(from_value=int(low), to_value=int(high), step=0)]
        else:
            descriptor.floating_point_range = [FloatingPointRange(from_value=low, to_value=high, step=0.0)]
    return descriptor


def read(node: Node) -> dict[str, Any]:
    """The present values of all parameters of the table and of the cameras."""
    names = [parameter.name for parameter in PARAMETERS]
    for camera in node.get_parameter('camera_names').value or []:
        names += [
            f'cameras.{camera}.{key}' for key, _ in _CAMERA_PARAMETERS if node.has_parameter(f'cameras.{camera}.{key}')
        ]
    return {name: node.get_parameter(name).value for name in names}


def settings_from(values: Mapping[str, Any]) -> NodeSettings:
    """Validate the values as a set.

    :raise SettingsError: with the name of the parameter and what is wrong.
    """
    for parameter in PARAMETERS:
        if parameter.limits is not None:
            low, high = parameter.limits
            if not low <= values[parameter.name] <= high:  # false for nan as well
                raise SettingsError(
                    f'{parameter.name} must be between {low:g} and {high:g}, found {values[parameter.name]}'
                )
    if values['temperature'] == 0.0 and (values['top_k'] or values['top_p'] < 1.0 or values['min_p']):
        raise SettingsError('top_k, top_p and min_p have no effect at temperature 0: raise temperature, or leave them')
    cameras = _cameras(values)
    return NodeSettings(
        autostart=values['autostart'],
        bundle=values['bundle'],
        verify_bundle=values['verify_bundle'],
        cameras=cameras,
        queue_size=values['queue_size'],
        frame_cache=values['frame_cache'],
        diagnostics_period_s=values['diagnostics_period_s'],
        max_frame_age_s=values['max_frame_age_s'],
        deadline_s=values['deadline_s'] or None,
        assistant=AssistantSettings(
            max_tokens=values['max_tokens'],
            min_confidence=values['min_confidence'] if values['min_confidence'] >= 0 else None,
            sampling=SamplingSettings(
                temperature=values['temperature'],
                top_k=values['top_k'],
                top_p=values['top_p'],
                min_p=values['min_p'],
                seed=values['seed'],
            ),
            n_threads=values['threads'],
        ),
        ahead=AheadSettings(
            duty=values['encode_ahead_duty'],
            max_lag_s=values['encode_ahead_max_lag_s'],
            cameras=tuple(camera.name for camera in cameras if camera.encode_ahead),
        ),
    )


def is_live(name: str) -> bool:
    """Whether the parameter may change while the node is active."""
    return name in _LIVE or (name.startswith('cameras.') and name.endswith('.encode_ahead'))


def _cameras(values: Mapping[str, Any]) -> tuple[CameraSettings, ...]:
    names = list(values['camera_names'] or [])
    if len(set(names)) != len(names):
        raise SettingsError(f'camera_names has a name twice: {", ".join(names)}')
    cameras = []
    for name in names:
        if not name.isidentifier() or name == 'request':
            raise SettingsError(
                f'camera name {name!r} cannot be used: letters, digits and underscores are allowed, and "request" '
                'stands for images that come with a question'
            )
        topic = values.get(f'cameras.{name}.topic', 'image' if len(names) == 1 else f'{name}/image')
        image_type = values.get(f'cameras.{name}.type', 'auto')
        if not topic:
            raise SettingsError(f'cameras.{name}.topic is empty')
        if image_type not in _CAMERA_TYPES:
            raise SettingsError(f'cameras.{name}.type must be one of {", ".join(_CAMERA_TYPES)}, found {image_type!r}')
        encode_ahead = values.get(f'cameras.{name}.encode_ahead', True)
        cameras.append(CameraSettings(name, topic, image_type, encode_ahead))
    return tuple(cameras)
