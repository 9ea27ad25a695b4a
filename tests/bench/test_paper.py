"""The paper's tables are copied right: they agree with themselves where the paper's do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from mobilevlm_ros.bench.paper import TABLE5, TABLE5_TOKENS, TABLE6, Table5Row, model_of


@pytest.mark.parametrize('row', TABLE5, ids=lambda row: f'{row.model} {row.bits} {row.device}')
def test_totals_of_table_5_are_the_sum_of_their_parts(row: Table5Row) -> None:
    n_prompt = 19  # of the paper's text in LLaMA's vocabulary
    parts = TABLE5_TOKENS / row.eval + TABLE5_TOKENS / row.sample + n_prompt / row.prompt
    assert row.total_s == pytest.approx(parts, abs=0.25)


def test_the_headline_figures_are_there() -> None:
    assert {(row.device, row.eval) for row in TABLE6 if row.model == 'MobileVLM 1.4B'} == {
        ('Snapdragon 888', 21.54),
        ('Jetson AGX Orin', 65.27),
    }
    assert len(TABLE5) == 16
    assert len(TABLE6) == 10


@dataclass
class Sizes:
    n_layers: int
    n_embd: int
    n_ff: int


@pytest.mark.parametrize(
    ('sizes', 'name'),
    [
        (Sizes(24, 2048, 5632), 'MobileLLaMA 1.4B'),
        (Sizes(22, 2048, 5632), 'TinyLLaMA 1.1B'),
        (Sizes(26, 3200, 8640), 'OpenLLaMA 3B'),
        (Sizes(2, 64, 128), ''),
    ],
)
def test_a_model_is_known_by_its_sizes(sizes: Any, name: str) -> None:
    assert model_of(sizes) == name
    assert not name or name in {row.model for row in TABLE5}
