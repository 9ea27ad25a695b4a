"""Which file of a folder is the tokenizer."""

from __future__ import annotations

from pathlib import Path

from mobilevlm_ros.errors import CheckpointMissingError

__all__ = ['TOKENIZER_JSON', 'TOKENIZER_MODEL', 'find_tokenizer']

TOKENIZER_MODEL = 'tokenizer.model'
TOKENIZER_JSON = 'tokenizer.json'


def find_tokenizer(folder: Path) -> Path:
    """``tokenizer.model`` (SentencePiece), or else ``tokenizer.json``.

    :raise CheckpointMissingError: if there is neither.
    """
    for name in (TOKENIZER_MODEL, TOKENIZER_JSON):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointMissingError(
        f'there is neither {TOKENIZER_MODEL} nor {TOKENIZER_JSON} in {folder}: copy it from the published model, '
        'or run `mobilevlm fetch NAME`'
    )
