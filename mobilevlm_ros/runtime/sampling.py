"""From logits to a token: greedy, or sampled with temperature, top-k, top-p and min-p.

Pure numpy on one row of logits, so that every engine samples alike and a seed means the same everywhere. Probabilities
that are reported as confidence always come from the raw logits (temperature 1, nothing cut off).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import SettingsError

__all__ = ['Probability', 'Sampler', 'SamplingSettings', 'log_softmax']


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are chosen; the default is greedy, which gives the same answer every time.

    :ivar temperature: 0 is greedy.
    :ivar top_k: how many of the best tokens stay in play; 0: all.
    :ivar top_p: smallest set of best tokens with this much probability stays in play.
    :ivar min_p: tokens below this share of the best token's probability are out.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """:raise SettingsError: if a value is out of its range."""
        if not 0.0 <= self.temperature <= 10.0:
            raise SettingsError(f'temperature must be between 0 and 10, found {self.temperature}')
        if self.top_k < 0:
            raise SettingsError(f'top_k must not be negative, found {self.top_k}')
        if not 0.0 < self.top_p <= 1.0:
            raise SettingsError(f'top_p must be above 0 and at most 1, found {self.top_p}')
        if not 0.0 <= self.min_p < 1.0:
            raise SettingsError(f'min_p must be at least 0 and below 1, found {self.min_p}')
        if self.seed < 0:
            raise SettingsError(f'seed must not be negative, found {self.seed}')


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log probabilities of one row of logits ``[n_vocab]``."""
    shifted = logits - logits.max()
    result: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum())
    return result


class Probability:
    """Probabilities of single tokens, token after token: takes the time of ``n_vocab`` exponentials and no memory."""

    def __init__(self) -> None:
        self._shifted = np.empty(0, dtype=np.float32)

    def of(self, token: int, logits: NDArray[np.float32]) -> float:
        """Probability of ``token`` by one row of logits ``[n_vocab]``."""
        if len(self._shifted) != len(logits):
            self._shifted = np.empty(len(logits), dtype=np.float32)
        shifted = np.subtract(logits, logits.max(), out=self._shifted)
        chosen = float(shifted[token])
        return math.exp(chosen) / float(np.exp(shifted, out=shifted).sum())


class Sampler:
    """Chooses tokens by ``SamplingSettings``; one for each answer, so that the seed decides the whole answer."""

    def __init__(self, settings: SamplingSettings) -> None:
        self._settings = settings
        self._random = np.random.default_rng(settings.seed)

    @property
    def is_greedy(self) -> bool:
        """Whether it always takes the most probable token."""
        return self._settings.temperature == 0.0

    def choose(self, logits: NDArray[np.float32]) -> int:
        """A token id for one row of logits ``[n_vocab]``; entries at minus infinity are never chosen."""
        settings = self._settings
        if settings.temperature == 0.0:
            return int(logits.argmax())
        order = np.argsort(logits)[::-1]
        if settings.top_k:
            order = order[: settings.top_k]
        probabilities = np.exp(log_softmax(logits[order]).astype(np.float64))
        keep = np.concatenate(([0.0], probabilities.cumsum()[:-1])) < settings.top_p
        keep &= probabilities >= settings.min_p * probabilities[0]
        scaled = np.where(keep, logits[order].astype(np.float64) / settings.temperature, -np.inf)
        weights = np.exp(scaled - scaled.max())
        return int(self._random.choice(order, p=weights / weights.sum()))
