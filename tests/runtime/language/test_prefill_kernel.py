"""The product of prompts and 4-bit weights: llama.cpp's results to the bit, llama.cpp's own where ours cannot be."""

from __future__ import annotations

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
from mobilevlm_ros.runtime.language import LanguageOptions, TokenSegment, prefill_kernel
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine
from mobilevlm_ros.runtime.language.llamacpp_library import load_library
from mobilevlm_ros.runtime.language.prefill_kernel import (
    ACTIVATIONS,
    LLAMA_CPP,
    OURS,
    WEIGHTS,
    PrefillKernel,
    product_s,
)


@pytest.fixture(scope='module')
def kernel() -> PrefillKernel:
    load_library()
    found = prefill_kernel.kernel()
    if found is None or found.theirs is None:
        pytest.skip(f'no kernel on this machine: {prefill_kernel.choice().reason}')
    return found


def operands(rows: int, n: int, columns: int, seed: int, extreme: bool = False) -> tuple[NDArray[Any], NDArray[Any]]:
    random = np.random.default_rng(seed)
    weights = np.zeros((columns // 8, n // 32), dtype=WEIGHTS)
    activations = np.zeros((rows // 4, n // 32), dtype=ACTIVATIONS)
    weights['d'] = random.normal(size=weights['d'].shape)
    activations['d'] = random.random(activations['d'].shape)
    if extreme:  # each value as far from zero as it may be: sums reach what 16 bits must hold
        weights['qs'] = random.choice(np.array([0x88, 0x77], dtype=np.uint8), weights['qs'].shape)
        activations['qs'] = random.choice(np.array([-127, 127], dtype=np.int8))
    else:
        weights['qs'] = random.integers(0, 256, weights['qs'].shape)
        activations['qs'] = random.integers(-127, 128, activations['qs'].shape)
    return weights, activations


def compute(function: Any, operands: tuple[NDArray[Any], NDArray[Any]], margin: int = 0) -> NDArray[np.float32]:
    weights, activations = operands
    result = np.full((4 * len(activations), 8 * len(weights) + margin), 7.0, dtype=np.float32)
    product_s(function, result, weights, activations)
    return result


def exact(weights: NDArray[Any], activations: NDArray[Any]) -> NDArray[np.float64]:
    """The product in float64, from the layouts' description."""
    nibbles = weights['qs'].reshape(*weights.shape, 2, 8, 8)
    nibbles = np.stack([nibbles & 15, nibbles >> 4], axis=2).astype(np.int64)  # [x, b, low/high, half, column, byte]
    w = ((nibbles ^ 8) - 8).transpose(0, 4, 1, 2, 3, 5).reshape(*weights.shape[:1], 8, weights.shape[1], 32)
    w = w * weights['d'].astype(np.float64).transpose(0, 2, 1)[..., None]
    a = activations['qs'].reshape(*activations.shape, 4, 4, 8).transpose(0, 3, 1, 2, 4).astype(np.float64)
    a = a.reshape(len(a), 4, activations.shape[1], 32) * activations['d'].astype(float).transpose(0, 2, 1)[..., None]
    return np.asarray(a.reshape(4 * len(a), -1) @ w.reshape(8 * len(w), -1).T)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 110).map(lambda n: 4 * n),
    blocks=st.integers(1, 70),
    groups=st.integers(1, 7),
    seed=st.integers(0, 2**16),
    extreme=st.booleans(),
)
def test_the_results_are_llamacpps_to_the_bit(
    kernel: PrefillKernel, rows: int, blocks: int, groups: int, seed: int, extreme: bool
) -> None:
    both = operands(rows, 32 * blocks, 8 * groups, seed, extreme)

    ours, theirs = compute(kernel.ours, both), compute(kernel.theirs, both)

    if prefill_kernel._cpu_flags() & {'avx512f', 'avx_vnni'}:  # where llama.cpp rounds in another order
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    else:
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize('extreme', [False, True])
def test_the_results_are_those_of_the_formats_description(kernel: PrefillKernel, extreme: bool) -> None:
    both = operands(12, 96, 24, 5, extreme)

    np.testing.assert_allclose(compute(kernel.ours, both), exact(*both), rtol=1e-5, atol=1e-3)


def test_only_its_columns_are_written(kernel: PrefillKernel) -> None:
    result = compute(kernel.ours, operands(8, 64, 24, 1), margin=5)

    assert (result[:, 24:] == 7.0).all()
    assert (result[:, :24] != 7.0).all()


def test_threads_do_not_disturb_each_other(kernel: PrefillKernel) -> None:
    tasks = [operands(200, 2048, 16, seed) for seed in range(4)]
    alone = [compute(kernel.ours, task) for task in tasks]
    together: list[Any] = [None] * 4

    def work(i: int) -> None:
        for _ in range(20):
            together[i] = compute(kernel.ours, tasks[i])

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


@pytest.mark.parametrize('n_tokens', [4, 31, 200])
def test_prompts_go_through_it_and_come_out_the_same(kernel: PrefillKernel, q4_0: Path, n_tokens: int) -> None:
    before = kernel.n_calls
    try:
        kernel.use(OURS)
        ours = prompt_logits(q4_0, n_tokens)
        called = kernel.n_calls
        kernel.use(LLAMA_CPP)
        theirs = prompt_logits(q4_0, n_tokens)
    finally:
        kernel.use(prefill_kernel.choice().kernel)

    assert called > before, 'llama.cpp does not call the kernel: is it loaded before llama.cpp?'
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_single_tokens_need_no_product_of_matrices(kernel: PrefillKernel, q4_0: Path) -> None:
    before = kernel.n_calls

    prompt_logits(q4_0, 3)

    assert kernel.n_calls == before


def loaded(work: str = '', **environment: str) -> Any:
    """The choice in a new process, after ``work``."""
    code = f"""
import dataclasses, json
from mobilevlm_ros.runtime.language import prefill_kernel
{work}
from mobilevlm_ros.runtime.language.llamacpp_library import load_library
load_library()
print(json.dumps(dataclasses.asdict(prefill_kernel.choice())))
"""
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_the_choice_says_how_much_faster_it_is(kernel: PrefillKernel) -> None:
    found = loaded()

    assert found['kernel'] == (OURS if found['speedup'] >= 1.1 else LLAMA_CPP)
    assert f'{found["speedup"]:.1f}' in found['reason']


def test_an_environment_variable_leaves_llamacpp_as_it_is() -> None:
    assert loaded(**{prefill_kernel.SWITCH: LLAMA_CPP}) == {
        'kernel': LLAMA_CPP,
        'reason': 'MOBILEVLM_PREFILL_KERNEL is llama.cpp',
        'speedup': None,
    }


@pytest.mark.skipif(platform.machine() not in ('x86_64', 'AMD64'), reason='there is no kernel for other machines')
@pytest.mark.parametrize(
    ('work', 'reason'),
    [
        ('prefill_kernel.platform.machine = lambda: "aarch64"', 'there is no kernel for aarch64'),
        ('prefill_kernel._cpu_flags = lambda: {"avx2"}', 'this CPU has no f16c, fma'),
        ('prefill_kernel.__file__ = "/nowhere/x.py"', 'it was not compiled when this package was installed'),
    ],
)
def test_without_it_llamacpp_does_the_work(work: str, reason: str) -> None:
    found = loaded(work)

    assert found['kernel'] == LLAMA_CPP
    assert found['reason'].startswith(reason)


@pytest.mark.parametrize(
    ('tried', 'reason'),
    [((0.3, 2.0), 'ours computed something else'), ((float('nan'), 2.0), 'ours computed'), ((0.0, 1.0), 'not faster')],
)
def test_a_kernel_that_is_wrong_or_slow_is_not_used(
    kernel: PrefillKernel, monkeypatch: pytest.MonkeyPatch, tried: tuple[float, float], reason: str
) -> None:
    used: list[str] = []
    monkeypatch.setattr(PrefillKernel, 'tried', lambda self: tried)
    monkeypatch.setattr(PrefillKernel, 'use', lambda self, name: used.append(name))
    monkeypatch.setattr(prefill_kernel, '_choice', None)

    found = prefill_kernel.choose()

    assert found.kernel == LLAMA_CPP
    assert reason in found.reason
    assert used == [LLAMA_CPP]


def test_a_library_of_something_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes.util

    libc = ctypes.util.find_library('c')
    assert libc is not None
    monkeypatch.setattr(prefill_kernel, '_compiled', lambda: (Path(libc), ''))
    monkeypatch.setattr(prefill_kernel, '_kernel', None)
    monkeypatch.setattr(prefill_kernel, '_choice', None)

    prefill_kernel.preload()

    assert prefill_kernel.kernel() is None
    assert 'cannot be used' in prefill_kernel.choice().reason
