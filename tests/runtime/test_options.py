"""Option probabilities: against brute force, token by token on a fresh sequence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mobilevlm_ros.errors import InterruptedAnswerError
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.language import TokenSegment
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine
from mobilevlm_ros.runtime.options import score_options

PROMPT = (1, 300, 310, 320)


@pytest.fixture
def ready(engine: LlamaCppEngine) -> LlamaCppEngine:
    """An engine that has read a prompt."""
    engine.prefill([TokenSegment(PROMPT)], CancelToken())
    return engine


def next_probabilities(engine: LlamaCppEngine, tokens: tuple[int, ...]) -> NDArray[np.float64]:
    """The model's distribution after the prompt and ``tokens``, computed from nothing."""
    engine.forget()
    engine.prefill([TokenSegment(PROMPT + tokens)], CancelToken())
    logits = engine.logits().astype(np.float64)
    weights = np.exp(logits - logits.max())
    result: NDArray[np.float64] = weights / weights.sum()
    return result


def brute_force(engine: LlamaCppEngine, options: list[str]) -> tuple[list[float], float]:
    """Every spelling's chain of probabilities among what can follow, and the mass of the first step."""
    sequences: dict[tuple[int, ...], int] = {}
    for index, option in enumerate(options):
        for spelling in {option, option.lower(), option[:1].upper() + option[1:]}:
            sequences.setdefault((*engine.tokenize(spelling), engine.end_token), index)

    def followers(prefix: tuple[int, ...]) -> set[int]:
        n = len(prefix)
        return {sequence[n] for sequence in sequences if sequence[:n] == prefix}

    totals = [0.0] * len(options)
    for sequence, index in sequences.items():
        probability = 1.0
        for n, token in enumerate(sequence):
            possible = followers(sequence[:n])
            if len(possible) > 1:
                distribution = next_probabilities(engine, sequence[:n])
                probability *= distribution[token] / sum(distribution[other] for other in possible)
        totals[index] += probability
    start = next_probabilities(engine, ())
    return totals, float(sum(start[token] for token in followers(())))


@pytest.mark.parametrize(
    'options',
    [
        ['yes', 'no'],
        ['red', 'blue', 'green'],
        ['car', 'cart'],
        ['the car', 'the truck', 'the table'],
        ['a', 'a b', 'a b c'],
        ['red car', 'red truck', 'blue'],
        ['x1', 'x2', 'x11', 'y'],
        ['Green', 'GREENER'],
        ['no'],
        ['東京', '京都', 'naïve'],
    ],
    ids=str,
)
def test_probabilities_are_those_of_brute_force(ready: LlamaCppEngine, options: list[str]) -> None:
    scores = score_options(ready, options, CancelToken())

    expected, mass = brute_force(ready, options)
    assert scores.probabilities == pytest.approx(expected, abs=1e-5)
    assert sum(scores.probabilities) == pytest.approx(1.0, abs=1e-9)
    assert scores.mass == pytest.approx(mass, rel=1e-4)
    assert scores.best == int(np.argmax(expected))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.text('abcxyz 1', min_size=1, max_size=4).map(str.strip).filter(bool), min_size=2, max_size=4, unique=True
    )
)
def test_any_options_score_as_brute_force_does(engine: LlamaCppEngine, options: list[str]) -> None:
    engine.prefill([TokenSegment(PROMPT)], CancelToken())

    scores = score_options(engine, options, CancelToken())

    expected, _ = brute_force(engine, options)
    assert scores.probabilities == pytest.approx(expected, abs=1e-5)


def test_options_that_differ_at_once_cost_no_model_run(ready: LlamaCppEngine) -> None:
    assert score_options(ready, ['yes', 'no'], CancelToken()).n_steps == 0


def test_a_shared_prefix_costs_one_run_where_it_branches(ready: LlamaCppEngine) -> None:
    # "the table", "the truck": the small and the capital spelling of "the" each branch once.
    assert score_options(ready, ['the 1', 'the 2'], CancelToken()).n_steps == 2


@pytest.mark.parametrize('options', [['yes', 'no'], ['the car', 'the truck', 'a car', 'a', 'the']], ids=str)
def test_the_sequence_is_left_as_it_was(ready: LlamaCppEngine, options: list[str]) -> None:
    n_before = ready.n_past

    score_options(ready, options, CancelToken())

    assert ready.n_past == n_before
    ready.append([400], CancelToken())
    after = ready.logits().copy()
    ready.forget()
    ready.prefill([TokenSegment(PROMPT)], CancelToken())
    ready.append([400], CancelToken())
    np.testing.assert_array_equal(after, ready.logits())


def test_scoring_twice_gives_the_same(ready: LlamaCppEngine) -> None:
    options = ['the car', 'the truck']
    first = score_options(ready, options, CancelToken())
    ready.prefill([TokenSegment(PROMPT)], CancelToken())

    assert score_options(ready, options, CancelToken()) == first


def test_spellings_in_capitals_count_for_the_same_option(ready: LlamaCppEngine) -> None:
    lower = score_options(ready, ['yes', 'no'], CancelToken())
    upper = score_options(ready, ['Yes', 'No'], CancelToken())

    assert upper.probabilities == pytest.approx(lower.probabilities, abs=1e-9)


def test_the_order_of_options_does_not_matter(ready: LlamaCppEngine) -> None:
    options = ['the car', 'a', 'blue']
    forward = score_options(ready, options, CancelToken())
    ready.prefill([TokenSegment(PROMPT)], CancelToken())
    backward = score_options(ready, options[::-1], CancelToken())

    assert backward.probabilities[::-1] == pytest.approx(forward.probabilities, abs=1e-6)


def test_scoring_can_be_canceled(ready: LlamaCppEngine) -> None:
    cancel = CancelToken()
    cancel.set()

    with pytest.raises(InterruptedAnswerError):
        score_options(ready, ['the car', 'the truck'], cancel)

    ready.prefill([TokenSegment(PROMPT)], CancelToken())
    assert sum(score_options(ready, ['the car', 'the truck'], CancelToken()).probabilities) == pytest.approx(1.0)
