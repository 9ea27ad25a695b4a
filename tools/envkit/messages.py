"""Generates and installs mobilevlm_msgs into the environment, as a ROS installation would."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from .console import Step
from .process import clean_environment, ninja_progress, run

# The wheels' CMake files name the include folders of the machine that built them.
FOREIGN_PYTHON = re.compile(r'/[^;"\s]*/include/python3\.\d+(?=[;"])')
FOREIGN_NUMPY = re.compile(r'/[^;"\s]*/numpy/_?core/include(?=[;"])')


def rewrite_include_paths(share: Path, python_include: str, numpy_include: str) -> int:
    """Point the CMake files below share/*/cmake to this machine's headers; return how many changed."""
    changed = 0
    for path in share.glob('*/cmake/*.cmake'):
        old = path.read_text(encoding='utf-8', errors='surrogateescape')
        new = FOREIGN_PYTHON.sub(lambda _: python_include, old)
        new = FOREIGN_NUMPY.sub(lambda _: numpy_include, new)
        if new != old:
            path.write_text(new, encoding='utf-8', errors='surrogateescape')
            changed += 1
    return changed


def include_paths(python: Path) -> tuple[str, str]:
    """Return the include folders of an environment's Python and NumPy."""
    code = 'import sysconfig, numpy; print(sysconfig.get_paths()["include"]); print(numpy.get_include())'
    output = subprocess.run(
        [str(python), '-c', code], check=True, capture_output=True, text=True, env=clean_environment()
    ).stdout.splitlines()
    return output[0], output[1]


def tools(venv: Path) -> tuple[str, str] | None:
    """Return cmake and ninja of the environment or of the machine, if both are there."""
    path = f'{venv / "bin"}:{clean_environment().get("PATH", "")}'
    cmake, ninja = shutil.which('cmake', path=path), shutil.which('ninja', path=path)
    return (cmake, ninja) if cmake and ninja else None


def install(source: Path, build: Path, venv: Path, step: Step, log: Path) -> None:
    """Build and install; what an earlier build installed is removed first."""
    python = venv / 'bin' / 'python'
    if tools(venv) is None:
        run([str(python), '-m', 'pip', 'install', '-r', str(source.parent / 'requirements' / 'cmake.txt')], step, log)
    found = tools(venv)
    assert found is not None
    cmake, ninja = found
    rewrite_include_paths(venv / 'share', *include_paths(python))
    remove_installed(build / 'install_manifest.txt', venv)
    shutil.rmtree(build, ignore_errors=True)
    env = clean_environment(AMENT_PREFIX_PATH=str(venv), CMAKE_PREFIX_PATH=str(venv))
    step.detail = 'configuring'
    run(
        [
            cmake,
            '-G',
            'Ninja',
            '-S',
            str(source),
            '-B',
            str(build),
            f'-DCMAKE_MAKE_PROGRAM={ninja}',
            f'-DCMAKE_INSTALL_PREFIX={venv}',
            f'-DPython3_EXECUTABLE={python}',
            '-DCMAKE_BUILD_TYPE=Release',
            '-DBUILD_TESTING=OFF',
        ],
        step,
        log,
        None,
        env,
    )
    run([cmake, '--build', str(build)], step, log, ninja_progress, env)
    run([cmake, '--install', str(build)], step, log, None, env)


def remove_installed(manifest: Path, venv: Path) -> None:
    """Remove the files that a manifest lists, so that a deleted message does not live on."""
    if not manifest.is_file():
        return
    for line in manifest.read_text(encoding='utf-8').splitlines():
        path = Path(line)
        if venv in path.parents:
            path.unlink(missing_ok=True)
