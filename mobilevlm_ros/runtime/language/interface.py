"""What a language engine promises.

An engine holds one sequence. ``prefill`` makes the sequence equal to a list of segments, computing only what it does
not hold yet; ``append`` continues it; after either, ``logits`` are those of the next token. ``branch`` looks at many
continuations of the sequence at once and leaves it as it was. The engine knows nothing of prompts, formats or sampling.
It is used by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.runtime.cancel import CancelToken

__all__ = [
    'EmbeddingSegment',
    'Grammar',
    'LanguageEngine',
    'LanguageOptions',
    'PerfCounters',
    'PrefillStats',
    'Segment',
    'SegmentKey',
    'TokenSegment',
]

SegmentKey: TypeAlias = 'tuple[int, ...] | str'


@dataclass(frozen=True)
class TokenSegment:
    """Text of a prompt, as token ids."""

    tokens: tuple[int, ...]

    @property
    def key(self) -> SegmentKey:
        """Equal keys, equal content."""
        return self.tokens

    @property
    def n_positions(self) -> int:
        """How many positions of the context it takes."""
        return len(self.tokens)


@dataclass(frozen=True)
class EmbeddingSegment:
    """An image in a prompt: rows for the model's embedding space.

    :ivar key: names the content; equal keys must mean equal rows.
    :ivar n_positions: number of rows.
    :ivar rows: makes the rows, float32 ``[n_positions, n_embd]``; only called if the engine does not hold the segment.
    """

    key: str
    n_positions: int
    rows: Callable[[], NDArray[np.float32]]


Segment: TypeAlias = 'TokenSegment | EmbeddingSegment'


@dataclass(frozen=True)
class PrefillStats:
    """What a ``prefill`` had to do, in positions."""

    n_positions: int
    n_reused: int


@dataclass(frozen=True)
class PerfCounters:
    """Counters of the engine since it was loaded; the columns of the MobileVLM paper's latency tables."""

    load_ms: float
    prompt_eval_ms: float
    n_prompt_eval: int
    eval_ms: float
    n_eval: int


@dataclass(frozen=True)
class LanguageOptions:
    """How a language engine is set up.

    :ivar n_ctx: positions of the context.
    :ivar n_batch: positions computed in one call.
    :ivar n_threads: threads for single tokens; 0: all cores but one, since one busy neighbour more than halves the
        speed when every core is taken.
    :ivar n_threads_batch: threads for batches; 0: all cores.
    :ivar n_gpu_layers: layers on the GPU; -1: all.
    :ivar flash_attention: None: llama.cpp decides, except that ``kv_type`` f32 goes without, which alone keeps to it.
    :ivar kv_type: data type of keys and values.
    :ivar frame_cache: how many frames' states are kept besides the one in use.
    :ivar n_branches: continuations that are computed together; more are computed in turns.
    """

    n_ctx: int = 2048
    n_batch: int = 512
    n_threads: int = 0
    n_threads_batch: int = 0
    n_gpu_layers: int = 0
    flash_attention: bool | None = None
    kv_type: Literal['f16', 'f32', 'q8_0'] = 'f16'
    frame_cache: int = 4
    n_branches: int = 16


class Grammar(Protocol):
    """Says which tokens may follow, and is moved on by the token that was taken."""

    def allows(self, token: int) -> bool:
        """Whether ``token`` may come next."""
        ...

    def allowed(self, tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which of ``tokens [n]`` may come next; costs in proportion to their number."""
        ...

    def forced(self) -> tuple[bytes, bool]:
        """The text that must come next, whatever is chosen, and whether everything ends after it.

        Empty where there is a choice; only whole characters.
        """
        ...

    def masked(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """A copy of ``logits [n_vocab]`` with forbidden tokens at minus infinity."""
        ...

    def accept(self, token: int) -> None:
        """Move on by ``token``."""
        ...

    def close(self) -> None:
        """Free what it holds; may be called again."""
        ...


class LanguageEngine(Protocol):
    """A language model that continues one sequence of tokens and embeddings."""

    @property
    def n_ctx(self) -> int:
        """Positions of the context."""
        ...

    @property
    def n_embd(self) -> int:
        """Width of an embedding."""
        ...

    @property
    def description(self) -> str:
        """Architecture, size and quantisation, for people."""
        ...

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Token ids of ``text``; ``special`` reads text such as ``</s>`` as the token it names."""
        ...

    def piece(self, token: int) -> bytes:
        """The bytes that ``token`` stands for; empty for control tokens."""
        ...

    def is_end(self, token: int) -> bool:
        """Whether ``token`` ends a generation."""
        ...

    @property
    def end_token(self) -> int:
        """The token that ends an answer."""
        ...

    def holds(self, segments: Sequence[Segment]) -> bool:
        """Whether a prompt that starts with ``segments`` needs none of them computed."""
        ...

    def prefill(self, segments: Sequence[Segment], cancel: CancelToken, *, want_logits: bool = True) -> PrefillStats:
        """Make the sequence equal to ``segments``.

        :param want_logits: False: logits are undefined afterwards, and if all is held already, nothing is computed.
        :raise QuestionTooLongError: if they do not fit the context.
        :raise InterruptedAnswerError: if ``cancel`` was set; the engine stays usable.
        :raise EngineError: if the model fails; the engine stays usable.
        """
        ...

    def append(self, tokens: Sequence[int], cancel: CancelToken) -> None:
        """Continue the sequence; the same errors as ``prefill``."""
        ...

    def branch(self, paths: Sequence[Sequence[int]], cancel: CancelToken) -> NDArray[np.float32]:
        """Logits of the next token after each of ``paths``, which are tokens that could follow the sequence.

        What paths have in common at their beginnings is computed once. The sequence is left as it was; ``logits`` are
        undefined until the next ``append``. The same errors as ``prefill``.

        :param paths: none of them empty.
        :return: float32 ``[n_paths, n_vocab]``.
        """
        ...

    @property
    def n_past(self) -> int:
        """Positions in the sequence."""
        ...

    def rewind(self, n_past: int) -> None:
        """Forget all positions from ``n_past`` on; logits are undefined until the next ``append``."""
        ...

    def logits(self) -> NDArray[np.float32]:
        """Logits of the next token, float32 ``[n_vocab]``; a view that the next call overwrites."""
        ...

    def json_grammar(self, schema: str) -> Grammar:
        """A grammar of the JSON texts that a schema describes.

        :raise AnswerFormatError: if the schema uses what cannot be turned into a grammar.
        """
        ...

    def set_threads(self, n_threads: int, n_threads_batch: int) -> None:
        """Change the thread counts; 0: as at the start."""
        ...

    def drop(self, segments: Sequence[Segment]) -> None:
        """Drop the saved state of exactly ``segments``, if there is one; the working sequence stays."""
        ...

    def forget(self) -> None:
        """Drop every kept state."""
        ...

    def perf(self) -> PerfCounters:
        """Counters since loading."""
        ...

    def close(self) -> None:
        """Free everything; may be called again."""
        ...
