"""Asks questions about a frame: prompt, visual tokens, decoding or scoring, answer.

Owns what is kept of recent frames: their visual tokens here, their keys and values in the language engine. A second
question on a frame computes its own tokens and nothing else; closed questions asked together are computed in one batch.
Used by one thread at a time.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import EngineError, InterruptedAnswerError, MobileVLMError, QuestionTooLongError
from mobilevlm_ros.runtime.asking import (
    MIN_CONFIDENCE,
    Asked,
    AssistantSettings,
    Progress,
    Turn,
    ignore_progress,
    when_all_are_set,
)
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.formats import PreparedQuestion, parse_json_answer, prepare
from mobilevlm_ros.runtime.generate import Generation, generate
from mobilevlm_ros.runtime.language import EmbeddingSegment, LanguageEngine, Segment, TokenSegment
from mobilevlm_ros.runtime.options import OptionScores, OptionTree
from mobilevlm_ros.runtime.preprocess import PreprocessSpec, preprocess
from mobilevlm_ros.runtime.prompt import PromptTemplate, prompt_hash
from mobilevlm_ros.runtime.sampling import Sampler
from mobilevlm_ros.runtime.vision import VisionEngine
from mobilevlm_ros.types import Answer, AnswerFormat, Frame, Question, ResultCode, Timing

__all__ = ['Asked', 'Assistant', 'AssistantSettings', 'Progress']

_MOST_PATHS = 64
"""Continuations whose logits are held at once: 8 MiB with 32,000 tokens."""


class Assistant:
    """See the module.

    :param model_id: names the model in every answer.
    :param min_confidence: of closed formats, for settings that leave it open.
    :param temperature: of closed formats, at which the model's probabilities are believed; 1 unless given.
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
        min_confidence: Mapping[AnswerFormat, float] | None = None,
        temperature: Mapping[AnswerFormat, float] | None = None,
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
        self._min_confidence = dict(min_confidence or {})
        self._temperature = dict(temperature or {})
        self._n_threads = 0
        self._n_frames = n_frames
        self._visual_tokens: OrderedDict[str, NDArray[np.float32]] = OrderedDict()

    def ask(
        self,
        question: Question,
        frame: Frame,
        *,
        cancel: CancelToken | None = None,
        on_progress: Callable[[Progress], None] = ignore_progress,
        timing: Timing | None = None,
        settings: AssistantSettings | None = None,
    ) -> Answer:
        """Answer one question about one frame.

        Whatever goes wrong with this question or frame comes back as a result code; only errors in the program raise.

        :param timing: filled in; may hold the stages that came before.
        :param settings: for this question, instead of those of the assistant.
        """
        asked = Asked(question, cancel or CancelToken(), on_progress, timing or Timing(), settings)
        return self.ask_many([asked], frame)[0]

    def ask_many(
        self,
        questions: Sequence[Question | Asked],
        frame: Frame,
        *,
        cancel: CancelToken | None = None,
        on_progress: Callable[[Progress], None] = ignore_progress,
        settings: AssistantSettings | None = None,
    ) -> list[Answer]:
        """Answer several questions about one frame; the same answers as of ``ask``, in the order of the questions.

        Closed questions are computed together, in one batch if they fit; then the open ones are answered in turn. What
        goes wrong with one question is its own result code. Questions that were computed together report the same
        stages: each took as long as all. Deadlines are the tokens' to keep (``CancelToken.deadline``).

        :param cancel: stops every question that is not ``Asked`` with a token of its own; so for the other two.
        """
        cancel = cancel or CancelToken()
        turns = [
            self._begin(one if isinstance(one, Asked) else Asked(one, cancel, on_progress, Timing(), settings), frame)
            for one in questions
        ]
        closed = [turn for turn in turns if turn.options is not None and turn.is_open]
        if closed:
            self._answer_closed(closed, frame)
        for turn in turns:
            if turn.options is None and turn.is_open:
                self._answer_open(turn, frame)
        for turn in turns:
            timing = turn.timing
            timing.first_text_s = turn.before_s + timing.first_text_s if timing.first_text_s else 0.0
            timing.total_s = timing.total_s or turn.before_s + turn.since_start_s()
        return [turn.answer for turn in turns]

    def encode(self, frame: Frame, cancel: CancelToken) -> tuple[str, bool]:
        """Compute everything about a frame that no question is needed for.

        :return: the frame's key, for ``is_warm`` and ``drop``; and whether there was anything to compute.
        :raise InterruptedAnswerError: if ``cancel`` was set; what is done already is kept.
        :raise MobileVLMError: if the frame is damaged or an engine fails.
        """
        key = _frame_key(frame)
        if self.is_warm(key):
            return key, False
        self.language.prefill(self._frame_segments(key, frame, cancel, Timing()), cancel, want_logits=False)
        return key, True

    def is_warm(self, key: str) -> bool:
        """Whether a question about the frame would compute its own tokens only."""
        return self.language.holds(self._frame_segments(key))

    def drop(self, key: str) -> None:
        """Let go of what is kept of a frame."""
        self._visual_tokens.pop(key, None)
        self.language.drop(self._frame_segments(key))

    # -- the way of a question ----------------------------------------------------------------------------------------

    def _begin(self, asked: Asked, frame: Frame) -> Turn:
        """Check a question and put it into tokens."""
        question, timing = asked.question, asked.timing
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
        settings = asked.settings or self._settings
        turn = Turn(asked, settings, answer, time.monotonic(), timing.queue_s + timing.image_s)
        if settings.n_threads != self._n_threads:
            self.language.set_threads(settings.n_threads, settings.n_threads)
            self._n_threads = settings.n_threads
        try:
            prepared = turn.prepared = prepare(question)
            turn.answer = replace(answer, prompt_hash=self._hash(prepared, settings))
            before, after = self._template.chunks(prepared.text, self.language)
            turn.tokens = tuple(after)
            timing.prompt_tokens = len(before) + self._vision.n_tokens + len(after)
            # Some room for an answer is part of fitting; an open answer that needs more is cut, and says so.
            room = min(question.max_tokens or settings.max_tokens, 16)
            if prepared.options:
                turn.options = OptionTree(prepared.options, self.language)
                room = max(room, *(len(path) for path in turn.options.branchings), 0)
            if timing.prompt_tokens + room > self.language.n_ctx:
                raise QuestionTooLongError(
                    f'the question makes a prompt of {timing.prompt_tokens} tokens; with {room} for the answer that '
                    f"does not fit the model's context of {self.language.n_ctx}: ask a shorter question"
                )
        except MobileVLMError as error:
            turn.fail(error)
        return turn

    def _frame_segments(
        self, key: str, frame: Frame | None = None, cancel: CancelToken | None = None, timing: Timing | None = None
    ) -> list[Segment]:
        """The prompt up to the image; without a frame only to be asked about, not to be computed."""

        def rows() -> NDArray[np.float32]:
            assert frame is not None and cancel is not None and timing is not None
            return self._encode(key, frame, cancel, timing)

        before = self._template.tokens_before(self.language)
        image = EmbeddingSegment(key, self._vision.n_tokens, rows)
        return [TokenSegment(tuple(before)), image] if before else [image]

    def _prefill(
        self, segments: Sequence[Segment], key: str, turns: Sequence[Turn], cancel: CancelToken, *, want_logits: bool
    ) -> None:
        """Compute a prompt that begins with a frame; the first turn's timing gets the parts."""
        timing = turns[0].timing
        known = self.is_warm(key) or key in self._visual_tokens
        for turn in turns:
            turn.timing.vision_reused = known
            turn.asked.on_progress(Progress('prefill' if known else 'vision'))
        started_s = time.monotonic()
        try:
            timing.reused_tokens = self.language.prefill(segments, cancel, want_logits=want_logits).n_reused
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

    def _answer_closed(self, turns: Sequence[Turn], frame: Frame) -> None:
        """Answer closed questions from one look at the frame; a question that is stopped leaves the others be."""
        first = turns[0].timing
        try:
            key = _frame_key(frame)
            with when_all_are_set([turn.cancel for turn in turns]) as cancel:
                segments = self._frame_segments(key, frame, cancel, first)
                self._prefill(segments, key, turns, cancel, want_logits=False)
                for turn in turns:
                    turn.asked.on_progress(Progress('decode'))
                self._score(turns, cancel)
        except MobileVLMError as error:
            for turn in turns:
                if turn.is_open:
                    turn.fail(error)
        for turn in turns:
            timing = turn.timing
            timing.preprocess_s, timing.vision_s, timing.prefill_s = (
                first.preprocess_s, first.vision_s, first.prefill_s
            )  # fmt: skip
            timing.decode_s, timing.reused_tokens = first.decode_s, first.reused_tokens
            timing.total_s = turn.before_s + turn.since_start_s()

    def _score(self, turns: Sequence[Turn], cancel: CancelToken) -> None:
        """Compute the questions and every branching of their options, then read the probabilities."""
        timing = turns[0].timing
        for group in _groups(turns):
            paths: list[tuple[int, ...]] = []
            for turn in group:
                assert turn.options is not None
                paths += [turn.tokens, *(turn.tokens + path for path in turn.options.branchings)]
            started_s = time.monotonic()
            try:
                logits = self.language.branch(paths, cancel)
            finally:
                timing.prefill_s += time.monotonic() - started_s
            started_s = time.monotonic()
            row = 0
            for turn in group:
                assert turn.options is not None
                after = row + 1 + len(turn.options.branchings)
                self._conclude(turn, turn.options.score(logits[row], logits[row + 1 : after]))
                turn.timing.first_text_s = turn.since_start_s()
                row = after
            timing.decode_s += time.monotonic() - started_s

    def _conclude(self, turn: Turn, scores: OptionScores) -> None:
        """The answer that follows from the probabilities, unless nobody waits for it any more."""
        try:
            turn.cancel.raise_if_set()
        except InterruptedAnswerError as error:
            turn.fail(error)
            return
        options = turn.prepared.options
        scores = scores.at(self._temperature.get(turn.asked.question.format, 1.0))
        turn.timing.generated_tokens = scores.n_steps
        confidence = scores.probabilities[scores.best]
        turn.answer = replace(
            turn.answer,
            confidence=confidence,
            options=options,
            probabilities=scores.probabilities,
            option_mass=scores.mass,
        )
        limit = turn.settings.min_confidence
        if limit is None:
            limit = self._min_confidence.get(turn.asked.question.format, MIN_CONFIDENCE)
        if confidence < limit:
            turn.answer = replace(
                turn.answer,
                result_code=ResultCode.UNKNOWN,
                message=f'best option {options[scores.best]!r} has probability {confidence:.2f}, '
                f'below the limit of {limit:.2f}',
            )
        else:
            turn.answer = replace(turn.answer, text=options[scores.best])

    def _answer_open(self, turn: Turn, frame: Frame) -> None:
        """Answer by decoding."""
        timing, on_progress = turn.timing, turn.asked.on_progress
        try:
            key = _frame_key(frame)
            segments = [*self._frame_segments(key, frame, turn.cancel, timing), TokenSegment(turn.tokens)]
            self._prefill(segments, key, [turn], turn.cancel, want_logits=True)
            on_progress(Progress('decode'))
            started_s = time.monotonic()

            def on_text(text: str) -> None:
                timing.first_text_s = timing.first_text_s or turn.since_start_s()
                on_progress(Progress('decode', text))

            try:
                self._generate(turn, on_text)
            finally:
                timing.decode_s = time.monotonic() - started_s
                timing.first_text_s = timing.first_text_s or turn.since_start_s()
        except MobileVLMError as error:
            turn.fail(error)
        timing.total_s = turn.before_s + turn.since_start_s()

    def _generate(self, turn: Turn, on_text: Callable[[str], None]) -> None:
        schema, settings = turn.prepared.schema, turn.settings
        with ExitStack() as stack:
            grammar = self.language.json_grammar(schema) if schema else None
            if grammar is not None:
                stack.callback(grammar.close)
            generation = generate(
                self.language,
                Sampler(settings.sampling),
                turn.cancel,
                max_tokens=turn.asked.question.max_tokens or settings.max_tokens,
                stop_texts=() if grammar else self._template.stop_texts,
                grammar=grammar,
                on_text=on_text,
            )
        turn.timing.generated_tokens = generation.n_tokens
        code, message = _judge(generation, schema)
        turn.answer = replace(
            turn.answer,
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


def _groups(turns: Sequence[Turn]) -> Iterator[list[Turn]]:
    """Closed questions in groups of not too many paths."""
    group: list[Turn] = []
    n_paths = 0
    for turn in turns:
        assert turn.options is not None
        n_more = 1 + len(turn.options.branchings)
        if group and n_paths + n_more > _MOST_PATHS:
            yield group
            group, n_paths = [], 0
        group.append(turn)
        n_paths += n_more
    yield group


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
