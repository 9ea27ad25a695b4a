"""How far confidence in one of two answers is lowered: the measure by hand, and what is never done to it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.evaluate.calibration import falls_in_first_half
from mobilevlm_ros.evaluate.temperature import choose_temperature, tempered

NAMES = [f'{n}.jpg' for n in range(4000)]
FIRST = [name for name in NAMES if falls_in_first_half(name)]
OTHER = [name for name in NAMES if not falls_in_first_half(name)]


def test_a_temperature_divides_the_log_odds() -> None:
    assert tempered([0.9], 2.0)[0] == pytest.approx(0.75)  # odds 9 to 1 become 3 to 1
    assert tempered([0.5], 7.0)[0] == 0.5


@given(st.lists(st.floats(0.5, 1.0), min_size=2, max_size=9), st.floats(1.0, 10.0))
def test_the_order_stays_and_nobody_gets_surer(confidences: list[float], temperature: float) -> None:
    found = tempered(confidences, temperature)
    assert (found <= np.array(confidences) + 1e-9).all()
    assert (found >= 0.5).all()
    order = np.argsort(confidences, kind='stable')
    assert (np.diff(found[order]) >= -1e-12).all()


def drawn(temperature: float, seed: int = 0) -> tuple[list[float], list[bool], list[str]]:
    """Answers of a model that is too sure by a known temperature."""
    rng = np.random.default_rng(seed)
    true = rng.uniform(0.5, 0.98, 20_000)
    confidences = 1 / (1 + ((1 - true) / true) ** temperature)
    return confidences.tolist(), (rng.random(20_000) < true).tolist(), NAMES * 5


@pytest.mark.parametrize('temperature', [1.5, 2.0, 3.0])
def test_a_known_temperature_is_found_again(temperature: float) -> None:
    found = choose_temperature(*drawn(temperature))
    assert found is not None
    assert found.value == pytest.approx(temperature, rel=0.15)
    assert found.ece_after < 0.4 * found.ece_before
    assert found.is_kept


def test_a_model_that_is_not_too_sure_is_left_alone() -> None:
    found = choose_temperature(*drawn(1.0))
    assert found is not None
    assert found.value == pytest.approx(1.0, abs=0.1)
    assert not found.is_kept
    unsure = choose_temperature(*drawn(0.5))
    assert unsure is not None
    assert unsure.value == 1.0


def test_the_loss_is_of_the_other_half() -> None:
    confidences = [0.9] * 20
    right = [index % 2 == 0 for index in range(10)] + [True] * 10
    found = choose_temperature(confidences, right, FIRST[:10] + OTHER[:10])
    assert found is not None
    assert found.value > 5  # half of the first half is wrong
    assert found.loss_before == pytest.approx(-math.log(0.9))
    assert found.loss_after > found.loss_before
    assert not found.is_kept


def test_one_half_alone_says_nothing() -> None:
    assert choose_temperature([0.9, 0.8], [True, False], FIRST[:2]) is None
    assert choose_temperature([], [], []) is None


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SettingsError, match=r'0\.5 to 1'):
        tempered([0.4], 1.0)
    with pytest.raises(SettingsError, match='above 0'):
        tempered([0.6], 0.0)
    with pytest.raises(SettingsError, match='one each'):
        choose_temperature([0.6], [True], [])
