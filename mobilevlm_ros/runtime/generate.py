"""The decoding loop: logits to text, token by token.

Stops at the vocabulary's end tokens, at a stop text, after ``max_tokens``, or when the cancel token is set; what was
said until then is always returned. Text is streamed in whole characters, never including a part of a stop text.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import AnswerFormatError, InterruptedAnswerError, QuestionTooLongError
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.language import Grammar, LanguageEngine
from mobilevlm_ros.runtime.sampling import Sampler, log_softmax

__all__ = ['Generation', 'generate']


@dataclass(frozen=True)
class Generation:
    """What was generated.

    :ivar confidence: mean probability of the chosen tokens under the raw logits, the end token included.
    :ivar truncated: whether ``max_tokens`` or the context ended it.
    :ivar interrupted: the error that ended it from outside, if one did.
    """

    text: str
    n_tokens: int
    confidence: float
    truncated: bool = False
    interrupted: InterruptedAnswerError | None = None


def generate(
    engine: LanguageEngine,
    sampler: Sampler,
    cancel: CancelToken,
    *,
    max_tokens: int,
    stop_texts: Sequence[str] = (),
    grammar: Grammar | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue what the engine holds.

    :param on_text: called with all text so far whenever it grew.
    :raise AnswerFormatError: if ``grammar`` asks for what the vocabulary cannot spell.
    """
    text = _TextBuffer(stop_texts)
    probabilities: list[float] = []
    truncated = False
    interrupted: InterruptedAnswerError | None = None
    n_tokens = 0
    try:
        while True:
            logits = engine.logits()
            token = _choose(logits, sampler, grammar)
            probabilities.append(float(np.exp(log_softmax(logits)[token])))
            if engine.is_end(token):
                break
            n_tokens += 1
            grew = text.add(engine.piece(token))
            if grew and on_text is not None:
                on_text(text.shown)
            if text.stopped:
                break
            if n_tokens >= max_tokens:
                truncated = True
                break
            engine.append([token], cancel)
    except InterruptedAnswerError as error:
        interrupted = error
    except QuestionTooLongError:
        truncated = True
    return Generation(
        text=text.finish(),
        n_tokens=n_tokens,
        confidence=float(np.mean(probabilities)) if probabilities else 0.0,
        truncated=truncated,
        interrupted=interrupted,
    )


def _choose(logits: NDArray[np.float32], sampler: Sampler, grammar: Grammar | None) -> int:
    token = sampler.choose(logits)
    if grammar is None:
        return token
    # Most free choices obey the grammar already, and asking about one token is far cheaper than about all.
    if not grammar.allows(token):
        masked = grammar.masked(logits)
        if not np.isfinite(masked).any():
            raise AnswerFormatError('the vocabulary of the model cannot spell what the JSON schema asks for: change it')
        token = sampler.choose(masked)
    grammar.accept(token)
    return token


class _TextBuffer:
    """Bytes in, text out; holds back the beginning of what may become a stop text."""

    def __init__(self, stop_texts: Sequence[str]) -> None:
        self._decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self._stop_texts = [stop for stop in stop_texts if stop]
        self._text = ''
        self._n_shown = 0
        self.stopped = False

    @property
    def shown(self) -> str:
        """The text that is certain to be part of the answer."""
        return self._text[: self._n_shown].strip()

    def add(self, piece: bytes) -> bool:
        """Add a token's bytes; returns whether ``shown`` grew."""
        before = self.shown
        self._text += self._decoder.decode(piece)
        cut = min((at for stop in self._stop_texts if (at := self._text.find(stop)) >= 0), default=-1)
        if cut >= 0:
            self._text = self._text[:cut]
            self.stopped = True
            self._n_shown = cut
        else:
            self._n_shown = len(self._text) - self._held_back()
        return self.shown != before

    def _held_back(self) -> int:
        longest = max((len(stop) for stop in self._stop_texts), default=1) - 1
        for n in range(min(longest, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-n:]) for stop in self._stop_texts):
                return n
        return 0

    def finish(self) -> str:
        """All text, with a held-back beginning of a stop text that never came, without a character cut in half."""
        return self._text.strip()
