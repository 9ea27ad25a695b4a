"""How probable a text is after another, by a language model in a GGUF file: what language benchmarks ask for.

Runs on the runtime's own engine. Texts become tokens by the rules of lm-evaluation-harness (``TemplateLM._encode_pair``
and ``HFLM``), so that the figures can stand beside those of a checkpoint. Continuations of one context are computed
together, and what a context has in common with the one before is not computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import QuestionTooLongError
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.generate import generate
from mobilevlm_ros.runtime.language import LanguageEngine, LanguageOptions, TokenSegment
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine
from mobilevlm_ros.runtime.sampling import Sampler, SamplingSettings, log_softmax

__all__ = ['LanguageScorer']

_BLOCK = 128
"""Tokens of a context are kept in blocks of so many; a new context shares whole blocks with the last one."""
_MOST_PATHS = 64
"""Beginnings whose logits are held at once: 8 MiB with 32,000 tokens."""

Tokens = tuple[int, ...]


class LanguageScorer:
    """See the module.

    :param engine: closed with the scorer.
    :param add_bos: whether the token that starts a text comes first, where the vocabulary has one.
    """

    def __init__(self, engine: LanguageEngine, *, add_bos: bool = True) -> None:
        self._engine = engine
        self._add_bos = add_bos
        # The harness gives an empty context this token, whether or not others get it.
        self._prefix = (engine.tokenize('', bos=True) or [engine.end_token])[0]

    @classmethod
    def open(
        cls, path: Path, *, n_ctx: int = 2048, n_threads: int = 0, n_gpu_layers: int = 0, add_bos: bool = True
    ) -> LanguageScorer:
        """Load a GGUF file.

        :raise EngineError: if it cannot be loaded.
        :raise DependencyError: if llama-cpp-python is missing.
        """
        options = LanguageOptions(
            n_ctx=n_ctx, n_threads=n_threads, n_threads_batch=n_threads, n_gpu_layers=n_gpu_layers, frame_cache=0
        )
        return cls(LlamaCppEngine(path, options), add_bos=add_bos)

    def tokens_of(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        """The tokens of both, told apart as the harness does: by the number of the context's own tokens."""
        if not context:
            tokens = tuple(self._engine.tokenize(continuation))
            if tokens[:1] == (self._prefix,):
                return tokens[:1], tokens[1:]
            return (self._prefix,), tokens
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        context_tokens = self._tokenize(stripped)
        return context_tokens, self._tokenize(stripped + continuation)[len(context_tokens) :]

    def _tokenize(self, text: str) -> Tokens:
        return tuple(self._engine.tokenize(text, bos=self._add_bos))

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[float, bool]]:
        """For each context and continuation: log probability of the continuation, and whether greedy decoding says it.

        What is too long loses its beginning.

        :raise QuestionTooLongError: if a continuation alone is too long.
        :raise EngineError: if the model fails.
        """
        encoded = (self._fitted(*self.tokens_of(*pair)) for pair in pairs)
        for context, group in groupby(encoded, key=lambda one: one[0]):
            yield from self._scored(context, [continuation for _, continuation in group])

    def _fitted(self, context: Tokens, continuation: Tokens) -> tuple[Tokens, Tokens]:
        room = self._engine.n_ctx - len(continuation)
        if room < 1:
            raise QuestionTooLongError(
                f'a continuation has {len(continuation)} tokens, the context of the model {self._engine.n_ctx}: '
                'raise n_ctx'
            )
        return context[-room:], continuation

    def _scored(self, context: Tokens, continuations: Sequence[Tokens]) -> list[tuple[float, bool]]:
        cancel = CancelToken()
        self._engine.prefill(_segments(context), cancel)
        # After each beginning of a continuation, which tokens are asked about.
        wanted: dict[Tokens, set[int]] = {(): set()}
        for one in continuations:
            for end in range(len(one)):
                wanted.setdefault(one[:end], set()).add(one[end])
        steps = dict(_steps((), self._engine.logits(), wanted))
        beginnings = [beginning for beginning in wanted if beginning]
        for start in range(0, len(beginnings), _MOST_PATHS):
            part = beginnings[start : start + _MOST_PATHS]
            for beginning, logits in zip(part, self._engine.branch(part, cancel), strict=True):
                steps.update(_steps(beginning, logits, wanted))
        scored = []
        for one in continuations:
            taken = [steps[one[:end], one[end]] for end in range(len(one))]
            scored.append((sum(value for value, _ in taken), all(is_best for _, is_best in taken)))
        return scored

    def generate(self, context: str, until: Sequence[str], max_tokens: int) -> str:
        """Continue a text greedily, until one of ``until`` comes.

        :raise EngineError: if the model fails.
        """
        tokens = self._tokenize(context) or (self._prefix,)
        room = self._engine.n_ctx - max_tokens
        if room < 1:
            raise QuestionTooLongError(f'{max_tokens} tokens do not fit a context of {self._engine.n_ctx}: raise n_ctx')
        cancel = CancelToken()
        self._engine.prefill(_segments(tokens[-room:]), cancel)
        sampler = Sampler(SamplingSettings())
        return generate(self._engine, sampler, cancel, max_tokens=max_tokens, stop_texts=until).text

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()


def _segments(tokens: Tokens) -> list[TokenSegment]:
    """Blocks, and the last token by itself: it is computed for its logits even where all is held already."""
    blocks = [tokens[start : start + _BLOCK] for start in range(0, len(tokens) - 1, _BLOCK)]
    if blocks:
        blocks[-1] = blocks[-1][: len(tokens) - 1 - _BLOCK * (len(blocks) - 1)]
    return [TokenSegment(block) for block in [*blocks, tokens[-1:]]]


def _steps(
    beginning: Tokens, logits: NDArray[np.float32], wanted: dict[Tokens, set[int]]
) -> Iterator[tuple[tuple[Tokens, int], tuple[float, bool]]]:
    """Of each token that is asked about after ``beginning``: its log probability, and whether it is the best."""
    log_probabilities, best = log_softmax(logits), int(logits.argmax())
    for token in wanted[beginning]:
        yield (beginning, token), (float(log_probabilities[token]), token == best)
