"""A run of stage lora that starts from the adapter of an earlier one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file, save_file

from mobilevlm_ros.errors import (
    CheckpointDamagedError,
    CheckpointMissingError,
    CheckpointShapeError,
    SettingsError,
)
from mobilevlm_ros.train.stage import Outcome, run_stage

SETTINGS, VALUES = 'adapter_config.json', 'adapter_model.safetensors'


@pytest.fixture(scope='module')
def first(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp('first')
    tiny_runs.write_data(folder)
    return run_stage(tiny_runs.config(folder, 'lora', tiny_runs.write_base(folder / 'base')))


def go_on(folder: Path, first: Outcome, adapter: Path, **sections: object) -> Outcome:
    tiny_runs.write_data(folder)
    model = {'base': str(first.products['model']), 'adapter': str(adapter)}
    return run_stage(tiny_runs.config(folder, 'lora', first.products['model'], model=model, **sections))


def test_it_starts_from_what_was_learned(first: Outcome, tmp_path: Path) -> None:
    """With rates of almost nothing, the adapter stays what it was, and what it was is not nothing."""
    rates = {'projector': 1e-12, 'language': 1e-12}
    adapter = first.products['adapter']

    second = go_on(tmp_path, first, adapter, learning_rate=rates, schedule={'max_steps': 1})

    before, after = load_file(adapter / VALUES), load_file(second.products['adapter'] / VALUES)
    assert before.keys() == after.keys()
    for name, values in before.items():
        torch.testing.assert_close(after[name], values, atol=1e-8, rtol=0)
    assert any('lora_B' in name and values.abs().max() > 1e-4 for name, values in before.items())


@pytest.fixture
def copied(first: Outcome, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first.products['adapter'], tmp_path / 'adapter'))


@pytest.mark.parametrize(('key', 'name'), [('r', 'rank'), ('lora_alpha', 'alpha')])
def test_another_scale_is_named(first: Outcome, copied: Path, tmp_path: Path, key: str, name: str) -> None:
    settings = json.loads((copied / SETTINGS).read_text()) | {key: 3}
    (copied / SETTINGS).write_text(json.dumps(settings))

    with pytest.raises(SettingsError, match=rf'has {name} 3, lora\.{name} is \d'):
        go_on(tmp_path / 'second', first, copied)


def test_other_matrices_are_named(first: Outcome, copied: Path, tmp_path: Path) -> None:
    values = load_file(copied / VALUES)
    gone = sorted(values)[0]
    save_file({name: value for name, value in values.items() if name != gone}, copied / VALUES)

    with pytest.raises(CheckpointShapeError, match='differ in 1 halves of adapters'):
        go_on(tmp_path / 'second', first, copied)


def test_another_width_is_named(first: Outcome, copied: Path, tmp_path: Path) -> None:
    values = load_file(copied / VALUES)
    name = sorted(values)[0]
    save_file(values | {name: values[name][:, :-1].contiguous()}, copied / VALUES)

    with pytest.raises(CheckpointShapeError, match='has shape'):
        go_on(tmp_path / 'second', first, copied)


def test_no_adapter_is_named(first: Outcome, copied: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissingError, match='expected an adapter'):
        go_on(tmp_path / 'second', first, tmp_path / 'nowhere')
    (copied / SETTINGS).write_text('{')
    with pytest.raises(CheckpointDamagedError, match='is not JSON'):
        go_on(tmp_path / 'third', first, copied)


def test_a_stage_without_adapters_takes_none(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r'leave out model\.adapter'):
        tiny_runs.config(tmp_path, 'instruct', tmp_path, model={'adapter': str(tmp_path)})
