"""What the figures were measured on and with: processor, memory, versions, the commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

import mobilevlm_ros

__all__ = ['describe_machine', 'git_describe', 'usable_cores', 'versions']

# What decides which kernels run: of x86, then of ARM.
_FLAGS = (
    *('avx', 'avx2', 'fma', 'f16c', 'avx_vnni', 'avx512f', 'avx512bw', 'avx512_vnni', 'avx512_bf16', 'amx_int8'),
    *('amx_bf16', 'asimd', 'asimdhp', 'asimddp', 'i8mm', 'bf16', 'sve', 'sve2'),
)
_DISTRIBUTIONS = ('llama-cpp-python', 'onnxruntime', 'openvino', 'numpy', 'torch', 'transformers', 'tensorrt')


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def describe_machine() -> dict[str, Any]:
    """Plain data for the record and the cost card."""
    described = _cpuinfo()
    flags = set(described.get('flags', described.get('Features', '')).split())
    memory = psutil.virtual_memory()
    return {
        'cpu': described.get('model name') or _board() or platform.processor() or 'unknown',
        'architecture': platform.machine(),
        'flags': [flag for flag in _FLAGS if flag in flags],
        'cores': usable_cores(),
        'memory_gib': round(memory.total / 2**30, 1),
        'available_gib': round(memory.available / 2**30, 1),
        'system': platform.platform(),
        'load_average_1min': os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    """Of what takes part; libraries that are not installed are left out."""
    found = {'python': platform.python_version(), 'mobilevlm_ros': mobilevlm_ros.__version__}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_describe() -> str:
    """The commit of the checkout that runs, ``-dirty`` if it was changed; empty outside one."""
    command = ['git', '-C', str(Path(__file__).parent), 'describe', '--always', '--dirty', '--tags']
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ''


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    try:
        first = Path('/proc/cpuinfo').read_text().split('\n\n')[0]
    except OSError:
        return {}
    pairs = (line.partition(':') for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _board() -> str:
    """The name of an ARM board, which /proc/cpuinfo does not tell."""
    try:
        return Path('/proc/device-tree/model').read_text().strip('\0\n ')
    except OSError:
        return ''
