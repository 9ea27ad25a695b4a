"""Prompts through 4-bit weights in less time than llama.cpp takes, where this CPU gains by it; the same results.

Most of a question's time on a CPU is one product: a prompt's activations times Q4_0 weights. ``q4_gemm.c`` computes it
for x86-64 CPUs with AVX2, to the bit what llama.cpp computes, in less than half of its time where the CPU has no VNNI.
The compiled library is put where the dynamic linker looks before it looks in llama.cpp (as one replaces ``malloc``), so
that any build of llama-cpp-python whose libraries are shared is served, without a patch.

Nothing is taken on trust: before it is used, both products are computed and compared, and the faster one stays.
Without a compiler at installation, on another CPU, or with another memory layout in llama.cpp, llama.cpp's own stays.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    'ACTIVATIONS',
    'LLAMA_CPP',
    'OURS',
    'SWITCH',
    'WEIGHTS',
    'Choice',
    'PrefillKernel',
    'choice',
    'choose',
    'kernel',
    'leave',
    'preload',
    'product_s',
]

OURS, LLAMA_CPP = 'mobilevlm_ros', 'llama.cpp'
SWITCH = 'MOBILEVLM_PREFILL_KERNEL'
"""Environment variable: ``llama.cpp`` leaves llama.cpp as it is."""

_NAME = 'ggml_gemm_q4_0_8x8_q8_0'
_NEEDS = {'avx2', 'fma', 'f16c'}
_ALIKE = 1e-5
"""Largest difference over largest magnitude; only llama.cpp's AVX-512 path rounds in another order."""
_GAIN = 1.1
_logger = logging.getLogger(__name__)

WEIGHTS = np.dtype([('d', np.float16, 8), ('qs', np.uint8, 128)])
"""``block_q4_0x8`` of llama.cpp's repack.h."""
ACTIVATIONS = np.dtype([('d', np.float16, 4), ('qs', np.int8, 128)])
"""``block_q8_0x4`` of llama.cpp's repack.h."""


@dataclass(frozen=True)
class Choice:
    """Which product prompts go through.

    :ivar kernel: ``OURS`` or ``LLAMA_CPP``.
    :ivar reason: why, in words.
    :ivar speedup: how many times faster ours was when both were tried; None: not tried.
    """

    kernel: str
    reason: str
    speedup: float | None = None


class PrefillKernel:
    """The compiled library, loaded; the product that it takes the place of is llama.cpp's until ``use(OURS)``.

    :param path: the compiled ``q4_gemm.c``.
    :raise OSError: if it cannot be loaded.
    :raise AttributeError: if it is another library.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.ours = self._library.mobilevlm_gemm_q4_0
        self._use = self._library.mobilevlm_gemm_q4_0_use
        self._use.argtypes, self._use.restype = [ctypes.c_void_p], None
        self.theirs: Any = None

    def find_theirs(self) -> bool:
        """Find llama.cpp's product in the library that this process has loaded, and leave the work to it."""
        for path in _loaded_libraries():
            try:
                self.theirs = ctypes.CDLL(path)[_NAME]
            except (OSError, AttributeError):
                continue
            self.use(LLAMA_CPP)
            return True
        return False

    def use(self, kernel: str) -> None:
        """Let ``OURS`` or ``LLAMA_CPP`` do the work from now on; not while a prompt is computed."""
        self._use(None if kernel == OURS else ctypes.cast(self.theirs, ctypes.c_void_p))

    @property
    def n_calls(self) -> int:
        """How often llama.cpp has called for the product here (both kernels); it wraps around."""
        return ctypes.c_uint.in_dll(self._library, 'mobilevlm_gemm_q4_0_calls').value

    def tried(self) -> tuple[float, float]:
        """Compute one product with both.

        :return: the largest difference over the largest magnitude, and how many times faster ours was.
        """
        n, rows, columns = 1024, 32, 64
        generator = np.random.default_rng(0)
        weights = np.zeros((columns // 8, n // 32), dtype=WEIGHTS)
        weights['d'] = generator.normal(size=weights['d'].shape)
        weights['qs'] = generator.integers(0, 256, weights['qs'].shape)
        activations = np.zeros((rows // 4, n // 32), dtype=ACTIVATIONS)
        activations['d'] = generator.random(activations['d'].shape)
        activations['qs'] = generator.integers(-127, 128, activations['qs'].shape)
        results: list[NDArray[np.float32]] = []
        best_s: list[float] = []
        for function in (self.ours, self.theirs):
            results.append(np.zeros((rows, columns), dtype=np.float32))
            best_s.append(min(product_s(function, results[-1], weights, activations) for _ in range(7)))
        difference = float(np.abs(results[0] - results[1]).max() / np.abs(results[1]).max())
        return difference, best_s[1] / best_s[0]


def product_s(function: Any, result: NDArray[np.float32], weights: NDArray[Any], activations: NDArray[Any]) -> float:
    """Multiply ``activations [rows / 4, blocks]`` by ``weights [columns / 8, blocks]`` into ``result [rows, columns]``.

    :param function: one of the two products; ``result`` may be wider than what it computes.
    :return: how long it took, in seconds.
    """
    n_blocks = weights.shape[1]
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (result, weights, activations)]
    stride = ctypes.c_size_t(result.strides[0] // result.itemsize)
    rows, columns = 4 * len(activations), 8 * len(weights)
    started_s = time.perf_counter()
    function(32 * n_blocks, pointers[0], stride, pointers[1], pointers[2], rows, columns)
    return time.perf_counter() - started_s


_kernel: PrefillKernel | None = None
_choice = Choice(LLAMA_CPP, 'llama.cpp is not loaded yet')


def choice() -> Choice:
    """What was chosen when llama.cpp was loaded."""
    return _choice


def kernel() -> PrefillKernel | None:
    """The compiled library, if it is loaded."""
    return _kernel


def preload() -> None:
    """Load the compiled library, where there is one for this machine; to be called before llama.cpp is loaded."""
    global _kernel, _choice
    path, reason = _compiled()
    if path is None:
        _choice = Choice(LLAMA_CPP, reason)
        return
    try:
        _kernel = PrefillKernel(path)
    except (OSError, AttributeError) as error:
        _choice = Choice(LLAMA_CPP, f'{path.name} cannot be used ({error})')


def choose() -> Choice:
    """Compare both, once llama.cpp is loaded, and use the faster from now on; without ``preload`` nothing happens."""
    global _choice
    if _kernel is None:
        return _choice
    if not _kernel.find_theirs():
        _choice = Choice(LLAMA_CPP, f'no library of this llama.cpp has {_NAME}')
        return _choice
    difference, speedup = _kernel.tried()
    if not difference < _ALIKE:
        _choice = Choice(LLAMA_CPP, f'ours computed something else (relative difference {difference:.1g})', speedup)
        _logger.warning('the prefill kernel is not used: %s', _choice.reason)
    elif speedup < _GAIN:
        _choice = Choice(LLAMA_CPP, f'ours is not faster on this CPU ({speedup:.2f} times)', speedup)
    else:
        _choice = Choice(OURS, f'{speedup:.1f} times the speed of llama.cpp on this CPU, same results', speedup)
        _kernel.use(OURS)
    _logger.debug('prompts through Q4_0 weights: %s, %s', _choice.kernel, _choice.reason)
    return _choice


def leave() -> None:
    """Let llama.cpp's own product do the work from now on, for comparisons."""
    global _choice
    if _kernel is not None and _kernel.theirs is not None:
        _kernel.use(LLAMA_CPP)
    _choice = Choice(LLAMA_CPP, 'it was asked for')


def _compiled() -> tuple[Path | None, str]:
    """The library for this machine, or why there is none."""
    if os.environ.get(SWITCH) == LLAMA_CPP:
        return None, f'{SWITCH} is {LLAMA_CPP}'
    if platform.machine() not in ('x86_64', 'AMD64'):
        return None, f'there is no kernel for {platform.machine()}'
    missing = _NEEDS - _cpu_flags()
    if missing:
        return None, f'this CPU has no {", ".join(sorted(missing))}'
    found = sorted(Path(__file__).parent.glob('_q4_gemm*.so'))
    if not found:
        return None, 'it was not compiled when this package was installed (is there a C compiler?)'
    return found[0], ''


def _loaded_libraries() -> list[str]:
    """Files of llama.cpp that are mapped into this process, the one for CPUs first.

    Not by name beside the package: a wheel holds copies under several names, and opening another copy loads it again.
    """
    with open('/proc/self/maps', encoding='utf-8', errors='replace') as maps:
        paths = {line.split(maxsplit=5)[5].rstrip('\n') for line in maps if '.so' in line}
    named = (path for path in paths if re.match(r'lib(ggml|llama)', os.path.basename(path)))
    return sorted(named, key=lambda path: (not os.path.basename(path).startswith('libggml-cpu'), path))


def _cpu_flags() -> set[str]:
    try:
        text = Path('/proc/cpuinfo').read_text()
    except OSError:
        return set()
    lines = (line.partition(':') for line in text.splitlines())
    return next((set(value.split()) for key, _, value in lines if key.strip() == 'flags'), set())
