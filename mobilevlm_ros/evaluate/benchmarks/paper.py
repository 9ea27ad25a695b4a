"""What the papers print for these benchmarks: MobileVLM (arXiv 2312.16886) Tables 3 and 4, and V2 (arXiv 2402.03766).

V2's figures are those of the repository's README. For ScienceQA that README gives the two V1 models 57.3 and 61.2,
where the paper has 54.7 and 61.0; the paper's stand here. Which POPE figure is meant, no paper says; see ``pope.py``.
"""

from __future__ import annotations

__all__ = ['LANGUAGE_TABLE', 'LANGUAGE_TASKS', 'VISION_TABLE', 'row_of']

_BENCHMARKS = ('gqa', 'sqa', 'textvqa', 'pope', 'mme', 'mmbench')
_ROWS = {
    'mobilevlm-1.7b': (56.1, 54.7, 41.5, 84.5, 1196.2, 53.2),
    'mobilevlm-1.7b-lora': (57.0, 53.1, 42.3, 86.0, 1143.7, 50.4),
    'mobilevlm-3b': (59.0, 61.0, 47.5, 84.9, 1288.9, 59.6),
    'mobilevlm-3b-lora': (58.4, 59.0, 46.7, 84.6, 1296.4, 57.0),
    'mobilevlm_v2-1.7b': (59.3, 66.7, 52.1, 84.3, 1302.8, 57.7),
    'mobilevlm_v2-3b': (61.1, 70.0, 57.5, 84.7, 1440.5, 63.2),
    'mobilevlm_v2-7b': (62.6, 74.8, 62.3, 85.3, 1560.7, 69.2),
    'llava-1.5-vicuna-7b': (62.0, 66.8, 58.2, 85.9, 1510.7, 64.3),
}
VISION_TABLE = {model: dict(zip(_BENCHMARKS, row, strict=True)) for model, row in _ROWS.items()}
"""By model, then by benchmark; MME is the sum over perception."""

LANGUAGE_TASKS = {
    'arc_challenge': 0, 'arc_easy': 0, 'boolq': 0, 'rte': 0, 'winogrande': 0, 'truthfulqa_mc1': 0, 'truthfulqa_mc2': 0,
    'hellaswag': 0, 'piqa': 0, 'mmlu': 5,
}  # fmt: skip
"""Tasks of lm-evaluation-harness by its names, and how many examples come before a question."""
_LANGUAGE_ROWS = {
    'mobilellama-1.4b': (0.26, 0.61, 0.53, 0.53, 0.59, 0.21, 0.35, 0.43, 0.73, 0.2497),
    'mobilellama-2.7b': (0.32, 0.68, 0.61, 0.59, 0.63, 0.23, 0.36, 0.48, 0.75, 0.2730),
}
LANGUAGE_TABLE = {model: dict(zip(LANGUAGE_TASKS, row, strict=True)) for model, row in _LANGUAGE_ROWS.items()}
"""By model, then by task; accuracy, not the one that is normalised by length."""


def row_of(model: str, table: dict[str, dict[str, float]]) -> str:
    """The row of a table that a model's name begins with, whoever publishes it; empty if there is none."""
    name = model.lower().rpartition('/')[2]
    return max((row for row in table if name.startswith(row)), key=len, default='')
