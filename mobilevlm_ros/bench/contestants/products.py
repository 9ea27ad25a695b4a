"""Whose products with Q4_0 weights a contestant uses, as plain data."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mobilevlm_ros.runtime.language.q4_kernel import choice

__all__ = ['q4_products']


def q4_products() -> dict[str, Any]:
    """``kernel`` (``mobilevlm_ros`` or ``llama.cpp``), which products are ours, why, and how many times faster."""
    chosen = choice()
    return {'kernel': chosen.kernel, **asdict(chosen)}
