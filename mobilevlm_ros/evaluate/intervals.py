"""How far a share that was counted may be from the true one: intervals at 95 %, also where answers hang together.

Questions about one frame share its difficulty, so ten of them tell less than ten about ten frames. The interval then is
Wilson's with the number of independent answers that these are worth: the number asked, over the design effect that is
estimated from the frames (Kish 1965; the combination, after Korn and Graubard 1998, is the one that Franco et al. 2019
recommend for shares in clustered samples). It is computed, not drawn: the same answers give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from mobilevlm_ros.errors import SettingsError

__all__ = ['Share', 'share_of', 'wilson_interval']

_Z = 1.959964
"""The quantile of the normal distribution that leaves 2.5 % above it."""


@dataclass(frozen=True)
class Share:
    """So many right of so many, and where the true share probably lies.

    :ivar n_groups: frames (or blocks of frames) that the questions were about.
    :ivar n_effective: independent answers that these are worth.
    :ivar low: of the interval at 95 %, as ``high``.
    """

    n_right: int
    n: int
    n_groups: int
    n_effective: float
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share; 0 of none."""
        return self.n_right / self.n if self.n else 0.0

    def as_record(self) -> dict[str, float]:
        """For JSON."""
        return {'accuracy': self.value} | vars(self)


def share_of(right: Sequence[bool], groups: Sequence[Hashable]) -> Share:
    """The share that is right; with one answer a group exactly Wilson's interval, of one group as if asked once.

    :param groups: what each answer belongs to; answers of different groups are taken as independent.
    :raise SettingsError: if the two differ in length.
    """
    if len(right) != len(groups):
        raise SettingsError(f'{len(right)} answers of {len(groups)} groups: one each is expected')
    counts: dict[Hashable, list[int]] = {}
    for hit, group in zip(right, groups, strict=True):
        count = counts.setdefault(group, [0, 0])
        count[0] += bool(hit)
        count[1] += 1
    n, n_right = len(right), sum(count[0] for count in counts.values())
    n_effective = _effective(list(counts.values()), n_right, n)
    low, high = wilson_interval(n_right / n * n_effective if n else 0.0, n_effective)
    return Share(n_right, n, len(counts), n_effective, low, high)


def wilson_interval(n_right: float, n: float, z: float = _Z) -> tuple[float, float]:
    """Where the true share probably lies (Wilson 1927); unlike the usual interval also right near 0 and 1.

    :param n_right: may be a fraction, as ``n``, where answers count for less than one.
    :param z: quantile of the normal distribution; the default means 95 %.
    :return: low and high; 0 and 1 if nothing was asked.
    """
    if n == 0:
        return 0.0, 1.0
    share = n_right / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(max(0.0, share * (1 - share)) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Rounding must not put the estimate outside.
    return max(0.0, min(share, (middle - half) / scale)), min(1.0, max(share, (middle + half) / scale))


def _effective(counts: Sequence[Sequence[int]], n_right: int, n: int) -> float:
    """Number of independent answers that are worth as much.

    Between all (groups do not matter) and what is left if a group always answers as one; the latter also where nothing
    can be estimated, because all are right, all are wrong, or there is one group.

    :param counts: right and asked, by group.
    """
    if not n:
        return 0.0
    fewest = n * n / sum(asked * asked for _, asked in counts)
    share, n_groups = n_right / n, len(counts)
    if n_groups == 1 or n_right in (0, n):
        return fewest
    spread = sum((hits - share * asked) ** 2 for hits, asked in counts)
    variance = n_groups / (n_groups - 1) * spread / (n * n)
    if not variance:
        return float(n)
    independent = share * (1 - share) / (n - 1)
    certainty = (_student(n - 1) / _student(n_groups - 1)) ** 2  # the variance itself is known from few groups only
    return min(float(n), max(fewest, n * independent / variance * certainty))


def _student(freedom: int) -> float:
    """The quantile of Student's distribution at 97.5 %; exact for 1 and 2, else to 1 % (Abramowitz, Stegun 26.7.5)."""
    if freedom == 1:
        return math.tan(0.475 * math.pi)
    if freedom == 2:
        return 0.95 / math.sqrt(2 * 0.975 * 0.025)
    return (
        _Z
        + (_Z**3 + _Z) / (4 * freedom)
        + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * freedom**2)
        + (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / (384 * freedom**3)
    )
