"""Parameters: described, bounded, validated as a set, live where promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mobilevlm_msgs.msg import Answer
from numpy.typing import NDArray
from rclpy.parameter import Parameter
from robot import Robot

from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.node.parameters import PARAMETERS, settings_from

Pixels = NDArray[np.uint8]
DEFAULTS = {parameter.name: parameter.default for parameter in PARAMETERS}


def set_parameter(robot: Robot, name: str, value: Any) -> Any:
    return robot.node.set_parameters([Parameter(name, value=value)])[0]


def test_every_parameter_has_a_description_and_numbers_have_ranges(shared_robot: Robot) -> None:
    for parameter in PARAMETERS:
        descriptor = shared_robot.node.describe_parameter(parameter.name)
        assert len(descriptor.description) > 20
        is_number = isinstance(parameter.default, (int, float)) and not isinstance(parameter.default, bool)
        assert bool(descriptor.integer_range or descriptor.floating_point_range) == is_number


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('max_tokens', 0),
        ('max_frame_age_s', 0.0),
        ('max_frame_age_s', float('nan')),
        ('min_confidence', 1.5),
        ('temperature', -0.1),
        ('deadline_s', float('inf')),
        ('threads', -1),
        ('max_tokens', 'many'),
    ],
)
def test_value_out_of_range_is_refused_with_a_reason(shared_robot: Robot, name: str, value: Any) -> None:
    before = shared_robot.node.get_parameter(name).value
    try:
        result = set_parameter(shared_robot, name, value)
        assert not result.successful
        assert result.reason
    except Exception as error:  # rclpy raises its own class for a wrong type
        assert 'type' in str(error).lower()
    assert shared_robot.node.get_parameter(name).value == before


def test_parameters_are_validated_as_a_set(shared_robot: Robot) -> None:
    refused = set_parameter(shared_robot, 'top_k', 5)
    assert not refused.successful
    assert 'temperature' in refused.reason
    together = shared_robot.node.set_parameters_atomically(
        [Parameter('temperature', value=0.5), Parameter('top_k', value=5)]
    )
    assert together.successful
    back = shared_robot.node.set_parameters_atomically(
        [Parameter('temperature', value=0.0), Parameter('top_k', value=0)]
    )
    assert back.successful


def test_live_parameter_takes_effect_on_the_next_question(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    assert set_parameter(robot, 'max_tokens', 3).successful
    assert robot.ask(max_tokens=0).timing.generated_tokens == 3
    assert set_parameter(robot, 'max_frame_age_s', 0.001).successful
    assert robot.ask().result_code == Answer.STALE


def test_threads_change_while_active(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    first = robot.ask(max_tokens=12).text
    assert set_parameter(robot, 'threads', 2).successful
    assert robot.ask(max_tokens=12).text == first


@pytest.mark.parametrize(('name', 'value'), [('bundle', 'fake'), ('queue_size', 9), ('camera_names', ['other'])])
def test_what_needs_a_reload_is_refused_while_active(shared_robot: Robot, name: str, value: Any) -> None:
    result = set_parameter(shared_robot, name, value)
    assert not result.successful
    assert 'deactivate' in result.reason


def test_what_needs_a_reload_changes_while_inactive(robot: Robot) -> None:
    assert robot.change_state('deactivate')
    assert set_parameter(robot, 'queue_size', 9).successful
    assert robot.change_state('activate')
    assert robot.node.settings.queue_size == 9


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        ({'camera_names': ['a', 'a']}, 'twice'),
        ({'camera_names': ['1st']}, 'camera name'),
        ({'camera_names': ['request']}, 'request'),
        ({'cameras.camera.type': 'jpeg'}, 'must be one of'),
        ({'cameras.camera.topic': ''}, 'is empty'),
        ({'top_p': 0.5}, 'temperature'),
        ({'queue_size': 0}, 'queue_size'),
    ],
)
def test_settings_say_what_is_wrong(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        settings_from({**DEFAULTS, **changes})


def test_shipped_parameter_file_holds_every_parameter_with_its_default() -> None:
    path = Path(__file__).parents[2] / 'config' / 'vqa.yaml'
    values = yaml.safe_load(path.read_text())['/**']['ros__parameters']
    cameras = values.pop('cameras')
    assert values == DEFAULTS
    assert set(cameras) == set(values['camera_names'])


@pytest.mark.parametrize(('value', 'expected'), [(-1.0, None), (0.0, 0.0), (0.7, 0.7)])
def test_a_limit_of_confidence_is_the_bundles_unless_it_is_set(value: float, expected: float | None) -> None:
    assert settings_from(DEFAULTS).assistant.min_confidence is None
    assert settings_from(DEFAULTS | {'min_confidence': value}).assistant.min_confidence == expected
