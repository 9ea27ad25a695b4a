"""Several measurements of one thing: percentiles, rates, and how sure a ratio of two is.

Everything is kept as seconds of a steady clock. A rate is derived from them, so that a percentile of a rate is the
rate of the run at that percentile of time: p90 is always the slow end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ['BUSY_CORES', 'Ratio', 'Series', 'ratio_of_medians']

BUSY_CORES = 0.15
"""Foreign load, in cores, above which a figure is marked as measured while others were busy."""
_RESAMPLES = 2000


@dataclass(frozen=True)
class Series:
    """Measured seconds of equal runs.

    :ivar name: what was measured, for people; also its key in the record.
    :ivar amount: units of work in a run (tokens); 0 if the seconds themselves are the figure.
    :ivar bound_s: what a run would take at the limits of the machine; None if no limit is known.
    :ivar foreign_cores: load of other programs meanwhile, in cores.
    :ivar n_prompt: positions of the prompt of a question; 0 if it is not about one.
    :ivar n_reused: how many of them were kept from earlier questions, and not computed.
    """

    name: str
    seconds: tuple[float, ...]
    amount: float = 0.0
    bound_s: float | None = None
    foreign_cores: float = 0.0
    n_prompt: int = 0
    n_reused: int = 0

    def __post_init__(self) -> None:
        """:raise ValueError: if there is no measurement, or one that no clock shows."""
        if not self.seconds or not all(np.isfinite(one) and one >= 0 for one in self.seconds):
            raise ValueError(f'{self.name}: expected measured seconds, found {self.seconds}')

    @property
    def unit(self) -> str:
        """Of the figures: seconds, or tokens a second."""
        return 'tok/s' if self.amount else 's'

    @property
    def median(self) -> float:
        """The figure."""
        return self._shown(float(np.median(self.seconds)))

    @property
    def interval(self) -> tuple[float, float]:
        """Where 95 of 100 resampled medians lie, from the lower figure to the higher."""
        fast_s, slow_s = np.percentile(_medians(self.seconds, np.random.default_rng(0)), (2.5, 97.5))
        low, high = sorted((self._shown(float(fast_s)), self._shown(float(slow_s))))
        return low, high

    @property
    def p90(self) -> float:
        """Its slow end."""
        return self._shown(float(np.percentile(self.seconds, 90)))

    @property
    def best(self) -> float:
        """Its fast end."""
        return self._shown(min(self.seconds))

    @property
    def share(self) -> float | None:
        """The median's share of the bound; 1 is as fast as the machine allows."""
        median_s = float(np.median(self.seconds))
        return None if self.bound_s is None or median_s == 0 else self.bound_s / median_s

    @property
    def busy(self) -> bool:
        """Whether others used the machine so much that the figure means little."""
        return self.foreign_cores > BUSY_CORES

    def _shown(self, seconds: float) -> float:
        return self.amount / max(seconds, 1e-9) if self.amount else seconds

    def as_record(self) -> dict[str, Any]:
        """For the JSON line."""
        low, high = self.interval
        positions = {'prompt_tokens': self.n_prompt, 'reused_tokens': self.n_reused} if self.n_prompt else {}
        return {
            'unit': self.unit,
            'n': len(self.seconds),
            'median': self.median,
            'low': low,
            'high': high,
            'p90': self.p90,
            'best': self.best,
            'bound': None if self.bound_s is None else self._shown(self.bound_s),
            'share': self.share,
            'foreign_cores': round(self.foreign_cores, 2),
            'busy': self.busy,
            **positions,
            'seconds': [round(one, 6) for one in self.seconds],
        }


@dataclass(frozen=True)
class Ratio:
    """How many times as fast we are, with the interval that holds 95 of 100 resampled ratios."""

    value: float
    low: float
    high: float

    def as_record(self) -> dict[str, float]:
        """For the JSON line."""
        return {'ratio': self.value, 'low': self.low, 'high': self.high}


def ratio_of_medians(theirs_s: Sequence[float], ours_s: Sequence[float]) -> Ratio:
    """Median of their seconds over median of ours: above 1 we are faster.

    The interval is a percentile bootstrap over both series, with a fixed seed; with few runs it is close to the
    range from the least to the greatest ratio that single runs could give.
    """
    random = np.random.default_rng(0)
    low, high = np.percentile(_medians(theirs_s, random) / _medians(ours_s, random), (2.5, 97.5))
    return Ratio(float(np.median(theirs_s) / np.median(ours_s)), float(low), float(high))


def _medians(seconds: Sequence[float], random: np.random.Generator) -> NDArray[np.float64]:
    """Medians of as many values drawn with replacement, ``[_RESAMPLES]``."""
    values = np.asarray(seconds, dtype=np.float64)
    drawn = values[random.integers(0, len(values), (_RESAMPLES, len(values)))]
    return np.asarray(np.median(drawn, axis=1), dtype=np.float64)
