"""Fixtures that every room's tests share: tiny real models, made once in a run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from numpy.typing import NDArray

from mobilevlm_ros.runtime.assistant import Assistant
from mobilevlm_ros.runtime.loading import load_assistant_from

# A shell that runs the tests in the background has them ignore Ctrl-C, which several of them are about.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope='session')
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a bundle with tiny random models; not to be changed."""
    return tiny_models.write_bundle(tmp_path_factory.mktemp('bundles') / 'tiny')


@pytest.fixture
def tiny_assistant(tiny_bundle: Path) -> Iterator[Assistant]:
    """An assistant on the tiny bundle."""
    assistant = load_assistant_from(tiny_bundle)
    yield assistant
    assistant.close()


@pytest.fixture
def photo() -> NDArray[np.uint8]:
    """A picture with structure, uint8 ``[48, 64, 3]``."""
    ys, xs = np.mgrid[0:48, 0:64]
    return np.stack((xs * 4, ys * 5, (xs * ys) % 256), axis=-1).astype(np.uint8)
