"""What is installed, whether a bundle fits, what the ROS graph offers, and what to do next.

Never raises for what it finds wrong: that is its result.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from mobilevlm_ros.errors import MobileVLMError, PlanMismatchError
from mobilevlm_ros.types import Check

if TYPE_CHECKING:
    from mobilevlm_ros.runtime.bundle import Bundle

__all__ = ['Report', 'examine', 'print_report']


@dataclass
class Report:
    """All findings."""

    checks: list[Check] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether questions can be answered on this machine."""
        return all(check.level != 'problem' for check in self.checks)

    @property
    def next_steps(self) -> list[str]:
        """The advice of the problems, then of the notes; each once."""
        ordered = sorted((c for c in self.checks if c.advice), key=lambda check: check.level != 'problem')
        return list(dict.fromkeys(check.advice for check in ordered))


# module, distribution, needed to answer, advice
_LIBRARIES = (
    ('numpy', 'numpy', True, 'pip install numpy'),
    ('PIL', 'pillow', True, 'pip install pillow'),
    ('cv2', 'opencv-python-headless', True, 'pip install opencv-python-headless (or apt install python3-opencv)'),
    ('llama_cpp', 'llama-cpp-python', True, 'pip install llama-cpp-python==0.3.36'),
    ('jsonschema', 'jsonschema', True, 'pip install jsonschema'),
    ('rclpy', 'ros-rclpy', False, 'for the node: source your ROS 2 (source /opt/ros/DISTRO/setup.bash)'),
    ('mobilevlm_msgs', 'mobilevlm_msgs', False, 'for the node: build and source the workspace (colcon build)'),
)
# The same of the vision backends, of which a bundle needs one.
_BACKENDS = (
    ('onnxruntime', 'onnxruntime', 'pip install onnxruntime'),
    ('openvino', 'openvino', 'pip install openvino'),
    ('tensorrt', 'tensorrt', 'pip install tensorrt (on a Jetson: sudo apt install python3-libnvinfer)'),
)
_DEFAULT_BACKEND = 'onnxruntime'


def examine(bundle: Path, *, graph_s: float) -> Report:
    """Look at everything.

    :param bundle: directory of the bundle that would be used.
    :param graph_s: how long to listen to the ROS graph, in seconds.
    """
    report = Report()
    report.checks += [_machine(), _memory()]
    kernel = _q4_kernel()  # before llama.cpp is loaded in any other way
    opened, found = _bundle(bundle)
    backend = opened.vision['backend'] if opened else _DEFAULT_BACKEND
    report.checks += [_library(*row) for row in _LIBRARIES]
    report.checks.append(kernel)
    for module, distribution, advice in _BACKENDS:
        needed = module == backend
        report.checks.append(_library(module, distribution, needed, advice if needed else ''))
    report.checks.append(found)
    if opened:
        report.checks.append(_parity(opened))
        report.checks += [_plan(opened)] if backend == 'tensorrt' else []
    names = {check.name: check.level for check in report.checks}
    if names['rclpy'] == names['mobilevlm_msgs'] == 'ok':
        from mobilevlm_ros.node.graph import examine_graph

        report.checks += examine_graph(graph_s)
    return report


def _machine() -> Check:
    cores = len(os.sched_getaffinity(0))
    found = f'Python {platform.python_version()} on {platform.machine()}, {cores} cores'
    return Check('machine', 'python', 'ok', found)


def _memory() -> Check:
    memory = psutil.virtual_memory()
    return Check('machine', 'memory', 'ok', f'{memory.available >> 20} of {memory.total >> 20} MiB free')


def _library(module: str, distribution: str, needed: bool, advice: str) -> Check:
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # a broken library raises whatever it likes; that is a finding, not our failure
        optional = 'not installed' if isinstance(error, ModuleNotFoundError) else f'does not load: {error}'
        return Check('library', module, 'problem' if needed else 'note', optional, advice)
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = str(getattr(loaded, '__version__', 'version unknown'))
    return Check('library', module, 'ok', version)


def _q4_kernel() -> Check:
    """Which products of 4-bit weights are used; llama.cpp's own are right, too, but slower on some CPUs."""
    from mobilevlm_ros.runtime.language import q4_kernel
    from mobilevlm_ros.runtime.language.llamacpp_library import load_library

    try:
        load_library()
    except MobileVLMError as error:
        return Check('library', '4-bit kernel', 'note', str(error))
    found = q4_kernel.choice()
    return Check('library', '4-bit kernel', 'ok', f"{found.kernel}'s: {found.reason}")


def _bundle(path: Path) -> tuple[Bundle | None, Check]:
    """The bundle, None if it cannot be opened, and what is found of it."""
    bundle = None
    try:
        from mobilevlm_ros.runtime.bundle import open_bundle
        from mobilevlm_ros.runtime.loading import check_memory

        bundle = open_bundle(path)
        check_memory(bundle)
    except MobileVLMError as error:
        return bundle, Check('bundle', str(path), 'problem', str(error), '' if bundle else 'mobilevlm build nano')
    except ImportError as error:  # one of the libraries above, with its advice
        return None, Check('bundle', str(path), 'problem', f'cannot be read here: {error}')
    found = f'{bundle.model_id}, {bundle.size_bytes >> 20} MiB, fits'
    if bundle.warning:
        found += f'. {bundle.warning.strip()}'
    return bundle, Check('bundle', str(path), 'ok', found)


def _parity(bundle: Bundle) -> Check:
    """How near to PyTorch the bundle is, by the report that its builder wrote (``build/parity.py``)."""
    name = bundle.description.get('parity')
    if name is None:
        return Check('bundle', 'parity', 'note', 'was not compared with PyTorch when it was built')
    try:
        report = json.loads((bundle.path / name).read_text())
        failed = [str(stage['stage']) for stage in report['stages'] if not stage['passed']]
        worst = {}
        for kind in ('visual tokens', 'logits'):
            # With a plan there are visual tokens of the graph and of the plan.
            found = [float(s['worst']) for s in report['stages'] if str(s['stage']).startswith(kind)]
            if found:
                worst[kind] = min(found)
        text = ', '.join(f'{kind} {value:.6f}' for kind, value in worst.items())
        reference = str(report['reference'])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return Check('bundle', 'parity', 'note', f'{name} is no parity report ({error!r})', 'build the bundle again')
    if failed:
        return Check('bundle', 'parity', 'problem', f'differs in {", ".join(failed)}', 'build the bundle again')
    return Check('bundle', 'parity', 'ok', f'worst cosine to {reference}: {text}')


def _plan(bundle: Bundle) -> Check:
    """Whether the TensorRT plan fits the TensorRT and the GPU of this machine."""
    from mobilevlm_ros.runtime.vision.cuda import open_cuda
    from mobilevlm_ros.runtime.vision.plan_key import PlanKey, check_plan
    from mobilevlm_ros.runtime.vision.tensorrt import key_here, load_tensorrt

    command = f'mobilevlm plan {bundle.path}'
    if 'plan_key' not in bundle.vision:
        return Check('bundle', 'plan', 'problem', 'has no TensorRT plan for this GPU yet', command)
    key = PlanKey.from_dict(bundle.vision['plan_key'])
    try:
        here = key_here(load_tensorrt(), open_cuda().gpu(), bundle.graph_sha256 or key.onnx_sha256, key.precision)
        check_plan(key, here, rebuild=command)
    except PlanMismatchError as error:
        return Check('bundle', 'plan', 'problem', str(error), command)
    except MobileVLMError as error:
        return Check('bundle', 'plan', 'problem', f'cannot be used here: {error}')
    return Check('bundle', 'plan', 'ok', f'TensorRT {key.tensorrt} on {key.gpu}')


def print_report(report: Report) -> None:
    """Print the findings for people."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=None, show_header=False, pad_edge=False)
    marks = {'ok': Text('ok', 'green'), 'note': Text('–', 'dim'), 'problem': Text('problem', 'bold red')}
    for check in report.checks:
        table.add_row(Text(check.area, 'dim'), check.name, marks[check.level], Text(check.found))
    console.print(table)
    console.print()
    if report.healthy:
        console.print('Questions can be answered here. Try: mobilevlm ask IMAGE "What is on the table?"', markup=False)
    for step in report.next_steps:
        console.print(f'next: {step}', markup=False)
