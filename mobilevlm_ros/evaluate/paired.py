"""Whether one of two runs over the same questions is better, or whether the difference may be chance. Exact tests.

McNemar's test (1947; exact, by the binomial distribution) looks at the answers that only one of the two got right, and
takes these as independent. Questions about one frame are not: the second test flips the two runs frame by frame, and
so asks how often chance alone would bring frames to such a difference. With one question a frame the two are the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from mobilevlm_ros.errors import SettingsError

__all__ = ['Paired', 'compare_pairs', 'holm', 'mcnemar', 'sign_flip']


@dataclass(frozen=True)
class Paired:
    """Two runs over the same questions.

    :ivar n_gained: questions that only the second got right; ``n_lost``: only the first.
    :ivar difference: accuracy of the second less that of the first.
    :ivar p_answers: McNemar's, two-sided: every answer for itself.
    :ivar p: the same frame by frame; the one to go by.
    """

    n: int
    n_gained: int
    n_lost: int
    n_groups: int
    p_answers: float
    p: float

    @property
    def difference(self) -> float:
        """Accuracy of the second run less that of the first; 0 of no questions."""
        return (self.n_gained - self.n_lost) / self.n if self.n else 0.0

    def as_record(self) -> dict[str, float]:
        """For JSON."""
        return {'difference': self.difference} | vars(self)


def compare_pairs(first: Sequence[bool], second: Sequence[bool], groups: Sequence[Hashable]) -> Paired:
    """Compare whether the same questions were answered rightly.

    :param groups: what each question is about; questions of different groups are taken as independent.
    :raise SettingsError: if the three differ in length.
    """
    if not len(first) == len(second) == len(groups):
        raise SettingsError(f'{len(first)} and {len(second)} answers of {len(groups)} groups: one each is expected')
    differences: Counter[Hashable] = Counter()
    n_gained = n_lost = 0
    for one, other, group in zip(first, second, groups, strict=True):
        n_gained += other and not one
        n_lost += one and not other
        differences[group] += int(other) - int(one)
    return Paired(
        n=len(first),
        n_gained=n_gained,
        n_lost=n_lost,
        n_groups=len(differences),
        p_answers=mcnemar(n_gained, n_lost),
        p=sign_flip(list(differences.values())),
    )


def mcnemar(n_gained: int, n_lost: int) -> float:
    """Two-sided p-value: how often a fair coin, thrown for each answer that changed, is at least as uneven."""
    n = n_gained + n_lost
    ways, tail = 1, 0  # of k heads, and of up to k, in whole numbers
    for k in range(min(n_gained, n_lost) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def sign_flip(differences: Sequence[int]) -> float:
    """Two-sided p-value of a sum, if each of its terms were as likely to have the other sign. Exact, by convolution.

    :param differences: by frame: answers gained less answers lost.
    """
    sizes = Counter(abs(one) for one in differences if one)
    chances = np.ones(1)  # of the sums from -reach to reach, in steps of one
    for size, count in sizes.items():
        signs = np.zeros(2 * size * count + 1)
        signs[:: 2 * size] = _coin(count)
        chances = np.convolve(chances, signs)
    reach = len(chances) // 2
    seen = abs(sum(differences))
    if not seen:
        return 1.0
    return min(1.0, float(chances[: reach - seen + 1].sum() + chances[reach + seen :].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, made larger so that several tests together are wrong no more often than one (Holm 1979)."""
    n, largest = len(p_values), 0.0
    adjusted = [0.0] * n
    for rank, index in enumerate(sorted(range(n), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (n - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _coin(n: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Chances of 0 to n heads; by logarithms, for 2**n is no float from 1,024 on."""
    logs = np.array([math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)])
    chances: np.ndarray[tuple[int], np.dtype[np.float64]] = np.exp(logs - n * math.log(2))
    return chances
