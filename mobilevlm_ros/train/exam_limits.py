"""How far a bundle's confidence is to be believed: proposals for its manifest, and what speaks for them.

A temperature for yes/no, where the model is too sure (``evaluate/temperature.py``), and a limit below which it had
better say "unknown", of confidences at that temperature. The limit's rule: the lowest confidence at and above which at
most ``max_risk`` of the answers are wrong, of at least ``LEAST`` answers, on one half of the pictures. It is proposed
if the other half does not speak against it: if the interval at 95 % of the risk there reaches down to ``max_risk``.
Each closed format has a limit of its own, as confidences of two options and of five are not alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mobilevlm_ros.evaluate.calibration import Calibration, Threshold, calibrate
from mobilevlm_ros.evaluate.temperature import Temperature, choose_temperature, tempered
from mobilevlm_ros.train.exam import Given

__all__ = ['FORMATS', 'LEAST', 'Belief', 'beliefs_of', 'manifest_lines', 'temperature_text', 'threshold_text']

LEAST = 20
"""Of fewer answers, nine in ten are right by chance too often."""
_OF_TWO = 'yes_no'
FORMATS = {_OF_TWO: 0.5, 'choice': 0.0}
"""Closed formats, and the least confidence that is possible."""
_DIGITS = 1000


@dataclass(frozen=True)
class Belief:
    """What the confidence of one format is worth, and what had better be made of it.

    :ivar measured: the confidences as they were given.
    :ivar temperature: what would make them believable; None where no temperature is looked for.
    :ivar threshold: the limit, of confidences at that temperature if it is kept.
    """

    measured: Calibration
    temperature: Temperature | None
    threshold: Threshold

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return self.measured.as_record() | {
            'threshold': vars(self.threshold),
            'temperature': None if self.temperature is None else vars(self.temperature),
        }


def beliefs_of(given: Sequence[Given], max_risk: float) -> dict[str, Belief]:
    """What is found of each closed format that was asked for."""
    found = {}
    for name, lowest in FORMATS.items():
        answers = [one for one in given if one.format == name]
        if answers:
            found[name] = _belief(name, answers, max_risk, lowest)
    return found


def _belief(name: str, answers: Sequence[Given], max_risk: float, lowest: float) -> Belief:
    confidences = [one.confidence for one in answers]
    right, pictures = [one.right for one in answers], [one.picture for one in answers]

    def calibrated(values: Sequence[float]) -> Calibration:
        return calibrate(values, right, pictures, max_risk=max_risk, least=LEAST, lowest=lowest)

    measured = calibrated(confidences)
    temperature = choose_temperature(confidences, right, pictures) if name == _OF_TWO else None
    if temperature is None or not temperature.is_kept:
        return Belief(measured, temperature, measured.threshold)
    return Belief(measured, temperature, calibrated(tempered(confidences, temperature.value).tolist()).threshold)


def manifest_lines(found: Mapping[str, Belief], present: Mapping[str, float] | None = None) -> str:
    """The section ``answers`` of a manifest with what is proposed; empty if nothing is.

    :param present: temperatures that the examined bundle has already, by format; new ones multiply them.
    """
    temperatures = dict(present or {})
    for name, belief in found.items():
        if belief.temperature is not None and belief.temperature.is_kept:
            temperatures[name] = temperatures.get(name, 1.0) * belief.temperature.value
    limits = {
        name: math.floor(belief.threshold.value * _DIGITS) / _DIGITS
        for name, belief in found.items()
        if belief.threshold.is_kept and belief.threshold.value is not None
    }
    lines = [
        f'  {key}: {{{", ".join(f"{name}: {value:g}" for name, value in values.items())}}}\n'
        for key, values in (('temperature', _rounded(temperatures)), ('min_confidence', limits))
        if values
    ]
    return ''.join(['answers:\n', *lines]) if lines else ''


def _rounded(temperatures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in temperatures.items()}


def temperature_text(temperature: Temperature) -> str:
    """What the temperature is worth, in a sentence."""
    if temperature.value == 1.0:
        return 'a temperature above 1 does not make it more believable'
    where = (
        f'at temperature {temperature.value:.2f}, found on one half of the pictures, the other half '
        f'({temperature.n_tried} answers) has ECE {temperature.ece_after:.3f} instead of '
        f'{temperature.ece_before:.3f}, and a loss of {temperature.loss_after:.3f} nats instead of '
        f'{temperature.loss_before:.3f}'
    )
    return where if temperature.is_kept else f'{where}: too little to be proposed'


def threshold_text(threshold: Threshold) -> str:
    """What the limit is worth, in a sentence."""
    if threshold.value is None:
        return (
            f'no limit of confidence keeps {1 - threshold.max_risk:.0%} of the answers right, of at least {LEAST} on '
            'one half of the pictures'
        )
    where = (
        f'"unknown" below {threshold.value:.3f}, which keeps {1 - threshold.max_risk:.0%} right on one half of the '
        f'pictures; on the other half {threshold.coverage:.0%} are answered, and of these {threshold.n_answered} '
        f'{1 - threshold.risk:.0%} ({1 - threshold.risk_high:.0%} to {1 - threshold.risk_low:.0%}) are right'
    )
    return where if threshold.is_kept else f'{where}: too few, so the limit is not proposed'
