"""From a bundle to an assistant that answers: opens both engines, or neither."""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil

from mobilevlm_ros.errors import EngineError
from mobilevlm_ros.runtime.assistant import Assistant, AssistantSettings
from mobilevlm_ros.runtime.bundle import Bundle, open_bundle
from mobilevlm_ros.runtime.language.fake import FakeLanguageEngine
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine
from mobilevlm_ros.runtime.preprocess import PreprocessSpec
from mobilevlm_ros.runtime.prompt import plain
from mobilevlm_ros.runtime.vision.fake import FakeVision
from mobilevlm_ros.runtime.vision.opening import open_engine
from mobilevlm_ros.types import Frame, Question

__all__ = [
    'check_memory',
    'fake_assistant',
    'load_assistant',
    'load_assistant_from',
    'return_freed_memory',
    'warm_up',
]

_WORKING_MEMORY_BYTES = 256 << 20


def load_assistant_from(path: Path, settings: AssistantSettings | None = None) -> Assistant:
    """Open the bundle in ``path`` and load it; see ``open_bundle`` and ``load_assistant`` for the errors."""
    return load_assistant(open_bundle(path), settings)


def load_assistant(
    bundle: Bundle, settings: AssistantSettings | None = None, *, n_threads: int = 0, frame_cache: int | None = None
) -> Assistant:
    """Load both engines of a bundle.

    :param n_threads: threads of every engine; 0: as the bundle says.
    :param frame_cache: recent frames to keep; None: as the bundle says.
    :raise EngineError: if the memory does not suffice, a file does not load, or the two do not fit each other.
    :raise DependencyError: if a library is missing.
    """
    check_memory(bundle)
    options = bundle.language_options()
    if frame_cache is not None:
        options = replace(options, frame_cache=frame_cache)
    if n_threads:
        options = replace(options, n_threads=n_threads, n_threads_batch=n_threads)
    with ExitStack() as stack:
        vision = open_engine(
            bundle.vision['backend'],
            bundle.vision_path,
            bundle.vision['precision'],
            n_threads=n_threads or bundle.vision.get('n_threads', 0),
            plan_key=bundle.vision.get('plan_key'),
            onnx_sha256=bundle.graph_sha256,
        )
        stack.callback(vision.close)
        expected = (bundle.vision['image_size'], bundle.vision['n_tokens'])
        if (vision.image_size, vision.n_tokens) != expected:
            raise EngineError(
                f'{bundle.vision_path} takes {vision.image_size} pixels and gives {vision.n_tokens} tokens, but '
                f'{bundle.path}/bundle.json says {expected[0]} and {expected[1]}. Rebuild the bundle.'
            )
        language = LlamaCppEngine(bundle.language_path, options, bundle.adapter_path)
        stack.callback(language.close)
        assistant = Assistant(
            vision,
            language,
            bundle.template(),
            bundle.preprocess_spec(),
            model_id=bundle.model_id,
            settings=settings,
            min_confidence=bundle.min_confidence(),
            temperature=bundle.temperature(),
            n_frames=options.frame_cache + 1,
        )
        stack.pop_all()
        return assistant


def check_memory(bundle: Bundle) -> None:
    """Refuse before loading rather than make the robot swap.

    :raise EngineError: if the free memory is smaller than the files that are loaded and some working memory.
    """
    needed = bundle.loaded_bytes + _WORKING_MEMORY_BYTES
    available = psutil.virtual_memory().available
    if needed > available:
        raise EngineError(
            f'bundle {bundle.model_id} needs about {needed >> 20} MiB of memory, {available >> 20} MiB are free: '
            'stop other programs, or build with a smaller quantisation'
        )


def fake_assistant(settings: AssistantSettings | None = None, *, token_s: float = 0.02) -> Assistant:
    """An assistant without a model, to try out everything around it; its answers say that they are fake."""
    vision, language = FakeVision(), FakeLanguageEngine(token_s=token_s)
    spec = PreprocessSpec(vision.image_size)
    return Assistant(vision, language, plain(), spec, model_id='fake', settings=settings)


def warm_up(assistant: Assistant) -> None:
    """Run once on a synthetic frame, so that the first question does not pay for lazy set-up.

    :raise EngineError: if the engines do not work.
    """
    answer = assistant.ask(Question('ok?', max_tokens=1), Frame(np.full((8, 8, 3), 128, np.uint8)))
    assistant.forget()
    if answer.message and answer.result_code >= 100:
        raise EngineError(f'the model failed its warm-up: {answer.message}')


def return_freed_memory() -> None:
    """Give memory that engines have freed back to the system.

    glibc keeps it for itself otherwise: after closing nano, 450 MiB that another node on the robot could use.
    """
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
        trim(0)
