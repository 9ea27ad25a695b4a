"""Builds llama-cpp-python for the CPU at hand, once, and keeps the wheel in a cache for all checkouts.

The compiler may use every instruction of this CPU (GGML_NATIVE), so such a wheel dies with 'illegal
instruction' on a lesser one. The cache key therefore names the CPU's instruction sets.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .console import Step
from .errors import SetupError
from .process import clean_environment, ninja_progress, pip_progress, run

CMAKE_FLAGS = ('-DGGML_NATIVE=ON',)
INSTRUCTION_SETS = re.compile(
    r'^(sse|ssse|pni$|avx|fma|f16c|bmi|abm|movbe|popcnt|amx|aes|vaes|gfni|vpclmul|pclmul|sha|adx|xsave'
    r'|asimd|sve|i8mm|bf16|fp)'
)
VOCAB = 'ggml-vocab-llama-spm.gguf'
VOCAB_SHA256 = '16c3724582d59aa8bf84711894e833f916ee46a31d80e21312759c48bf8d0e69'
LEFTOVER_S = 24 * 3600  # an unfinished build of a killed run is removed after a day
LEAN = Path(__file__).with_name('lean.cmake')


def cache_folder() -> Path:
    """Return the folder for what is shared between checkouts."""
    home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(home) / 'mobilevlm_ros'


def requirement(path: Path) -> tuple[str, str]:
    """Return version and sha256 of the source distribution that a requirements file pins."""
    text = path.read_text(encoding='utf-8')
    match = re.search(r'^llama-cpp-python==(\S+) --hash=sha256:([0-9a-f]{64})$', text, re.MULTILINE)
    if not match:
        raise SetupError(f'found no pin in {path}\nexpected: llama-cpp-python==VERSION --hash=sha256:DIGEST')
    return match[1], match[2]


def cpu_flags(cpuinfo: Path = Path('/proc/cpuinfo')) -> list[str]:
    """Return the instruction sets that compiled code may come to depend on."""
    try:
        text = cpuinfo.read_text(encoding='utf-8', errors='replace')
    except OSError:
        return ['unknown']
    match = re.search(r'^(?:flags|Features)\s*:\s*(.*)$', text, re.MULTILINE)
    words = match[1].split() if match else ['unknown']
    return sorted({word for word in words if INSTRUCTION_SETS.match(word)} or {'unknown'})


def cmake_arguments() -> list[str]:
    """Return our flags, then those of CMAKE_ARGS, which win."""
    return [*CMAKE_FLAGS, *shlex.split(os.environ.get('CMAKE_ARGS', ''))]


def wheel_key(version: str, arguments: list[str], flags: list[str], machine: str, libc: str) -> str:
    """Return the name of the cache folder for one kind of wheel."""
    compiler = {name: os.environ.get(name, '') for name in ('CC', 'CXX', 'CFLAGS', 'CXXFLAGS')}
    recipe = LEAN.read_text(encoding='utf-8')
    value = json.dumps([version, arguments, flags, machine, libc, compiler, recipe])
    return f'llama-cpp-python-{version}-{machine}-{hashlib.sha256(value.encode()).hexdigest()[:12]}'


def current_key(version: str) -> str:
    """Return the key for this machine and environment."""
    return wheel_key(version, cmake_arguments(), cpu_flags(), platform.machine(), '-'.join(platform.libc_ver()))


def cached_wheel(folder: Path) -> Path | None:
    """Return the finished wheel in a cache folder."""
    wheels = sorted(folder.glob('*.whl'))
    return wheels[0] if wheels else None


def vocab_complete() -> bool:
    """Return whether the LLaMA vocabulary (a reference in tests) was kept."""
    return (cache_folder() / 'vocab' / VOCAB).is_file()


def provide(python: Path, pin: Path, step: Step, log: Path) -> Path:
    """Return the wheel for this machine, from the cache or built now. Safe to call in parallel."""
    version, sha256 = requirement(pin)
    folder = cache_folder() / 'wheels' / current_key(version)
    wheel = cached_wheel(folder)
    if wheel and vocab_complete():
        return wheel
    with _lock(folder.with_name(folder.name + '.lock'), step):
        wheel = cached_wheel(folder)
        if wheel and vocab_complete():
            return wheel
        _remove_leftovers(folder.parent)
        with tempfile.TemporaryDirectory(prefix='.building-', dir=folder.parent) as work:
            source = _download(python, pin, sha256, Path(work), step, log)
            _keep_vocab(source)
            if wheel is None:
                _build(python, source, Path(work), folder, step, log)
    wheel = cached_wheel(folder)
    if wheel is None:
        raise SetupError(f'found no wheel in {folder} after building it; see {log}')
    return wheel


def _download(python: Path, pin: Path, sha256: str, work: Path, step: Step, log: Path) -> Path:
    step.detail = 'downloading the source, 77 MB'
    run(
        [
            str(python),
            '-m',
            'pip',
            'download',
            '--no-deps',
            '--no-binary',
            'llama-cpp-python',
            '--require-hashes',
            '-r',
            str(pin),
            '-d',
            str(work),
        ],
        step,
        log,
        pip_progress,
    )
    sources = list(work.glob('*.tar.gz'))
    if len(sources) != 1:
        raise SetupError(f'found {len(sources)} source archives after the download, expected one')
    digest = hashlib.sha256(sources[0].read_bytes()).hexdigest()
    if digest != sha256:
        raise SetupError(f'found a source archive with sha256 {digest}\nexpected: {sha256}')
    return sources[0]


def _keep_vocab(source: Path) -> None:
    """Keep llama.cpp's LLaMA vocabulary and its test vectors."""
    folder = cache_folder() / 'vocab'
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(source) as archive:
        found = {
            Path(member.name).name: member
            for member in archive
            if member.isfile() and Path(member.name).name.startswith(VOCAB)
        }
        # The vocabulary comes last: where it is, the vectors are.
        for name in (f'{VOCAB}.inp', f'{VOCAB}.out', VOCAB):
            stream = archive.extractfile(found[name]) if name in found else None
            if stream is None:
                raise SetupError(f'found no {name} in {source.name}')
            content = stream.read()
            if name == VOCAB and hashlib.sha256(content).hexdigest() != VOCAB_SHA256:
                raise SetupError(f'found another {name} than expected (sha256 {VOCAB_SHA256})')
            part = folder / f'{name}.{os.getpid()}.part'
            part.write_bytes(content)
            part.replace(folder / name)


def _build(python: Path, source: Path, work: Path, folder: Path, step: Step, log: Path) -> None:
    cores = os.environ.get('CMAKE_BUILD_PARALLEL_LEVEL') or str(len(os.sched_getaffinity(0)))
    lean = work / 'lean.cmake'
    shutil.copyfile(LEAN, lean)
    arguments = [f'-DCMAKE_PROJECT_llama_cpp_INCLUDE={lean}', *cmake_arguments()]
    out = work / 'out'
    env = clean_environment(CMAKE_ARGS=shlex.join(arguments), CMAKE_BUILD_PARALLEL_LEVEL=cores, TMPDIR=str(work))
    step.detail = f'preparing to compile on {cores} cores'
    run(
        [str(python), '-m', 'pip', 'wheel', '--verbose', '--no-deps', '--no-cache-dir', str(source), '-w', str(out)],
        step,
        log,
        ninja_progress,
        env,
    )
    (out / 'built-for.json').write_text(
        json.dumps(
            {
                'cmake_args': cmake_arguments(),
                'cpu_flags': cpu_flags(),
                'machine': platform.machine(),
                'libc': platform.libc_ver(),
            },
            indent=1,
        )
        + '\n',
        encoding='utf-8',
    )
    out.rename(folder)


@contextlib.contextmanager
def _lock(path: Path, step: Step) -> Iterator[None]:
    """Hold a lock that the kernel releases when this process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w') as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                step.detail = 'waiting for another set-up that builds the same wheel'
                step.tick()
                time.sleep(0.3)
        yield


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob('.building-*'):
        if time.time() - path.stat().st_mtime > LEFTOVER_S:
            shutil.rmtree(path, ignore_errors=True)
