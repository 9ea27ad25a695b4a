"""How long answers took, by stage: percentiles, of new frames and of frames that had been looked at already.

The two are never mixed: an answer about a known frame skips the vision encoder and most of the prompt, so that a median
over both would say more about how many questions a frame got than about the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobilevlm_ros.evaluate.scored import STAGES, Collected

__all__ = ['PERCENTILES', 'Latency', 'Spread', 'latencies', 'spread_of']

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Spread:
    """Seconds that something took: mean, percentiles (between two values interpolated), and the longest."""

    n: int
    mean: float
    percentiles: dict[int, float]
    longest: float

    def as_record(self) -> dict[str, float]:
        """For JSON."""
        named = {f'p{percent}': value for percent, value in self.percentiles.items()}
        return {'n': self.n, 'mean': self.mean} | named | {'max': self.longest}


@dataclass(frozen=True)
class Latency:
    """By whether the frame was known (``new``, ``known``), then by stage; what never happened is left out.

    :ivar tokens: of all answers together: ``prompt``, of these ``reused``, and ``generated``.
    """

    stages: dict[str, dict[str, Spread]]
    tokens: dict[str, int]

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        stages = {
            known: {stage: spread.as_record() for stage, spread in of_stage.items()}
            for known, of_stage in self.stages.items()
        }
        return stages | {'tokens': self.tokens}


def latencies(found: Collected) -> Latency:
    """The percentiles of all stages of the answers in view that did not fail."""
    stages = {known: _by_stage(of_stage) for known, of_stage in found.seconds.items() if len(of_stage['total_s'])}
    return Latency(stages, dict(found.tokens))


def spread_of(seconds: Sequence[float]) -> Spread:
    """Percentiles of at least one duration."""
    values = np.asarray(seconds, np.float64)
    found = np.percentile(values, PERCENTILES)
    percentiles = {percent: float(value) for percent, value in zip(PERCENTILES, found, strict=True)}
    return Spread(len(values), float(values.mean()), percentiles, float(values.max()))


def _by_stage(seconds: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
    return {stage: spread_of(seconds[stage]) for stage in STAGES}
