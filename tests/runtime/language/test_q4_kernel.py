"""Products of 4-bit weights: llama.cpp's results to the bit, and llama.cpp's own products where ours cannot be used."""

from __future__ import annotations

import ctypes.util
import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mobilevlm_ros.build.quantize import quantize_gguf
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.language import LanguageOptions, TokenSegment, q4_kernel
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine
from mobilevlm_ros.runtime.language.llamacpp_library import load_library
from mobilevlm_ros.runtime.language.q4_kernel import LLAMA_CPP, OURS, SWITCH, Product, Q4Kernel, operands, product_s

Operands = tuple[NDArray[Any], NDArray[Any]]
PRODUCTS: tuple[Product, ...] = ('gemm', 'gemv')


@pytest.fixture(scope='module')
def kernel() -> Q4Kernel:
    load_library()
    assert 'imported before' not in q4_kernel.choice().reason, 'a test imports llama_cpp by itself: use load_library()'
    found = q4_kernel.kernel()
    if found is None or not found.theirs:
        pytest.skip(f'no kernel on this machine: {q4_kernel.choice().reason}')
    return found


def extreme(both: Operands, seed: int) -> Operands:
    """The same with each value as far from zero as it may be: sums reach what 16 bits must hold."""
    random = np.random.default_rng(seed)
    weights, activations = both
    weights['qs'] = random.choice(np.array([0x88, 0x77], dtype=np.uint8))
    activations['qs'] = random.choice(np.array([-127, 127], dtype=np.int8))
    return weights, activations


def compute(function: Any, both: Operands, margin: int = 0) -> NDArray[np.float32]:
    weights, activations = both
    rows = len(activations) * activations.dtype['d'].shape[0]
    result = np.full((rows, 8 * len(weights) + margin), 7.0, dtype=np.float32)
    product_s(function, result, weights, activations)
    return result


def exact(weights: NDArray[Any], activations: NDArray[Any]) -> NDArray[np.float64]:
    """The product in float64, from the layouts' description."""
    rows = activations.dtype['d'].shape[0]
    nibbles = weights['qs'].reshape(*weights.shape, 2, 8, 8)
    nibbles = np.stack([nibbles & 15, nibbles >> 4], axis=2).astype(np.int64)  # [x, b, low or high, half, column, byte]
    w = ((nibbles ^ 8) - 8).transpose(0, 4, 1, 2, 3, 5).reshape(len(weights), 8, weights.shape[1], 32)
    w = w * weights['d'].astype(np.float64).transpose(0, 2, 1)[..., None]
    a = activations['qs'].reshape(*activations.shape, 4, rows, 8).transpose(0, 3, 1, 2, 4).astype(np.float64)
    a = a.reshape(len(a), rows, activations.shape[1], 32) * activations['d'].astype(float).transpose(0, 2, 1)[..., None]
    return np.asarray(a.reshape(rows * len(a), -1) @ w.reshape(8 * len(w), -1).T)


@settings(deadline=None, max_examples=80)
@given(
    name=st.sampled_from(PRODUCTS),
    fours=st.integers(1, 110),
    blocks=st.integers(1, 70) | st.sampled_from([1024, 1030]),
    groups=st.integers(1, 7),
    seed=st.integers(0, 2**16),
    far=st.booleans(),
)
def test_the_results_are_llamacpps_to_the_bit(
    kernel: Q4Kernel, name: Product, fours: int, blocks: int, groups: int, seed: int, far: bool
) -> None:
    both = operands(name, 4 * fours if name == 'gemm' else 1, 32 * blocks, 8 * groups, seed)
    both = extreme(both, seed) if far else both

    ours, theirs = compute(kernel.ours[name], both), compute(kernel.theirs[name], both)

    if q4_kernel._cpu_flags() & {'avx512f', 'avx_vnni'}:  # where llama.cpp rounds in another order
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    else:
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize('name', PRODUCTS)
@pytest.mark.parametrize('far', [False, True])
def test_the_results_are_those_of_the_formats_description(kernel: Q4Kernel, name: Product, far: bool) -> None:
    both = operands(name, 12, 96, 24, seed=5)
    both = extreme(both, 5) if far else both

    np.testing.assert_allclose(compute(kernel.ours[name], both), exact(*both), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize('name', PRODUCTS)
def test_only_its_columns_are_written(kernel: Q4Kernel, name: Product) -> None:
    result = compute(kernel.ours[name], operands(name, 8, 64, 24, seed=1), margin=5)

    assert (result[:, 24:] == 7.0).all()
    assert (result[:, :24] != 7.0).all()


@pytest.mark.parametrize('name', PRODUCTS)
def test_threads_do_not_disturb_each_other(kernel: Q4Kernel, name: Product) -> None:
    tasks = [operands(name, 200, 2048, 16, seed) for seed in range(4)]
    alone = [compute(kernel.ours[name], task) for task in tasks]
    together: list[Any] = [None] * 4

    def work(i: int) -> None:
        for _ in range(20):
            together[i] = compute(kernel.ours[name], tasks[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope='module')
def q4_0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('q4')
    tiny_models.write_gguf(folder / 'f16.gguf', tiny_models.TinyLlama(n_embd=256, n_layers=2, n_heads=4, n_ff=512))
    quantize_gguf(folder / 'f16.gguf', folder / 'q4_0.gguf', 'Q4_0', n_threads=1)
    return folder / 'q4_0.gguf'


def prompt_logits(path: Path, n_tokens: int) -> NDArray[np.float32]:
    engine = LlamaCppEngine(path, LanguageOptions(n_ctx=256, n_threads=2, n_threads_batch=2))
    engine.prefill([TokenSegment(tuple(range(20, 20 + n_tokens)))], CancelToken())
    values = engine.logits().copy()
    engine.close()
    return values


@pytest.mark.parametrize('n_tokens', [1, 4, 31, 200])
def test_a_model_goes_through_them_and_answers_the_same(kernel: Q4Kernel, q4_0: Path, n_tokens: int) -> None:
    before = kernel.n_calls
    try:
        kernel.use(PRODUCTS)
        ours = prompt_logits(q4_0, n_tokens)
        called = kernel.n_calls
        kernel.use(())
        theirs = prompt_logits(q4_0, n_tokens)
    finally:
        kernel.use(q4_kernel.choice().ours)

    assert called > before, 'llama.cpp does not call the kernel: is it loaded before llama.cpp?'
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def loaded(work: str = '', **environment: str) -> Any:
    """The choice in a new process, after ``work``."""
    code = f"""
import dataclasses, json
from mobilevlm_ros.runtime.language import q4_kernel
{work}
from mobilevlm_ros.runtime.language.llamacpp_library import load_library
load_library()
print(json.dumps(dataclasses.asdict(q4_kernel.choice())))
"""
    command = [sys.executable, '-c', code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_the_choice_says_how_much_faster_ours_are(kernel: Q4Kernel) -> None:
    found = loaded()

    assert found['ours'] == [name for name in PRODUCTS if found['speedups'][name] >= 1.1]
    assert f'prompts {found["speedups"]["gemm"]:.1f}' in found['reason']


def test_an_environment_variable_leaves_llamacpp_as_it_is() -> None:
    assert loaded(**{SWITCH: LLAMA_CPP}) == {'ours': [], 'reason': 'MOBILEVLM_Q4_KERNEL is llama.cpp', 'speedups': {}}


def test_a_comparison_may_leave_llamacpp_as_it_is(kernel: Q4Kernel) -> None:
    found = loaded('from mobilevlm_ros.runtime.language import llamacpp_library as l; l.load_library(own_kernel=False)')

    assert found == {'ours': [], 'reason': 'it was asked for', 'speedups': {}}


@pytest.mark.skipif(platform.machine() not in ('x86_64', 'AMD64'), reason='there is no kernel for other machines')
@pytest.mark.parametrize(
    ('work', 'reason'),
    [
        ('q4_kernel.platform.machine = lambda: "aarch64"', 'there is no kernel for aarch64'),
        ('q4_kernel._cpu_flags = lambda: {"avx2"}', 'this CPU has no f16c, fma'),
        ('q4_kernel.__file__ = "/nowhere/x.py"', 'it was not compiled when this package was installed'),
        ('import llama_cpp', 'llama_cpp was imported before'),
    ],
)
def test_without_them_llamacpp_does_the_work(work: str, reason: str) -> None:
    found = loaded(work)

    assert found['ours'] == []
    assert found['reason'].startswith(reason)


@pytest.mark.parametrize(
    ('tried', 'ours', 'reason'),
    [
        ({'gemm': (0.3, 2.0), 'gemv': (0.0, 2.0)}, (), 'ours compute something else for prompts'),
        ({'gemm': (0.0, 2.0), 'gemv': (float('nan'), 2.0)}, (), 'ours compute something else for tokens'),
        ({'gemm': (0.0, 2.0), 'gemv': (0.0, 1.0)}, ('gemm',), 'prompts 2.0, tokens 1.0 times'),
        ({'gemm': (0.0, 0.9), 'gemv': (0.0, 1.0)}, (), 'prompts 0.9, tokens 1.0 times'),
    ],
)
def test_what_is_wrong_or_slow_is_not_used(
    kernel: Q4Kernel,
    monkeypatch: pytest.MonkeyPatch,
    tried: dict[Product, tuple[float, float]],
    ours: tuple[Product, ...],
    reason: str,
) -> None:
    used: list[tuple[Product, ...]] = []
    monkeypatch.setattr(Q4Kernel, 'tried', lambda self, name: tried[name])
    monkeypatch.setattr(Q4Kernel, 'use', lambda self, names: used.append(names))
    monkeypatch.setattr(q4_kernel, '_choice', None)

    found = q4_kernel.choose()

    assert found.ours == used[-1] == ours
    assert found.kernel == (OURS if ours else LLAMA_CPP)
    assert reason in found.reason


def test_a_library_of_something_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = ctypes.util.find_library('c')
    assert libc is not None
    monkeypatch.setattr(q4_kernel, '_compiled', lambda: (Path(libc), ''))
    monkeypatch.delitem(sys.modules, 'llama_cpp', raising=False)
    monkeypatch.setattr(q4_kernel, '_kernel', None)
    monkeypatch.setattr(q4_kernel, '_choice', None)

    q4_kernel.preload()

    assert q4_kernel.kernel() is None
    assert 'cannot be used' in q4_kernel.choice().reason
