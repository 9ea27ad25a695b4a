"""Random weights of any model, made one tensor at a time; the same for the same seed, whatever the order.

Initialised as upstream starts from scratch: matrices and embeddings normal with deviation 0.02, norms 1, biases 0.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.model.config import ModelConfig
from mobilevlm_ros.model.layout import expected_tensors

__all__ = ['RandomWeights']

_DEVIATION = 0.02


class RandomWeights(Mapping[str, NDArray[np.float32]]):
    """Every tensor of a model under its published name, made when it is asked for."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._shapes = expected_tensors(config)
        self._seed = seed

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        shape = self._shapes[name]
        if name.endswith('.bias'):
            return np.zeros(shape, dtype=np.float32)
        if len(shape) == 1 and name.endswith('.weight'):
            return np.ones(shape, dtype=np.float32)
        random = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        values = random.standard_normal(shape, dtype=np.float32)
        values *= _DEVIATION
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
