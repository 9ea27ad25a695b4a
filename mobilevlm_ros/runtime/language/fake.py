"""A language engine without a model: every prompt has one certain reply, byte by byte.

For trying out a robot's graph, and for tests of what lies around an engine. It keeps the promises of
``LanguageEngine`` on positions, reuse, cancelling and errors; only the words are not a model's. Token ids below 256
are bytes, 256 ends an answer, 257 starts a text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import QuestionTooLongError
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.language.branches import plan_trees
from mobilevlm_ros.runtime.language.interface import (
    EmbeddingSegment,
    LanguageOptions,
    PerfCounters,
    PrefillStats,
    Segment,
)
from mobilevlm_ros.runtime.language.prefix import PrefixCache

__all__ = ['FakeGrammar', 'FakeLanguageEngine', 'reply_with_sum']

_END = 256
_START = 257
_N_VOCAB = 258
_CERTAIN = 12.0


def reply_with_sum(prompt: str, image_sum: float) -> str:
    """The default reply: says how long the prompt is and what the image adds up to, so that a mix-up shows."""
    return f'fake answer to {len(prompt)} characters about image {image_sum:.3f}'


class FakeGrammar:
    """Allows everything: the fake engine's replies are what they are."""

    def allows(self, token: int) -> bool:
        """Yes."""
        return True

    def allowed(self, tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
        """All."""
        return np.ones(len(tokens), dtype=np.bool_)

    def forced(self) -> tuple[bytes, bool]:
        """Nothing."""
        return b'', False

    def masked(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """An unchanged copy."""
        return logits.copy()

    def accept(self, token: int) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to free."""


class FakeLanguageEngine:
    """See the module.

    :param reply: prompt text and the sum of all embedding rows -> the text that the "model" will say.
    :param n_embd: width of an embedding.
    :param token_s: how long a token takes, in seconds; a prompt takes a tenth of that for each position.
    """

    def __init__(
        self,
        options: LanguageOptions | None = None,
        *,
        reply: Callable[[str, float], str] = reply_with_sum,
        n_embd: int = 8,
        token_s: float = 0.0,
    ) -> None:
        self._options = options or LanguageOptions()
        self._cache = PrefixCache(self._options.frame_cache)
        self._reply_of = reply
        self._n_embd = n_embd
        self._token_s = token_s
        self._prompt = self._reply = b''
        self._prompt_positions = 0
        self._said: list[int] = []
        self._image_sum = 0.0
        self.closed = False

    @property
    def n_ctx(self) -> int:
        """Positions of the context."""
        return self._options.n_ctx

    @property
    def n_embd(self) -> int:
        """Width of an embedding."""
        return self._n_embd

    @property
    def description(self) -> str:
        """Says that it is none."""
        return 'fake language engine'

    @property
    def end_token(self) -> int:
        """The token that ends an answer."""
        return _END

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """One token a byte."""
        return ([_START] if bos else []) + list(text.encode())

    def piece(self, token: int) -> bytes:
        """The byte."""
        return bytes([token]) if token < _END else b''

    def is_end(self, token: int) -> bool:
        """Whether it is the end token."""
        return token == _END

    def holds(self, segments: Sequence[Segment]) -> bool:
        """See ``LanguageEngine.holds``."""
        return self._cache.match_resident(segments) == len(segments) or self._cache.has(segments)

    def prefill(self, segments: Sequence[Segment], cancel: CancelToken, *, want_logits: bool = True) -> PrefillStats:
        """See ``LanguageEngine.prefill``; takes time by the position, and can be interrupted."""
        n_positions = sum(segment.n_positions for segment in segments)
        if n_positions >= self.n_ctx:
            raise QuestionTooLongError(f'the prompt takes {n_positions} positions, but the context has {self.n_ctx}')
        reusable = segments[:-1] if want_logits else segments
        done = self._cache.match_resident(reusable)
        saved = self._cache.match_saved(reusable, more_than=done)
        image_sum = saved.data if saved is not None else (self._image_sum if done else 0.0)
        done = saved.n_segments if saved is not None else done
        n_reused = sum(segment.n_positions for segment in segments[:done])
        self._cache.truncate(0)
        for index in range(done, len(segments)):
            segment = segments[index]
            if isinstance(segment, EmbeddingSegment):
                image_sum = float(segment.rows().sum())
            self._work(segment.n_positions * self._token_s / 10, cancel)
            self._image_sum = image_sum
            self._cache.resident_is(segments[: index + 1])
            if isinstance(segment, EmbeddingSegment):
                self._cache.save(segments[: index + 1], image_sum)
        self._cache.resident_is(segments)
        self._image_sum = image_sum
        self._prompt = b''.join(
            self.piece(token) for s in segments if not isinstance(s, EmbeddingSegment) for token in s.tokens
        )
        self._reply = self._reply_to(self._prompt)
        self._prompt_positions, self._said = n_positions, []
        return PrefillStats(n_positions, n_reused)

    def _reply_to(self, prompt: bytes) -> bytes:
        return self._reply_of(prompt.decode(errors='replace'), self._image_sum).encode()

    def append(self, tokens: Sequence[int], cancel: CancelToken) -> None:
        """Continue the sequence."""
        if self.n_past + len(tokens) > self.n_ctx:
            raise QuestionTooLongError(f'the answer reached the end of the context ({self.n_ctx} positions)')
        self._work(len(tokens) * self._token_s, cancel)
        self._said.extend(tokens)

    def branch(self, paths: Sequence[Sequence[int]], cancel: CancelToken) -> NDArray[np.float32]:
        """See ``LanguageEngine.branch``; what a path adds to another path that it begins with was said by the model."""
        result = np.zeros((len(paths), _N_VOCAB), dtype=np.float32)
        for tree in plan_trees(paths, max_sequences=self._options.n_branches, max_tokens=self.n_ctx - self.n_past):
            self._work(len(tree.tokens) * self._token_s / 10, cancel)
        for row, path in zip(result, paths, strict=True):
            prompt = min((other for other in paths if tuple(path[: len(other)]) == tuple(other)), key=len)
            reply = self._reply_to(self._prompt + b''.join(self.piece(token) for token in prompt))
            row[:] = _certain(reply, path[len(prompt) :])
        return result

    @property
    def n_past(self) -> int:
        """Positions in the sequence."""
        return self._prompt_positions + len(self._said)

    def rewind(self, n_past: int) -> None:
        """Forget what was appended after ``n_past``."""
        del self._said[max(n_past - self._prompt_positions, 0) :]

    def logits(self) -> NDArray[np.float32]:
        """Nearly all probability on the next byte of the reply, as long as what was said follows it."""
        return _certain(self._reply, self._said)

    def json_grammar(self, schema: str) -> FakeGrammar:
        """A grammar that allows everything."""
        return FakeGrammar()

    def set_threads(self, n_threads: int, n_threads_batch: int) -> None:
        """Nothing to do."""

    def drop(self, segments: Sequence[Segment]) -> None:
        """Drop one saved state."""
        self._cache.drop(segments)

    def forget(self) -> None:
        """Drop every kept state."""
        self._cache.clear()

    def perf(self) -> PerfCounters:
        """All zero."""
        return PerfCounters(0.0, 0.0, 0, 0.0, 0)

    def close(self) -> None:
        """Note that it was closed."""
        self.closed = True

    @staticmethod
    def _work(duration_s: float, cancel: CancelToken) -> None:
        end_s = time.monotonic() + duration_s
        cancel.raise_if_set()
        while (left_s := end_s - time.monotonic()) > 0:
            time.sleep(min(left_s, 0.005))
            cancel.raise_if_set()


def _certain(reply: bytes, said: Sequence[int]) -> NDArray[np.float32]:
    """Logits of whoever wants to say ``reply`` and has said ``said``."""
    logits = np.zeros(_N_VOCAB, dtype=np.float32)
    follows = bytes(token for token in said if token < _END) == reply[: len(said)]
    logits[_END if len(said) >= len(reply) or not follows else reply[len(said)]] = _CERTAIN
    return logits
