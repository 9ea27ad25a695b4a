"""The vision engine on ONNX Runtime: the reference's tokens, interruption, and files that do not fit."""

from __future__ import annotations

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
from vision_reference import tokens_of

from mobilevlm_ros.errors import EngineError, InterruptedAnswerError
from mobilevlm_ros.model.config import VisionConfig
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.vision.onnxruntime import OnnxRuntimeVision

SHAPE = tiny_models.TINY_VISION
DEEPER = VisionConfig('deeper', image_size=48, patch_size=8, width=24, n_heads=3, n_blocks=5, mlp_width=40)


@pytest.fixture(scope='module')
def vision_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('vision') / 'vision.onnx'
    tiny_models.write_vision(path)
    return path


@pytest.fixture
def vision(vision_path: Path) -> Iterator[OnnxRuntimeVision]:
    engine = OnnxRuntimeVision(vision_path, n_threads=1)
    yield engine
    engine.close()


def pixels(seed: int, size: int = SHAPE.image_size) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(1, 3, size, size)).astype(np.float32)


@pytest.mark.parametrize('vision_config', [SHAPE, DEEPER], ids=['tiny', 'deeper'])
@pytest.mark.parametrize('seed', [0, 1])
def test_visual_tokens_are_those_of_the_reference(tmp_path: Path, vision_config: VisionConfig, seed: int) -> None:
    tiny_models.write_vision(tmp_path / 'v.onnx', vision_config, seed)
    engine = OnnxRuntimeVision(tmp_path / 'v.onnx', n_threads=1)
    image = pixels(seed, vision_config.image_size)

    tokens = engine.encode(image, CancelToken())

    weights = tiny_models.vision_weights(vision_config, seed)
    projector, n_embd = tiny_models.TINY_PROJECTOR, tiny_models.TinyLlama.n_embd
    expected = tokens_of(weights, vision_config, projector, n_embd, image)
    assert tokens.shape == (projector.grid_out(vision_config.grid) ** 2, n_embd)
    assert np.abs(tokens - expected).max() <= 1e-5 * np.abs(expected).max()


def test_it_says_what_it_is(vision: OnnxRuntimeVision) -> None:
    assert (vision.image_size, vision.n_tokens, vision.n_embd) == (32, 4, 64)
    assert 'onnxruntime' in vision.description


def test_the_same_image_gives_the_same_tokens(vision: OnnxRuntimeVision) -> None:
    first = vision.encode(pixels(0), CancelToken())
    vision.encode(pixels(1), CancelToken())

    np.testing.assert_array_equal(vision.encode(pixels(0), CancelToken()), first)


def test_a_set_token_interrupts_before_the_run(vision: OnnxRuntimeVision) -> None:
    cancel = CancelToken()
    cancel.set()

    with pytest.raises(InterruptedAnswerError):
        vision.encode(pixels(0), cancel)


class WatchedToken(CancelToken):
    """Tells when the session runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.running = threading.Event()

    @contextmanager
    def on_set(self, callback: Callable[[], None]) -> Iterator[None]:
        with super().on_set(callback):
            self.running.set()
            yield


def test_a_run_is_interrupted_and_the_next_one_works(vision: OnnxRuntimeVision) -> None:
    expected = vision.encode(pixels(0), CancelToken())
    for _ in range(20):
        cancel = WatchedToken()
        thread = threading.Thread(target=lambda token=cancel: token.running.wait(10) and token.set())
        thread.start()
        with suppress(InterruptedAnswerError):  # the run may be over before it is stopped
            vision.encode(pixels(0), cancel)
        thread.join()

    np.testing.assert_array_equal(vision.encode(pixels(0), CancelToken()), expected)


def test_a_token_set_during_the_run_stops_it_early(tmp_path: Path) -> None:
    slow = VisionConfig('slow', image_size=96, patch_size=4, width=64, n_heads=4, n_blocks=7, mlp_width=128)
    tiny_models.write_vision(tmp_path / 'slow.onnx', slow)
    vision, image = OnnxRuntimeVision(tmp_path / 'slow.onnx', n_threads=1), pixels(0, 96)

    class SetsItself(CancelToken):
        @contextmanager
        def on_set(self, callback: Callable[[], None]) -> Iterator[None]:
            with super().on_set(callback):
                self.set()
                yield

    vision.encode(image, CancelToken())
    started_s = time.monotonic()
    vision.encode(image, CancelToken())
    whole_s = time.monotonic() - started_s
    started_s = time.monotonic()
    with pytest.raises(InterruptedAnswerError):
        vision.encode(image, SetsItself())

    assert time.monotonic() - started_s < whole_s / 2


@pytest.mark.parametrize('shape', [(1, 3, 16, 16), (1, 3, 32), (2, 3, 32, 32)])
def test_pixels_of_another_shape_are_an_error(vision: OnnxRuntimeVision, shape: tuple[int, ...]) -> None:
    with pytest.raises(EngineError, match='failed on an image'):
        vision.encode(np.zeros(shape, np.float32), CancelToken())


def test_values_that_are_not_finite_are_an_error(vision: OnnxRuntimeVision) -> None:
    with pytest.raises(EngineError, match='not finite'):
        vision.encode(np.full((1, 3, 32, 32), np.nan, np.float32), CancelToken())


def test_it_may_be_closed_twice_and_says_that_it_is_closed(vision: OnnxRuntimeVision) -> None:
    vision.close()
    vision.close()

    with pytest.raises(EngineError, match='closed'):
        vision.encode(pixels(0), CancelToken())


@pytest.mark.parametrize('share', [0.0, 0.3, 0.99])
def test_a_truncated_file_is_an_error_that_names_it(vision_path: Path, tmp_path: Path, share: float) -> None:
    data = vision_path.read_bytes()
    (tmp_path / 'cut.onnx').write_bytes(data[: int(len(data) * share)])

    with pytest.raises(EngineError, match=r'cut\.onnx.*Rebuild'):
        OnnxRuntimeVision(tmp_path / 'cut.onnx')


def test_a_file_of_garbage_is_an_error(tmp_path: Path) -> None:
    (tmp_path / 'bad.onnx').write_bytes(b'no model' * 100)

    with pytest.raises(EngineError, match=r'bad\.onnx'):
        OnnxRuntimeVision(tmp_path / 'bad.onnx')


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r'nothing\.onnx'):
        OnnxRuntimeVision(tmp_path / 'nothing.onnx')


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
        OnnxRuntimeVision(tmp_path / 'other.onnx')
