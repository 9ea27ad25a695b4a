"""The runtime's own decoding loop, timed from outside, that does not stop at end tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.generate import generate
from mobilevlm_ros.runtime.language import LanguageEngine, TokenSegment
from mobilevlm_ros.runtime.sampling import Sampler, SamplingSettings

__all__ = ['DecodeTimes', 'decode', 'prefill_s']


@dataclass(frozen=True)
class DecodeTimes:
    """Of one run of the loop.

    :ivar total_s: all of it.
    :ivar eval_s: inside the language engine; the rest is choosing tokens and making text of them.
    :ivar n_sampled: tokens chosen.
    :ivar n_evaluated: tokens computed.
    """

    total_s: float
    eval_s: float
    n_sampled: int
    n_evaluated: int


class _Endless:
    """A language engine in which nothing ends an answer, and whose work is timed; all else is the engine's."""

    def __init__(self, engine: LanguageEngine) -> None:
        self._engine = engine
        self.eval_s = 0.0
        self.n_evaluated = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def is_end(self, token: int) -> bool:
        """Never."""
        return False

    def append(self, tokens: Sequence[int], cancel: CancelToken) -> None:
        """Timed."""
        started_s = time.perf_counter()
        self._engine.append(tokens, cancel)
        self.eval_s += time.perf_counter() - started_s
        self.n_evaluated += len(tokens)

    def logits(self) -> NDArray[np.float32]:
        """Timed: llama.cpp may wait here for what it computes."""
        started_s = time.perf_counter()
        row = self._engine.logits()
        self.eval_s += time.perf_counter() - started_s
        return row


def decode(engine: LanguageEngine, n_sampled: int) -> DecodeTimes:
    """Choose ``n_sampled`` tokens greedily after what the engine holds; all but the last are computed."""
    endless = _Endless(engine)
    started_s = time.perf_counter()
    generation = generate(
        cast(LanguageEngine, endless), Sampler(SamplingSettings()), CancelToken(), max_tokens=n_sampled
    )
    total_s = time.perf_counter() - started_s
    return DecodeTimes(total_s, endless.eval_s, generation.n_tokens, endless.n_evaluated)


def prefill_s(engine: LanguageEngine, tokens: Sequence[int]) -> float:
    """Seconds from tokens to logits; nothing of them is reused, since a prompt's last segment never is."""
    started_s = time.perf_counter()
    engine.prefill([TokenSegment(tuple(tokens))], CancelToken())
    engine.logits()
    return time.perf_counter() - started_s
