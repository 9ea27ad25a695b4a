"""The doctor: finds what is wrong, says what to do, never raises."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mobilevlm_ros.cli import main
from mobilevlm_ros.doctor import examine


def test_healthy_machine(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['doctor', '--bundle', str(tiny_bundle), '--seconds', '0.2']) == 0
    printed = capsys.readouterr().out
    assert 'tiny-cpu@' in printed
    assert 'llama_cpp' in printed
    assert 'Questions can be answered here' in printed


def test_missing_bundle_is_a_problem_with_advice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['doctor', '--bundle', '/nonexistent', '--seconds', '0.1', '--json']) == 1
    report = json.loads(capsys.readouterr().out)
    problems = [check for check in report['checks'] if check['level'] == 'problem']
    assert [check['area'] for check in problems] == ['bundle']
    assert problems[0]['advice'] == 'mobilevlm build nano'


def test_missing_library_is_a_problem_with_advice(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    report = examine(tiny_bundle, graph_s=0.1)
    assert not report.healthy
    assert report.next_steps[0] == 'pip install onnxruntime'


def test_without_ros_the_rest_is_still_examined(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'mobilevlm_msgs', None)
    report = examine(tiny_bundle, graph_s=0.1)
    assert report.healthy
    assert any('colcon build' in step for step in report.next_steps)
