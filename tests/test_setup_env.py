"""The set-up: what it refuses, what it skips, and what it leaves behind when it is interrupted."""

from __future__ import annotations

import ast
import hashlib
import io
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / 'tools'
sys.path.insert(0, str(TOOLS))

import setup_env  # noqa: E402
from envkit import console, errors, llama_wheel, main, messages, process, stamps  # noqa: E402


@pytest.fixture
def step() -> console.Step:
    return console.Step('a step', io.StringIO())


# --- what it refuses


@pytest.mark.parametrize('version', [(3, 10, 13), (3, 11, 2), (3, 12, 1)])
def test_supported_pythons_have_no_problem(version: tuple[int, int, int]) -> None:
    assert setup_env.python_problem(version, 'cpython') is None


@pytest.mark.parametrize(
    ('version', 'implementation'), [((3, 9, 2), 'cpython'), ((3, 13, 0), 'cpython'), ((3, 11, 0), 'pypy')]
)
def test_other_pythons_are_named_with_the_way_out(version: tuple[int, int, int], implementation: str) -> None:
    problem = setup_env.python_problem(version, implementation)
    assert problem is not None
    assert f'{implementation} {version[0]}.{version[1]}' in problem
    assert '3.10, 3.11 or 3.12' in problem
    assert 'make venv PYTHON=' in problem


def test_the_version_check_parses_on_old_pythons() -> None:
    ast.parse((TOOLS / 'setup_env.py').read_text(encoding='utf-8'), feature_version=(3, 6))


def test_a_machine_without_ros_wheels_is_shown_the_workspace_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, 'machine', lambda: 'aarch64')
    with pytest.raises(errors.SetupError, match=r'colcon build --base-paths \. mobilevlm_msgs') as refused:
        main.check_machine()
    assert 'aarch64' in str(refused.value)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main.shutil, 'which', lambda name: None)
    with pytest.raises(errors.SetupError, match=r'missing:  a C compiler, a C\+\+ compiler'):
        main.check_machine()


@pytest.mark.parametrize(
    ('line', 'advice'),
    [
        ('OSError: [Errno 28] No space left on device', 'disk space'),
        ('fatal error: Python.h: No such file or directory', 'headers'),
        ('c++: fatal error: Killed signal terminated program', 'CMAKE_BUILD_PARALLEL_LEVEL=1'),
        ('something nobody has seen', 'run again'),
    ],
)
def test_a_failure_comes_with_advice(line: str, advice: str) -> None:
    assert advice in errors.hint_for(['before', line])


# --- what it skips


def test_a_step_is_done_once_for_the_same_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, 'VENV', tmp_path)
    done: list[str] = []

    def plan(first: str, second: str, missing: bool = False) -> list[str]:
        done.clear()
        plan = main.Plan(tmp_path / 'setup', force=False)
        plan.step('one', 'one', first, lambda step: done.append('one'))
        plan.step('two', 'two', second, lambda step: done.append('two'), chained=False, missing=missing)
        plan.step('three', 'three', '', lambda step: done.append('three'))
        return list(done)

    assert plan('a', 'b') == ['one', 'two', 'three']
    assert plan('a', 'b') == []
    assert plan('a', 'b', missing=True) == ['two']
    assert plan('a', 'c') == ['two'], 'an unchained step concerns no other'
    assert plan('x', 'c') == ['one', 'two', 'three'], 'what came after a changed step is due again'


def test_a_failed_step_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, 'VENV', tmp_path)

    def fail(step: console.Step) -> None:
        raise errors.SetupError('no')

    main.Plan(tmp_path / 'setup', force=False).step('one', 'one', 'a', lambda step: None)
    with pytest.raises(errors.SetupError):
        main.Plan(tmp_path / 'setup', force=False).step('one', 'one', 'b', fail)
    plan = main.Plan(tmp_path / 'setup', force=False)
    plan.step('one', 'one', 'a', lambda step: None)
    assert plan.done == 1, 'the failed step may have changed things: its earlier stamp must not count'


def test_a_fingerprint_sees_content_name_and_place(tmp_path: Path) -> None:
    (tmp_path / 'a').mkdir()
    one = tmp_path / 'a' / 'one'
    one.write_text('1')
    before = stamps.fingerprint(tmp_path, stamps.tree(tmp_path))
    assert before == stamps.fingerprint(tmp_path, stamps.tree(tmp_path))
    one.write_text('2')
    changed = stamps.fingerprint(tmp_path, stamps.tree(tmp_path))
    one.rename(tmp_path / 'one')
    moved = stamps.fingerprint(tmp_path, stamps.tree(tmp_path))
    assert len({before, changed, moved}) == 3
    assert stamps.fingerprint(tmp_path, [], 'ab', 'c') != stamps.fingerprint(tmp_path, [], 'a', 'bc')


# --- the wheel of llama-cpp-python


def test_the_wheel_key_names_all_that_the_binary_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    base = ('0.3.36', ['-DGGML_NATIVE=ON'], ['avx2', 'fma'], 'x86_64', 'glibc-2.36')
    others = [
        ('0.3.37', *base[1:]),
        (base[0], ['-DGGML_NATIVE=OFF'], *base[2:]),
        (*base[:2], ['avx', 'fma'], *base[3:]),
        (*base[:3], 'aarch64', base[4]),
        (*base[:4], 'glibc-2.31'),
    ]
    for name in ('CC', 'CXX', 'CFLAGS', 'CXXFLAGS'):
        monkeypatch.delenv(name, raising=False)
    keys = {llama_wheel.wheel_key(*arguments) for arguments in [base, *others]}
    assert len(keys) == 6
    assert llama_wheel.wheel_key(*base) == llama_wheel.wheel_key(*base)
    monkeypatch.setenv('CXXFLAGS', '-O0')
    assert llama_wheel.wheel_key(*base) not in keys


def test_cpu_flags_are_instruction_sets_only(tmp_path: Path) -> None:
    cpuinfo = tmp_path / 'cpuinfo'
    cpuinfo.write_text('processor\t: 0\nflags\t\t: fpu avx2 nopl avx512f hypervisor fma sse4_2 ibrs\n')
    assert llama_wheel.cpu_flags(cpuinfo) == ['avx2', 'avx512f', 'fma', 'fpu', 'sse4_2']
    cpuinfo.write_text('processor\t: 0\nFeatures\t: fp asimd evtstrm sve i8mm\n')
    assert llama_wheel.cpu_flags(cpuinfo) == ['asimd', 'fp', 'i8mm', 'sve']
    assert llama_wheel.cpu_flags(tmp_path / 'none') == ['unknown']


def test_the_pin_carries_its_hash(tmp_path: Path) -> None:
    version, digest = llama_wheel.requirement(ROOT / 'requirements' / 'llama.txt')
    assert version == '0.3.36'
    assert len(digest) == 64
    loose = tmp_path / 'llama.txt'
    loose.write_text('llama-cpp-python>=0.3\n')
    with pytest.raises(errors.SetupError, match='found no pin'):
        llama_wheel.requirement(loose)


def test_a_finished_wheel_is_used_without_a_build(
    tmp_path: Path, step: console.Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    pin = ROOT / 'requirements' / 'llama.txt'
    folder = tmp_path / 'mobilevlm_ros' / 'wheels' / llama_wheel.current_key('0.3.36')
    folder.mkdir(parents=True)
    (folder / 'some.whl').write_bytes(b'')
    vocab = tmp_path / 'mobilevlm_ros' / 'vocab' / llama_wheel.VOCAB
    vocab.parent.mkdir()
    vocab.write_bytes(b'')
    assert llama_wheel.provide(Path('/no/python'), pin, step, tmp_path / 'log') == folder / 'some.whl'


def test_an_interrupted_build_leaves_nothing(
    tmp_path: Path, step: console.Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))

    def interrupt(*arguments: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(llama_wheel, '_download', interrupt)
    with pytest.raises(KeyboardInterrupt):
        llama_wheel.provide(Path('/no/python'), ROOT / 'requirements' / 'llama.txt', step, tmp_path / 'log')
    left = [path.name for path in (tmp_path / 'mobilevlm_ros' / 'wheels').iterdir()]
    assert [name for name in left if not name.endswith('.lock')] == []


def test_the_kept_vocabulary_is_the_published_one() -> None:
    path = llama_wheel.cache_folder() / 'vocab' / llama_wheel.VOCAB
    if not path.is_file():
        pytest.skip(f'{path} is missing: make venv keeps it when it builds llama-cpp-python')
    assert hashlib.sha256(path.read_bytes()).hexdigest() == llama_wheel.VOCAB_SHA256


# --- the messages


def test_foreign_include_folders_are_rewritten(tmp_path: Path) -> None:
    file = tmp_path / 'some_msgs' / 'cmake' / 'export.cmake'
    file.parent.mkdir(parents=True)
    file.write_text(
        'set_target_properties(t PROPERTIES\n'
        '  INTERFACE_INCLUDE_DIRECTORIES "/opt/python/cp311-cp311/include/python3.11;'
        '/opt/python/cp311-cp311/lib/python3.11/site-packages/numpy/_core/include"\n'
        '  OTHER "${_IMPORT_PREFIX}/include/some_msgs")\n'
    )
    untouched = tmp_path / 'some_msgs' / 'cmake' / 'other.cmake'
    untouched.write_text('set(x "${_IMPORT_PREFIX}/include/some_msgs")\n')
    assert messages.rewrite_include_paths(tmp_path, '/here/include/python3.12', '/here/numpy/_core/include') == 1
    assert '"/here/include/python3.12;/here/numpy/_core/include"' in file.read_text()
    assert '${_IMPORT_PREFIX}/include/some_msgs' in file.read_text()
    assert messages.rewrite_include_paths(tmp_path, '/here/include/python3.12', '/here/numpy/_core/include') == 0


def test_only_files_of_the_environment_are_removed(tmp_path: Path) -> None:
    venv, outside = tmp_path / 'venv', tmp_path / 'outside'
    venv.mkdir()
    (venv / 'old.py').touch()
    outside.touch()
    manifest = tmp_path / 'install_manifest.txt'
    manifest.write_text(f'{venv / "old.py"}\n{outside}\n{venv / "gone.py"}\n')
    messages.remove_installed(manifest, venv)
    assert not (venv / 'old.py').exists()
    assert outside.exists()


# --- running commands


def test_a_failed_command_keeps_its_last_lines(tmp_path: Path, step: console.Step) -> None:
    code = 'for i in range(50): print("line", i)\nraise SystemExit(3)'
    with pytest.raises(errors.CommandFailed) as failed:
        process.run([sys.executable, '-c', code], step, tmp_path / 'log')
    assert failed.value.returncode == 3
    assert failed.value.tail == [f'line {i}' for i in range(30, 50)]
    assert (tmp_path / 'log').read_text().count('line') == 50 + 1


def test_an_interrupt_ends_all_that_was_started(tmp_path: Path, step: console.Step) -> None:
    pid_file = tmp_path / 'pid'
    script = f'sleep 60 & echo $! > {pid_file}; echo started; wait'

    def interrupt(line: str) -> str | None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        process.run(['sh', '-c', script], step, tmp_path / 'log', interrupt)
    pid = int(pid_file.read_text())
    for _ in range(50):
        if not alive(pid):
            return
        time.sleep(0.1)
    pytest.fail('a child of the interrupted command still runs')


def alive(pid: int) -> bool:
    try:
        state = Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0]
    except OSError:
        return False
    return state not in 'ZX'


def test_another_ros_does_not_leak_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('PYTHONPATH', '/opt/ros/humble/lib/python3.10/site-packages')
    monkeypatch.setenv('LD_LIBRARY_PATH', f'/opt/ros/humble/lib{os.pathsep}/usr/local/cuda/lib64')
    env = process.clean_environment()
    assert 'PYTHONPATH' not in env
    assert env['LD_LIBRARY_PATH'] == '/usr/local/cuda/lib64'


@pytest.mark.parametrize(
    ('line', 'detail'),
    [
        ('Collecting numpy==2.4.6', 'looking at numpy'),
        ('  Downloading numpy-2.4.6-cp311-cp311-x.whl (16.6 MB)', 'downloading numpy, 16.6 MB'),
        ('Installing collected packages: a, b, c', 'installing 3 packages'),
        ('anything else', None),
    ],
)
def test_pip_is_followed(line: str, detail: str | None) -> None:
    assert process.pip_progress(line) == detail


def test_compilers_are_followed() -> None:
    assert process.ninja_progress('  [12/83] Building CXX object x.o') == '12 of 83 compiled'
    assert process.ninja_progress('[ 45%] Building CXX object x.o') == '45 % compiled'
    assert process.ninja_progress('warning: [12]') is None


def test_a_step_is_one_line_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    step = console.Step('compiling', stream)
    step.detail = '3 of 9'
    step.tick()
    step.end('ok')
    assert stream.getvalue().count('\n') == 1
    assert '3 of 9' in stream.getvalue()
    assert console.elapsed(59.4) == '59 s'
    assert console.elapsed(245) == '4 min 05 s'


def test_find_python_prints_one_that_runs() -> None:
    found = subprocess.run([str(TOOLS / 'find_python')], capture_output=True, text=True, check=True).stdout.strip()
    code = 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'
    assert subprocess.run([found, '-c', code], check=False).returncode == 0
