"""The doctor's look at the graph."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from robot import Robot, wait_until

from mobilevlm_ros.node.graph import examine_graph


def test_cameras_and_services_are_found(robot: Robot, photo: NDArray[np.uint8]) -> None:
    robot.show(robot.image(photo))

    def found() -> Any:
        checks = {check.name: check for check in examine_graph(1.0)}
        camera, service = checks.get(f'{robot.ns}/image'), checks.get(f'{robot.ns}/vqa_node/ask_image')
        return camera and service and (camera, service)

    camera, service = wait_until(found)
    assert 'raw images' in camera.found
    assert 'BEST_EFFORT' in camera.found
    assert service.level == 'ok'
