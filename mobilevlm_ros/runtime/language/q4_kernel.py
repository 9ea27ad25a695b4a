"""4-bit weights in less time than llama.cpp takes, where this CPU gains by it; the same results.

Nearly all of a question's time on a CPU goes by in two products of llama.cpp: Q4_0 weights times the activations of a
prompt (a matrix), and times those of one token (a vector). ``q4_gemm.c`` and ``q4_gemv.c`` compute them for x86-64 CPUs
with AVX2, to the bit what llama.cpp computes; on CPUs without VNNI in half of its time or less. The compiled library is
put where the dynamic linker looks before it looks in llama.cpp (as one replaces ``malloc``), so that any build of
llama-cpp-python whose libraries are shared is served, without a patch.

Nothing is taken on trust: before they are used, each is computed by both and compared, and the faster one stays.
Without a compiler at installation, on another CPU, or with another memory layout in llama.cpp, llama.cpp's own stay.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    'ACTIVATIONS',
    'LLAMA_CPP',
    'OURS',
    'SWITCH',
    'WEIGHTS',
    'Choice',
    'Product',
    'Q4Kernel',
    'choice',
    'choose',
    'kernel',
    'leave',
    'operands',
    'preload',
    'product_s',
]

Product = Literal['gemm', 'gemv']
"""Of matrices (prompts) and of a matrix and a vector (single tokens)."""

OURS, LLAMA_CPP = 'mobilevlm_ros', 'llama.cpp'
SWITCH = 'MOBILEVLM_Q4_KERNEL'
"""Environment variable: ``llama.cpp`` leaves llama.cpp as it is."""

_PRODUCTS: dict[Product, str] = {'gemm': 'prompts', 'gemv': 'tokens'}
_NEEDS = {'avx2', 'fma', 'f16c'}
_ALIKE = 1e-5
"""Largest difference over largest magnitude; only llama.cpp's AVX-512 path rounds in another order."""
_GAIN = 1.1
_logger = logging.getLogger(__name__)

WEIGHTS = np.dtype([('d', np.float16, 8), ('qs', np.uint8, 128)])
"""``block_q4_0x8`` of llama.cpp's repack.h: 32 inputs of 8 outputs."""
ACTIVATIONS: dict[Product, np.dtype[Any]] = {
    'gemm': np.dtype([('d', np.float16, (4,)), ('qs', np.int8, 128)]),
    'gemv': np.dtype([('d', np.float16, (1,)), ('qs', np.int8, 32)]),
}
"""``block_q8_0x4`` of llama.cpp's repack.h and ``block_q8_0``: 32 inputs of 4 tokens, or of one."""


@dataclass(frozen=True)
class Choice:
    """Which products are used.

    :ivar ours: those that are ours; all others are llama.cpp's.
    :ivar reason: why, in words.
    :ivar speedups: how many times faster ours were when both were tried.
    """

    ours: tuple[Product, ...]
    reason: str
    speedups: dict[Product, float] = field(default_factory=dict)

    @property
    def kernel(self) -> str:
        """``OURS`` if anything is, else ``LLAMA_CPP``."""
        return OURS if self.ours else LLAMA_CPP


class Q4Kernel:
    """The compiled library, loaded.

    :param path: ``q4_gemm.c``, ``q4_gemv.c`` and ``q4_names.c`` in one.
    :raise OSError: if it cannot be loaded.
    :raise AttributeError: if it is another library.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.ours: dict[Product, Any] = {name: self._library[f'mobilevlm_{name}_q4_0'] for name in _PRODUCTS}
        self._use = self._library.mobilevlm_q4_0_use
        self._use.argtypes, self._use.restype = [ctypes.c_void_p, ctypes.c_void_p], None
        self.theirs: dict[Product, Any] = {}

    def find_theirs(self) -> bool:
        """Find llama.cpp's products in the library that this process has loaded, and leave the work to them."""
        for path in _loaded_libraries():
            try:
                library = ctypes.CDLL(path)
                self.theirs = {name: library[f'ggml_{name}_q4_0_8x8_q8_0'] for name in _PRODUCTS}
            except (OSError, AttributeError):
                continue
            self.use(())
            return True
        return False

    def use(self, ours: tuple[Product, ...]) -> None:
        """Let these of ours do the work from now on, and llama.cpp's the rest; not while one is running."""
        chosen = [self.ours[name] if name in ours else self.theirs[name] for name in _PRODUCTS]
        self._use(*(ctypes.cast(function, ctypes.c_void_p) for function in chosen))

    @property
    def n_calls(self) -> int:
        """How often llama.cpp has called for a product here, whosever it then was; it wraps around."""
        return ctypes.c_uint.in_dll(self._library, 'mobilevlm_q4_0_calls').value

    def tried(self, name: Product) -> tuple[float, float]:
        """Compute one product with both.

        :return: the largest difference over the largest magnitude, and how many times faster ours was.
        """
        weights, activations = operands(name, 32 if name == 'gemm' else 1, 1024, 64, seed=0)
        results: list[NDArray[np.float32]] = []
        best_s: list[float] = []
        for function in (self.ours[name], self.theirs[name]):
            results.append(np.zeros((32, 64), dtype=np.float32))
            best_s.append(min(product_s(function, results[-1], weights, activations) for _ in range(7)))
        difference = float(np.abs(results[0] - results[1]).max() / np.abs(results[1]).max())
        return difference, best_s[1] / best_s[0]


def operands(name: Product, rows: int, n: int, columns: int, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Random ``WEIGHTS [columns / 8, n / 32]`` and ``ACTIVATIONS [rows / 4 or rows, n / 32]``."""
    random = np.random.default_rng(seed)
    layout = ACTIVATIONS[name]
    weights = np.zeros((columns // 8, n // 32), dtype=WEIGHTS)
    activations = np.zeros((rows // layout['d'].shape[0], n // 32), dtype=layout)
    weights['d'] = random.normal(size=weights['d'].shape)
    weights['qs'] = random.integers(0, 256, weights['qs'].shape)
    activations['d'] = random.random(activations['d'].shape)
    activations['qs'] = random.integers(-127, 128, activations['qs'].shape)
    return weights, activations


def product_s(function: Any, result: NDArray[np.float32], weights: NDArray[Any], activations: NDArray[Any]) -> float:
    """Multiply ``activations`` by ``weights`` into ``result [rows, columns]``, which may be larger.

    :return: how long it took, in seconds.
    """
    n_blocks = weights.shape[1]
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (result, weights, activations)]
    stride = ctypes.c_size_t(result.strides[0] // result.itemsize)
    rows, columns = len(activations) * activations.dtype['d'].shape[0], 8 * len(weights)
    started_s = time.perf_counter()
    function(32 * n_blocks, pointers[0], stride, pointers[1], pointers[2], rows, columns)
    return time.perf_counter() - started_s


_kernel: Q4Kernel | None = None
_choice = Choice((), 'llama.cpp is not loaded yet')


def choice() -> Choice:
    """What was chosen when llama.cpp was loaded."""
    return _choice


def kernel() -> Q4Kernel | None:
    """The compiled library, if it is loaded."""
    return _kernel


def preload() -> None:
    """Load the compiled library, where there is one for this machine; to be called before llama.cpp is loaded."""
    global _kernel, _choice
    path, reason = _compiled()
    if 'llama_cpp' in sys.modules:  # whose functions may be bound already, or not yet: there is no telling
        path, reason = None, 'llama_cpp was imported before this package loaded it'
    if path is None:
        _choice = Choice((), reason)
        return
    try:
        _kernel = Q4Kernel(path)
    except (OSError, AttributeError) as error:
        _choice = Choice((), f'{path.name} cannot be used ({error})')


def choose() -> Choice:
    """Compare both, once llama.cpp is loaded, and use the faster from now on; without ``preload`` nothing happens."""
    global _choice
    if _kernel is None:
        return _choice
    if not _kernel.find_theirs():
        _choice = Choice((), 'no library of this llama.cpp has these products')
        return _choice
    speedups: dict[Product, float] = {}
    for name, of in _PRODUCTS.items():
        difference, speedups[name] = _kernel.tried(name)
        if not difference < _ALIKE:
            _choice = Choice((), f'ours compute something else for {of} (relative difference {difference:.1g})')
            _logger.warning('%s does the work of Q4_0 weights: %s', LLAMA_CPP, _choice.reason)
            return _choice
    gained = ', '.join(f'{of} {speedups[name]:.1f}' for name, of in _PRODUCTS.items())
    ours = tuple(name for name in _PRODUCTS if speedups[name] >= _GAIN)
    _choice = Choice(ours, f"{gained} times the speed of llama.cpp's on this CPU, same results", speedups)
    _kernel.use(ours)
    _logger.debug('Q4_0 weights: ours do %s; %s', ours, _choice.reason)
    return _choice


def leave() -> None:
    """Let llama.cpp's own products do the work from now on, for comparisons."""
    global _choice
    if _kernel is not None and _kernel.theirs:
        _kernel.use(())
    _choice = Choice((), 'it was asked for')


def _compiled() -> tuple[Path | None, str]:
    """The library for this machine, or why there is none."""
    if os.environ.get(SWITCH) == LLAMA_CPP:
        return None, f'{SWITCH} is {LLAMA_CPP}'
    if platform.machine() not in ('x86_64', 'AMD64'):
        return None, f'there is no kernel for {platform.machine()}'
    missing = _NEEDS - _cpu_flags()
    if missing:
        return None, f'this CPU has no {", ".join(sorted(missing))}'
    found = sorted(Path(__file__).parent.glob('_q4_kernel*.so'))
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
