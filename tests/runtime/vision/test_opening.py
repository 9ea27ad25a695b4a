"""Which vision engine a bundle gets, and what is said where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from fake_cudart import FakeCudart
from fake_tensorrt import FakeTensorRt, plan_bytes, tokens_of

from mobilevlm_ros.errors import BundleIncompleteError, DependencyError, EngineError, PlanMismatchError
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.vision import VisionEngine
from mobilevlm_ros.runtime.vision import tensorrt as engine_module
from mobilevlm_ros.runtime.vision.cuda import Cuda
from mobilevlm_ros.runtime.vision.opening import open_engine

KEY = {
    'flavour': 'tensorrt',
    'tensorrt': '10.3.0',
    'gpu': 'Orin',
    'compute_capability': '8.7',
    'onnx_sha256': 'a' * 64,
    'precision': 'fp16',
}
PIXELS = np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    tiny_models.write_vision(tmp_path / 'vision.onnx')
    return tmp_path / 'vision.onnx'


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan, and what runs it."""
    cudart = FakeCudart()
    monkeypatch.setattr(engine_module, 'open_cuda', lambda: Cuda(cudart))
    monkeypatch.setitem(sys.modules, 'tensorrt', FakeTensorRt(cudart))  # type: ignore[arg-type]
    (tmp_path / 'vision.plan').write_bytes(plan_bytes(side=32, n_tokens=4, n_embd=64))
    return tmp_path / 'vision.plan'


def run(engine: VisionEngine) -> Any:
    try:
        assert (engine.image_size, engine.n_tokens, engine.n_embd) == (32, 4, 64)
        return engine.encode(PIXELS, CancelToken())
    finally:
        engine.close()


def test_onnxruntime_with_its_threads(graph: Path) -> None:
    engine = open_engine('onnxruntime', graph, 'fp32', n_threads=3)

    assert engine.description.startswith('onnxruntime')
    assert '3 threads' in engine.description
    run(engine)


def test_openvino_computes_the_same(graph: Path) -> None:
    openvino = pytest.importorskip('openvino', reason='needs openvino: make venv-dev')
    model = openvino.convert_model(str(graph))
    openvino.save_model(model, str(graph.with_suffix('.xml')), compress_to_fp16=False)

    engine = open_engine('openvino', graph.with_suffix('.xml'), 'fp32', n_threads=1)

    assert 'openvino' in engine.description.lower()
    np.testing.assert_allclose(run(engine), run(open_engine('onnxruntime', graph, 'fp32')), atol=1e-4)


def test_tensorrt_with_a_plan_that_fits(plan: Path) -> None:
    engine = open_engine('tensorrt', plan, 'fp16', plan_key=KEY, onnx_sha256='a' * 64)

    assert engine.description.startswith('TensorRT 10.3.0 on Orin')
    np.testing.assert_array_equal(run(engine), tokens_of(PIXELS, (4, 64)))


def test_tensorrt_without_a_plan_says_what_to_run(graph: Path) -> None:
    with pytest.raises(EngineError, match=f'no plan for this GPU yet.*On the device itself run: .*plan {graph.parent}'):
        open_engine('tensorrt', graph, 'fp16')


@pytest.mark.parametrize(
    ('change', 'onnx_sha256', 'named'),
    [
        ({'tensorrt': '8.6.2'}, None, 'TensorRT 8.6.2, here is 10.3.0'),
        ({'gpu': 'Xavier'}, None, 'GPU Xavier, here is Orin'),
        ({}, 'b' * 64, 'ONNX graph'),
    ],
)
def test_tensorrt_with_a_plan_that_does_not_fit_names_the_command(
    plan: Path, change: dict[str, str], onnx_sha256: str | None, named: str
) -> None:
    with pytest.raises(PlanMismatchError, match=f'{named}.*mobilevlm plan {plan.parent}$'):
        open_engine('tensorrt', plan, 'fp16', plan_key={**KEY, **change}, onnx_sha256=onnx_sha256)


@pytest.mark.parametrize('key', [{}, {**KEY, 'gpu': 3}, {**KEY, 'more': 'x'}])
def test_a_malformed_key_is_a_damaged_bundle(plan: Path, key: dict[str, Any]) -> None:
    with pytest.raises(BundleIncompleteError, match='the key of the TensorRT plan is malformed'):
        open_engine('tensorrt', plan, 'fp16', plan_key=key)


def test_an_unknown_backend_is_an_error(graph: Path) -> None:
    with pytest.raises(EngineError, match="unknown vision backend 'vulkan'"):
        open_engine('vulkan', graph, 'fp32')


@pytest.mark.parametrize('backend', ['onnxruntime', 'openvino', 'tensorrt'])
def test_a_missing_library_is_told(plan: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, backend, None)

    with pytest.raises(DependencyError, match=rf'pip install {backend}'):
        open_engine(backend, plan, 'fp16', plan_key=KEY)


def test_only_the_library_of_the_backend_is_loaded(graph: Path) -> None:
    code = (
        'import sys; from pathlib import Path; from mobilevlm_ros.runtime.vision.opening import open_engine; '
        f'open_engine("onnxruntime", Path({str(graph)!r}), "fp32"); '
        'assert "onnxruntime" in sys.modules; assert not {"openvino", "tensorrt", "torch"} & set(sys.modules)'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
