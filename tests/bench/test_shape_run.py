"""The paper's tables for shapes: rows, resuming, limits of time and room, and that nothing stays on the disk."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_models
from processes import alive, wait_for

from mobilevlm_ros.bench import shape_run
from mobilevlm_ros.bench.command import add_arguments, run
from mobilevlm_ros.bench.paper import TABLE5, TABLE6, model_of
from mobilevlm_ros.bench.shape_rows import PAPER_MODELS, rows_of
from mobilevlm_ros.errors import BuildError, SettingsError
from mobilevlm_ros.model.config import LanguageConfig, ModelConfig, ProjectorConfig
from mobilevlm_ros.model.manifest import read_manifest

SMALL = LanguageConfig(n_vocab=512, n_embd=64, n_layers=2, n_heads=4, n_kv_heads=4, n_ff=128)
HUGE = LanguageConfig(n_embd=1 << 16, n_layers=1000, n_heads=16, n_kv_heads=16, n_ff=1 << 18)
SEEING = {'vision': tiny_models.TINY_VISION, 'projector': ProjectorConfig('mlp2x_gelu')}
MODELS = {
    'small': ModelConfig('small', SMALL, **SEEING),
    'blind': ModelConfig('blind', SMALL),
    'huge': ModelConfig('huge', HUGE, **SEEING),
}


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_run, 'read_manifest', MODELS.__getitem__)


def options(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(list(map(str, arguments)))


def shapes(tmp_path: Path, *names: str, more: tuple[object, ...] = ()) -> tuple[int, list[dict[str, Any]]]:
    """The exit code, and all lines of the file."""
    work, record = tmp_path / 'work', tmp_path / 'rows.jsonl'
    work.mkdir(exist_ok=True)
    code = run(options('--shapes', *names, '--quick', '--wait', 0, '--work', work, '--json', record, *more))
    assert list(work.iterdir()) == []
    return code, [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


def test_each_shape_gets_the_papers_rows_and_is_not_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = shapes(tmp_path, 'small', 'blind')
    printed = capsys.readouterr().out
    assert code == 0
    assert [(one['model'], one['quantization'], one['table']) for one in lines] == [
        *(('small', 'Q8_0', 5), ('small', 'Q4_K_S', 5), ('small', 'Q4_K_S', 6)),
        *(('blind', 'Q8_0', 5), ('blind', 'Q4_K_S', 5)),
    ]
    assert all(one['row']['eval'] > 0 and one['took_s'] > 0 for one in lines)
    assert lines[2]['row']['ve_per_patch_ms'] > 0
    assert all(one['kernel']['kernel'] in ('mobilevlm_ros', 'llama.cpp') for one in lines)
    for expected in ('3 of 5: small Q4_K_S, Table 6: prompt', "paper's Table 5", "paper's Table 6", '36.20'):
        assert expected in printed
    again, same = shapes(tmp_path, 'small', 'blind', 'small')
    printed = capsys.readouterr().out
    assert (again, same) == (0, lines)
    assert '1 of 5: small Q8_0, Table 5: done earlier' in printed
    assert "paper's Table 6" in printed


def test_rows_of_other_settings_are_not_done(tmp_path: Path) -> None:
    shapes(tmp_path, 'blind', more=('--part', 'table5', '--quantization', 'Q4_0'))
    _, lines = shapes(
        tmp_path, 'blind', more=('--part', 'table5', '--quantization', 'Q4_0', '--threads', 1, '--runs', 2)
    )
    assert [one['circumstances']['n_runs'] for one in lines] == [1, 2]
    assert [one['row']['n_runs'] for one in lines] == [1, 2]


def test_what_has_no_room_is_named_and_the_others_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = shapes(tmp_path, 'huge', 'blind', more=('--quantization', 'Q4_0'))
    printed = ' '.join(capsys.readouterr().out.split())
    assert code == 1
    assert [one['model'] for one in lines] == ['blind']
    assert 'missing: huge Q4_0, Table 5: ' in printed
    assert 'another place with --work' in printed


def test_nothing_is_begun_that_would_end_after_the_time_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = shapes(tmp_path, 'blind', more=('--minutes', 0.001))
    assert (code, len(lines)) == (1, 1)
    assert 'left of --minutes 0.001' in ' '.join(capsys.readouterr().out.split())
    code, lines = shapes(tmp_path, 'blind', more=('--minutes', 5))
    assert (code, len(lines)) == (0, 2)


def test_a_failure_while_measuring_is_named_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'tokenizer.model').write_bytes(b'no tokenizer')
    code, lines = shapes(tmp_path, 'blind', more=('--tokenizer', tmp_path / 'tokenizer.model'))
    assert (code, lines) == (1, [])
    assert 'is no SentencePiece model' in ' '.join(capsys.readouterr().out.split())


SCRIPT = """
import argparse
from mobilevlm_ros.bench import shape_run
from mobilevlm_ros.bench.command import add_arguments, run
from mobilevlm_ros.model.config import LanguageConfig, ModelConfig
if __name__ == '__main__':
    small = LanguageConfig(n_vocab=512, n_embd=64, n_layers=2, n_heads=4, n_kv_heads=4, n_ff=128)
    shape_run.read_manifest = lambda name: ModelConfig(name, small)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args())
"""


@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_files_and_no_process(how: signal.Signals, tmp_path: Path) -> None:
    script, work = tmp_path / 'shapes.py', tmp_path / 'work'
    script.write_text(SCRIPT)
    work.mkdir()
    command = [sys.executable, script, '--shapes', 'small', '--runs', '100000', '--wait', '0', '--work', work]
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
        wait_for(lambda: bool(list(work.glob('*/language.gguf'))))
        children = psutil.Process(process.pid).children()
        process.send_signal(how)
        assert process.wait(20.0) != 0
    wait_for(lambda: not any(alive(child.pid) for child in children))
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('--json', '-'), 'give --json FILE'),
        (('--json', '/nowhere/rows.jsonl'), 'the folder of --json'),
        (('--part', 'figures'), 'give --part table5 or table6'),
        (('--only', 'new'), 'makes its own models'),
        (('--tokenizer', '/nowhere/tokenizer.model'), '/nowhere/tokenizer.model does not exist'),
        (('--work', '/nowhere'), '/nowhere does not exist'),
        (('--part', 'table6'), 'blind is in none of the tables 6'),
    ],
)
def test_what_would_fail_after_minutes_is_refused_at_once(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        run(options('--shapes', 'blind', *arguments))


def test_an_unknown_quantisation_is_refused_at_once() -> None:
    with pytest.raises(BuildError, match="unknown quantization 'Q3'"):
        run(options('--shapes', 'blind', '--quantization', 'Q3'))


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / 'rows.jsonl').write_text('{"benchmark": "engine"}\n{"benchmark": "sha')
    with pytest.raises(SettingsError, match=r'line 2 of .*rows\.jsonl'):
        run(options('--shapes', 'blind', '--json', tmp_path / 'rows.jsonl'))


def test_the_default_rows_are_the_papers() -> None:
    rows = rows_of([read_manifest(name) for name in PAPER_MODELS], {5, 6}, [])
    found = [(model_of(row.config.language), 8 if row.quantization == 'Q8_0' else 4) for row in rows if row.table == 5]
    assert sorted(found) == sorted({(row.model, row.bits) for row in TABLE5})
    seeing = [model_of(row.config.language) for row in rows if row.table == 6]
    assert sorted(seeing) == sorted({row.language for row in TABLE6})
    sizes = [row.disk_bytes for row in rows if row.table == 6]
    assert sizes == sorted(sizes)
    assert all(row.memory_bytes > row.disk_bytes for row in rows)
