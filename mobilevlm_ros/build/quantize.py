"""Quantises a language model with llama.cpp, in a process of its own.

llama.cpp's function cannot be stopped once it runs, and ends its process over some damaged files; so it runs in a
child (this module, ``python -m``), whose end, wanted or not, costs the builder nothing. The child ends when the builder
does. The result is whole or not there.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mobilevlm_ros.build.gguf_file import OnProgress, atomic_file, load_gguf
from mobilevlm_ros.build.quantization_types import (
    QUANTIZATIONS,
    check_quantization,
    predicted_bytes,
    tensor_types,
)
from mobilevlm_ros.build.stages import check_room
from mobilevlm_ros.errors import BuildError, DependencyError

__all__ = ['QUANTIZATIONS', 'Quantized', 'check_quantization', 'predicted_bytes', 'quantize_gguf', 'tensor_types']

_PROGRESS = re.compile(r'\[ *(\d+)/ *(\d+)\]')
_FALLBACK = re.compile(r'warning: (\S+) +- ncols +(\d+) not divisible by +(\d+) \(required for type +(\S+)\)')
_DEPENDENCY_EXIT = 3


@dataclass(frozen=True)
class Quantized:
    """What came out.

    :ivar n_bytes: size of the file.
    :ivar types: tensors of each type, as llama.cpp names them (``q4_K``), the commonest first.
    :ivar fallbacks: tensors that got another type than the quantisation asks for, because their rows do not fit its
        blocks; name to what was wrong.
    """

    n_bytes: int
    types: dict[str, int]
    fallbacks: dict[str, str]

    @property
    def warning(self) -> str:
        """For the user: which tensors were stored otherwise; empty if none."""
        if not self.fallbacks:
            return ''
        name, reason = next(iter(self.fallbacks.items()))
        return (
            f'{len(self.fallbacks)} of {sum(self.types.values())} tensors got another type than asked for, since '
            f'{reason} ({name} and others); now there are {self.types}'
        )


def quantize_gguf(
    source: Path,
    out: Path,
    quantization: str,
    *,
    n_threads: int = 0,
    on_progress: OnProgress = lambda done, total: None,
) -> Quantized:
    """Write ``source`` (f16 or f32) to ``out`` in another quantisation; ``F16`` of an f16 file is a copy.

    :param quantization: one of ``QUANTIZATIONS``.
    :param n_threads: 0: as many as there are processors.
    :param on_progress: told of tensors done.
    :raise BuildError: if there is no such quantisation, the source is none that llama.cpp can quantise, or the disk is
        full.
    :raise DependencyError: if llama-cpp-python or gguf is missing.
    """
    check_quantization(quantization)
    gguf = load_gguf()
    try:
        n_source_bytes = source.stat().st_size
    except OSError as error:
        raise BuildError(f'cannot read {source}: {error.strerror}') from error
    # Nothing that is made here is larger than its source.
    check_room(out.parent, n_source_bytes, out.name)
    with atomic_file(out) as partial:
        fallbacks = _run_child(source, partial, quantization, n_threads or os.cpu_count() or 1, on_progress)
        kinds = [tensor.tensor_type.name for tensor in gguf.GGUFReader(partial).tensors]
        n_bytes = partial.stat().st_size
    return Quantized(n_bytes, dict(Counter(kinds).most_common()), fallbacks)


def _run_child(source: Path, out: Path, quantization: str, n_threads: int, on_progress: OnProgress) -> dict[str, str]:
    """Run this module; returns the fallbacks that its log tells of."""
    command = [sys.executable, '-m', __name__, str(source), str(out), quantization, str(n_threads)]
    # What stands on the child's input is nothing; its end tells the child that the builder is gone.
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace'
    )
    fallbacks: dict[str, str] = {}
    last_line = ''
    try:
        assert child.stdout is not None
        for line in child.stdout:
            last_line = line.strip() or last_line
            if match := _PROGRESS.match(line):
                on_progress(int(match[1]), int(match[2]))
            elif match := _FALLBACK.match(line):
                fallbacks[match[1]] = f'rows of {match[2]} are no multiple of {match[3]}, which {match[4]} needs'
        code = child.wait()
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
    if code == _DEPENDENCY_EXIT:
        raise DependencyError(last_line)
    if code != 0:
        how = f'was ended by {signal.Signals(-code).name}' if code < 0 else 'failed'
        reason = last_line.rpartition('failed to quantize: ')[2] or 'llama.cpp gave no reason'
        raise BuildError(
            f'quantising {source} to {quantization} {how}: {reason}. The source must be a language model in f16 or f32.'
        )
    return fallbacks


# -- the child ----------------------------------------------------------------------------------------------------


def _child(source: str, out: str, quantization: str, n_threads: str) -> int:
    """Quantise, with llama.cpp's log on the standard output."""
    # Python would handle an interrupt only when llama.cpp's function returns, after a minute or two.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logger = logging.getLogger('mobilevlm_ros.llama_cpp')
    logger.addHandler(logging.StreamHandler(sys.stdout))
    logger.setLevel(logging.DEBUG)

    from mobilevlm_ros.runtime.language.llamacpp_library import load_library

    try:
        lib = load_library()
    except DependencyError as error:
        print(error)
        return _DEPENDENCY_EXIT
    settings = lib.llama_model_quantize_default_params()
    settings.nthread = int(n_threads)
    settings.ftype = getattr(lib, f'LLAMA_FTYPE_MOSTLY_{quantization}')
    return int(lib.llama_model_quantize(os.fsencode(source), os.fsencode(out), settings))


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == '__main__':
    sys.exit(_child(*sys.argv[1:]))
