"""The page about training: its commands parse, its files and configurations exist, its example is one."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import test_docs
import yaml

from mobilevlm_ros.cli import build_parser
from mobilevlm_ros.train.config import STAGES, TrainConfig, find_config, read_config

PAGE = 'docs/training.md'
TEXT = (test_docs.ROOT / PAGE).read_text()


def trainings() -> list[list[str]]:
    """Words of every command that trains, also through a launcher; files of the reader's own left out."""
    lines = [line for first in ('mobilevlm', 'torchrun', 'accelerate') for line in test_docs.commands(PAGE, first)]
    words = [shlex.split(re.sub(r'^.*mobilevlm(_ros\.cli)? ', '', line)) for line in lines]
    return [line for line in words if line[:1] == ['train'] and line[1:2] and line[1] in STAGES]


def test_linked_files_exist() -> None:
    test_docs.test_linked_files_exist(PAGE)


def test_commands_parse() -> None:
    test_docs.test_mobilevlm_commands_parse(PAGE)
    assert len(test_docs.commands(PAGE, 'mobilevlm')) > 10


@pytest.mark.parametrize('words', trainings(), ids=' '.join)
def test_a_training_is_of_the_stage_of_its_configuration(words: list[str], tmp_path: Path) -> None:
    options = build_parser().parse_args(words)
    if options.config == 'my-robot.yaml':
        options.config = str(tmp_path / 'my-robot.yaml')
        Path(options.config).write_text(example())
    assert read_config(options.config, options.overrides).stage == options.stage


def example() -> str:
    """The reader's own configuration."""
    block = re.search(r'```yaml\n(.*?)```', TEXT, flags=re.S)
    assert block is not None
    return '\n'.join(line[3:] for line in block.group(1).split('\n'))


def test_the_example_is_a_configuration(tmp_path: Path) -> None:
    (tmp_path / 'mine.yaml').write_text(example())
    config = read_config(str(tmp_path / 'mine.yaml'))

    assert (config.stage, config.model.base, config.parallel.deepspeed) == ('lora', 'mobilevlm_v2-1.7b', None)
    assert yaml.safe_load(example())['data']['on_bad'] == 'skip'


def test_the_example_is_a_record(tmp_path: Path) -> None:
    from mobilevlm_ros.train.records import read_records

    line = re.search(r'`(\{"id".*?\})`', TEXT)
    assert line is not None
    record = json.loads(line.group(1))
    (tmp_path / 'hall').mkdir()
    (tmp_path / record['image']).write_bytes(b'x')
    (tmp_path / 'data.json').write_text(line.group(1) + '\n')
    assert len(read_records(tmp_path / 'data.json', tmp_path)) == 1


def test_every_configuration_that_is_named_exists() -> None:
    for name in re.findall(r'`((?:mobilevlm|mobilellama)[\w.-]*-(?:pretrain|sft|align|instruct|q?lora))`', TEXT):
        assert isinstance(read_config(str(find_config(name))), TrainConfig)


def test_every_stage_and_section_is_explained() -> None:
    for stage in STAGES:
        assert f'| `{stage}` |' in TEXT
    for section in TrainConfig.model_fields:
        assert f'`{section}`' in TEXT
    for name in ('schedule', 'learning_rate', 'saving', 'parallel', 'model'):
        annotation = TrainConfig.model_fields[name].annotation
        for key in annotation.model_fields:  # type: ignore[union-attr]
            if key not in ('epsilon', 'tf32'):
                assert f'`{key}`' in TEXT, f'{name}.{key}'
