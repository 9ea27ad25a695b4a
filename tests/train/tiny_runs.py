"""Runs of a second: tiny random models, pictures of one colour, and questions about it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny_checkpoints
import yaml
from PIL import Image
from vocabularies import write_chatml

from mobilevlm_ros.model.config import ModelConfig
from mobilevlm_ros.model.publish import write_checkpoint
from mobilevlm_ros.train.config import TrainConfig, read_config

COLOURS = {'red': (200, 30, 30), 'green': (30, 160, 40), 'blue': (30, 40, 200)}
QUESTION = 'what'
_CHATML_VOCAB = 280


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


def chatml_config(**changes: Any) -> ModelConfig:
    """A tiny model of nano's kind."""
    language = replace(tiny_checkpoints.LANGUAGE, n_vocab=_CHATML_VOCAB)
    return replace(tiny_checkpoints.config(language=language), **changes)


def write_chatml_base(folder: Path, **changes: Any) -> Path:
    """A tiny checkpoint with ChatML's tokens, as `mobilevlm train nano-base` writes one."""
    config = chatml_config(**changes)
    vocabulary = folder.with_name(f'{folder.name}-vocabulary')
    vocabulary.mkdir(parents=True)
    tokenizer = write_chatml(vocabulary, ('user', 'system', 'Ġthe'))
    write_checkpoint(folder, config, tiny_checkpoints.random_tensors(config), tokenizer, dtype='fp32')
    for name in ('tokenizer_config.json', 'special_tokens_map.json'):
        shutil.copyfile(vocabulary / 'tokenizer_config.json', folder / name)
    return folder


def write_grounded(folder: Path, name: str = 'records.json') -> None:
    """Half of each picture is of a colour that has a name; the other half shows nothing."""
    (folder / 'images').mkdir(parents=True)
    (folder / 'regions').mkdir()
    random, entries = np.random.default_rng(1), []
    nouns = ['car', 'table', 'dog']
    for i in range(12):
        pixels = np.full((32, 32, 3), 120, np.uint8)
        left = bool(i % 2)
        half = np.s_[:, :16] if left else np.s_[:, 16:]
        pixels[half] = list(COLOURS.values())[i % 3]
        noisy = np.clip(pixels + random.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / 'images' / f'{i}.png')
        regions = np.zeros((32, 32), np.uint8)
        regions[half] = 1
        Image.fromarray(regions).save(folder / 'regions' / f'{i}.png')
        thing = [nouns[i % 3], list(COLOURS)[i % 3]]
        entries.append({'id': str(i), 'image': f'{i}.png', 'regions': f'{i}.png', 'things': [thing], 'place': ''})
    (folder / name).write_text(json.dumps(entries))


def write_text(folder: Path, tokenizer: Path, n_lines: int = 80) -> None:
    """Shards of a text that says the same again and again, as ``config`` wants them for llm-pretrain."""
    from mobilevlm_ros.train.tokenise import tokenise

    folder.mkdir(parents=True, exist_ok=True)
    text = folder / 'text.txt'
    text.write_text('the car is red\n' * n_lines)
    tokenise([text], tokenizer, folder / 'shards', separator=None)
