"""What is installed, whether a bundle fits, what the ROS graph offers, and what to do next.

Never raises for what it finds wrong: that is its result.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from mobilevlm_ros.errors import MobileVLMError
from mobilevlm_ros.types import Check

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
    ('onnxruntime', 'onnxruntime', True, 'pip install onnxruntime'),
    ('llama_cpp', 'llama-cpp-python', True, 'pip install llama-cpp-python==0.3.36'),
    ('jsonschema', 'jsonschema', True, 'pip install jsonschema'),
    ('rclpy', 'ros-rclpy', False, 'for the node: source your ROS 2 (source /opt/ros/DISTRO/setup.bash)'),
    ('mobilevlm_msgs', 'mobilevlm_msgs', False, 'for the node: build and source the workspace (colcon build)'),
    ('tensorrt', 'tensorrt', False, ''),
    ('openvino', 'openvino', False, ''),
)


def examine(bundle: Path, *, graph_s: float) -> Report:
    """Look at everything.

    :param bundle: directory of the bundle that would be used.
    :param graph_s: how long to listen to the ROS graph, in seconds.
    """
    report = Report()
    report.checks += [_machine(), _memory()]
    report.checks += [_library(*row) for row in _LIBRARIES]
    report.checks.append(_bundle(bundle))
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


def _bundle(path: Path) -> Check:
    from mobilevlm_ros.runtime.bundle import open_bundle
    from mobilevlm_ros.runtime.loading import check_memory

    try:
        bundle = open_bundle(path)
        check_memory(bundle)
    except MobileVLMError as error:
        return Check('bundle', str(path), 'problem', str(error), 'mobilevlm build nano')
    found = f'{bundle.model_id}, {bundle.size_bytes >> 20} MiB, fits'
    if bundle.warning:
        return Check('bundle', str(path), 'ok', f'{found}. {bundle.warning.strip()}')
    return Check('bundle', str(path), 'ok', found)


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
