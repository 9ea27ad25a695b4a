"""What is said beside the tables of a comparison."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from mobilevlm_ros.bench.report import Report
from mobilevlm_ros.bench.series import Series, ratio_of_medians
from mobilevlm_ros.bench.versus import NEW, Comparison

KERNELS: dict[str, dict[str, Any] | None] = {
    'ours': {'kernel': 'mobilevlm_ros', 'reason': 'faster here'},
    'mtmd': {'kernel': 'llama.cpp', 'reason': 'it was asked for'},
    'pytorch': None,
}


def printed(quantization: str) -> str:
    ours, theirs = (Series(NEW, seconds, n_prompt=192, n_reused=35) for seconds in ((4.0, 4.5), (8.0, 9.0)))
    out = io.StringIO()
    comparison = Comparison('mtmd', NEW, ours, theirs, ratio_of_medians(theirs.seconds, ours.seconds))
    Report(Console(file=out, width=150)).comparisons([comparison], KERNELS, quantization)
    return ' '.join(out.getvalue().split())


def test_whose_products_were_used_is_said_where_it_matters() -> None:
    said = "Products with Q4_0 weights: ours: mobilevlm_ros's (faster here); mtmd: llama.cpp's (it was asked for)."
    assert said in printed('Q4_0')
    assert 'Products' not in printed('Q4_K_S')


@pytest.mark.parametrize('expected', ['2.00x', '4.25 s', f'{NEW} 35 of 192'])
def test_the_ratio_and_what_was_kept_are_said(expected: str) -> None:
    assert expected in printed('Q4_0')
