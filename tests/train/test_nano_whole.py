"""One command for all of nano: the steps, their order, and what is left out when it is run again.

The steps themselves have tests of their own and take hours here; they stand in as functions that note what they were
asked and leave what the next one looks for. That they fit each other is tried with a tiny model and tiny data.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import tiny_runs
from safetensors.numpy import load_file

from mobilevlm_ros.errors import DatasetMissingError
from mobilevlm_ros.model.checkpoint import open_checkpoint
from mobilevlm_ros.train import command, nano_whole
from mobilevlm_ros.train.config import read_config
from mobilevlm_ros.train.nano_data import command as data_command
from mobilevlm_ros.train.stage import run_stage


class Steps:
    """What was asked of the stand-ins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.stops_in = ''
        for name in ('run_base', 'run_data', 'run_features'):
            monkeypatch.setattr(data_command, name, self._made(name.removeprefix('run_')))
        monkeypatch.setattr(command, 'run_training', self._train)
        monkeypatch.setattr(nano_whole, 'ship', lambda run, out: (out / 'projector.safetensors', out / 'adapter.gguf'))

    def _made(self, name: str) -> nano_whole.Run:
        def run(options: argparse.Namespace) -> int:
            self.done.append(name)
            options.out.mkdir(parents=True, exist_ok=True)
            return 0

        return run

    def _train(self, options: argparse.Namespace) -> int:
        config = read_config(options.config, options.overrides)
        assert config.stage == options.stage
        assert options.resume
        assert config.data.records is not None
        self.done.append(f'{config.stage} of {Path(config.model.base or "").parent.name} on {config.data.records.name}')
        if config.stage == self.stops_in:
            return 130
        (config.out / 'model').mkdir(parents=True)
        return 0


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def run(work: Path, *more: str) -> int:
    parser = argparse.ArgumentParser()
    nano_whole.add_nano_arguments(parser)
    return nano_whole.run_nano(parser.parse_args(['--work', str(work), *more]))


ALL = ['base', 'data', 'features', 'ground of work on regions.json', 'lora of ground on train.json']


def test_the_steps_come_one_after_the_other(tmp_path: Path, steps: Steps) -> None:
    assert run(tmp_path / 'work') == 0
    assert steps.done == ALL


def test_what_is_done_is_not_done_again(tmp_path: Path, steps: Steps) -> None:
    run(tmp_path / 'work')
    steps.done.clear()
    assert run(tmp_path / 'work') == 0
    assert steps.done == ['data', 'features']  # which look at what is there


def test_a_stage_that_was_stopped_ends_it_and_is_gone_on_with(tmp_path: Path, steps: Steps) -> None:
    steps.stops_in = 'ground'
    assert run(tmp_path / 'work') == 130
    assert steps.done == ALL[:4]
    steps.stops_in = ''
    assert run(tmp_path / 'work') == 0
    assert steps.done[-2:] == ALL[3:]


def test_the_stages_fit_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the size of the parts and of the data is real: the features, both committed configurations, the files."""

    def tiny_base(options: argparse.Namespace) -> int:
        tiny_runs.write_chatml_base(options.out, template='chatml', system='', aspect='pad')
        return 0

    def tiny_data(options: argparse.Namespace) -> int:
        if not options.out.exists():
            tiny_runs.write_grounded(options.out, 'regions.json')
            tiny_runs.write_records(options.out / 'train.json', [f'{i}.png' for i in range(12)])
        return 0

    monkeypatch.setattr(data_command, 'run_base', tiny_base)
    monkeypatch.setattr(data_command, 'run_data', tiny_data)
    assert run(tmp_path / 'work', 'schedule.max_steps=2', 'saving.every_steps=1') == 0
    shipped = tmp_path / 'work' / 'shipped'
    assert sorted(path.name for path in shipped.iterdir()) == ['adapter.gguf', 'projector.safetensors']
    for stage in ('ground', 'instruct'):
        with open_checkpoint(tmp_path / 'work' / stage / 'model') as opened:
            assert (opened.config.template, opened.config.system) == ('chatml', '')


def test_overrides_reach_the_stages(tmp_path: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    train = command.run_training

    def note(options: argparse.Namespace) -> int:
        seen.append(options.overrides)
        return train(options)

    monkeypatch.setattr(command, 'run_training', note)
    run(tmp_path / 'work', 'schedule.max_steps=3')
    assert all('schedule.max_steps=3' in overrides for overrides in seen)
    assert len(seen) == 2


def test_the_two_files_hold_what_was_learned(tmp_path: Path) -> None:
    base = tiny_runs.write_base(tmp_path / 'base')
    tiny_runs.write_data(tmp_path / 'data')
    config = tiny_runs.config(tmp_path / 'data', 'lora', base, schedule={'max_steps': 2})
    run_stage(config)
    projector, adapter = nano_whole.ship(config.out, tmp_path / 'shipped')
    values = load_file(projector)
    assert values
    assert {value.dtype.name for value in values.values()} == {'float16'}
    assert adapter.read_bytes()[:4] == b'GGUF'


def test_a_run_that_is_not_finished_is_not_shipped(tmp_path: Path) -> None:
    with pytest.raises(DatasetMissingError, match='finish the run first'):
        nano_whole.ship(tmp_path, tmp_path / 'shipped')
