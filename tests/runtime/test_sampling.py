"""Choosing tokens: against a naive reference that loops where the sampler has arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.runtime.sampling import Sampler, SamplingSettings, log_softmax

# Apart from each other, so that rounding cannot change their order or a cut.
LOGITS = st.lists(st.integers(-60, 60), min_size=2, max_size=12, unique=True).map(
    lambda numbers: np.array(numbers, dtype=np.float32) / 7
)


def naive_distribution(logits: NDArray[np.float32], sampling: SamplingSettings) -> dict[int, float]:
    """Token -> probability: top-k, then top-p and min-p on what is left, then temperature."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    if sampling.top_k:
        order = order[: sampling.top_k]
    total = sum(math.exp(logits[token]) for token in order)
    probability = {token: math.exp(logits[token]) / total for token in order}
    kept, so_far = [], 0.0
    for token in order:
        if so_far < sampling.top_p:
            kept.append(token)
        so_far += probability[token]
    kept = [token for token in kept if probability[token] >= sampling.min_p * probability[order[0]]]
    weights = {token: math.exp((logits[token] - logits[order[0]]) / sampling.temperature) for token in kept}
    return {token: weight / sum(weights.values()) for token, weight in weights.items()}


def draw(logits: NDArray[np.float32], sampling: SamplingSettings, n: int) -> list[int]:
    sampler = Sampler(sampling)
    return [sampler.choose(logits) for _ in range(n)]


@given(LOGITS)
def test_greedy_takes_the_best(logits: NDArray[np.float32]) -> None:
    assert Sampler(SamplingSettings()).choose(logits) == int(np.argmax(logits))


def test_greedy_takes_the_first_of_equals() -> None:
    assert Sampler(SamplingSettings()).choose(np.array([0.0, 2.0, 2.0], dtype=np.float32)) == 1


@settings(max_examples=60, deadline=None)
@given(
    LOGITS,
    st.floats(0.3, 3.0),
    st.integers(0, 6),
    st.sampled_from([0.31, 0.557, 0.9017, 1.0]),
    st.sampled_from([0.0, 0.0503, 0.3001]),
)
def test_only_tokens_that_the_reference_keeps_are_drawn(
    logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    sampling = SamplingSettings(temperature, top_k, top_p, min_p, seed=1)

    drawn = set(draw(logits, sampling, 30))

    assert drawn <= set(naive_distribution(logits, sampling))


@pytest.mark.parametrize(
    'sampling',
    [
        SamplingSettings(temperature=1.0),
        SamplingSettings(temperature=0.5),
        SamplingSettings(temperature=2.0, top_k=3),
        SamplingSettings(temperature=1.0, top_p=0.8),
        SamplingSettings(temperature=1.5, min_p=0.2),
        SamplingSettings(temperature=1.2, top_k=4, top_p=0.95, min_p=0.05),
    ],
    ids=str,
)
def test_frequencies_are_those_of_the_reference(sampling: SamplingSettings) -> None:
    logits = np.array([0.1, 1.7, -0.6, 0.9, 1.2], dtype=np.float32)
    n = 4000

    drawn = draw(logits, sampling, n)

    expected = naive_distribution(logits, sampling)
    for token in range(len(logits)):
        p = expected.get(token, 0.0)
        assert drawn.count(token) / n == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n) + 1e-9)


def test_the_seed_decides_everything() -> None:
    logits = np.zeros(50, dtype=np.float32)

    assert draw(logits, SamplingSettings(1.0, seed=3), 20) == draw(logits, SamplingSettings(1.0, seed=3), 20)
    assert draw(logits, SamplingSettings(1.0, seed=3), 20) != draw(logits, SamplingSettings(1.0, seed=4), 20)


def test_a_forbidden_token_is_never_drawn() -> None:
    logits = np.array([5.0, -np.inf, 5.0, -np.inf], dtype=np.float32)

    assert set(draw(logits, SamplingSettings(temperature=5.0), 100)) == {0, 2}


def test_top_p_keeps_at_least_the_best() -> None:
    logits = np.array([0.0, 1.0], dtype=np.float32)

    assert set(draw(logits, SamplingSettings(temperature=10.0, top_p=1e-9), 30)) == {1}


def test_the_logits_are_not_changed() -> None:
    logits = np.array([0.0, 1.0, 2.0], dtype=np.float32)

    draw(logits, SamplingSettings(temperature=1.0, top_k=2), 3)

    np.testing.assert_array_equal(logits, [0.0, 1.0, 2.0])


@given(LOGITS)
def test_log_softmax_sums_to_one_and_keeps_differences(logits: NDArray[np.float32]) -> None:
    result = log_softmax(logits)

    assert np.exp(result.astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(result - result[0], logits - logits[0], atol=1e-4)


def test_log_softmax_of_huge_logits_is_finite() -> None:
    assert log_softmax(np.array([1e30, 1e30], dtype=np.float32)) == pytest.approx(math.log(0.5))


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('temperature', -0.1),
        ('temperature', 10.1),
        ('temperature', math.nan),
        ('temperature', math.inf),
        ('top_k', -1),
        ('top_p', 0.0),
        ('top_p', 1.1),
        ('top_p', math.nan),
        ('min_p', -0.1),
        ('min_p', 1.0),
        ('min_p', math.nan),
        ('seed', -1),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: float) -> None:
    wrong: dict[str, Any] = {name: value}

    with pytest.raises(SettingsError, match=name):
        SamplingSettings(**wrong)


@pytest.mark.parametrize(
    'edges', [{'temperature': 10.0}, {'top_p': 1.0}, {'min_p': 0.999}, {'top_k': 10**9}, {'seed': 2**63}], ids=str
)
def test_the_edges_of_the_ranges_work(edges: dict[str, Any]) -> None:
    sampling = SamplingSettings(**{'temperature': 1.0, **edges})

    assert Sampler(sampling).choose(np.array([0.0, 3.0], dtype=np.float32)) in (0, 1)
