"""The fake vision engine: tokens that tell images apart."""

from __future__ import annotations

import time

import numpy as np
import pytest

from mobilevlm_ros.errors import InterruptedAnswerError
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.vision.fake import FakeVision


def test_tokens_are_means_of_cells() -> None:
    pixels = np.zeros((1, 3, 16, 16), np.float32)
    pixels[:, :, :8, 8:] = 3.0

    tokens = FakeVision().encode(pixels, CancelToken())

    np.testing.assert_allclose(tokens, np.repeat([[0.0], [3.0], [0.0], [0.0]], 8, axis=1))


def test_runs_are_counted() -> None:
    vision = FakeVision()

    vision.encode(np.zeros((1, 3, 16, 16), np.float32), CancelToken())

    assert vision.n_runs == 1


def test_a_run_takes_its_time_and_can_be_interrupted() -> None:
    vision, cancel = FakeVision(run_s=3600.0), CancelToken()

    with cancel.deadline(time.monotonic() + 0.02), pytest.raises(InterruptedAnswerError):
        vision.encode(np.zeros((1, 3, 16, 16), np.float32), cancel)

    assert vision.n_runs == 0


def test_closing_is_noted() -> None:
    vision = FakeVision()

    vision.close()

    assert vision.closed
