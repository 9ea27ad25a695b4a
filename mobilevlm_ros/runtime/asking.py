"""A question on its way to an answer: what came with it, what is known of it, and when to stop.

Plain records without an engine; ``assistant.py`` is what moves them on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from mobilevlm_ros.errors import InterruptedAnswerError, MobileVLMError
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.formats import PreparedQuestion
from mobilevlm_ros.runtime.options import OptionTree
from mobilevlm_ros.runtime.sampling import SamplingSettings
from mobilevlm_ros.types import Answer, Question, ResultCode, Timing

__all__ = ['MIN_CONFIDENCE', 'Asked', 'AssistantSettings', 'Progress', 'Turn', 'ignore_progress', 'when_all_are_set']

MIN_CONFIDENCE = 0.5
"""For models of which nothing is known."""


@dataclass(frozen=True)
class AssistantSettings:
    """Defaults for what a question leaves open.

    :ivar max_tokens: longest answer, in tokens.
    :ivar min_confidence: a closed question answered less confidently than this gets the code UNKNOWN; 0: none does;
        None: what the bundle says of the question's format, else ``MIN_CONFIDENCE``.
    :ivar n_threads: threads of the language engine; 0: as it was loaded.
    """

    max_tokens: int = 128
    min_confidence: float | None = None
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    n_threads: int = 0


@dataclass(frozen=True)
class Progress:
    """What an asker may be told while waiting: the stage begun, and all text so far."""

    stage: str
    text: str = ''


def ignore_progress(progress: Progress) -> None:
    """The default listener."""


@dataclass(frozen=True)
class Asked:
    """A question with what is its own where several are asked together.

    :ivar cancel: stops this question; the others go on.
    :ivar timing: filled in; may hold the stages that came before.
    :ivar settings: instead of those of the assistant.
    """

    question: Question
    cancel: CancelToken = field(default_factory=CancelToken)
    on_progress: Callable[[Progress], None] = ignore_progress
    timing: Timing = field(default_factory=Timing)
    settings: AssistantSettings | None = None


@dataclass
class Turn:
    """A question on the way to its answer.

    :ivar before_s: what had passed when the assistant took it up, at ``started_s``.
    :ivar tokens: what comes after the image.
    :ivar options: of a closed question.
    """

    asked: Asked
    settings: AssistantSettings
    answer: Answer
    started_s: float
    before_s: float
    prepared: PreparedQuestion = field(default_factory=lambda: PreparedQuestion(''))
    tokens: tuple[int, ...] = ()
    options: OptionTree | None = None

    @property
    def timing(self) -> Timing:
        """The question's own."""
        return self.asked.timing

    @property
    def cancel(self) -> CancelToken:
        """The question's own."""
        return self.asked.cancel

    @property
    def is_open(self) -> bool:
        """Whether there is no answer yet, good or bad."""
        return self.answer.result_code is ResultCode.OK and not self.answer.text

    def fail(self, error: MobileVLMError) -> None:
        """Answer with the code of ``error``; if the question itself was stopped, that is why."""
        if self.cancel.is_set:
            error = InterruptedAnswerError(self.cancel.code or ResultCode.CANCELED, self.cancel.message)
        self.answer = replace(self.answer, result_code=error.code, message=str(error))

    def since_start_s(self) -> float:
        """Seconds since the assistant took the question up."""
        return time.monotonic() - self.started_s


@contextmanager
def when_all_are_set(tokens: Sequence[CancelToken]) -> Iterator[CancelToken]:
    """A token that is set when the last of ``tokens`` is, with its reason."""
    together = CancelToken()

    def look() -> None:
        if all(token.is_set for token in tokens):
            token = tokens[-1]
            together.set(token.code or ResultCode.CANCELED, token.message)

    with ExitStack() as stack:
        for token in {id(token): token for token in tokens}.values():
            stack.enter_context(token.on_set(look))
        yield together
