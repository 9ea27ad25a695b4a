"""How far a model's confidence in the likelier of two answers has to be lowered for it to be believed.

A temperature ``T`` divides the log odds of the two (Guo et al. 2017): which answer is the likelier one stays, and how
answers rank. It is fitted on one half of the groups and tried on the other. Only ``T >= 1`` is looked for: to be unsure
where one is right costs a question, to be sure where one is wrong may cost a robot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.evaluate.calibration import calibration_error, falls_in_first_half, reliability

__all__ = ['Temperature', 'choose_temperature', 'tempered']

_Floats = NDArray[np.float64]
_TRIED = np.geomspace(1.0, 10.0, 231)
"""One per cent apart."""
_SUREST = 1.0 - 1e-6
_LEAST_GAIN = 0.01


@dataclass(frozen=True)
class Temperature:
    """What was found on one half, and what it does to the other.

    :ivar value: at least 1; 1 changes nothing.
    :ivar n_tried: answers of the other half.
    :ivar loss_before: mean negative log likelihood of what came true there, in nats; ``loss_after``: with it.
    :ivar ece_before: expected calibration error there; ``ece_after``: with it.
    """

    value: float
    n_tried: int
    loss_before: float
    loss_after: float
    ece_before: float
    ece_after: float

    @property
    def is_kept(self) -> bool:
        """Whether it is worth a number: the other half gains a hundredth of a nat an answer or more."""
        return self.loss_before - self.loss_after >= _LEAST_GAIN


def tempered(confidences: Sequence[float] | _Floats, temperature: float) -> _Floats:
    """Confidences in the likelier of two answers, at a temperature.

    :raise SettingsError: if the temperature is not positive, or a confidence is not in [0.5, 1].
    """
    values = np.asarray(confidences, np.float64)
    if not temperature > 0:
        raise SettingsError(f'a temperature is above 0, found {temperature}')
    if values.size and not (values.min() >= 0.5 - 1e-6 and values.max() <= 1 + 1e-6):
        raise SettingsError(f'the likelier of two has a confidence of 0.5 to 1, found {values.min()} to {values.max()}')
    values = np.clip(values, 0.5, _SUREST)
    odds: _Floats = np.log(values / (1 - values)) / temperature
    return 1 / (1 + np.exp(-odds))


def choose_temperature(
    confidences: Sequence[float], right: Sequence[bool], groups: Sequence[str]
) -> Temperature | None:
    """The temperature with the least loss on the first half of the groups; None if a half is empty.

    :param confidences: in the likelier of two answers.
    :param groups: what an answer belongs to (its picture): a group is never in both halves.
    :raise SettingsError: if a value is out of its range, or the three differ in length.
    """
    if not len(confidences) == len(right) == len(groups):
        raise SettingsError(f'{len(confidences)} answers, {len(right)} truths and {len(groups)} groups: one each')
    values, hits = tempered(confidences, 1.0), np.asarray(right, np.bool_)
    first = np.array([falls_in_first_half(group) for group in groups], dtype=bool)
    if not len(values) or first.all() or not first.any():
        return None
    best = float(min(_TRIED, key=lambda one: _loss(tempered(values[first], one), hits[first])))
    before, after = values[~first], tempered(values[~first], best)
    return Temperature(
        best,
        int((~first).sum()),
        _loss(before, hits[~first]),
        _loss(after, hits[~first]),
        calibration_error(reliability(before, hits[~first], lowest=0.5)),
        calibration_error(reliability(after, hits[~first], lowest=0.5)),
    )


def _loss(confidences: _Floats, right: NDArray[np.bool_]) -> float:
    return float(-np.log(np.where(right, confidences, 1 - confidences)).mean())
