"""All answers as CSV, for spreadsheets; a text that a spreadsheet would run as a formula is made plain text."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from mobilevlm_ros.evaluate.gallery import outcome_of
from mobilevlm_ros.evaluate.scored import STAGES

__all__ = ['COLUMNS', 'write_answers']

_TEXTS = ('key', 'pass', 'question_id', 'kind', 'question', 'format', 'truth', 'answer')
_PLACE = ('camera', 'frame_index', 'stamp_ns', 'received_ns', 'image')

COLUMNS = (*_TEXTS, 'outcome', 'result_code', 'message', 'confidence', *_PLACE, *STAGES, 'prompt_hash', 'model_id')

_FORMULA = ('=', '+', '-', '@', '\t', '\r', '\n', '＝', '＋', '－', '＠')
"""What begins a formula somewhere (OWASP's list of CSV injections; the wide signs are taken for the others)."""


def write_answers(rows: Iterable[Mapping[str, Any]], stream: TextIO) -> None:
    """Write one line an answer.

    :param stream: text in UTF-8, opened with ``newline=''``.
    """
    writer = csv.writer(stream)
    writer.writerow(COLUMNS)
    for row in rows:
        values = {**row, **row['timing'], 'outcome': outcome_of(row)}
        writer.writerow([_cell(values[name]) for name in COLUMNS])


def _cell(value: object) -> object:
    if isinstance(value, str) and value.lstrip(' ').startswith(_FORMULA):
        return "'" + value
    return value
