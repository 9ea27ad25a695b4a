"""Whether a model's confidence can be believed, and below which one it had better say "unknown".

Works on pairs of a confidence and whether the answer was right; knows nothing of questions or models. Measures:
reliability by bins with the expected calibration error (Guo et al. 2017), the Brier score, and risk against coverage
(Geifman and El-Yaniv 2017).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.evaluate.intervals import share_of

__all__ = [
    'Bin',
    'Calibration',
    'Threshold',
    'brier_score',
    'calibrate',
    'calibration_error',
    'choose_threshold',
    'falls_in_first_half',
    'reliability',
    'risk_coverage',
]

_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Bin:
    """Answers of about the same confidence: from ``low`` up to, but not including, ``high`` (1 is in the last).

    :ivar confidence: mean of them; ``accuracy``: share that was right.
    """

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Threshold:
    """The limit below which answers become "unknown".

    :ivar value: the smallest confidence that is still answered; None if no limit keeps the risk.
    :ivar max_risk: the share of wrong answers that was asked for.
    :ivar coverage: share of the other half of the questions that is answered with it.
    :ivar risk: share of these that is wrong.
    :ivar n_answered: how many these are.
    :ivar risk_low: of the interval at 95 % around ``risk``, as ``risk_high``; answers about one picture hang together.
    """

    value: float | None
    max_risk: float
    coverage: float
    risk: float
    n_answered: int = 0
    risk_low: float = 0.0
    risk_high: float = 1.0

    @property
    def is_kept(self) -> bool:
        """Whether there is a limit, and the other half does not speak against it."""
        return self.value is not None and self.n_answered > 0 and self.risk_low <= self.max_risk


@dataclass(frozen=True)
class Calibration:
    """All figures about one set of answers."""

    n: int
    accuracy: float
    mean_confidence: float
    ece: float
    brier: float
    bins: tuple[Bin, ...]
    threshold: Threshold

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        fields = dict(vars(self))
        return fields | {'bins': [vars(one) for one in self.bins], 'threshold': vars(self.threshold)}


def calibrate(
    confidences: Sequence[float],
    right: Sequence[bool],
    groups: Sequence[str],
    *,
    max_risk: float = 0.1,
    least: int = 1,
    lowest: float = 0.5,
    n_bins: int = 10,
) -> Calibration:
    """Every figure; the threshold is chosen on one half of the groups and tried on the other.

    :param groups: what an answer belongs to (its picture): a group is never in both halves.
    :param least: see ``choose_threshold``.
    :param lowest: the least confidence that is possible: 0.5 for the likelier of two answers.
    :raise SettingsError: if a value is out of its range, or the three differ in length.
    """
    values, hits = _checked(confidences, right)
    if len(groups) != len(values):
        raise SettingsError(f'{len(values)} answers of {len(groups)} groups: one each is expected')
    bins = reliability(confidences, right, n_bins=n_bins, lowest=lowest)
    first = np.array([falls_in_first_half(group) for group in groups], dtype=bool)
    limit = choose_threshold(values[first], hits[first], max_risk, least=least) if first.any() else None
    answered = ~first & (values >= limit) if limit is not None else np.zeros(len(values), bool)
    n_other, n_answered = int((~first).sum()), int(answered.sum())
    share = share_of(hits[answered].tolist(), [group for group, is_in in zip(groups, answered, strict=True) if is_in])
    threshold = Threshold(
        limit,
        max_risk,
        coverage=n_answered / n_other if n_other else 0.0,
        risk=float(1 - hits[answered].mean()) if n_answered else 0.0,
        n_answered=n_answered,
        risk_low=1 - share.high,
        risk_high=1 - share.low,
    )
    return Calibration(
        len(values),
        float(hits.mean()),
        float(values.mean()),
        calibration_error(bins),
        brier_score(confidences, right),
        tuple(bins),
        threshold,
    )


def reliability(
    confidences: Sequence[float] | _Floats,
    right: Sequence[bool] | NDArray[np.bool_],
    *,
    n_bins: int = 10,
    lowest: float = 0.0,
) -> list[Bin]:
    """Bins of equal width from ``lowest`` to 1; empty ones are left out.

    :raise SettingsError: if a value is out of its range, or there are no answers.
    """
    values, hits = _checked(confidences, right)
    if n_bins < 1 or not 0.0 <= lowest < 1.0:
        raise SettingsError(f'at least one bin above a lowest confidence in [0, 1), found {n_bins} above {lowest}')
    edges = np.linspace(lowest, 1.0, n_bins + 1)
    index = np.clip(np.searchsorted(edges, values, side='right') - 1, 0, n_bins - 1)
    bins = []
    for number in range(n_bins):
        inside = index == number
        if inside.any():
            confidence, accuracy = float(values[inside].mean()), float(hits[inside].mean())
            bins.append(Bin(float(edges[number]), float(edges[number + 1]), int(inside.sum()), confidence, accuracy))
    return bins


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: how far accuracy is from confidence, on average over the answers."""
    n = sum(one.n for one in bins)
    return sum(one.n * abs(one.accuracy - one.confidence) for one in bins) / n if n else 0.0


def brier_score(confidences: Sequence[float] | _Floats, right: Sequence[bool] | NDArray[np.bool_]) -> float:
    """Mean squared distance of confidence from what came true: 0 is perfect, 0.25 is a coin that knows it is one."""
    values, hits = _checked(confidences, right)
    return float(((values - hits) ** 2).mean())


def risk_coverage(
    confidences: Sequence[float] | _Floats, right: Sequence[bool] | NDArray[np.bool_]
) -> tuple[_Floats, _Floats, _Floats]:
    """What answering only from some confidence on costs and keeps, for every such limit, from strict to lenient.

    Answers of equal confidence come in together: no limit can tell them apart.

    :return: limits, coverages (share answered), risks (share of the answered that is wrong).
    """
    values, hits = _checked(confidences, right)
    order = np.argsort(-values, kind='stable')
    values, hits = values[order], hits[order]
    last_of_equals = np.append(values[1:] != values[:-1], True)
    n_answered = np.arange(1, len(values) + 1)[last_of_equals]
    n_wrong = np.cumsum(~hits)[last_of_equals]
    return values[last_of_equals], n_answered / len(values), n_wrong / n_answered


def choose_threshold(
    confidences: Sequence[float] | _Floats,
    right: Sequence[bool] | NDArray[np.bool_],
    max_risk: float,
    *,
    least: int = 1,
) -> float | None:
    """The limit with the largest coverage whose risk is at most ``max_risk``; None if there is none.

    :param least: so many answers have to be at or above it; of a few, all can be right by chance.
    :raise SettingsError: if a value is out of its range.
    """
    if not 0.0 <= max_risk <= 1.0:
        raise SettingsError(f'a risk is between 0 and 1, found {max_risk}')
    limits, coverages, risks = risk_coverage(confidences, right)
    kept = np.flatnonzero((risks <= max_risk) & (np.rint(coverages * len(confidences)) >= least))
    return float(limits[kept[-1]]) if len(kept) else None


def falls_in_first_half(group: str) -> bool:
    """Puts about half of all names into one half, the same ones on every machine and in every run."""
    return hashlib.sha256(group.encode()).digest()[0] % 2 == 0


def _checked(
    confidences: Sequence[float] | _Floats, right: Sequence[bool] | NDArray[np.bool_]
) -> tuple[_Floats, NDArray[np.bool_]]:
    values, hits = np.asarray(confidences, np.float64), np.asarray(right, np.bool_)
    if values.ndim != 1 or values.shape != hits.shape or not len(values):
        raise SettingsError(f'one confidence for each answer is expected, found {values.shape} for {hits.shape}')
    if not (np.isfinite(values).all() and (values >= 0).all() and (values <= 1 + 1e-6).all()):
        raise SettingsError(f'a confidence is between 0 and 1, found {values.min()} to {values.max()}')
    return np.minimum(values, 1.0), hits
