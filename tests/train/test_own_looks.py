"""Which frames are worth labelling, on photographs that were darkened, blurred and shown again."""

from __future__ import annotations

import cv2
import numpy as np
import own_recordings
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mobilevlm_ros.train.own_looks import Limits, choose, look_at

PHOTOS = own_recordings.photographs(9)


def noisy(rgb_hwc: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """As a camera that stands still sees it again."""
    noise = np.random.default_rng(seed).normal(0.0, 4.0, rgb_hwc.shape)
    return np.clip(rgb_hwc + noise, 0, 255).astype(np.uint8)


def verdicts(*pictures: NDArray[np.uint8], n_most: int = 99, **limits: float) -> list[str]:
    return list(choose([look_at(picture) for picture in pictures], n_most, Limits(**limits)))


def test_different_photographs_are_kept() -> None:
    assert set(verdicts(*PHOTOS)) == {'kept'}


def test_dark_bright_and_blurred_frames_are_left_out() -> None:
    dark = (PHOTOS[1] // 16).astype(np.uint8)
    bright = np.full_like(PHOTOS[1], 252)
    blurred = np.asarray(cv2.GaussianBlur(PHOTOS[1], (0, 0), 3.0), np.uint8)
    turned = np.asarray(cv2.blur(PHOTOS[1], (11, 1)), np.uint8)
    found = verdicts(PHOTOS[0], dark, bright, blurred, turned, *PHOTOS[2:6])
    assert found == ['kept', 'dark', 'bright', 'blurred', 'blurred', *['kept'] * 4]


def test_a_frame_that_was_seen_before_is_a_near_duplicate_also_later() -> None:
    found = verdicts(PHOTOS[0], noisy(PHOTOS[0], 1), PHOTOS[1], noisy(PHOTOS[0], 2))
    assert found == ['kept', 'near-duplicate', 'kept', 'near-duplicate']
    assert verdicts(PHOTOS[0], PHOTOS[0], change=0.0) == ['kept', 'kept']


def test_light_that_changes_is_no_change_but_something_small_that_moves_is() -> None:
    brighter = np.clip(PHOTOS[2].astype(int) + 12, 0, 255).astype(np.uint8)
    door = PHOTOS[2].copy()
    door[20:40, 8:20] = 255 - door[20:40, 8:20]
    assert verdicts(PHOTOS[2], brighter, door) == ['kept', 'near-duplicate', 'kept']


@given(st.integers(1, 60), st.integers(1, 60))
def test_what_is_too_much_is_taken_from_everywhere(n: int, n_most: int) -> None:
    look = look_at(PHOTOS[0])
    found = choose([look] * n, n_most, Limits(change=0.0))
    places = [place for place, verdict in enumerate(found) if verdict == 'kept']
    assert len(places) == min(n, n_most)
    assert set(found) <= {'kept', 'more than asked for'}
    if n_most > 1:
        assert places[0] == 0 and places[-1] == n - 1 and np.ptp(np.diff(places) if len(places) > 1 else [1]) <= 1


@pytest.mark.parametrize('shape', [(1, 1, 3), (3, 700, 3), (48, 64, 3)])
def test_pictures_of_any_shape_are_measured(shape: tuple[int, int, int]) -> None:
    look = look_at(np.full(shape, 100, np.uint8))
    assert look.brightness == pytest.approx(100, abs=1) and look.cells.shape == (16, 16, 3)
    assert 0.0 <= look.blur <= 1.0


def test_nothing_is_chosen_of_nothing() -> None:
    assert choose([], 5) == []
