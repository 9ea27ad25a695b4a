"""Reads the small JSON files of a checkpoint, which nobody vouches for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mobilevlm_ros.errors import CheckpointDamagedError, CheckpointMissingError

__all__ = ['read_json_object', 'shown']

_MAX_BYTES = 32 << 20


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file.

    :raise CheckpointMissingError: if there is no such file.
    :raise CheckpointDamagedError: if it is no JSON object, or absurdly large.
    """
    try:
        with path.open('rb') as file:
            raw = file.read(_MAX_BYTES + 1)
        if len(raw) > _MAX_BYTES:
            raise ValueError(f'it has more than {_MAX_BYTES >> 20} MiB')
        found = json.loads(raw.decode('utf-8'), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise CheckpointMissingError(
            f'there is no {path}: expected a folder in the published layout, with config.json, the weights and '
            'tokenizer.model. `mobilevlm fetch NAME` downloads one.'
        ) from error
    except OSError as error:
        raise CheckpointMissingError(f'{path} cannot be read: {error.strerror}') from error
    except (ValueError, RecursionError) as error:
        raise CheckpointDamagedError(f'{path} is not JSON ({error}): download it again') from error
    if not isinstance(found, dict):
        raise CheckpointDamagedError(f'{path} must be a JSON object, found {shown(found)}')
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f'{name} is no number of JSON')


def shown(value: object) -> str:
    """A value for a message, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:60]}…'
