"""A shuffled order of n things that no list holds: position k of it is computed when it is asked for.

A Feistel network over a grid: an index is a pair (row, column) of the smallest grid, as square as can be, that has at
least n cells. Each round adds a keyed hash of one coordinate to the other, modulo that one's size, which can be undone
and so is a bijection of the cells. A cell beyond n is sent through again until it falls below n (cycle walking, Black
and Rogaway 2002); since a grid has few such cells, that is rare. Memory and time do not depend on n.
"""

from __future__ import annotations

import hashlib
from math import isqrt

__all__ = ['Permutation']

_ROUNDS = 8
_MASK = (1 << 64) - 1


class Permutation:
    """A bijection of ``range(n)``, the same on every machine for the same ``key``.

    :param n: 1 or more.
    :param key: numbers that name this order, for example seed, source and epoch.
    :raise ValueError: if ``n`` is less than 1.
    """

    def __init__(self, n: int, key: tuple[int, ...]) -> None:
        if n < 1:
            raise ValueError(f'n must be 1 or more, found {n}')
        self.n = n
        self._n_rows = isqrt(n - 1) + 1
        self._n_columns = -(-n // self._n_rows)
        digest = hashlib.blake2b(repr((n, *key)).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(digest[i : i + 8], 'little') for i in range(0, 8 * _ROUNDS, 8)]

    def __len__(self) -> int:
        return self.n

    def __call__(self, position: int) -> int:
        """Which thing stands at ``position``.

        :raise IndexError: if ``position`` is outside ``range(n)``.
        """
        if not 0 <= position < self.n:
            raise IndexError(f'position {position} is outside the {self.n} that there are')
        index = self._shuffled(position)
        while index >= self.n:
            index = self._shuffled(index)
        return index

    def _shuffled(self, cell: int) -> int:
        row, column = divmod(cell, self._n_columns)
        for first, second in zip(self._keys[::2], self._keys[1::2], strict=True):
            row = (row + _hash(column ^ first)) % self._n_rows
            column = (column + _hash(row ^ second)) % self._n_columns
        return row * self._n_columns + column


def _hash(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): every bit of the result depends on every bit of 64."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
