"""The steps of the set-up, in order."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from . import llama_wheel, messages
from .console import Step, elapsed
from .errors import CommandFailed, SetupError, hint_for
from .process import clean_environment, pip_progress, run
from .stamps import Stamp, fingerprint, tree

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / '.venv'
LOG = VENV / 'setup.log'
REQUIREMENTS = ROOT / 'requirements'
NEEDED_BYTES = 3 << 30
DATA = ('launch', 'config', 'engines', 'models')

Work = Callable[[Step], None]


class Plan:
    """Runs steps, each only when its inputs or those of an earlier step have changed."""

    def __init__(self, folder: Path, force: bool) -> None:
        """Keep stamps in a folder; with `force` nothing counts as done."""
        self._folder = folder
        self._force = force
        self._chain = ''
        self.done = 0

    def step(self, name: str, title: str, inputs: str, work: Work, chained: bool = True, missing: bool = False) -> None:
        """Do one step if its stamp is stale or something it makes is missing.

        A chained step, when its inputs change, makes those after it due.
        """
        value = fingerprint(ROOT, [], self._chain, inputs)
        if chained:
            self._chain = value
        stamp = Stamp(self._folder, name)
        if stamp.fresh(value) and not self._force and not missing:
            return
        if VENV.is_dir():
            stamp.forget()
        shown = Step(title)
        try:
            work(shown)
        except BaseException as error:
            shown.end('FAILED ' if isinstance(error, Exception) else 'stopped')
            raise
        stamp.set(value)
        shown.end('ok')
        self.done += 1


def check_machine() -> None:
    """Refuse, with the way out, a machine for which there are no ROS 2 wheels or no compiler."""
    machine, system = platform.machine(), sys.platform
    if (system, machine) != ('linux', 'x86_64') or 'musl' in (sysconfig.get_config_var('SOABI') or ''):
        raise SetupError(
            f'found:    {system} on {machine} ({sysconfig.get_config_var("SOABI")})\n'
            'expected: Linux on x86_64 with glibc, the only platform with ROS 2 wheels\n'
            'run:      install ROS 2 (Humble or newer) and llama-cpp-python and onnxruntime with pip, then\n'
            '          source /opt/ros/<distro>/setup.bash\n'
            '          colcon build --base-paths . mobilevlm_msgs'
        )
    missing = [
        name
        for name, choices in (
            ('a C compiler', (os.environ.get('CC', 'cc'), 'gcc', 'clang')),
            ('a C++ compiler', (os.environ.get('CXX', 'c++'), 'g++', 'clang++')),
        )
        if not any(shutil.which(choice.split()[0]) for choice in choices)
    ]
    header = Path(sysconfig.get_paths()['include']) / 'Python.h'
    if not header.is_file():
        missing.append(f"Python's C headers ({header})")
    if missing:
        raise SetupError(
            f'missing:  {", ".join(missing)}\n'
            'expected: compilers and headers, to build llama.cpp and the ROS messages\n'
            'run:      install them (on Debian and Ubuntu: build-essential python3-dev), or choose an '
            'interpreter\n          that brings its headers: make venv PYTHON=/path/to/python3.11'
        )


def make_venv(step: Step) -> None:
    """Create .venv, or keep a healthy one of the same Python version."""
    wanted = f'{sys.version_info[0]}.{sys.version_info[1]}'
    python = VENV / 'bin' / 'python'
    if (VENV / 'pyvenv.cfg').is_file() and venv_version(python) == wanted:
        return
    if VENV.exists() and not (VENV / 'pyvenv.cfg').exists() and any(VENV.iterdir()):
        raise SetupError(
            f'found:    {VENV}, which is no virtual environment\n'
            'expected: no such folder, or an environment of an earlier set-up\n'
            'run:      move it away'
        )
    free = shutil.disk_usage(ROOT).free
    if free < NEEDED_BYTES:
        raise SetupError(
            f'found:    {free / 2**30:.1f} GB free at {ROOT}\nexpected: 3 GB\nrun:      free some disk space'
        )
    if VENV.exists():
        shutil.rmtree(VENV)
    VENV.mkdir()
    run([sys.executable, '-m', 'venv', str(VENV)], step, LOG)


def venv_version(python: Path) -> str:
    """Return 'major.minor' of an interpreter, or '' if it does not run."""
    code = 'import sys; print("%d.%d" % sys.version_info[:2]); import pip'
    try:
        return subprocess.run(
            [str(python), '-c', code], capture_output=True, text=True, check=True, env=clean_environment(), timeout=60
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ''


def pip_install(*arguments: str) -> Work:
    """Return work that installs with the environment's pip."""

    def work(step: Step) -> None:
        run([str(VENV / 'bin' / 'python'), '-m', 'pip', 'install', *arguments], step, LOG, pip_progress)

    return work


def requirements(*names: str, options: tuple[str, ...] = ()) -> tuple[str, Work]:
    """Return fingerprint and work for requirements files and those that they name."""
    files = [REQUIREMENTS / f'{name}.txt' for name in names]
    arguments = [part for file in files for part in ('-r', str(file))]
    read: set[Path] = set()
    while files:
        file = files.pop()
        if file not in read:
            read.add(file)
            files += [REQUIREMENTS / name for name in re.findall(r'^-[rc] (\S+)', file.read_text(), re.M)]
    return fingerprint(ROOT, sorted(read)), pip_install(*options, *arguments)


def install_llama(step: Step) -> None:
    """Install the cached or freshly built wheel and see that it runs here."""
    python = VENV / 'bin' / 'python'
    wheel = llama_wheel.provide(python, REQUIREMENTS / 'llama.txt', step, LOG)
    step.detail = 'installing'
    pip_install('--no-deps', '--force-reinstall', str(wheel))(step)
    try:
        run([str(python), '-c', 'import llama_cpp; print(llama_cpp.llama_print_system_info())'], step, LOG)
    except CommandFailed as error:
        raise SetupError(
            f'found:    a wheel that does not run on this CPU (exit status {error.returncode}): {wheel}\n'
            'expected: import llama_cpp works\n'
            f'run:      rm -r {wheel.parent}   and then again what you just ran'
        ) from error


def install_package(step: Step) -> None:
    """Install this package in editable form, its shared files and executables as links.

    pip leaves data files out of editable installs; with the links the environment is what ROS tools
    expect of a package (get_package_share_directory, ros2 run, ros2 launch).
    """
    pip_install('--no-deps', '--no-build-isolation', '-e', str(ROOT))(step)
    for name in ('package.xml', *DATA):
        link(VENV / 'share' / 'mobilevlm_ros' / name, ROOT / name)
    link(VENV / 'share/ament_index/resource_index/packages/mobilevlm_ros', ROOT / 'resource/mobilevlm_ros')
    for name in ('vqa_node', 'mobilevlm'):
        link(VENV / 'lib' / 'mobilevlm_ros' / name, VENV / 'bin' / name)


def link(path: Path, target: Path) -> None:
    """Make `path` a link to `target`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        path.unlink()
    path.symlink_to(target)


def set_up(with_dev: bool, force: bool) -> None:
    """Run all steps that are due."""
    version = f'{platform.python_version_tuple()[:2]} {ROOT}'
    plan = Plan(VENV / 'setup', force)
    start = time.monotonic()
    if venv_version_is_stale(version):
        check_machine()
    plan.step('venv', f'Python {platform.python_version()} environment in .venv', version, make_venv)
    plan.step('ros', 'ROS 2 wheels', *requirements('ros'))
    plan.step('runtime', 'packages to run and to assemble models', *requirements('runtime', 'build'))
    pinned = llama_wheel.requirement(REQUIREMENTS / 'llama.txt')[0]
    key = llama_wheel.current_key(pinned)
    cached = llama_wheel.cached_wheel(llama_wheel.cache_folder() / 'wheels' / key)
    title = (
        'llama.cpp, compiled for this CPU earlier'
        if cached
        else 'llama.cpp, compiled for this CPU (once, 3 to 8 minutes)'
    )
    plan.step('llama', title, key, install_llama, chained=False, missing=not llama_wheel.vocab_complete())
    plan.step(
        'messages',
        'messages of mobilevlm_msgs',
        fingerprint(ROOT, tree(ROOT / 'mobilevlm_msgs'), Path(messages.__file__).read_text()),
        lambda step: messages.install(ROOT / 'mobilevlm_msgs', ROOT / 'build' / 'msgs', VENV, step, LOG),
        chained=False,
    )
    described = [ROOT / name for name in ('setup.py', 'setup.cfg', 'package.xml')]
    described += (ROOT / 'mobilevlm_ros').rglob('*.[ch]')
    described += [*REQUIREMENTS.glob('*.txt'), Path(__file__)]
    plan.step('package', 'mobilevlm_ros itself, editable', fingerprint(ROOT, described), install_package, chained=False)
    if with_dev:
        plan.step('dev', 'packages for tests and lint (torch and transformers as references)', *requirements('dev'))
        plan.step('dev-alone', 'packages without what they pull in', *requirements('dev-alone', options=('--no-deps',)))
    if plan.done:
        print(f'  ready in {elapsed(time.monotonic() - start)}; log in {LOG.relative_to(ROOT)}')


def venv_version_is_stale(version: str) -> bool:
    """Return whether anything at all was set up with other inputs, or never."""
    return not Stamp(VENV / 'setup', 'venv').fresh(fingerprint(ROOT, [], '', version))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let one set-up at a time work on this checkout."""
    descriptor = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print('  .. waiting for another set-up of this checkout', flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def main(arguments: list[str]) -> int:
    """Set up; explain a failure."""
    parser = argparse.ArgumentParser(prog='setup_env.py', description='Make or refresh .venv.')
    parser.add_argument(
        '--with', dest='extras', action='append', choices=['dev'], default=[], help='dev: also what tests and lint need'
    )
    parser.add_argument('--force', action='store_true', help='do every step again')
    options = parser.parse_args(arguments)
    for sign in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, signal.default_int_handler)
    try:
        with alone():
            set_up('dev' in options.extras, options.force)
    except CommandFailed as error:
        print(f'\nThe last lines of {LOG}:', file=sys.stderr)
        for line in error.tail:
            print(f'  | {line}', file=sys.stderr)
        print(
            f'\nfound:    {Path(error.command[0]).name} ended with status {error.returncode}\n'
            f'run:      {hint_for(error.tail)}',
            file=sys.stderr,
        )
        return 1
    except SetupError as error:
        print(f'\n{error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\nstopped; finished steps are kept', file=sys.stderr)
        return 130
    return 0
