"""Runs the commands of a step: output to the log, progress to the console, nothing left running."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from .console import Step
from .errors import CommandFailed

TAIL_LINES = 20
# A sourced ROS or an activated environment must not leak into this one.
FOREIGN = (
    'PYTHONPATH',
    'PYTHONHOME',
    'VIRTUAL_ENV',
    'AMENT_PREFIX_PATH',
    'CMAKE_PREFIX_PATH',
    'COLCON_PREFIX_PATH',
    'PIP_REQUIRE_VIRTUALENV',
    '_ROS_WHEELS_BOOTSTRAP_COMPLETE',
)

Progress = Callable[[str], 'str | None']


def clean_environment(**extra: str) -> dict[str, str]:
    """Return the environment for commands: ours without what belongs to another installation."""
    env = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    paths = env.pop('LD_LIBRARY_PATH', '').split(os.pathsep)
    kept = [path for path in paths if path and '/opt/ros/' not in path]
    if kept:
        env['LD_LIBRARY_PATH'] = os.pathsep.join(kept)
    env.update(
        PYTHONUNBUFFERED='1',
        PIP_DISABLE_PIP_VERSION_CHECK='1',
        PIP_NO_INPUT='1',
        PIP_PROGRESS_BAR='off',
        PIP_NO_COLOR='1',
    )
    env.update(extra)
    return env


def pip_progress(line: str) -> str | None:
    """Return a short detail for a line of pip's output."""
    line = line.strip()
    match = re.match(r'Collecting ([\w.-]+)', line)
    if match:
        return f'looking at {match[1]}'
    match = re.match(r'Downloading (\S+) \(([^)]+)\)', line)
    if match:
        return f'downloading {match[1].rsplit("/", 1)[-1].split("-")[0]}, {match[2]}'
    if line.startswith('Installing collected packages:'):
        return f'installing {line.count(",") + 1} packages'
    return None


def ninja_progress(line: str) -> str | None:
    """Return 'k of n compiled' for ninja's '[k/n]' or make's '[ p%]' lines."""
    match = re.search(r'\[(\d+)/(\d+)\]', line)
    if match:
        return f'{match[1]} of {match[2]} compiled'
    match = re.match(r'\s*\[ *(\d+)%\]', line)
    return f'{match[1]} % compiled' if match else None


def run(
    command: list[str],
    step: Step,
    log: Path,
    progress: Progress | None = None,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> None:
    """Run a command to its end; raise CommandFailed if it fails.

    An interrupt ends the command and all that it started before it is passed on.
    """
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    lines: queue.Queue[str | None] = queue.Queue()
    with log.open('a', encoding='utf-8', errors='replace') as logfile:
        logfile.write(f'\n$ {" ".join(command)}\n')
        logfile.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
            env=env or clean_environment(),
            cwd=cwd,
            start_new_session=True,
        )
        reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
        reader.start()
        try:
            while True:
                try:
                    line = lines.get(timeout=0.2)
                except queue.Empty:
                    step.tick()
                    continue
                if line is None:
                    break
                logfile.write(line)
                tail.append(line.rstrip())
                detail = progress(line) if progress else None
                if detail:
                    step.detail = detail
                    step.tick()
            returncode = process.wait()
        except BaseException:
            _end(process)
            raise
    if returncode:
        raise CommandFailed(command, returncode, list(tail))


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _end(process: subprocess.Popen[str]) -> None:
    """End a command with everything it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            continue
        # The leader is gone; its compilers may not be.
