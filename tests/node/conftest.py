"""Fixtures for tests over real rclpy and DDS."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# A graph of this run's own, whatever else is on the machine; set before the first context is made.
os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
os.environ.setdefault('ROS_DOMAIN_ID', str(random.randint(1, 101)))

from robot import Robot

MakeRobot = Callable[..., Robot]


def _robot(bundle: Path, /, **parameters: Any) -> Robot:
    values: dict[str, Any] = {'bundle': str(bundle), 'diagnostics_period_s': 0.1, 'max_frame_age_s': 60.0}
    return Robot(values | {name.replace('__', '.'): value for name, value in parameters.items()})


@pytest.fixture
def make_robot(tiny_bundle: Path) -> Iterator[MakeRobot]:
    """Makes robots on the tiny bundle; keyword arguments are parameters (``__`` for a dot)."""
    robots: list[Robot] = []

    def make(**parameters: Any) -> Robot:
        robots.append(_robot(tiny_bundle, **parameters))
        return robots[-1]

    yield make
    for robot in robots:
        robot.close()


@pytest.fixture(scope='module')
def shared_robot(tiny_bundle: Path) -> Iterator[Robot]:
    """An active robot for tests that leave it as they found it."""
    robot = _robot(tiny_bundle).start()
    yield robot
    robot.close()


@pytest.fixture
def robot(make_robot: MakeRobot) -> Robot:
    """An active robot with one camera."""
    return make_robot().start()
