"""Transitions over DDS: what each state answers, what fails cleanly, what is freed."""

from __future__ import annotations

import gc
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from mobilevlm_msgs.msg import Answer, Event
from numpy.typing import NDArray
from rclpy.parameter import Parameter
from robot import LONG_TOKENS, Robot, wait_until

from mobilevlm_ros.runtime.bundle import DESCRIPTION, file_entry

Pixels = NDArray[np.uint8]


def test_states(make_robot: Any) -> None:
    robot = make_robot()
    assert robot.state() == 'unconfigured'
    assert robot.change_state('configure') and robot.state() == 'inactive'
    assert robot.change_state('activate') and robot.state() == 'active'
    assert robot.change_state('deactivate') and robot.state() == 'inactive'
    assert robot.change_state('cleanup') and robot.state() == 'unconfigured'


def test_autostart_activates(make_robot: Any) -> None:
    robot = make_robot()
    assert robot.node.autostart()
    assert robot.state() == 'active'


def test_inactive_node_refuses_questions(make_robot: Any) -> None:
    robot = make_robot()
    assert robot.change_state('configure')
    robot._matched(robot._service, 'ask_image')
    assert robot.ask().result_code == Answer.NOT_ACTIVE


def test_deactivate_answers_what_is_open(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    futures = [robot.ask_async(max_tokens=LONG_TOKENS) for _ in range(3)]
    wait_until(lambda: robot.node._session.worker.n_waiting == 2)
    time.sleep(0.05)
    started_s = time.monotonic()
    assert robot.change_state('deactivate')
    assert time.monotonic() - started_s < 1.0
    answers = [robot.result(future).detail for future in futures]
    assert [answer.result_code for answer in answers] == [Answer.NOT_ACTIVE] * 3


def test_it_answers_again_after_each_round(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    first = robot.ask(max_tokens=12).text
    for _ in range(3):
        assert robot.change_state('deactivate')
        assert robot.ask().result_code == Answer.NOT_ACTIVE
        assert robot.change_state('activate')
        assert robot.ask().result_code == Answer.NO_FRAME
        robot.show(robot.image(photo))
        assert robot.ask(max_tokens=12).text == first


def test_cleanup_and_configure_again(robot: Robot, photo: Pixels) -> None:
    assert robot.change_state('deactivate')
    assert robot.change_state('cleanup')
    robot.start()
    robot.show(robot.image(photo))
    assert robot.ask().result_code == Answer.OK


@pytest.mark.slow
def test_rounds_do_not_grow_the_memory(robot: Robot, photo: Pixels) -> None:
    def resident_mib() -> float:
        gc.collect()
        return psutil.Process().memory_info().rss / 2**20

    def rounds(n: int) -> None:
        for _ in range(n):
            robot.show(robot.image(photo))
            assert robot.ask().result_code == Answer.OK
            assert robot.change_state('deactivate') and robot.change_state('activate')

    rounds(4)
    before_mib = resident_mib()
    rounds(8)
    # One loaded tiny context is about 4 MiB; a leak of one in each round would show as 32.
    assert resident_mib() - before_mib < 16.0


def test_missing_bundle_fails_configure_and_a_right_one_mends_it(make_robot: Any, tiny_bundle: Path) -> None:
    robot = make_robot(bundle='/nonexistent/bundle')
    assert not robot.change_state('configure')
    assert robot.state() == 'unconfigured'
    robot.node.set_parameters([Parameter('bundle', value=str(tiny_bundle))])
    robot.start()
    assert robot.ask().result_code == Answer.NO_FRAME


def broken_copy(source: Path, target: Path, kind: str) -> Path:
    """A bundle with one defect."""
    shutil.copytree(source, target)
    description = json.loads((target / DESCRIPTION).read_text())
    if kind == 'half-written':
        (target / DESCRIPTION).unlink()
    elif kind == 'file missing':
        (target / 'vision.onnx').unlink()
    elif kind == 'version':
        (target / DESCRIPTION).write_text(json.dumps({**description, 'format_version': 99}))
    elif kind == 'hash':
        data = bytearray((target / 'language.gguf').read_bytes())
        data[-1] ^= 1
        (target / 'language.gguf').write_bytes(data)
    elif kind == 'unloadable':
        (target / 'language.gguf').write_bytes(b'GGUF' + bytes(1000))
        description['files']['language.gguf'] = file_entry(target / 'language.gguf')
        (target / DESCRIPTION).write_text(json.dumps(description))
    return target


@pytest.mark.parametrize('kind', ['half-written', 'file missing', 'version', 'hash'])
def test_broken_bundle_fails_configure(make_robot: Any, tiny_bundle: Path, tmp_path: Path, kind: str) -> None:
    robot = make_robot(bundle=str(broken_copy(tiny_bundle, tmp_path / 'broken', kind)))
    assert not robot.change_state('configure')
    assert robot.state() == 'unconfigured'
    assert 'Build it again' in robot.node._health.last_error


def test_model_that_does_not_load_fails_activate(make_robot: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    robot = make_robot(bundle=str(broken_copy(tiny_bundle, tmp_path / 'broken', 'unloadable')))
    assert robot.change_state('configure')
    assert not robot.change_state('activate')
    assert robot.state() == 'inactive'
    robot._matched(robot._service, 'ask_image')
    assert robot.ask().result_code == Answer.NOT_ACTIVE
    assert 'llama.cpp could not load' in robot.node._health.last_error


def test_shutdown_while_answering(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    future = robot.ask_async(max_tokens=LONG_TOKENS)
    wait_until(lambda: robot.node._session.worker._running)
    assert robot.change_state('shutdown')
    assert robot.result(future).detail.result_code == Answer.NOT_ACTIVE
    assert robot.state() == 'finalized'


def test_loading_and_unloading_make_events(robot: Robot) -> None:
    wait_until(lambda: Event.MODEL_LOADED in [event.kind for event in robot.events])
    assert robot.change_state('deactivate')
    wait_until(lambda: Event.MODEL_UNLOADED in [event.kind for event in robot.events])


def test_fake_bundle_needs_no_model(make_robot: Any, photo: Pixels) -> None:
    robot = make_robot(bundle='fake').start()
    robot.show(robot.image(photo))
    answer = robot.ask(max_tokens=100)
    assert answer.text.startswith('fake answer')
    assert answer.model_id == 'fake'
