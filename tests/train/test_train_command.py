"""The commands of ``mobilevlm train``: what they need, print and return."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs

from mobilevlm_ros.cli import build_parser, main
from mobilevlm_ros.model.checkpoint import open_checkpoint
from mobilevlm_ros.train.config import STAGES

Capture = pytest.CaptureFixture[str]


def test_robots_need_nothing_of_training() -> None:
    """The parser of all commands is made without the libraries that only training has."""
    script = (
        'import sys\nfrom mobilevlm_ros.cli import build_parser\nbuild_parser()\n'
        "print([name for name in ('torch', 'transformers', 'pydantic', 'peft', 'accelerate') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == '[]'


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setitem(sys.modules, 'mobilevlm_ros.train.command', None)
    assert main(['train', 'align', '--config', 'mobilevlm-1.7b-align']) == 2
    assert 'pip install -r requirements/train.txt' in capsys.readouterr().err


@pytest.mark.parametrize('stage', STAGES)
def test_every_stage_has_a_command(stage: str) -> None:
    options = build_parser().parse_args(['train', stage, '--config', 'x', '--resume', 'a.b=1', 'c=2'])
    assert (options.stage, options.config, options.resume, options.card) == (stage, 'x', True, False)
    assert options.overrides == ['a.b=1', 'c=2']


def test_a_mistake_in_the_configuration_costs_no_time(capsys: Capture) -> None:
    assert main(['train', 'align', '--config', 'mobilevlm-1.7b-align', 'schedule.bacth=3']) == 2
    assert 'did you mean schedule.batch?' in capsys.readouterr().err


def test_card_align_lora_merge(tmp_path: Path, capsys: Capture) -> None:
    """A reader's way through the page about training: what it costs, two stages, one folder in the end."""
    base = tiny_runs.write_base(tmp_path / 'base')
    tiny_runs.write_data(tmp_path / 'data')
    tiny_runs.config(tmp_path / 'data', 'align', base, schedule={'max_steps': 2}, out=str(tmp_path / 'one'))
    model = tmp_path / 'one' / 'model'
    tiny_runs.config(tmp_path / 'data', 'lora', model, schedule={'max_steps': 2}, out=str(tmp_path / 'two'))
    align, lora = (['train', name, '--config', str(tmp_path / 'data' / f'{name}.yaml')] for name in ('align', 'lora'))

    assert main([*align, '--card']) == 0
    said = capsys.readouterr()
    assert said.out == ''
    assert 'learns      6.91 k of 178 k parameters held' in said.err
    assert not (tmp_path / 'one').exists()
    assert main([*align, 'schedule.max_steps=1']) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / 'one' / name) for name in ('projector', 'model')]
    assert main(lora) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / 'two' / name) for name in ('adapter', 'model')]
    merged = str(tmp_path / 'merged')
    assert main(['train', 'merge', str(model), str(tmp_path / 'two' / 'adapter'), '--out', merged]) == 0
    assert capsys.readouterr().out.split() == [merged]
    with open_checkpoint(Path(merged)) as opened:
        assert (opened.kind, opened.dtype) == ('vlm', 'fp16')
    assert main(align) == 2
    assert 'holds a run already (checkpoint-1)' in capsys.readouterr().err
