"""The conversation that a checkpoint was taught: this project's addition to its files, unless it is the published one.

Published checkpoints say nothing of it and mean Vicuna's v1, so nothing is written for that one either. An adapter has
a file that says it, as its base may not have been taught any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mobilevlm_ros.errors import CheckpointDamagedError, CheckpointError
from mobilevlm_ros.model.config import ModelConfig
from mobilevlm_ros.model.json_files import read_json_object, shown
from mobilevlm_ros.runtime.prompt import TEMPLATES

__all__ = [
    'CONVERSATION',
    'CONVERSATION_FILE',
    'conversation_fields',
    'names_conversation',
    'read_conversation',
    'taught_by',
    'write_conversation',
]

CONVERSATION = 'conversation'
"""The field of ``config.json``: an object with ``template`` and ``system``."""
CONVERSATION_FILE = 'conversation.json'
"""The file of an adapter that holds the same field."""

_DEFAULT = 'v1'
_UNNAMED = (_DEFAULT, 'plain')
"""Published, and none."""
_MAX_SYSTEM_CHARACTERS = 16384


def names_conversation(config: ModelConfig) -> bool:
    """Whether the checkpoint has a conversation of its own, which its files name."""
    return config.template not in _UNNAMED or bool(config.system)


def conversation_fields(config: ModelConfig) -> dict[str, Any]:
    """What ``config.json`` says of it; nothing of the published one."""
    if not names_conversation(config):
        return {}
    return {CONVERSATION: {'template': config.template, 'system': config.system}}


def read_conversation(fields: Mapping[str, Any], path: Path) -> tuple[str, str]:
    """Template and system text from the fields of ``config.json``; v1 where they do not name any.

    :param path: of the file, for messages.
    :raise CheckpointDamagedError: if the field is malformed.
    :raise CheckpointError: if there is no such template here.
    """
    found = fields.get(CONVERSATION)
    if found is None:
        return _DEFAULT, ''
    if not isinstance(found, dict):
        raise CheckpointDamagedError(f'{path}: {CONVERSATION} must be an object, found {shown(found)}')
    template, system = found.get('template'), found.get('system', '')
    if not isinstance(template, str) or not isinstance(system, str) or not _is_sendable(system):
        raise CheckpointDamagedError(
            f'{path}: {CONVERSATION} must have a text as template, and as system one of at most '
            f'{_MAX_SYSTEM_CHARACTERS} characters, found {shown(found)}'
        )
    if template not in TEMPLATES:
        raise CheckpointError(
            f'{path}: {CONVERSATION}.template is {shown(template)}; this project asks in {", ".join(TEMPLATES)} only'
        )
    return template, system


def _is_sendable(text: str) -> bool:
    return len(text) <= _MAX_SYSTEM_CHARACTERS and text.encode('utf-8', 'replace').decode() == text


def write_conversation(adapter: Path, config: ModelConfig) -> None:
    """Say beside an adapter what conversation it was taught."""
    fields = conversation_fields(config)
    if fields:
        (adapter / CONVERSATION_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True) + '\n', encoding='utf-8')


def taught_by(adapter: Path, config: ModelConfig) -> ModelConfig:
    """The configuration of a model with the conversation that its adapter was taught, if the adapter names one.

    :raise CheckpointDamagedError: if the adapter's file is malformed.
    :raise CheckpointError: if there is no such template here.
    """
    path = adapter / CONVERSATION_FILE
    if not path.is_file():
        return config
    template, system = read_conversation(read_json_object(path), path)
    return replace(config, template=template, system=system)
