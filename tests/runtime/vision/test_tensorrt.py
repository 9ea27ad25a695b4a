"""The TensorRT engine against a fake TensorRT and a fake CUDA runtime, in every generation of the API.

No GPU has run this code: see docs/tensorrt.md. The fakes raise on what the real ones forbid, and compute a known
function; that they have no names but those of NVIDIA's bindings is checked against ``tensorrt_rtx``.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
from fake_cudart import FakeCudart
from fake_tensorrt import VERSIONS, FakeTensorRt, plan_bytes, tokens_of
from numpy.typing import NDArray

from mobilevlm_ros.errors import (
    DependencyError,
    DeviceMemoryError,
    EngineError,
    InterruptedAnswerError,
    PlanMismatchError,
)
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.vision import tensorrt as engine_module
from mobilevlm_ros.runtime.vision.cuda import Cuda
from mobilevlm_ros.runtime.vision.plan_key import PlanKey
from mobilevlm_ros.runtime.vision.tensorrt import TensorRtVision, key_here, load_tensorrt

Maker = Callable[..., TensorRtVision]


@pytest.fixture
def cudart() -> FakeCudart:
    return FakeCudart()


@pytest.fixture(params=VERSIONS)
def trt(request: pytest.FixtureRequest, cudart: FakeCudart) -> FakeTensorRt:
    return FakeTensorRt(cudart, request.param)


@pytest.fixture
def any_trt(cudart: FakeCudart) -> FakeTensorRt:
    """For what does not depend on the version."""
    return FakeTensorRt(cudart)


@pytest.fixture
def make(tmp_path: Path, cudart: FakeCudart) -> Iterator[Maker]:
    """Opens engines; afterwards each is closed and nothing may be left."""
    engines: list[TensorRtVision] = []

    def open_engine(trt: FakeTensorRt, plan: bytes = plan_bytes(), key: PlanKey | None = None, **options: Any) -> Any:
        path = tmp_path / 'vision.plan'
        path.write_bytes(plan)
        engine = TensorRtVision(path, key or key_of(trt), trt=trt, cuda=Cuda(cudart), **options)
        engines.append(engine)
        return engine

    yield open_engine
    for engine in engines:
        engine.close()
    engines.clear()
    assert_nothing_left(cudart)


def assert_nothing_left(cudart: FakeCudart) -> None:
    cudart.assert_clean()


def key_of(trt: FakeTensorRt) -> PlanKey:
    return PlanKey('tensorrt', trt.__version__, 'Orin', '8.7', 'a' * 64, 'fp16')


def pixels(seed: int = 0, side: int = 4) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(1, 3, side, side)).astype(np.float32)


# -- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('cuda_graph', [True, False])
def test_visual_tokens_are_what_the_plan_computes(trt: FakeTensorRt, make: Maker, cuda_graph: bool) -> None:
    engine = make(trt, cuda_graph=cuda_graph)

    for seed in range(3):
        tokens = engine.encode(pixels(seed), CancelToken())
        np.testing.assert_array_equal(tokens, tokens_of(pixels(seed), (4, 3)))
        assert tokens.dtype == np.float32


def test_it_says_what_it_is(trt: FakeTensorRt, make: Maker) -> None:
    engine = make(trt, plan_bytes(side=6, n_tokens=9, n_embd=5))

    assert (engine.image_size, engine.n_tokens, engine.n_embd) == (6, 9, 5)
    assert engine.description == f'TensorRT {trt.__version__} on Orin (8.7), fp16, CUDA graph'


@pytest.mark.parametrize(('dtype_in', 'dtype_out'), [('HALF', 'HALF'), ('FLOAT', 'HALF'), ('HALF', 'FLOAT')])
def test_half_precision_inputs_and_outputs_are_converted(
    any_trt: FakeTensorRt, make: Maker, dtype_in: str, dtype_out: str
) -> None:
    engine = make(any_trt, plan_bytes(dtype_in=dtype_in, dtype_out=dtype_out))

    tokens = engine.encode(pixels(), CancelToken())

    assert tokens.dtype == np.float32
    np.testing.assert_allclose(tokens, tokens_of(pixels(), (4, 3)), atol=4e-3)


def test_tokens_stay_when_the_next_image_comes(any_trt: FakeTensorRt, make: Maker) -> None:
    engine = make(any_trt)
    first = engine.encode(pixels(0), CancelToken())

    engine.encode(pixels(1), CancelToken())

    np.testing.assert_array_equal(first, tokens_of(pixels(0), (4, 3)))


def test_everything_is_allocated_once(any_trt: FakeTensorRt, make: Maker, cudart: FakeCudart) -> None:
    engine = make(any_trt)
    cudart.calls.clear()

    for seed in range(5):
        engine.encode(pixels(seed), CancelToken())

    assert set(cudart.calls) == {'cudaSetDevice', 'cudaGraphLaunch', 'cudaStreamQuery'}
    assert cudart.calls.count('cudaGraphLaunch') == 5


def test_another_thread_than_the_one_that_opened_it_may_use_and_close_it(any_trt: FakeTensorRt, make: Maker) -> None:
    engine = make(any_trt)
    results: list[Any] = []

    def work() -> None:
        results.append(engine.encode(pixels(), CancelToken()))
        engine.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    np.testing.assert_array_equal(results[0], tokens_of(pixels(), (4, 3)))


@pytest.mark.parametrize('shape', [(1, 3, 2, 2), (1, 3, 4), (2, 3, 4, 4), (1, 3, 1, 1)])
def test_pixels_of_another_shape_are_an_error(any_trt: FakeTensorRt, make: Maker, shape: tuple[int, ...]) -> None:
    with pytest.raises(EngineError, match=r'failed on an image: .*expected \(1, 3, 4, 4\)'):
        make(any_trt).encode(np.zeros(shape, np.float32), CancelToken())


def test_values_that_are_not_finite_are_an_error(any_trt: FakeTensorRt, make: Maker) -> None:
    with pytest.raises(EngineError, match='not finite'):
        make(any_trt).encode(np.full((1, 3, 4, 4), np.nan, np.float32), CancelToken())


# -- CUDA graphs ----------------------------------------------------------------------------------------------------


def test_a_plan_that_cannot_be_recorded_runs_without_a_graph(trt: FakeTensorRt, make: Maker) -> None:
    engine = make(trt, plan_bytes(recordable=False))

    np.testing.assert_array_equal(engine.encode(pixels(), CancelToken()), tokens_of(pixels(), (4, 3)))
    assert 'graph' not in engine.description


@pytest.mark.parametrize('function', ['cudaStreamBeginCapture', 'cudaGraphInstantiateWithFlags', 'cudaGraphLaunch'])
def test_a_graph_that_cuda_refuses_is_done_without(
    any_trt: FakeTensorRt, make: Maker, cudart: FakeCudart, function: str
) -> None:
    cudart.fail[function] = 900
    engine = make(any_trt)

    np.testing.assert_array_equal(engine.encode(pixels(), CancelToken()), tokens_of(pixels(), (4, 3)))
    assert 'graph' not in engine.description


# -- stopping -------------------------------------------------------------------------------------------------------


def test_a_set_token_interrupts_before_the_run(any_trt: FakeTensorRt, make: Maker, cudart: FakeCudart) -> None:
    engine, cancel = make(any_trt), CancelToken()
    cancel.set()
    cudart.calls.clear()

    with pytest.raises(InterruptedAnswerError):
        engine.encode(pixels(), cancel)

    assert cudart.calls == []


@pytest.mark.parametrize('cuda_graph', [True, False])
def test_a_run_is_abandoned_and_the_next_one_waits_for_it(
    any_trt: FakeTensorRt, make: Maker, cudart: FakeCudart, cuda_graph: bool
) -> None:
    engine, cancel = make(any_trt, cuda_graph=cuda_graph), CancelToken()
    cudart.polls = 1_000_000
    with cancel.deadline(time.monotonic() + 0.02), pytest.raises(InterruptedAnswerError):
        engine.encode(pixels(0), cancel)

    cudart.polls = 2
    for stream in cudart.streams.values():
        assert stream.operations  # still running, in our buffers
        stream.polls_left = 3

    np.testing.assert_array_equal(engine.encode(pixels(1), CancelToken()), tokens_of(pixels(1), (4, 3)))


def test_waiting_for_an_abandoned_run_can_be_cancelled_too(
    any_trt: FakeTensorRt, make: Maker, cudart: FakeCudart
) -> None:
    engine = make(any_trt)
    cudart.polls = 1_000_000
    for seed in range(2):
        cancel = CancelToken()
        with cancel.deadline(time.monotonic() + 0.02), pytest.raises(InterruptedAnswerError):
            engine.encode(pixels(seed), cancel)
    (stream,) = cudart.streams.values()
    stream.polls_left = 0

    assert len([op for op in stream.operations if op.reads]) == 1  # the second image never reached the GPU


def test_a_gpu_that_hangs_is_an_error_and_closing_returns(any_trt: FakeTensorRt, tmp_path: Path) -> None:
    cudart = any_trt.cudart
    (tmp_path / 'vision.plan').write_bytes(plan_bytes())
    engine = TensorRtVision(tmp_path / 'vision.plan', key_of(any_trt), trt=any_trt, cuda=Cuda(cudart), run_limit_s=0.02)
    cudart.polls = -1

    with pytest.raises(EngineError, match=r'not finished an image within 0\.02 s'):
        engine.encode(pixels(), CancelToken())
    engine.close()

    with pytest.raises(EngineError, match='closed'):
        engine.encode(pixels(), CancelToken())
    assert len(cudart.blocks) == 4  # freeing it would wait for ever, and the GPU may still write there
    del engine_module._hung[:]


# -- failing --------------------------------------------------------------------------------------------------------


def test_a_failed_execution_tells_the_last_lines_of_the_log(trt: FakeTensorRt, make: Maker) -> None:
    engine = make(trt, cuda_graph=False)
    trt.fail['execute'] = 'IExecutionContext::enqueueV3: Error Code 1: Cask'

    with pytest.raises(EngineError, match='failed on an image: IExecutionContext::enqueueV3: Error Code 1: Cask'):
        engine.encode(pixels(), CancelToken())

    np.testing.assert_array_equal(engine.encode(pixels(), CancelToken()), tokens_of(pixels(), (4, 3)))


def test_a_kernel_that_fails_later_is_an_error(any_trt: FakeTensorRt, make: Maker, cudart: FakeCudart) -> None:
    engine = make(any_trt)
    cudart.async_error = 700

    with pytest.raises(EngineError, match=r'cudaErrorIllegalAddress \(700\).*restart the node'):
        engine.encode(pixels(), CancelToken())


@pytest.mark.parametrize(
    'function', ['cudaSetDevice', 'cudaStreamQuery', 'cudaMemcpyAsync', 'cudaGetDeviceProperties_v2', 'cudaMalloc']
)
def test_every_error_code_is_an_engine_error(
    any_trt: FakeTensorRt, make: Maker, cudart: FakeCudart, function: str
) -> None:
    cudart.fail[function] = 100

    with pytest.raises(EngineError, match=r'cudaErrorNoDevice \(100\): no CUDA-capable device is detected'):
        make(any_trt, cuda_graph=False)

    assert_nothing_left(cudart)


def test_too_little_memory_for_the_buffers(any_trt: FakeTensorRt, make: Maker, cudart: FakeCudart) -> None:
    cudart.total_bytes = 100

    with pytest.raises(DeviceMemoryError, match=r'the pixels need 0\.0 MiB'):
        make(any_trt)


@pytest.mark.parametrize(
    'line',
    ['Error Code 2: OutOfMemory (Requested size was 1 bytes.)', 'Cuda Runtime (out of memory)'],
)
def test_too_little_memory_for_the_weights_says_how_much(trt: FakeTensorRt, make: Maker, line: str) -> None:
    trt.fail['deserialize'] = line

    with pytest.raises(DeviceMemoryError, match=r'weights of the plan need about 3 MiB, but \d+ of 1024 MiB .* free'):
        make(trt, plan_bytes() + b' ' * (3 << 20))


def test_too_little_memory_for_the_activations_says_how_much(trt: FakeTensorRt, make: Maker) -> None:
    trt.fail['context'] = 'Error Code 2: OutOfMemory (Requested size was 41943040 bytes.)'

    with pytest.raises(DeviceMemoryError, match='activations of the plan need about 40 MiB'):
        make(trt)


def test_no_execution_context_is_an_error(trt: FakeTensorRt, make: Maker) -> None:
    trt.fail['context'] = 'Error Code 1: Internal'

    with pytest.raises(EngineError, match='no execution context: Error Code 1: Internal'):
        make(trt)


def test_a_runtime_that_does_not_start_is_an_error(trt: FakeTensorRt, make: Maker) -> None:
    trt.fail['runtime'] = 'CUDA initialization failure with error: 35'

    with pytest.raises(EngineError, match='does not start: CUDA initialization failure with error: 35'):
        make(trt)


@pytest.mark.parametrize('share', [0.0, 0.4, 0.99])
def test_a_truncated_plan_is_an_error_with_the_reason_and_the_command(
    trt: FakeTensorRt, make: Maker, share: float
) -> None:
    plan = plan_bytes()

    with pytest.raises(
        EngineError, match=r'cannot load .*vision\.plan .*magicTagRead mismatch.* again: mobilevlm plan B'
    ):
        make(trt, plan[: int(len(plan) * share)], rebuild='mobilevlm plan B')


def test_a_missing_plan_is_an_error(any_trt: FakeTensorRt, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r'nothing\.plan cannot be read: No such file'):
        TensorRtVision(tmp_path / 'nothing.plan', key_of(any_trt), trt=any_trt, cuda=Cuda(any_trt.cudart))

    assert_nothing_left(any_trt.cudart)


@pytest.mark.parametrize(
    'io',
    [
        [['x', 'INPUT', [1, 3, 4, 4], 'FLOAT']],
        [['x', 'INPUT', [1, 3, 4, 5], 'FLOAT'], ['y', 'OUTPUT', [1, 4, 3], 'FLOAT']],
        [['x', 'INPUT', [2, 3, 4, 4], 'FLOAT'], ['y', 'OUTPUT', [2, 4, 3], 'FLOAT']],
        [['x', 'INPUT', [-1, 3, 4, 4], 'FLOAT'], ['y', 'OUTPUT', [-1, 4, 3], 'FLOAT']],
        [['x', 'INPUT', [1, 3, -1, -1], 'FLOAT'], ['y', 'OUTPUT', [1, 4, 3], 'FLOAT']],
        [['x', 'INPUT', [1, 3, 4, 4], 'FLOAT'], ['y', 'OUTPUT', [4, 3], 'FLOAT']],
        [['x', 'INPUT', [1, 3, 4, 4], 'INT8'], ['y', 'OUTPUT', [1, 4, 3], 'FLOAT']],
        [['x', 'INPUT', [1, 3, 4, 4], 'FLOAT'], ['y', 'OUTPUT', [1, 4, 3], 'BF16']],
        [
            ['x', 'INPUT', [1, 3, 4, 4], 'FLOAT'],
            ['z', 'INPUT', [1], 'INT32'],
            ['y', 'OUTPUT', [1, 4, 3], 'FLOAT'],
        ],
    ],
    ids=str,
)
def test_a_plan_of_another_kind_is_an_error_that_names_what_it_has(
    any_trt: FakeTensorRt, make: Maker, io: list[Any]
) -> None:
    with pytest.raises(EngineError, match='expected one input') as caught:
        make(any_trt, plan_bytes(io=io))

    assert all(f'{name} {shape}' in str(caught.value) for name, _, shape, _ in io)


# -- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'value', 'here'),
    [
        ('tensorrt', '9.9.9', '10.3.0'),
        ('gpu', 'Thor', 'Orin'),
        ('compute_capability', '12.0', '8.7'),
        ('flavour', 'tensorrt_rtx', 'tensorrt'),
    ],
)
def test_a_foreign_plan_is_refused_before_it_is_read(
    any_trt: FakeTensorRt, tmp_path: Path, name: str, value: str, here: str
) -> None:
    key = dataclasses.replace(key_of(any_trt), **{name: value})

    # The file does not exist: whoever read it would find another error.
    with pytest.raises(
        PlanMismatchError, match=f'{value}, here is {here}.*mobilevlm build MODEL --profile jetson-orin'
    ):
        TensorRtVision(tmp_path / 'vision.plan', key, trt=any_trt, cuda=Cuda(any_trt.cudart))

    assert any_trt.n_deserialized == 0
    assert_nothing_left(any_trt.cudart)


def test_a_plan_of_a_graph_that_was_changed_since_is_refused(any_trt: FakeTensorRt, make: Maker) -> None:
    with pytest.raises(PlanMismatchError, match=r'ONNX graph \(SHA-256\) aaaaaaaaaaaa…, here is bbbbbbbbbbbb…'):
        make(any_trt, onnx_sha256='b' * 64)

    assert any_trt.n_deserialized == 0


def test_the_graph_that_it_was_built_from_is_taken(any_trt: FakeTensorRt, make: Maker) -> None:
    make(any_trt, onnx_sha256='a' * 64)


# -- closing --------------------------------------------------------------------------------------------------------


def test_it_may_be_closed_twice_and_says_that_it_is_closed(trt: FakeTensorRt, make: Maker) -> None:
    engine = make(trt)
    engine.close()
    engine.close()

    assert_nothing_left(trt.cudart)
    with pytest.raises(EngineError, match='closed'):
        engine.encode(pixels(), CancelToken())


def test_closing_waits_for_an_abandoned_run(any_trt: FakeTensorRt, make: Maker, cudart: FakeCudart) -> None:
    engine, cancel = make(any_trt), CancelToken()
    cudart.polls = 1_000_000
    with cancel.deadline(time.monotonic() + 0.02), pytest.raises(InterruptedAnswerError):
        engine.encode(pixels(), cancel)
    for stream in cudart.streams.values():
        stream.polls_left = 5

    engine.close()  # the fake raises if memory is freed while something uses it

    assert_nothing_left(cudart)


def test_what_cannot_be_freed_does_not_keep_the_rest(any_trt: FakeTensorRt, make: Maker, cudart: FakeCudart) -> None:
    engine = make(any_trt)
    cudart.fail['cudaFreeHost'] = 700

    engine.close()

    assert [block.kind for block in cudart.blocks.values()] == ['host']
    cudart.blocks.clear()


@pytest.mark.parametrize('cuda_graph', [True, False])
def test_a_start_that_fails_anywhere_leaves_nothing(tmp_path: Path, cuda_graph: bool) -> None:
    """Every CUDA call of a start fails once; the start fails or does without, and nothing is left."""
    (tmp_path / 'vision.plan').write_bytes(plan_bytes())

    def start(cudart: FakeCudart) -> TensorRtVision:
        trt = FakeTensorRt(cudart)
        return TensorRtVision(tmp_path / 'vision.plan', key_of(trt), trt=trt, cuda=Cuda(cudart), cuda_graph=cuda_graph)

    clean = FakeCudart()
    engine = start(clean)
    # What cannot be destroyed is left, whatever we do.
    numbers = [number for number, name in enumerate(clean.calls) if name != 'cudaGraphDestroy']
    engine.close()
    n_failed = 0
    for number in numbers:
        cudart = FakeCudart()
        cudart.fail_at[number] = 100
        try:
            start(cudart).close()
        except EngineError as error:
            assert 'cudaErrorNoDevice' in str(error)
            n_failed += 1
        assert_nothing_left(cudart)
    assert n_failed > 8


# -- libraries ------------------------------------------------------------------------------------------------------


def module(version: str) -> ModuleType:
    made = ModuleType('tensorrt')
    made.__version__ = version  # type: ignore[attr-defined]
    return made


def test_a_tensorrt_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'tensorrt', module('8.5.2.2'))

    with pytest.raises(DependencyError, match=r'TensorRT 8\.5\.2\.2 found; 8\.6 or newer'):
        load_tensorrt()


@pytest.mark.parametrize('version', [*VERSIONS, '8.6.1.post1', '10.16.0.72'])
def test_a_tensorrt_that_is_new_enough_is_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setitem(sys.modules, 'tensorrt', module(version))

    assert load_tensorrt().__version__ == version


def test_a_missing_tensorrt_says_how_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'tensorrt', None)

    with pytest.raises(DependencyError, match=r'cannot be loaded .*JetPack.*--system-site-packages'):
        load_tensorrt()


def test_the_key_of_this_machine_is_one_that_a_bundle_can_hold(any_trt: FakeTensorRt, cudart: FakeCudart) -> None:
    key = key_here(any_trt, Cuda(cudart).gpu(), 'a' * 64, 'fp16')

    assert PlanKey.from_dict(key.to_dict()) == key == key_of(any_trt)


def test_the_fake_has_no_names_but_those_of_nvidias_bindings() -> None:
    trt = pytest.importorskip('tensorrt_rtx', reason='needs tensorrt-rtx')
    fake = FakeTensorRt(FakeCudart(), '11.1.0')
    engine = fake_tensorrt._Engine(fake, None, {'io': [], 'recordable': True})
    pairs = [
        (trt.Runtime, fake_tensorrt._Runtime),
        (trt.ICudaEngine, engine),
        (trt.IExecutionContext, fake_tensorrt._Context),
        (trt.DataType, FakeTensorRt.DataType.__members__),
        (trt.TensorIOMode, FakeTensorRt.TensorIOMode.__members__),
        (trt.ILogger.Severity, FakeTensorRt.ILogger.Severity.__members__),
        (trt, fake),
    ]
    helpers = {'say', 'fail', 'cudart', 'n_deserialized', 'number'}
    for real, ours in pairs:
        names = ours if isinstance(ours, dict | type(FakeTensorRt.DataType.__members__)) else dir(ours)
        assert {n for n in names if not n.startswith('_')} - helpers <= set(dir(real))
    assert {name: int(value) for name, value in trt.ILogger.Severity.__members__.items()} == {
        name: int(value) for name, value in FakeTensorRt.ILogger.Severity.__members__.items()
    }
