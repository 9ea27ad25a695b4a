"""Bounds follow from costs and ceilings."""

from __future__ import annotations

from pathlib import Path

import pytest

from mobilevlm_ros.bench.card import Ceilings, CostCard, measure_ceilings
from mobilevlm_ros.bench.language_cost import read_language_cost
from mobilevlm_ros.bench.vision_cost import read_vision_cost


@pytest.fixture
def card(tiny_bundle: Path) -> CostCard:
    ceilings = Ceilings(
        n_threads=2,
        read_bytes=1e6,
        vision_product=(16, 32, 64),
        vision_fp32=1e6,
        vision_int8=4e6,
        prompt_product=(164, 64, 128),
        prompt_fp32=1e7,
        prompt_int8=4e7,
    )
    language = read_language_cost(tiny_bundle / 'language.gguf')
    return CostCard(language, read_vision_cost(tiny_bundle / 'vision.onnx'), ceilings)


def test_decoding_is_bound_by_reading_weights_and_what_is_kept(card: CostCard) -> None:
    language = card.language
    assert card.decode_bound_s(0) == language.weight_bytes / 1e6
    assert card.decode_bound_s(10) == (language.weight_bytes + 10 * language.kv_bytes) / 1e6


def test_a_prompt_is_bound_by_computing_if_long_and_by_reading_if_short(card: CostCard) -> None:
    assert card.prefill_bound_s(500) == card.language.prefill_flops(500) / 1e7
    assert card.prefill_bound_s(1) == card.language.weight_bytes / 1e6


def test_the_vision_engine_is_bound_by_products_of_its_precision(card: CostCard) -> None:
    assert card.vision is not None
    assert card.vision_bound_s == card.vision.flops / 1e6


def test_ceilings_are_measured(card: CostCard) -> None:
    ceilings = measure_ceilings(card.language, card.vision, 1, seconds=0.01, buffer_bytes=1 << 22)
    assert ceilings.prompt_product == (164, 64, 128)
    rates = (ceilings.read_bytes, ceilings.vision_fp32, ceilings.vision_int8, ceilings.prompt_fp32)
    # Any machine of this century does more than this, and none does a million times as much.
    assert all(rate is not None and 1e7 < rate < 1e16 for rate in rates)
