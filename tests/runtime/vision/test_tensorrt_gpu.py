"""The TensorRT engine on a real GPU: built from a tiny graph, run, and held against ONNX Runtime.

Skipped, with the reason, where there is no CUDA device or no TensorRT. See docs/tensorrt.md for where it has run.
"""

from __future__ import annotations

import dataclasses
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tiny_models
from numpy.typing import NDArray

from mobilevlm_ros.build.tensorrt_plan import build_plan
from mobilevlm_ros.build.vision_graph import write_vision_graph
from mobilevlm_ros.errors import EngineError, InterruptedAnswerError, MobileVLMError, PlanMismatchError
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.vision.cuda import open_cuda
from mobilevlm_ros.runtime.vision.onnxruntime import OnnxRuntimeVision
from mobilevlm_ros.runtime.vision.plan_key import PlanKey
from mobilevlm_ros.runtime.vision.tensorrt import TensorRtVision, load_tensorrt


def find_tensorrt() -> tuple[Any, str]:
    """TensorRT, or its sister for GeForce cards, or why neither can be used."""
    try:
        open_cuda()
    except MobileVLMError as error:
        return None, str(error)
    try:
        return load_tensorrt(), ''
    except MobileVLMError as error:
        try:
            return importlib.import_module('tensorrt_rtx'), ''
        except ImportError:
            return None, str(error)


TRT, REASON = find_tensorrt()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(TRT is None, reason=REASON)]

# 1 - cosine to ONNX Runtime; fp32 without TF32 differs by the order of sums only.
LIMITS = {'fp32': 1e-5, 'fp16': 1e-3}
SIZE = tiny_models.TINY_VISION.image_size
SLACK_BYTES = 32 << 20
Opener = Callable[..., TensorRtVision]


@dataclasses.dataclass(frozen=True)
class Built:
    """A plan, and the graph in fp32 that it is held against."""

    reference: Path
    plan: Path
    key: PlanKey


@pytest.fixture(scope='module', params=['fp32', 'fp16'])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp('plan')
    for precision in ('fp32', 'fp16'):
        write_vision_graph(
            tiny_models.vision_weights(),
            tiny_models.TINY_VISION,
            tiny_models.TINY_PROJECTOR,
            tiny_models.TinyLlama.n_embd,
            folder / f'{precision}.onnx',
            precision=precision,
        )
    key = build_plan(
        folder / f'{request.param}.onnx', folder / 'vision.plan', timing_cache=folder / 'timing.cache', trt=TRT
    )
    return Built(folder / 'fp32.onnx', folder / 'vision.plan', key)


@pytest.fixture
def open_plan(built: Built) -> Iterator[Opener]:
    engines: list[TensorRtVision] = []

    def open_it(**options: Any) -> TensorRtVision:
        engines.append(TensorRtVision(built.plan, built.key, trt=TRT, **options))
        return engines[-1]

    yield open_it
    for engine in engines:
        engine.close()


def pixels(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(1, 3, SIZE, SIZE)).astype(np.float32)


@pytest.mark.parametrize('cuda_graph', [True, False])
def test_visual_tokens_are_those_of_onnxruntime(built: Built, open_plan: Opener, cuda_graph: bool) -> None:
    reference, engine = OnnxRuntimeVision(built.reference), open_plan(cuda_graph=cuda_graph)

    assert ('CUDA graph' in engine.description) == cuda_graph
    for seed in range(5):
        expected, tokens = (one.encode(pixels(seed), CancelToken()) for one in (reference, engine))
        norms = np.linalg.norm(expected, axis=1) * np.linalg.norm(tokens, axis=1)
        assert tokens.shape == expected.shape
        assert 1.0 - ((expected * tokens).sum(axis=1) / norms).min() <= LIMITS[built.key.precision]


def test_a_thousand_runs_take_no_more_memory_than_ten(open_plan: Opener) -> None:
    engine, cuda = open_plan(), open_cuda()
    for seed in range(10):
        engine.encode(pixels(seed), CancelToken())
    before, _ = cuda.free_memory()
    resident = psutil.Process().memory_info().rss

    for seed in range(1000):
        engine.encode(pixels(seed % 7), CancelToken())

    assert before - cuda.free_memory()[0] < SLACK_BYTES
    assert psutil.Process().memory_info().rss - resident < SLACK_BYTES


def test_opening_and_closing_gives_the_memory_back(open_plan: Opener) -> None:
    open_plan().close()  # what CUDA and TensorRT keep for the process
    cuda = open_cuda()
    before, _ = cuda.free_memory()

    for _ in range(20):
        open_plan().close()

    assert before - cuda.free_memory()[0] < SLACK_BYTES


def test_a_cancelled_image_does_not_spoil_the_next_one(open_plan: Opener) -> None:
    engine = open_plan()
    expected = engine.encode(pixels(0), CancelToken())
    for seed in range(1, 30):
        cancel = CancelToken()
        thread = threading.Thread(target=cancel.set)
        thread.start()
        with suppress(InterruptedAnswerError):  # it may be over before it is stopped
            engine.encode(pixels(seed), cancel)
        thread.join()

    np.testing.assert_allclose(engine.encode(pixels(0), CancelToken()), expected, rtol=1e-3, atol=1e-3)


def test_another_thread_may_run_it(open_plan: Opener) -> None:
    engine = open_plan()
    expected = engine.encode(pixels(0), CancelToken())
    results: list[Any] = []

    thread = threading.Thread(target=lambda: results.append(engine.encode(pixels(0), CancelToken())))
    thread.start()
    thread.join()

    np.testing.assert_allclose(results[0], expected, rtol=1e-3, atol=1e-3)


def test_a_truncated_plan_is_an_error(built: Built, tmp_path: Path) -> None:
    data = built.plan.read_bytes()
    (tmp_path / 'cut.plan').write_bytes(data[: len(data) // 2])

    with pytest.raises(EngineError, match=r'cannot load .*cut\.plan'):
        TensorRtVision(tmp_path / 'cut.plan', built.key, trt=TRT)


def test_a_plan_of_another_tensorrt_is_refused(built: Built) -> None:
    with pytest.raises(PlanMismatchError, match=r'TensorRT 8\.6\.2, here is'):
        TensorRtVision(built.plan, dataclasses.replace(built.key, tensorrt='8.6.2'), trt=TRT)
