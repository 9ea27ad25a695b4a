"""Asks one question about one frame: prompt, visual tokens, decoding or scoring, answer.

Owns what is kept of recent frames: their visual tokens here, their keys and values in the language engine. A second
question on a frame computes its own tokens and nothing else. Used by one thread at a time.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import EngineError, InterruptedAnswerError, MobileVLMError, QuestionTooLongError
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.formats import PreparedQuestion, parse_json_answer, prepare
from mobilevlm_ros.runtime.generate import Generation, generate
from mobilevlm_ros.runtime.language import EmbeddingSegment, LanguageEngine, Segment, TokenSegment
from mobilevlm_ros.runtime.options import score_options
from mobilevlm_ros.runtime.preprocess import PreprocessSpec, preprocess
from mobilevlm_ros.runtime.prompt import PromptTemplate, prompt_hash
from mobilevlm_ros.runtime.sampling import Sampler, SamplingSettings
from mobilevlm_ros.runtime.vision import VisionEngine
from mobilevlm_ros.types import Answer, Frame, Question, ResultCode, Timing

__all__ = ['Assistant', 'AssistantSettings', 'Progress']


@dataclass(frozen=True)
class AssistantSettings:
    """Defaults for what a question leaves open.

    :ivar max_tokens: longest answer, in tokens.
    :ivar min_confidence: a closed question answered less confidently than this gets the code UNKNOWN.
    :ivar n_threads: threads of the language engine; 0: as it was loaded.
    """

    max_tokens: int = 128
    min_confidence: float = 0.5
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    n_threads: int = 0


@dataclass(frozen=True)
class Progress:
    """What an asker may be told while waiting: the stage begun, and all text so far."""

    stage: str
    text: str = ''


def _ignore_progress(progress: Progress) -> None:
    """The default listener."""


class Assistant:
    """See the module.

    :param model_id: names the model in every answer.
    :param n_frames: of how many frames the visual tokens are kept.
    """

    def __init__(
        self,
        vision: VisionEngine,
        language: LanguageEngine,
        template: PromptTemplate,
        spec: PreprocessSpec,
        *,
        model_id: str,
        settings: AssistantSettings | None = None,
        n_frames: int = 8,
    ) -> None:
        if vision.n_embd != language.n_embd:
            raise EngineError(
                f'visual tokens are {vision.n_embd} wide, the language model takes {language.n_embd}: '
                'the bundle mixes two models, rebuild it'
            )
        self._vision = vision
        self.language = language
        self._template = template
        self._spec = spec
        self.model_id = model_id
        self._settings = settings or AssistantSettings()
        self._n_threads = 0
        self._n_frames = n_frames
        self._visual_tokens: OrderedDict[str, NDArray[np.float32]] = OrderedDict()

    def ask(
        self,
        question: Question,
        frame: Frame,
        *,
        cancel: CancelToken | None = None,
        on_progress: Callable[[Progress], None] = _ignore_progress,
        timing: Timing | None = None,
        settings: AssistantSettings | None = None,
    ) -> Answer:
        """Answer one question about one frame.

        Whatever goes wrong with this question or frame comes back as a result code; only errors in the program raise.

        :param timing: filled in; may hold the stages that came before.
        :param settings: for this question, instead of those of the assistant.
        """
        started_s = time.monotonic()
        timing = timing or Timing()
        before_s = timing.queue_s + timing.image_s
        answer = Answer(
            question=question,
            result_code=ResultCode.OK,
            camera=frame.camera,
            frame_id=frame.frame_id,
            stamp_ns=frame.stamp_ns,
            age_s=frame.age_s,
            model_id=self.model_id,
            timing=timing,
        )
        settings = settings or self._settings
        if settings.n_threads != self._n_threads:
            self.language.set_threads(settings.n_threads, settings.n_threads)
            self._n_threads = settings.n_threads
        try:
            prepared = prepare(question)
            answer = replace(answer, prompt_hash=self._hash(prepared, settings))
            answer = self._answer(answer, prepared, frame, settings, cancel or CancelToken(), on_progress, started_s)
        except MobileVLMError as error:
            answer = replace(answer, result_code=error.code, message=str(error))
        timing.first_text_s = before_s + timing.first_text_s if timing.first_text_s else 0.0
        timing.total_s = before_s + time.monotonic() - started_s
        return answer

    def _answer(
        self,
        answer: Answer,
        prepared: PreparedQuestion,
        frame: Frame,
        settings: AssistantSettings,
        cancel: CancelToken,
        on_progress: Callable[[Progress], None],
        started_s: float,
    ) -> Answer:
        timing = answer.timing
        max_tokens = answer.question.max_tokens or settings.max_tokens
        self._prefill(prepared, frame, max_tokens, cancel, on_progress, timing)
        on_progress(Progress('decode'))
        decode_started_s = time.monotonic()
        try:
            if prepared.options:
                return self._closed_answer(answer, prepared, settings, cancel)

            def on_text(text: str) -> None:
                timing.first_text_s = timing.first_text_s or time.monotonic() - started_s
                on_progress(Progress('decode', text))

            return self._open_answer(answer, prepared, settings, max_tokens, cancel, on_text)
        finally:
            now_s = time.monotonic()
            timing.decode_s = now_s - decode_started_s
            timing.first_text_s = timing.first_text_s or now_s - started_s

    def _prefill(
        self,
        prepared: PreparedQuestion,
        frame: Frame,
        max_tokens: int,
        cancel: CancelToken,
        on_progress: Callable[[Progress], None],
        timing: Timing,
    ) -> None:
        before, after = self._template.chunks(prepared.text, self.language)
        key = _frame_key(frame)
        image = EmbeddingSegment(key, self._vision.n_tokens, lambda: self._encode(key, frame, cancel, timing))
        segments: list[Segment] = [TokenSegment(tuple(before)), image, TokenSegment(tuple(after))]
        if not before:
            del segments[0]
        n_prompt = sum(segment.n_positions for segment in segments)
        # Some room for an answer is part of fitting; an open answer that needs more is cut, and says so.
        room = min(max_tokens, 16)
        if n_prompt + room > self.language.n_ctx:
            raise QuestionTooLongError(
                f'the question makes a prompt of {n_prompt} tokens; with {room} for the answer that does not fit the '
                f"model's context of {self.language.n_ctx}: ask a shorter question"
            )
        timing.prompt_tokens = n_prompt
        known = self.language.holds(segments[:-1]) or key in self._visual_tokens
        timing.vision_reused = known
        on_progress(Progress('prefill' if known else 'vision'))
        started_s = time.monotonic()
        try:
            timing.reused_tokens = self.language.prefill(segments, cancel).n_reused
        finally:
            timing.prefill_s = time.monotonic() - started_s - timing.preprocess_s - timing.vision_s

    def _encode(self, key: str, frame: Frame, cancel: CancelToken, timing: Timing) -> NDArray[np.float32]:
        rows = self._visual_tokens.get(key)
        if rows is None:
            started_s = time.monotonic()
            pixels_nchw = preprocess(frame.rgb_hwc, self._spec)
            preprocessed_s = time.monotonic()
            timing.preprocess_s = preprocessed_s - started_s
            try:
                rows = self._vision.encode(pixels_nchw, cancel)
            finally:
                timing.vision_s = time.monotonic() - preprocessed_s
            self._visual_tokens[key] = rows
            while len(self._visual_tokens) > self._n_frames:
                self._visual_tokens.popitem(last=False)
        self._visual_tokens.move_to_end(key)
        return rows

    def _closed_answer(
        self, answer: Answer, prepared: PreparedQuestion, settings: AssistantSettings, cancel: CancelToken
    ) -> Answer:
        scores = score_options(self.language, prepared.options, cancel)
        answer.timing.generated_tokens = scores.n_steps
        confidence = scores.probabilities[scores.best]
        scored = replace(
            answer,
            confidence=confidence,
            options=prepared.options,
            probabilities=scores.probabilities,
            option_mass=scores.mass,
        )
        if confidence < settings.min_confidence:
            return replace(
                scored,
                result_code=ResultCode.UNKNOWN,
                message=f'best option {prepared.options[scores.best]!r} has probability {confidence:.2f}, '
                f'below the limit of {settings.min_confidence:.2f}',
            )
        return replace(scored, text=prepared.options[scores.best])

    def _open_answer(
        self,
        answer: Answer,
        prepared: PreparedQuestion,
        settings: AssistantSettings,
        max_tokens: int,
        cancel: CancelToken,
        on_text: Callable[[str], None],
    ) -> Answer:
        grammar = self.language.json_grammar(prepared.schema) if prepared.schema else None
        try:
            generation = generate(
                self.language,
                Sampler(settings.sampling),
                cancel,
                max_tokens=max_tokens,
                stop_texts=() if grammar else self._template.stop_texts,
                grammar=grammar,
                on_text=on_text,
            )
        finally:
            if grammar is not None:
                grammar.close()
        answer.timing.generated_tokens = generation.n_tokens
        code, message = _judge(generation, prepared.schema)
        return replace(
            answer,
            result_code=code,
            message=message,
            text=generation.text,
            truncated=generation.truncated,
            confidence=generation.confidence,
        )

    def _hash(self, prepared: PreparedQuestion, settings: AssistantSettings) -> str:
        template, spec, sampling = self._template, self._spec, settings.sampling
        described = repr((self.model_id, template.name, spec, prepared.options, prepared.schema, sampling))
        return prompt_hash(template.render(prepared.text), described)

    def forget(self) -> None:
        """Drop everything that is kept of earlier frames."""
        self._visual_tokens.clear()
        self.language.forget()

    def close(self) -> None:
        """Free both engines; may be called again."""
        self._visual_tokens.clear()
        self.language.close()
        self._vision.close()


def _judge(generation: Generation, schema: str) -> tuple[ResultCode, str]:
    if generation.interrupted is not None:
        error: InterruptedAnswerError = generation.interrupted
        return error.code, str(error)
    if schema:
        problem = parse_json_answer(generation.text, schema)
        return (ResultCode.OK, '') if problem is None else (ResultCode.INCOMPLETE, problem)
    if not generation.text:
        return ResultCode.UNKNOWN, 'the model had nothing to say'
    return ResultCode.OK, ''


def _frame_key(frame: Frame) -> str:
    """Names the pixels, not the stamp: cameras repeat frames, and clocks jump."""
    digest = hashlib.blake2b(repr(frame.rgb_hwc.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(frame.rgb_hwc).data)
    return digest.hexdigest()
