"""This project's runtime: a bundle's assistant, or its language engine alone on a GGUF file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.bench.contestants.endless import decode, prefill_s
from mobilevlm_ros.bench.contestants.products import q4_products
from mobilevlm_ros.bench.process import memory_of
from mobilevlm_ros.bench.scenes import scene
from mobilevlm_ros.errors import EngineError
from mobilevlm_ros.runtime.assistant import AssistantSettings
from mobilevlm_ros.runtime.bundle import open_bundle
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.language import EmbeddingSegment, LanguageEngine, LanguageOptions, Segment, TokenSegment
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine
from mobilevlm_ros.runtime.loading import load_assistant
from mobilevlm_ros.types import Answer, AnswerFormat, Frame, Question

__all__ = ['OurEngine', 'OurLanguageEngine']

_FIRST_ERROR_CODE = 100


class _Language:
    """What both do with a language engine."""

    language: LanguageEngine

    def tokens(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of a text, so that every contestant computes the same."""
        return self.language.tokenize(text, bos=bos)

    def prefill(self, tokens: Sequence[int]) -> float:
        """See the package."""
        return prefill_s(self.language, tokens)

    def decode(self, tokens: Sequence[int], n_tokens: int) -> float:
        """See the package."""
        prefill_s(self.language, tokens)
        return decode(self.language, n_tokens + 1).total_s

    def complete(self, prompt: str, n_tokens: int) -> dict[str, float]:
        """The paper's Table 5: a text is continued by ``n_tokens``."""
        started_s = time.perf_counter()
        tokens = self.tokens(prompt)
        prompt_s = prefill_s(self.language, tokens)
        return self._continued(started_s, len(tokens), prompt_s, n_tokens)

    def _continued(self, started_s: float, n_prompt: int, prompt_s: float, n_tokens: int) -> dict[str, float]:
        times = decode(self.language, n_tokens)
        return {
            'prompt_tokens': n_prompt,
            'prompt_s': prompt_s,
            'sampled': times.n_sampled,
            'sample_s': times.total_s - times.eval_s,
            'evaluated': times.n_evaluated,
            'eval_s': times.eval_s,
            'total_s': time.perf_counter() - started_s,
        }


class OurEngine(_Language):
    """A bundle, loaded as a robot loads it.

    :param height: rows of the frames that are asked about; ``width`` their columns.
    :raise MobileVLMError: if the bundle cannot be opened or loaded.
    """

    def __init__(self, bundle: str, n_threads: int, height: int, width: int) -> None:
        started_s = time.perf_counter()
        self._bundle = open_bundle(Path(bundle))
        opened_s = time.perf_counter()
        settings = AssistantSettings(min_confidence=0.0)
        self._assistant = load_assistant(self._bundle, settings, n_threads=n_threads)
        self._load_s = time.perf_counter() - opened_s
        self._check_s = opened_s - started_s
        self._memory_loaded = memory_of()
        self.language = self._assistant.language
        self._size = height, width

    def describe(self) -> dict[str, Any]:
        """What it is, and how long it took to get it."""
        vision = self._bundle.vision
        return {
            'model_id': self._bundle.model_id,
            'name': self._bundle.name,
            'profile': self._bundle.profile,
            'vision': f'{vision["backend"]} {vision["precision"]}',
            'quantization': self._bundle.language['quantization'],
            'language': self.language.description,
            'kernel': q4_products(),
            'image_size': vision['image_size'],
            'n_visual_tokens': vision['n_tokens'],
            'files_bytes': self._bundle.size_bytes,
            'load_s': self._load_s,
            'check_s': self._check_s,
            'memory_loaded': self._memory_loaded,
        }

    def prompt_parts(self, question: str) -> tuple[list[int], list[int], str]:
        """Token ids before and after the image, and the whole prompt as text, for those who compute the same."""
        template = self._bundle.template()
        before, after = template.chunks(question, self.language)
        return before, after, template.render(question)

    def first_token(self, index: int, question: str) -> dict[str, float]:
        """See the package; a frame asked about before is known, any other is cold."""
        return self.ask(index, question)

    def first_question(self, index: int, question: str) -> dict[str, float]:
        """As ``first_token``, with nothing kept from earlier questions: the first one after the start."""
        self._assistant.forget()
        return self.ask(index, question)

    def hold_prompt(self) -> int:
        """Hold the prompt up to the image, as after any earlier question; returns its positions."""
        before = self._bundle.template().tokens_before(self.language)
        if before:
            self.language.prefill([TokenSegment(tuple(before))], CancelToken(), want_logits=False)
        return len(before)

    def ask(
        self, index: int, question: str, format_name: str = 'TEXT', choices: Sequence[str] = ()
    ) -> dict[str, float]:
        """One question about frame ``index``; an open one ends with its first token."""
        asked = Question(question, AnswerFormat[format_name], tuple(choices), max_tokens=1)
        return self._first_token(self._frame(index), asked)

    def _first_token(self, frame: Frame, question: Question) -> dict[str, float]:
        started_s = time.perf_counter()
        answer = self._assistant.ask(question, frame)
        total_s = time.perf_counter() - started_s
        return self._measured(answer) | {'total_s': total_s}

    def ask_several(self, index: int, questions: Sequence[str], together: bool) -> dict[str, Any]:
        """Yes/no questions about one known frame, one after the other or as one batch."""
        frame = self._frame(index)
        asked = [Question(text, AnswerFormat.YES_NO) for text in questions]
        assistant = self._assistant
        started_s = time.perf_counter()
        answers = assistant.ask_many(asked, frame) if together else [assistant.ask(one, frame) for one in asked]
        total_s = time.perf_counter() - started_s
        timings = [self._measured(answer) for answer in answers]
        positions = {name: timings[0][name] for name in ('prompt_tokens', 'reused_tokens')}
        return {'total_s': total_s, 'texts': [answer.text for answer in answers], **positions}

    def answer(self, index: int, side: int, question: str, n_tokens: int) -> dict[str, float]:
        """The paper's Table 6: a new frame of ``side`` pixels a side, a question, and ``n_tokens`` of answer."""
        started_s = time.perf_counter()
        first = self._first_token(Frame(scene(index, side, side)), Question(question, max_tokens=1))
        computed = round(first['prompt_tokens'] - first['reused_tokens'])
        # The first token is chosen again by the loop that goes on from here: once in 256.
        return first | self._continued(started_s, computed, first['prefill_s'], n_tokens)

    def _frame(self, index: int) -> Frame:
        return Frame(scene(index, *self._size))

    def _measured(self, answer: Answer) -> dict[str, float]:
        if answer.result_code >= _FIRST_ERROR_CODE:
            raise EngineError(f'the benchmark question was not answered: {answer.result_code.name}: {answer.message}')
        return {name: float(value) for name, value in asdict(answer.timing).items()}


class OurLanguageEngine(_Language):
    """A GGUF file without a vision engine, for models of which only the language part is compared."""

    def __init__(self, gguf: str, n_threads: int) -> None:
        started_s = time.perf_counter()
        options = replace(LanguageOptions(), n_threads=n_threads, n_threads_batch=n_threads)
        self.language = LlamaCppEngine(Path(gguf), options)
        self._load_s = time.perf_counter() - started_s

    def describe(self) -> dict[str, Any]:
        """What it is, and how long it took to get it."""
        return {'language': self.language.description, 'kernel': q4_products(), 'load_s': self._load_s}

    def answer(self, index: int, before: str, after: str, n_visual_tokens: int, n_tokens: int) -> dict[str, float]:
        """The paper's Table 6 less its vision engine: random rows stand for the visual tokens."""

        def rows() -> NDArray[np.float32]:
            random = np.random.default_rng(index)
            return random.normal(0.0, 0.02, (n_visual_tokens, self.language.n_embd)).astype(np.float32)

        started_s = time.perf_counter()
        segments: list[Segment] = [
            TokenSegment(tuple(self.tokens(before))),
            EmbeddingSegment(f'benchmark {index}', n_visual_tokens, rows),
            TokenSegment(tuple(self.tokens(after, bos=False))),
        ]
        self.language.forget()
        n_positions = self.language.prefill(segments, CancelToken()).n_positions
        self.language.logits()
        return self._continued(started_s, n_positions, time.perf_counter() - started_s, n_tokens)
