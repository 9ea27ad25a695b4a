"""Who answers in an evaluation: one protocol, and the bundle behind it. ``server.py`` has the other one.

An answerer gets pixels and a question and gives a reply; it knows nothing of bags, benchmarks or right answers. A reply
to a closed question is always its likeliest option, however unsure: abstaining is for the evaluation to decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from mobilevlm_ros.runtime.assistant import Assistant, AssistantSettings
from mobilevlm_ros.runtime.bundle import Bundle, open_bundle
from mobilevlm_ros.runtime.loading import load_assistant
from mobilevlm_ros.runtime.preprocess import Aspect
from mobilevlm_ros.types import Answer, AnswerFormat, Frame, Question, ResultCode, Timing

__all__ = ['Answerer', 'BundleAnswerer', 'Reply']

_CLOSED = (AnswerFormat.YES_NO, AnswerFormat.CHOICE)


@dataclass(frozen=True)
class Reply:
    """What was answered.

    :ivar text: the answer; empty if there is none. Never an error message: that is ``message``.
    :ivar confidence: probability of the answer; None if whoever answered does not tell.
    :ivar result_code: from 100 on there was no answer.
    :ivar truncated: whether the limit of tokens cut it off.
    :ivar options: of a closed question, with ``probabilities`` if they are known.
    :ivar prompt_hash: equal for equal prompts to equal models under equal settings; of a bundle the one that the node
        reports.
    """

    text: str
    confidence: float | None = None
    timing: Timing = field(default_factory=Timing)
    result_code: ResultCode = ResultCode.OK
    message: str = ''
    truncated: bool = False
    options: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    prompt_hash: str = ''

    @classmethod
    def of(cls, answer: Answer) -> Reply:
        """The reply that an assistant's answer is."""
        return cls(
            text=answer.text,
            confidence=answer.confidence,
            timing=answer.timing,
            result_code=answer.result_code,
            message=answer.message,
            truncated=answer.truncated,
            options=answer.options,
            probabilities=answer.probabilities,
            prompt_hash=answer.prompt_hash,
        )


class Answerer(Protocol):
    """Answers questions about images; used by one thread at a time."""

    @property
    def model_id(self) -> str:
        """Names the model in results."""
        ...

    def answer(self, frame: Frame, question: Question) -> Reply:
        """Answer one question about one image.

        What is wrong with this question or image alone comes back as the reply's result code.

        :param frame: RGB, uint8 ``[height, width, 3]``.
        :param question: text, format and limit of tokens; decoding is greedy.
        :raise MobileVLMError: if there will be no answer to the next question either.
        """
        ...

    def answer_many(self, frame: Frame, questions: Sequence[Question]) -> list[Reply]:
        """Answer several questions about one image, in their order; the same replies as of ``answer``."""
        ...

    def close(self) -> None:
        """Free what it holds; may be called again."""
        ...


class BundleAnswerer:
    """A bundle, asked through the runtime exactly as the node asks it.

    :param assistant: closed with the answerer.
    :param settings: for every question; the limit of confidence is taken out of them.
    """

    def __init__(self, assistant: Assistant, settings: AssistantSettings | None = None) -> None:
        self.assistant = assistant
        self._settings = replace(settings or AssistantSettings(), min_confidence=0.0)

    @classmethod
    def open(cls, path: Path, *, n_threads: int = 0, aspect: Aspect | None = None) -> BundleAnswerer:
        """Open and load a bundle.

        :param n_threads: of every engine; 0: as the bundle says.
        :param aspect: how images are made square, instead of the way that the bundle says.
        :raise BundleError: if the bundle cannot be used.
        :raise EngineError: if it does not load.
        :raise DependencyError: if a library is missing.
        """
        bundle = open_bundle(path)
        if aspect is not None:
            vision = bundle.vision | {'aspect': aspect}
            bundle = Bundle(bundle.path, bundle.description | {'vision': vision}, bundle.hash)
        return cls(load_assistant(bundle, n_threads=n_threads))

    @property
    def model_id(self) -> str:
        """The bundle's own."""
        return self.assistant.model_id

    def answer(self, frame: Frame, question: Question) -> Reply:
        """See ``Answerer``."""
        return self.answer_many(frame, [question])[0]

    def answer_many(self, frame: Frame, questions: Sequence[Question]) -> list[Reply]:
        """See ``Answerer``; closed questions are computed in one batch.

        Open ones are asked by themselves, so that the time of each holds no other question's.
        """
        together = [number for number, one in enumerate(questions) if one.format in _CLOSED]
        alone = [[number] for number, one in enumerate(questions) if one.format not in _CLOSED]
        replies: dict[int, Reply] = {}
        for numbers in [together, *alone] if together else alone:
            answers = self.assistant.ask_many([questions[number] for number in numbers], frame, settings=self._settings)
            replies |= {number: Reply.of(answer) for number, answer in zip(numbers, answers, strict=True)}
        return [replies[number] for number in range(len(questions))]

    def close(self) -> None:
        """Free both engines."""
        self.assistant.close()
