"""Datasets for tests: image files, and dialogue files about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_picture(path: Path, width: int = 40, height: int = 30, seed: int = 0) -> Path:
    """A PNG or JPEG of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def record(*texts: object, **fields: Any) -> dict[str, Any]:
    """A dialogue in LLaVA's form; the first text is a person's."""
    turns = [{'from': ('human', 'gpt')[index % 2], 'value': text} for index, text in enumerate(texts)]
    return {'id': 'r', 'conversations': turns, **fields}


def write_json(path: Path, *records: object) -> Path:
    """A JSON array."""
    path.write_text(json.dumps(records))
    return path
