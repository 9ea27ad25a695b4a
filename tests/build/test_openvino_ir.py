"""OpenVINO's own model from the graph: equal in floating point, near in int8, right or not there at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from numpy.typing import NDArray
from vision_reference import cosine

from mobilevlm_ros.build.openvino_ir import write_openvino
from mobilevlm_ros.errors import BuildError, DependencyError
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.vision.onnxruntime import OnnxRuntimeVision
from mobilevlm_ros.runtime.vision.openvino import OpenVinoVision

pytest.importorskip('openvino', reason='needs openvino: pip install openvino')
IMAGES = [np.random.default_rng(seed).normal(size=(1, 3, 32, 32)).astype(np.float32) for seed in range(6)]


@pytest.fixture(scope='module')
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('graph') / 'vision.onnx'
    tiny_models.write_vision(path)
    return path


def worst_cosine(graph: Path, path: Path, precision: str, images: list[NDArray[np.float32]]) -> float:
    exact, engine = OnnxRuntimeVision(graph, 1), OpenVinoVision(path, 1, precision)
    return min(cosine(engine.encode(x, CancelToken()), exact.encode(x, CancelToken())) for x in images)


@pytest.mark.parametrize(('precision', 'limit'), [('fp32', 0.999999), ('bf16', 0.999)])
def test_floating_point_keeps_the_tokens(graph: Path, tmp_path: Path, precision: str, limit: float) -> None:
    write_openvino(graph, tmp_path / 'vision.xml', precision)

    assert {path.name for path in tmp_path.iterdir()} == {'vision.xml', 'vision.bin'}
    assert worst_cosine(graph, tmp_path / 'vision.xml', precision, IMAGES) >= limit


@pytest.mark.slow
def test_int8_is_near_on_images_it_was_not_calibrated_with(graph: Path, tmp_path: Path) -> None:
    pytest.importorskip('nncf', reason='needs nncf: pip install nncf')

    write_openvino(graph, tmp_path / 'vision.xml', 'int8', IMAGES[:3])

    assert {path.name for path in tmp_path.iterdir()} == {'vision.xml', 'vision.bin'}
    assert '"FakeQuantize"' in (tmp_path / 'vision.xml').read_text()
    assert worst_cosine(graph, tmp_path / 'vision.xml', 'int8', IMAGES[3:]) >= 0.98


def test_int8_without_images_is_refused(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match='images to calibrate'):
        write_openvino(graph, tmp_path / 'vision.xml', 'int8')


def test_an_unknown_precision_is_refused(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="'int4'"):
        write_openvino(graph, tmp_path / 'vision.xml', 'int4')


@pytest.mark.parametrize('content', [b'', b'no model'])
def test_a_damaged_graph_is_an_error_that_leaves_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / 'bad.onnx').write_bytes(content)

    with pytest.raises(BuildError, match=r'bad\.onnx'):
        write_openvino(tmp_path / 'bad.onnx', tmp_path / 'vision.xml', 'fp32')

    assert [path.name for path in tmp_path.iterdir()] == ['bad.onnx']


@pytest.mark.parametrize(('module', 'precision'), [('openvino', 'fp32'), ('nncf', 'int8')])
def test_a_missing_library_is_named(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, precision: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(DependencyError, match=f'pip install {module}'):
        write_openvino(graph, tmp_path / 'vision.xml', precision, IMAGES)


@pytest.mark.slow
def test_nncf_reports_to_nobody(graph: Path, tmp_path: Path) -> None:
    """In a process of its own, because NNCF keeps quiet by itself where pytest is loaded."""
    pytest.importorskip('nncf', reason='needs nncf: pip install nncf')
    np.save(tmp_path / 'image.npy', IMAGES[0])
    script = (
        'import numpy, pathlib, sys\n'
        'from mobilevlm_ros.build.openvino_ir import write_openvino\n'
        'graph, out, image = map(pathlib.Path, sys.argv[1:])\n'
        "write_openvino(graph, out, 'int8', [numpy.load(image)])\n"
        'from nncf.telemetry.wrapper import telemetry\n'
        'print(type(telemetry).__name__)\n'
    )
    environment = {name: value for name, value in os.environ.items() if name not in ('NNCF_CI', 'CI')}
    arguments = [str(graph), str(tmp_path / 'vision.xml'), str(tmp_path / 'image.npy')]

    done = subprocess.run(
        [sys.executable, '-c', script, *arguments], capture_output=True, text=True, env=environment, check=True
    )

    assert done.stdout.split()[-1] == 'MagicMock'
