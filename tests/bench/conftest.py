"""Fixtures of the benchmark's tests: tiny real models, each made once in a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models


@pytest.fixture(scope='session')
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny bundle; not to be changed."""
    return tiny_models.write_bundle(tmp_path_factory.mktemp('bundles') / 'tiny')
