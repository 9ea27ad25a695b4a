"""The decoding loop: logits to text, token by token.

Stops at the vocabulary's end tokens, at a stop text, after ``max_tokens``, or when the cancel token is set; what was
said until then is always returned. Text is streamed in whole characters, never including a part of a stop text.

Where a grammar leaves no choice, nothing is asked of the model: the text that must come is taken over, and computed in
one batch with the token chosen before it. It is spelled as the vocabulary's tokenizer spells it, which is how the model
has seen such text; its last token is left to the model, because with what follows it may be another one (``: `` and
``true`` are usually ``:`` and `` true``). The text is the one that choosing token by token would give.
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
from mobilevlm_ros.runtime.sampling import Probability, Sampler

__all__ = ['Generation', 'generate']

_N_TRIED = 64


@dataclass(frozen=True)
class Generation:
    """What was generated.

    :ivar confidence: mean probability of the chosen tokens under the raw logits, the end token included; tokens that a
        grammar forced were not chosen and do not count. Where it forced all, 1.
    :ivar n_forced: how many of ``n_tokens`` a grammar forced.
    :ivar truncated: whether ``max_tokens`` or the context ended it.
    :ivar interrupted: the error that ended it from outside, if one did.
    """

    text: str
    n_tokens: int
    confidence: float
    n_forced: int = 0
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
    probability = Probability()
    probabilities: list[float] = []
    truncated = False
    interrupted: InterruptedAnswerError | None = None
    n_tokens = n_forced = 0
    # Said, but not computed yet.
    pending: list[int] = []
    try:
        while True:
            if grammar is not None:
                forced, ends = _forced_tokens(engine, grammar)
                room = max_tokens - n_tokens
                if not ends:  # what comes last is not computed, and needs no place in the context
                    room = min(room, max(engine.n_ctx - engine.n_past - len(pending), 0))
                ends = ends and len(forced) <= room
                del forced[room:]
                for index, token in enumerate(forced):
                    if not grammar.allows(token):  # cannot be; but accepting it would end the process
                        del forced[index:]
                        ends = False
                        break
                    grammar.accept(token)
                pending += forced
                n_tokens += len(forced)
                n_forced += len(forced)
                grew = text.add(b''.join(engine.piece(token) for token in forced))
                if grew and on_text is not None:
                    on_text(text.shown)
                if ends:
                    break
                if n_tokens >= max_tokens:
                    truncated = True
                    break
            if pending:
                engine.append(pending, cancel)
            logits = engine.logits()
            token = _choose(logits, sampler, grammar)
            probabilities.append(probability.of(token, logits))
            if engine.is_end(token):
                break
            n_tokens += 1
            grew = text.add(engine.piece(token))
            if grew and on_text is not None:
                on_text(text.shown)
            if text.stopped:
                break
            if n_tokens >= max_tokens and grammar is None:
                truncated = True
                break
            pending = [token]
    except InterruptedAnswerError as error:
        interrupted = error
    except QuestionTooLongError:
        truncated = True
    return Generation(
        text=text.finish(),
        n_tokens=n_tokens,
        confidence=float(np.mean(probabilities)) if probabilities else float(n_forced > 0),
        n_forced=n_forced,
        truncated=truncated,
        interrupted=interrupted,
    )


def _forced_tokens(engine: LanguageEngine, grammar: Grammar) -> tuple[list[int], bool]:
    """The tokens to take over; see the module. And whether the text ends with them."""
    forced, ends = grammar.forced()
    if not forced:
        return [], ends
    # After a line break, so that the tokenizer does not take the text for the beginning of one and add a space.
    break_, text = '\n', forced.decode()
    mark, tokens = engine.tokenize(break_), engine.tokenize(break_ + text)
    rest = tokens[len(mark) :]
    if tokens[: len(mark)] != mark or b''.join(engine.piece(token) for token in rest) != forced:
        return [], False  # the line break became part of a token: let the model spell
    return (rest, True) if ends else (rest[:-1], False)


def _choose(logits: NDArray[np.float32], sampler: Sampler, grammar: Grammar | None) -> int:
    token = sampler.choose(logits)
    if grammar is None:
        return token
    # Most free choices obey the grammar already, and asking about one token is far cheaper than about all.
    if not grammar.allows(token):
        token = _best_allowed(logits, grammar) if sampler.is_greedy else -1
        if token < 0:
            masked = grammar.masked(logits)
            if not np.isfinite(masked).any():
                raise AnswerFormatError(
                    'the vocabulary of the model cannot spell what the JSON schema asks for: change it'
                )
            token = sampler.choose(masked)
    grammar.accept(token)
    return token


def _best_allowed(logits: NDArray[np.float32], grammar: Grammar) -> int:
    """The best token that is allowed, if it is among the best of all; else -1.

    A model that knows JSON nearly always has one there, and asking about all 32,000 costs up to a third of a token.
    """
    best = np.argpartition(logits, -min(_N_TRIED, len(logits)))[-_N_TRIED:].astype(np.int32)
    allowed = grammar.allowed(best)
    if not allowed.any():
        return -1
    # The first of equals, as over all tokens; unless there may be more of them among the others.
    token = int(min(best[allowed], key=lambda token: (-logits[token], token)))
    return token if logits[token] > logits[best].min() else -1


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
