"""The doctor: finds what is wrong, says what to do, never raises."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mobilevlm_ros.cli import main
from mobilevlm_ros.doctor import Report, examine
from mobilevlm_ros.runtime.bundle import DESCRIPTION, file_entry, write_description
from mobilevlm_ros.types import Check

STAGES = [
    {'stage': 'preprocess', 'metric': 'levels', 'worst': 0.001, 'passed': True},
    {'stage': 'visual tokens', 'metric': 'cosine', 'worst': 0.99999912, 'passed': True},
    {'stage': 'logits', 'metric': 'cosine', 'worst': 0.98765432, 'passed': True},
    {'stage': 'visual tokens of the plan', 'metric': 'cosine', 'worst': 0.9995, 'passed': True},
]
KEY = {
    'flavour': 'tensorrt',
    'tensorrt': '10.3.0',
    'gpu': 'Orin',
    'compute_capability': '8.7',
    'onnx_sha256': 'a' * 64,
    'precision': 'fp16',
}
Change = Callable[..., Path]


@pytest.fixture
def changed(tiny_bundle: Path, tmp_path: Path) -> Change:
    """Makes a copy of the tiny bundle with another vision part, and with a parity report of some stages."""

    def change(stages: object = None, **vision: Any) -> Path:
        path = tmp_path / 'bundle'
        shutil.copytree(tiny_bundle, path)
        description = json.loads((path / DESCRIPTION).read_text())
        description['vision'].update(vision)
        if stages is not None:
            text = json.dumps({'reference': 'PyTorch 2, float32', 'stages': stages})
            (path / 'parity.json').write_text(text)
            description['parity'] = 'parity.json'
            description['files']['parity.json'] = file_entry(path / 'parity.json')
        write_description(path, description)
        return path

    return change


def found(report: Report, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


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


@pytest.mark.parametrize(
    ('stages', 'visual_tokens'), [(STAGES[:3], '0.999999'), (STAGES, '0.999500')], ids=['graph', 'plan']
)
def test_the_parity_report_is_summed_up(changed: Change, stages: object, visual_tokens: str) -> None:
    report = examine(changed(stages), graph_s=0.1)

    check = found(report, 'parity')
    assert check.level == 'ok'
    assert check.found == f'worst cosine to PyTorch 2, float32: visual tokens {visual_tokens}, logits 0.987654'
    assert report.healthy


def test_a_bundle_that_was_not_compared_is_noted(tiny_bundle: Path) -> None:
    report = examine(tiny_bundle, graph_s=0.1)

    assert found(report, 'parity').level == 'note'
    assert report.healthy


def test_a_stage_that_differs_is_a_problem(changed: Change) -> None:
    report = examine(changed([*STAGES, {**STAGES[0], 'stage': 'prompt', 'passed': False}]), graph_s=0.1)

    assert found(report, 'parity') == Check(
        'bundle', 'parity', 'problem', 'differs in prompt', 'build the bundle again'
    )
    assert not report.healthy


@pytest.mark.parametrize('stages', [3, [3], [{'stage': 'logits'}], [{**STAGES[1], 'worst': 'near'}]])
def test_a_damaged_report_is_noted(changed: Change, stages: object) -> None:
    report = examine(changed(stages), graph_s=0.1)

    assert found(report, 'parity').level == 'note'
    assert 'no parity report' in found(report, 'parity').found


@pytest.mark.parametrize('backend', ['onnxruntime', 'openvino', 'tensorrt'])
def test_only_the_library_of_the_backend_is_needed(
    changed: Change, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ('onnxruntime', 'openvino', 'tensorrt'):
        monkeypatch.setitem(sys.modules, module, None)

    report = examine(changed(backend=backend), graph_s=0.1)

    missing = [check.name for check in report.checks if check.area == 'library' and check.level == 'problem']
    assert missing == [backend]
    assert found(report, backend).advice.startswith(f'pip install {backend}')


def test_a_bundle_without_its_plan_says_what_to_run(changed: Change, capsys: pytest.CaptureFixture[str]) -> None:
    path = changed(backend='tensorrt')

    assert main(['doctor', '--bundle', str(path), '--seconds', '0.1', '--json']) == 1

    report = json.loads(capsys.readouterr().out)
    (plan,) = (check for check in report['checks'] if check['name'] == 'plan')
    assert (plan['level'], plan['advice']) == ('problem', f'mobilevlm plan {path}')


class OnThisMachine:
    """A TensorRT and a GPU, as far as the doctor asks for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, version: str, gpu: str) -> None:
        from mobilevlm_ros.runtime.vision import cuda
        from mobilevlm_ros.runtime.vision.cuda import Gpu

        self.__name__, self.__version__ = 'tensorrt', version
        self.gpu = lambda: Gpu(gpu, '8.7')
        monkeypatch.setitem(sys.modules, 'tensorrt', self)  # type: ignore[arg-type]
        monkeypatch.setattr(cuda, 'open_cuda', lambda: self)


@pytest.mark.parametrize(
    ('version', 'gpu', 'level', 'says'),
    [
        ('10.3.0', 'Orin', 'ok', 'TensorRT 10.3.0 on Orin'),
        ('10.7.0', 'Orin', 'problem', 'TensorRT 10.3.0, here is 10.7.0'),
        ('10.3.0', 'Thor', 'problem', 'GPU Orin, here is Thor'),
    ],
)
def test_a_plan_is_compared_with_this_machine(
    changed: Change, monkeypatch: pytest.MonkeyPatch, version: str, gpu: str, level: str, says: str
) -> None:
    OnThisMachine(monkeypatch, version, gpu)
    path = changed(backend='tensorrt', plan_key=KEY)

    check = found(examine(path, graph_s=0.1), 'plan')

    assert (check.level, check.advice) == (level, '' if level == 'ok' else f'mobilevlm plan {path}')
    assert says in check.found


def test_a_plan_where_there_is_no_tensorrt_is_a_problem(changed: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'tensorrt', None)

    check = found(examine(changed(backend='tensorrt', plan_key=KEY), graph_s=0.1), 'plan')

    assert check.level == 'problem'
    assert 'cannot be used here: TensorRT cannot be loaded' in check.found


def test_too_little_memory_is_no_reason_to_build_nano(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    memory = psutil.virtual_memory()._replace(available=1 << 20)
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: memory)

    check = found(examine(tiny_bundle, graph_s=0.1), str(tiny_bundle))

    assert (check.level, check.advice) == ('problem', '')
    assert '1 MiB are free: stop other programs' in check.found


def test_it_looks_on_where_a_library_of_its_own_is_missing(tiny_bundle: Path) -> None:
    code = (
        'import sys; sys.modules["jsonschema"] = None; from pathlib import Path; '
        'from mobilevlm_ros.doctor import examine; '
        f'report = examine(Path({str(tiny_bundle)!r}), graph_s=0.1); '
        'print([check.name for check in report.checks if check.level == "problem"])'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(['jsonschema', str(tiny_bundle)])
