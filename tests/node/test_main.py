"""The process: starts, survives a failing callback, ends cleanly under load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mobilevlm_msgs.action import AskImage as AskImageAction
from mobilevlm_msgs.msg import Answer
from mobilevlm_msgs.srv import AskImage
from numpy.typing import NDArray
from rclpy.action import ActionClient
from robot import Robot, wait_until

Pixels = NDArray[np.uint8]


def test_failing_callback_does_not_end_the_node(robot: Robot, photo: Pixels) -> None:
    fired = threading.Event()

    def fail() -> None:
        timer.cancel()
        fired.set()
        raise RuntimeError('a bug')

    timer = robot.node.create_timer(0.01, fail)
    assert fired.wait(10.0)
    robot.show(robot.image(photo))
    assert robot.ask().result_code == Answer.OK


@pytest.mark.parametrize('sent', [signal.SIGINT, signal.SIGTERM])
def test_process_ends_cleanly_under_load(
    tiny_bundle: Path, photo: Pixels, sent: signal.Signals, make_robot: Any
) -> None:
    namespace = f'/process_{os.getpid()}_{sent}'
    command = [sys.executable, '-m', 'mobilevlm_ros.node.main', '--ros-args', '-p', f'bundle:={tiny_bundle}']
    process = subprocess.Popen(
        [*command, '-r', f'__ns:={namespace}'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        # The robot's own node stays unconfigured; its client asks the process.
        robot = make_robot()
        client = robot.client.create_client(AskImage, f'{namespace}/vqa_node/ask_image')
        assert client.wait_for_service(30.0)
        request = AskImage.Request(question='what is the table', image=robot.image(photo), max_tokens=4)
        # The process answers NOT_ACTIVE until it has loaded the model.
        wait_until(lambda: robot.result(client.call_async(request)).success)
        request.max_tokens = 1900
        action = ActionClient(robot.client, AskImageAction, f'{namespace}/vqa_node/ask_image')
        assert action.wait_for_server(30.0)
        streamed: list[Any] = []
        goal = AskImageAction.Goal(question='what is the table', image=request.image, max_tokens=1900)
        action.send_goal_async(goal, streamed.append)
        wait_until(lambda: len(streamed) > 5)
        for _ in range(3):
            client.call_async(request)
        stop_watch = threading.Event()
        stop_watch.wait(0.2)
        process.send_signal(sent)
        output, _ = process.communicate(timeout=20.0)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert 'Traceback' not in output
