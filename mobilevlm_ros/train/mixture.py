"""A weighted mixture of sources whose proportions hold at every moment, not only on average.

Which source the i-th sequence is read from is fixed by the weights alone. After any number of sequences each source
has given its share of them to within less than one sequence, so a run that ends early, or a batch, is mixed as the
whole is. Knows nothing of what the sources hold.

Weights are taken as the decimal numbers that were written, so the pattern repeats exactly after the sum of the weights
in their common unit: 1007 sequences for the seven sources of MobileLLaMA (67.7, 15.0, 4.5, 4.5, 4.5, 2.5 and 2.0). One
period is laid out when the mixture is made. Within it every sequence of a source has a first place, before which the
source would be ahead of its share by one, and a last place, after which it would be behind by one; of those whose
first place has come, the one with the nearest last place goes. That such an order always exists, and that this rule
finds it, is the theorem of proportionate-fair scheduling (Baruah, Cohen, Plaxton, Varvel 1996, for one processor).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, isfinite, lcm

import numpy as np

from mobilevlm_ros.errors import SettingsError

__all__ = ['Mixture']

_MAX_PERIOD = 100_000
_MAX_SOURCES = 256


class Mixture:
    """See the module.

    :param weights: one for each source, in any unit.
    :ivar shares: what each source gives of the whole; sums to 1.
    :raise SettingsError: if there is none or too many, one is no positive number, or they have no common unit that is
        large enough.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        parts = _whole_parts(weights)
        period = sum(parts)
        self.shares = tuple(Fraction(part, period) for part in parts)
        self._parts = parts
        self._sources = _lay_out(parts)
        # How often its source was read before, in this period.
        self._before = np.empty(period, dtype=np.int32)
        for source, part in enumerate(parts):
            self._before[self._sources == source] = np.arange(part, dtype=np.int32)

    @property
    def period(self) -> int:
        """After so many sequences the order of the sources repeats."""
        return len(self._sources)

    def at(self, i: int) -> tuple[int, int]:
        """Which source sequence ``i`` is read from, and how many were read from this source before.

        :raise IndexError: if ``i`` is negative.
        """
        if i < 0:
            raise IndexError(f'there is no sequence {i}')
        periods, place = divmod(i, self.period)
        source = int(self._sources[place])
        return source, periods * self._parts[source] + int(self._before[place])

    def counts(self, n: int) -> tuple[int, ...]:
        """How many of the first ``n`` sequences are read from each source."""
        periods, rest = divmod(n, self.period)
        begun = np.bincount(self._sources[:rest], minlength=len(self._parts))
        return tuple(periods * part + int(more) for part, more in zip(self._parts, begun, strict=True))


def _whole_parts(weights: Sequence[float]) -> list[int]:
    """The weights in their largest common unit."""
    if not 1 <= len(weights) <= _MAX_SOURCES:
        raise SettingsError(f'a mixture has 1 to {_MAX_SOURCES} sources, found {len(weights)}')
    for weight in weights:
        if not _is_positive(weight):
            raise SettingsError(f'a weight of a mixture is a number above zero, found {weight!r:.80}')
    exact = [Fraction(str(weight)) for weight in weights]  # as written: 0.1 is a tenth
    unit = lcm(*(weight.denominator for weight in exact))
    parts = [int(weight * unit) for weight in exact]
    common = gcd(*parts)
    parts = [part // common for part in parts]
    if sum(parts) > _MAX_PERIOD:
        raise SettingsError(
            f'the weights {", ".join(map(str, weights))} only add up in steps of 1/{sum(parts)}; expected '
            f'1/{_MAX_PERIOD} or coarser. Write them with fewer digits, for example as per cent with one digit.'
        )
    return parts


def _is_positive(weight: object) -> bool:
    return isinstance(weight, int | float) and not isinstance(weight, bool) and isfinite(weight) and weight > 0


def _lay_out(parts: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The source of each place of one period, uint8 ``[period]``."""
    period = sum(parts)
    sources = np.empty(period, dtype=np.uint8)
    given = [0] * len(parts)
    ends = [-(-period // part) for part in parts]  # the place before which the next one has to go
    for place in range(period):
        ready = (s for s, part in enumerate(parts) if given[s] * period < (place + 1) * part)
        source = min(ready, key=ends.__getitem__)
        sources[place] = source
        given[source] += 1
        ends[source] = -(-(given[source] + 1) * period // parts[source])
    return sources
