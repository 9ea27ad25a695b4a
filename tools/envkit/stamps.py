"""Remembers which inputs a step was done with, so that an unchanged step is skipped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path


def fingerprint(root: Path, files: Iterable[Path], *values: object) -> str:
    """Return a hash of files (their paths below root, and contents) and of further values."""
    digest = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f'{path.relative_to(root)}\0{len(content)}\0'.encode())
        digest.update(content)
    digest.update(json.dumps([str(value) for value in values]).encode())
    return digest.hexdigest()


def tree(folder: Path) -> list[Path]:
    """Return all files below a folder, without caches."""
    return [path for path in folder.rglob('*') if path.is_file() and '__pycache__' not in path.parts]


class Stamp:
    """The record of one step in .venv/setup."""

    def __init__(self, folder: Path, name: str) -> None:
        """Name the record; nothing is written yet."""
        self._path = folder / f'{name}.stamp'

    def fresh(self, value: str) -> bool:
        """Return whether the step was last done with these inputs."""
        try:
            return self._path.read_text(encoding='utf-8') == value
        except OSError:
            return False

    def forget(self) -> None:
        """Call it before a step starts to change things, so that an interrupted step runs again."""
        self._path.unlink(missing_ok=True)

    def set(self, value: str) -> None:
        """Record that the step was done with these inputs."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix('.part')
        part.write_text(value, encoding='utf-8')
        part.replace(self._path)
