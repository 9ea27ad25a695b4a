"""The vision engine on OpenVINO: the reference's tokens, interruption, and files that do not fit."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from numpy.typing import NDArray
from vision_reference import cosine, tokens_of

from mobilevlm_ros.errors import DependencyError, EngineError, InterruptedAnswerError
from mobilevlm_ros.model.config import VisionConfig
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.vision.openvino import OpenVinoVision

pytest.importorskip('openvino', reason='needs openvino: pip install openvino')
SHAPE = tiny_models.TINY_VISION
SLOW = VisionConfig('slow', image_size=96, patch_size=4, width=64, n_heads=4, n_blocks=7, mlp_width=128)


def pixels(seed: int, size: int = SHAPE.image_size) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(1, 3, size, size)).astype(np.float32)


@pytest.fixture(scope='module')
def vision_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('vision') / 'vision.onnx'
    tiny_models.write_vision(path)
    return path


@pytest.fixture
def vision(vision_path: Path) -> Iterator[OpenVinoVision]:
    engine = OpenVinoVision(vision_path, n_threads=1)
    yield engine
    engine.close()


@pytest.mark.parametrize(('precision', 'limit'), [('fp32', 0.999999), ('bf16', 0.999)])
def test_visual_tokens_are_those_of_the_reference(vision_path: Path, precision: str, limit: float) -> None:
    engine = OpenVinoVision(vision_path, 1, precision)

    tokens = engine.encode(pixels(0), CancelToken())

    weights = tiny_models.vision_weights()
    expected = tokens_of(weights, SHAPE, tiny_models.TINY_PROJECTOR, tiny_models.TinyLlama.n_embd, pixels(0))
    assert tokens.shape == (engine.n_tokens, engine.n_embd) == (4, 64)
    assert cosine(tokens, expected) >= limit


def test_it_says_what_it_is_and_computes_in(vision_path: Path, vision: OpenVinoVision) -> None:
    assert (vision.image_size, vision.n_tokens, vision.n_embd) == (32, 4, 64)
    assert 'openvino' in vision.description
    assert 'CPU, fp32, 1 threads' in vision.description
    # Where the CPU has no bfloat16 the plugin computes in float32, silently.
    assert OpenVinoVision(vision_path, 1, 'bf16').description.count('bf16') == 1


def test_the_tokens_of_an_image_stay_when_the_next_one_comes(vision: OpenVinoVision) -> None:
    first = vision.encode(pixels(0), CancelToken())
    kept = first.copy()
    other = vision.encode(pixels(1), CancelToken())

    assert not np.array_equal(other, first)
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(vision.encode(pixels(0), CancelToken()), first)


def test_a_set_token_interrupts_before_the_run(vision: OpenVinoVision) -> None:
    cancel = CancelToken()
    cancel.set()

    with pytest.raises(InterruptedAnswerError):
        vision.encode(pixels(0), cancel)


def test_a_run_is_interrupted_and_the_next_one_works(vision: OpenVinoVision) -> None:
    expected = vision.encode(pixels(0), CancelToken())
    for delay_s in np.linspace(0.0, 0.002, 20):
        cancel = CancelToken()
        thread = threading.Timer(delay_s, cancel.set)
        thread.start()
        with suppress(InterruptedAnswerError):  # the run may be over before it is stopped
            vision.encode(pixels(0), cancel)
        thread.join()

    np.testing.assert_array_equal(vision.encode(pixels(0), CancelToken()), expected)


class SetsItself(CancelToken):
    """Set so long after the engine listens; at once, it is before or at the start of the run."""

    def __init__(self, after_s: float) -> None:
        super().__init__()
        self._after_s = after_s

    @contextmanager
    def on_set(self, callback: Callable[[], None]) -> Iterator[None]:
        with super().on_set(callback):
            if self._after_s:
                threading.Timer(self._after_s, self.set).start()
            else:
                self.set()
            yield


@pytest.mark.parametrize('share', [0.0, 0.15])
def test_a_token_set_around_the_start_stops_it_early(tmp_path: Path, share: float) -> None:
    """Set after a share of the time that a whole run takes on the machine at hand."""
    tiny_models.write_vision(tmp_path / 'slow.onnx', SLOW)
    vision, image = OpenVinoVision(tmp_path / 'slow.onnx', n_threads=1), pixels(0, 96)
    vision.encode(image, CancelToken())

    def whole_s() -> float:
        started_s = time.monotonic()
        vision.encode(image, CancelToken())
        return time.monotonic() - started_s

    def stopped_s(after_s: float) -> float:
        started_s = time.monotonic()
        with pytest.raises(InterruptedAnswerError):
            vision.encode(image, SetsItself(after_s))
        return time.monotonic() - started_s

    # The quickest of several: a process that is made to wait once would decide otherwise.
    whole = min(whole_s() for _ in range(9))
    assert min(stopped_s(share * whole) for _ in range(9)) < whole / 2


@pytest.mark.parametrize('shape', [(1, 3, 16, 16), (1, 3, 32), (2, 3, 32, 32)])
def test_pixels_of_another_shape_are_an_error(vision: OpenVinoVision, shape: tuple[int, ...]) -> None:
    with pytest.raises(EngineError, match='failed on an image'):
        vision.encode(np.zeros(shape, np.float32), CancelToken())


def test_values_that_are_not_finite_are_an_error(vision: OpenVinoVision) -> None:
    with pytest.raises(EngineError, match='not finite'):
        vision.encode(np.full((1, 3, 32, 32), np.nan, np.float32), CancelToken())


def test_it_may_be_closed_twice_and_says_that_it_is_closed(vision: OpenVinoVision) -> None:
    vision.close()
    vision.close()

    with pytest.raises(EngineError, match='closed'):
        vision.encode(pixels(0), CancelToken())


@pytest.mark.parametrize('share', [0.0, 0.3, 0.99])
def test_a_truncated_file_is_an_error_that_names_it(vision_path: Path, tmp_path: Path, share: float) -> None:
    data = vision_path.read_bytes()
    (tmp_path / 'cut.onnx').write_bytes(data[: int(len(data) * share)])

    with pytest.raises(EngineError, match=r'cut\.onnx.*Rebuild'):
        OpenVinoVision(tmp_path / 'cut.onnx')


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r'nothing\.xml is missing'):
        OpenVinoVision(tmp_path / 'nothing.xml')


def test_an_unknown_precision_is_an_error(vision_path: Path) -> None:
    with pytest.raises(EngineError, match="'int4'"):
        OpenVinoVision(vision_path, precision='int4')


@pytest.mark.parametrize(
    ('n_inputs', 'shape_in', 'shape_out'),
    [
        (1, [1, 3, 8, 8], [1, 192]),
        (1, [1, 3, 8, 4], [1, 96, 1]),
        (1, [1, 1, 8, 8], [1, 64, 1]),
        (1, ['n', 3, 8, 8], ['n', 192, 1]),
        (2, [1, 3, 8, 8], [1, 192, 1]),
    ],
    ids=str,
)
def test_a_graph_of_another_kind_is_an_error(tmp_path: Path, n_inputs: int, shape_in: Any, shape_out: Any) -> None:
    tiny_models.write_reshape(tmp_path / 'other.onnx', n_inputs, shape_in, shape_out)

    with pytest.raises(EngineError, match='expected one input'):
        OpenVinoVision(tmp_path / 'other.onnx')


def test_a_missing_library_is_named(vision_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'openvino', None)

    with pytest.raises(DependencyError, match='pip install openvino'):
        OpenVinoVision(vision_path)
