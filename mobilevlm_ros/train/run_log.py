"""The record of a run, from which plots are made: one JSON object a logged step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ['LOG', 'read_log']

LOG = 'log.jsonl'


def read_log(folder: Path) -> list[dict[str, Any]]:
    """What was logged, step by step; a line that a kill cut short is left out."""
    path = folder / LOG
    lines = path.read_text().splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
