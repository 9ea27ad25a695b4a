"""Fixtures that the tests of training share."""

from __future__ import annotations

import pytest
from vocabularies import write_llama

from mobilevlm_ros.train.tokens import Tokenizer, open_tokenizer


@pytest.fixture(scope='session')
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """LLaMA's real vocabulary."""
    return open_tokenizer(write_llama(tmp_path_factory.mktemp('llama') / 'tokenizer.model'))
