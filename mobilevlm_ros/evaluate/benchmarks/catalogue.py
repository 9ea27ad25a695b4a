"""The six benchmarks by name."""

from __future__ import annotations

from mobilevlm_ros.evaluate.benchmarks.gqa import GQA
from mobilevlm_ros.evaluate.benchmarks.mmbench import MMBENCH
from mobilevlm_ros.evaluate.benchmarks.mme import MME
from mobilevlm_ros.evaluate.benchmarks.pope import POPE
from mobilevlm_ros.evaluate.benchmarks.scienceqa import SCIENCE_QA
from mobilevlm_ros.evaluate.benchmarks.textvqa import TEXT_VQA

__all__ = ['BENCHMARKS']

BENCHMARKS = {one.name: one for one in (GQA, SCIENCE_QA, TEXT_VQA, POPE, MME, MMBENCH)}
