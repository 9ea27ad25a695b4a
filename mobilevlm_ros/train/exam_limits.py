"""Below which confidence a bundle had better say "unknown": a proposal for its manifest, and what speaks for it.

The rule: the lowest confidence at and above which at most ``max_risk`` of the answers are wrong, of at least ``LEAST``
answers, on one half of the pictures. It is proposed if the other half does not speak against it: if the interval at
95 % of the risk there reaches down to ``max_risk``. Each closed format has a limit of its own, as confidences of two
options and of five are not alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mobilevlm_ros.evaluate.calibration import Calibration, Threshold, calibrate
from mobilevlm_ros.train.exam import Given

__all__ = ['FORMATS', 'LEAST', 'calibrations', 'manifest_lines', 'threshold_text']

LEAST = 20
"""Of fewer answers, nine in ten are right by chance too often."""
FORMATS = {'yes_no': 0.5, 'choice': 0.0}
"""Closed formats, and the least confidence that is possible."""
_DIGITS = 1000


def calibrations(given: Sequence[Given], max_risk: float) -> dict[str, Calibration]:
    """The figures of each closed format that was asked for."""
    found = {}
    for name, lowest in FORMATS.items():
        answers = [one for one in given if one.format == name]
        if answers:
            confidences, right, pictures = zip(
                *((one.confidence, one.right, one.picture) for one in answers), strict=True
            )
            found[name] = calibrate(confidences, right, pictures, max_risk=max_risk, least=LEAST, lowest=lowest)
    return found


def manifest_lines(found: Mapping[str, Calibration]) -> str:
    """The section ``answers`` of a manifest with the limits that are proposed; empty if none is."""
    limits = {
        name: math.floor(calibration.threshold.value * _DIGITS) / _DIGITS
        for name, calibration in found.items()
        if calibration.threshold.is_kept and calibration.threshold.value is not None
    }
    inner = ', '.join(f'{name}: {limit:g}' for name, limit in limits.items())
    return f'answers:\n  min_confidence: {{{inner}}}\n' if limits else ''


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
