"""A robot's recordings for tests: bags made of real photographs, and a person who labels what was picked out."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bag_writing
import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
TOPIC = '/camera/image_raw'
COLOURS = {'red': (220, 20, 20), 'green': (20, 170, 30), 'blue': (20, 30, 220)}


def helper(room: str, name: str) -> Any:
    """A helper module of another room's tests."""
    folder = str(ROOT / 'tests' / room)
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def photographs(n: int) -> list[NDArray[np.uint8]]:
    """Of the exam, small."""
    found: list[NDArray[np.uint8]] = bag_writing.pictures(n)
    return found


def tinted(n: int) -> list[NDArray[np.uint8]]:
    """Different photographs through red, green and blue glass, which take turns."""
    pictures = []
    for picture, colour in zip(photographs(n), list(COLOURS.values()) * n, strict=False):
        pictures.append((0.15 * picture + 0.85 * np.array(colour)).astype(np.uint8))
    return pictures


def record(path: Path, images: Sequence[NDArray[np.uint8]], *, every_s: float = 2.0, topic: str = TOPIC) -> Path:
    """What ``ros2 bag record`` writes."""
    made: Path = bag_writing.write_bag(path, bag_writing.stream(topic, images, every_ns=round(every_s * 1e9)))
    return made


def label(folder: Path, answer: Callable[[dict[str, Any], str], str]) -> None:
    """Write answers, as a person would: those of ``answer``, told the question's entry and the picture's colour."""
    path = folder / 'labels.jsonl'
    lines = []
    for line in path.read_text().splitlines():
        frame = json.loads(line)
        frame['questions'] = [
            one | {'answer': answer(one, colour_of(folder / frame['image']))} for one in frame['questions']
        ]
        lines.append(json.dumps(frame | ({'checked': True} if 'checked' in frame else {})) + '\n')
    path.write_text(''.join(lines))


def colour_of(picture: Path) -> str:
    """Which glass a picture was seen through."""
    from mobilevlm_ros.runtime.images import read_image

    mean = read_image(picture).mean(axis=(0, 1))
    return min(COLOURS, key=lambda name: float(np.abs(mean - np.array(COLOURS[name])).sum()))
