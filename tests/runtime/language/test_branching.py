"""Many continuations at once on a real engine: the numbers of one after the other, and no trace afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from mobilevlm_ros.errors import EngineError, InterruptedAnswerError, QuestionTooLongError
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.language import EmbeddingSegment, TokenSegment
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine

EngineMaker = Callable[..., LlamaCppEngine]
ImageMaker = Callable[..., EmbeddingSegment]

BEFORE = TokenSegment((1, 300, 301))
PATHS = [(310, 311), (310, 312, 313), (310,), (320, 321, 322, 323), (310, 311), (310, 312, 314), (330,)]
BOUND = 1e-4
"""How far float32 logits of a batch are from those of a path alone; their standard deviation is 3."""


def alone(engine: LlamaCppEngine, prompt: Sequence[Any], path: Sequence[int]) -> NDArray[np.float32]:
    """Logits after a path, computed from nothing."""
    engine.forget()
    engine.prefill([*prompt, TokenSegment(tuple(path))], CancelToken())
    return engine.logits().copy()


class Counted:
    """Counts what an engine computes."""

    def __init__(self, engine: LlamaCppEngine) -> None:
        self.sizes: list[int] = []
        compute = engine._compute

        def counted(batch: Any, cancel: CancelToken) -> None:
            self.sizes.append(int(batch.n_tokens))
            compute(batch, cancel)

        engine._compute = counted  # type: ignore[method-assign]


@pytest.fixture
def ready(engine: LlamaCppEngine, image_segment: ImageMaker) -> LlamaCppEngine:
    engine.prefill([BEFORE, image_segment(1)], CancelToken(), want_logits=False)
    return engine


def test_logits_are_those_of_each_path_alone(
    ready: LlamaCppEngine, make_engine: EngineMaker, image_segment: ImageMaker
) -> None:
    logits = ready.branch(PATHS, CancelToken())

    reference = make_engine()
    expected = [alone(reference, [BEFORE, image_segment(1)], path) for path in PATHS]
    np.testing.assert_allclose(logits, expected, atol=BOUND)


@pytest.mark.parametrize('options', [{'n_branches': 2}, {'n_branches': 1}, {'n_batch': 3}, {'n_batch': 2}], ids=str)
def test_what_does_not_fit_one_batch_is_computed_in_several(make_engine: EngineMaker, options: dict[str, Any]) -> None:
    engine, reference = make_engine(**options), make_engine()
    engine.prefill([BEFORE], CancelToken(), want_logits=False)

    logits = engine.branch(PATHS, CancelToken())

    np.testing.assert_allclose(logits, [alone(reference, [BEFORE], path) for path in PATHS], atol=BOUND)


def test_paths_that_together_exceed_the_context_are_computed_in_turns(make_engine: EngineMaker) -> None:
    engine, reference = make_engine(n_ctx=256), make_engine(n_ctx=256)
    random = np.random.default_rng(0)
    paths = [tuple(int(token) for token in random.integers(300, 400, 100)) for _ in range(5)]
    engine.prefill([BEFORE], CancelToken(), want_logits=False)
    counted = Counted(engine)

    logits = engine.branch(paths, CancelToken())

    assert counted.sizes == [200, 200, 100]
    np.testing.assert_allclose(logits, [alone(reference, [BEFORE], path) for path in paths], atol=BOUND)


def test_one_call_computes_what_is_shared_once(ready: LlamaCppEngine) -> None:
    counted = Counted(ready)

    ready.branch(PATHS, CancelToken())

    assert counted.sizes == [10]


def test_no_paths_are_no_work(ready: LlamaCppEngine) -> None:
    counted = Counted(ready)

    assert len(ready.branch([], CancelToken())) == 0
    assert counted.sizes == []


def test_the_sequence_goes_on_to_the_bit_as_if_nothing_had_been(
    ready: LlamaCppEngine, make_engine: EngineMaker, image_segment: ImageMaker
) -> None:
    n_past = ready.n_past
    ready.branch(PATHS, CancelToken())
    assert ready.n_past == n_past

    after = []
    for token in range(300, 320):
        ready.append([token], CancelToken())
        after.append(ready.logits().copy())

    fresh = make_engine()
    fresh.prefill([BEFORE, image_segment(1)], CancelToken(), want_logits=False)
    for token, logits in zip(range(300, 320), after, strict=True):
        fresh.append([token], CancelToken())
        np.testing.assert_array_equal(logits, fresh.logits())


def test_branching_again_gives_the_same_bits(ready: LlamaCppEngine) -> None:
    first = ready.branch(PATHS, CancelToken())
    ready.append([300, 301], CancelToken())
    ready.rewind(ready.n_past - 2)

    np.testing.assert_array_equal(ready.branch(PATHS, CancelToken()), first)


def test_a_canceled_branch_leaves_the_sequence_and_the_next_works(make_engine: EngineMaker, big_gguf: Path) -> None:
    engine = make_engine(big_gguf, n_ctx=2048, n_batch=64)
    engine.prefill([BEFORE], CancelToken(), want_logits=False)
    expected = engine.branch(PATHS, CancelToken())

    class SetAtTheThirdBatch(CancelToken):
        n_calls = 0

        def raise_if_set(self) -> None:
            self.n_calls += 1
            if self.n_calls == 3:
                self.set()
            super().raise_if_set()

    with pytest.raises(InterruptedAnswerError):
        engine.branch([tuple(range(300, 380)), tuple(range(301, 380)), tuple(range(302, 380))], SetAtTheThirdBatch())

    assert engine.n_past == 3
    np.testing.assert_array_equal(engine.branch(PATHS, CancelToken()), expected)


def test_a_path_too_long_for_the_context_is_refused_and_the_next_works(make_engine: EngineMaker) -> None:
    engine = make_engine(n_ctx=256)
    engine.prefill([BEFORE], CancelToken(), want_logits=False)

    with pytest.raises(QuestionTooLongError, match='room for 253'):
        engine.branch([(300,) * 254], CancelToken())

    assert engine.branch([(300,) * 253], CancelToken()).shape[0] == 1


def test_a_closed_engine_says_so(make_engine: EngineMaker) -> None:
    engine = make_engine()
    engine.close()

    with pytest.raises(EngineError, match='closed'):
        engine.branch([(300,)], CancelToken())


def test_branches_leave_nothing_behind(ready: LlamaCppEngine) -> None:
    paths = [tuple(range(300 + number, 330 + number)) for number in range(16)]
    for _ in range(5):
        ready.branch(paths, CancelToken())
    before = psutil.Process().memory_info().rss
    for _ in range(100):
        ready.branch(paths, CancelToken())

    assert psutil.Process().memory_info().rss - before < 8 << 20


# -- a prompt without logits --------------------------------------------------------------------------------------


def test_without_logits_a_prompt_that_is_held_costs_nothing(ready: LlamaCppEngine, image_segment: ImageMaker) -> None:
    counted = Counted(ready)

    stats = ready.prefill([BEFORE, image_segment(1)], CancelToken(), want_logits=False)

    assert (stats.n_positions, stats.n_reused) == (7, 7)
    assert counted.sizes == []


def test_a_frame_without_a_question_is_kept_like_one_with(ready: LlamaCppEngine, image_segment: ImageMaker) -> None:
    ready.prefill([BEFORE, image_segment(2)], CancelToken(), want_logits=False)

    assert ready.prefill([BEFORE, image_segment(1), TokenSegment((310,))], CancelToken()).n_reused == 7


def test_a_question_on_a_frame_computed_without_one_has_the_same_bits(
    ready: LlamaCppEngine, make_engine: EngineMaker, image_segment: ImageMaker
) -> None:
    prompt = [BEFORE, image_segment(1), TokenSegment((310, 311))]
    ready.prefill(prompt, CancelToken())

    fresh = make_engine()
    fresh.prefill(prompt, CancelToken())
    np.testing.assert_array_equal(ready.logits(), fresh.logits())


def test_a_dropped_state_is_gone_and_the_working_sequence_stays(
    ready: LlamaCppEngine, image_segment: ImageMaker
) -> None:
    ready.prefill([BEFORE, image_segment(2)], CancelToken(), want_logits=False)

    ready.drop([BEFORE, image_segment(1)])
    ready.drop([BEFORE, image_segment(2)])
    ready.drop([BEFORE, image_segment(3)])

    assert not ready.holds([BEFORE, image_segment(1)])
    assert ready.holds([BEFORE, image_segment(2)])
