"""Runs of a second: tiny random models, pictures of one colour, and questions about it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tiny_checkpoints
import yaml
from PIL import Image

from mobilevlm_ros.train.config import TrainConfig, read_config

COLOURS = {'red': (200, 30, 30), 'green': (30, 160, 40), 'blue': (30, 40, 200)}
QUESTION = 'what'


def write_pictures(folder: Path, n: int = 12) -> list[str]:
    """Pictures of one noisy colour each; the colours take turns."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(3)
    names = []
    for i in range(n):
        colour = list(COLOURS.values())[i % len(COLOURS)]
        pixels = np.clip(random.normal(colour, 12.0, (36, 48, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f'{i}.png')
        names.append(f'{i}.png')
    return names


def write_records(path: Path, pictures: Iterable[str], *, text_only: int = 0) -> Path:
    """What colour is it? Every picture once, and some questions without one."""
    records: list[dict[str, Any]] = []
    for i, name in enumerate(pictures):
        colour = list(COLOURS)[i % len(COLOURS)]
        turns = [{'from': 'human', 'value': f'<image>\n{QUESTION}'}, {'from': 'gpt', 'value': colour}]
        records.append({'id': f'picture-{i}', 'image': name, 'conversations': turns})
    for i in range(text_only):
        turns = [{'from': 'human', 'value': 'is the car a table'}, {'from': 'gpt', 'value': 'no'}]
        records.append({'id': f'text-{i}', 'conversations': turns})
    path.write_text(json.dumps(records))
    return path


def config(folder: Path, stage: str, base: Path, **sections: Any) -> TrainConfig:
    """A configuration for a tiny run on the pictures of ``folder``, changed by ``sections``."""
    rates = {'align': {'projector': 3e-3}, 'sft': {'language': 3e-3}, 'llm-pretrain': {'language': 3e-3}}
    values: dict[str, Any] = {
        'stage': stage,
        'out': str(folder / 'run'),
        'model': {'base': str(base)},
        'data': {
            'records': str(folder / 'records.json'),
            'images': str(folder / 'images'),
            'template': 'plain' if stage == 'align' else 'v1',
            'n_workers': 0,
        },
        'learning_rate': rates.get(stage, {'projector': 3e-3, 'language': 3e-3}),
        'schedule': {
            'global_batch': 4,
            'batch': 4,
            'max_steps': 8,
            'precision': 'fp32',
            'checkpoint_activations': False,
        },
        'saving': {'every_steps': 100, 'dtype': 'fp32'},
    }
    if stage == 'llm-pretrain':
        values['data'] = {'shards': [{'path': str(folder / 'shards')}], 'max_tokens': 32, 'n_workers': 0}
    if stage == 'sft':
        del values['data']['images']
    if stage in ('lora', 'qlora'):
        values['lora'] = {'rank': 4, 'alpha': 8, 'dropout': 0.05}
    for name, section in sections.items():
        values[name] = values[name] | section if isinstance(values.get(name), dict) else section
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f'{stage}.yaml'
    path.write_text(yaml.safe_dump(values))
    return read_config(str(path))


def write_data(folder: Path, *, text_only: int = 0) -> None:
    """The pictures and the questions of ``config``."""
    write_records(folder / 'records.json', write_pictures(folder / 'images'), text_only=text_only)


def write_base(folder: Path, projector: str | None = 'ldpnetv2') -> Path:
    """A tiny checkpoint to start from; None: a language model alone."""
    tiny_checkpoints.write(folder, tiny_checkpoints.config(projector), dtype='fp32')
    return folder


def write_text(folder: Path, tokenizer: Path, n_lines: int = 80) -> None:
    """Shards of a text that says the same again and again, as ``config`` wants them for llm-pretrain."""
    from mobilevlm_ros.train.tokenise import tokenise

    folder.mkdir(parents=True, exist_ok=True)
    text = folder / 'text.txt'
    text.write_text('the car is red\n' * n_lines)
    tokenise([text], tokenizer, folder / 'shards', separator=None)
