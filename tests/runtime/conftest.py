"""Fixtures of the runtime's tests: engines on tiny real models, each made once in a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from numpy.typing import NDArray

from mobilevlm_ros.runtime.assistant import Assistant
from mobilevlm_ros.runtime.bundle import DESCRIPTION
from mobilevlm_ros.runtime.language import EmbeddingSegment, LanguageOptions
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine
from mobilevlm_ros.runtime.loading import load_assistant_from

EngineMaker = Callable[..., LlamaCppEngine]


@pytest.fixture(scope='session')
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny language model; not to be changed."""
    path = tmp_path_factory.mktemp('language') / 'tiny.gguf'
    tiny_models.write_gguf(path)
    return path


@pytest.fixture(scope='session')
def big_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model just big enough that 2000 positions take a noticeable time."""
    path = tmp_path_factory.mktemp('language') / 'big.gguf'
    tiny_models.write_gguf(path, tiny_models.TinyLlama(n_embd=256, n_layers=4, n_heads=4, n_ff=1024))
    return path


@pytest.fixture
def make_engine(tiny_gguf: Path) -> Iterator[EngineMaker]:
    """Makes engines with keys and values in float32 on one thread, and closes them after the test."""
    with ExitStack() as stack:

        def make(path: Path = tiny_gguf, adapter: Path | None = None, **options: Any) -> LlamaCppEngine:
            settings: dict[str, Any] = {'n_threads': 1, 'n_threads_batch': 1, 'kv_type': 'f32', 'n_ctx': 512}
            engine = LlamaCppEngine(path, LanguageOptions(**{**settings, **options}), adapter)
            stack.callback(engine.close)
            return engine

        yield make


@pytest.fixture
def engine(make_engine: EngineMaker) -> LlamaCppEngine:
    return make_engine()


@pytest.fixture
def image_segment() -> Callable[..., EmbeddingSegment]:
    """Makes image segments whose rows are decided by their number."""

    def make(number: int, n_positions: int = 4, n_embd: int = 64) -> EmbeddingSegment:
        def rows() -> NDArray[np.float32]:
            return np.random.default_rng(number).normal(size=(n_positions, n_embd)).astype(np.float32)

        return EmbeddingSegment(f'image {number}', n_positions, rows)

    return make


@pytest.fixture
def load(tiny_bundle: Path, tmp_path: Path) -> Iterator[Callable[[Any], Assistant]]:
    """Loads the tiny bundle with another section ``answers``; None: with none."""
    opened: list[Assistant] = []

    def load(answers: Any) -> Assistant:
        path = Path(shutil.copytree(tiny_bundle, tmp_path / 'bundle', dirs_exist_ok=True))
        description = json.loads((path / DESCRIPTION).read_text())
        (path / DESCRIPTION).write_text(json.dumps(description | ({} if answers is None else {'answers': answers})))
        opened.append(load_assistant_from(path))
        return opened[-1]

    yield load
    for assistant in opened:
        assistant.close()
