"""The whole benchmark on tiny models: what is printed, what is recorded, what is refused at once."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import tiny_models
from processes import alive, wait_for

from mobilevlm_ros.bench import run as run_module
from mobilevlm_ros.bench.command import RIVALS, add_arguments, run
from mobilevlm_ros.bench.versus import METRICS
from mobilevlm_ros.errors import BundleMissingError, SettingsError

NUMBER = {'type': 'number'}
SERIES = {
    'type': 'object',
    'required': [
        *('unit', 'n', 'median', 'low', 'high', 'p90', 'best', 'bound', 'share', 'foreign_cores', 'busy', 'seconds'),
    ],
    'properties': {
        'unit': {'enum': ['s', 'tok/s']},
        'n': {'type': 'integer', 'minimum': 1},
        'median': {'type': 'number', 'exclusiveMinimum': 0},
        'busy': {'type': 'boolean'},
        'seconds': {'type': 'array', 'items': NUMBER},
    },
}
PROTOCOL = {
    'type': 'object',
    'required': ['name', 'size_gb', 'sample', 'prompt', 'eval', 'load_s', 'total_s', 'n_tokens', 'runs'],
    'properties': {name: {'type': 'number', 'exclusiveMinimum': 0} for name in ('sample', 'prompt', 'eval', 'total_s')},
}
RECORD = {
    'type': 'object',
    'required': ['benchmark', 'schema', 'time', 'machine', 'versions', 'git', 'settings', 'bundles', 'against'],
    'properties': {
        'benchmark': {'const': 'engine'},
        'schema': {'const': 2},
        'machine': {'type': 'object', 'required': ['cpu', 'flags', 'cores', 'memory_gib']},
        'versions': {'type': 'object', 'required': ['python', 'llama-cpp-python', 'onnxruntime']},
        'bundles': {
            'type': 'array',
            'items': {
                'type': 'object',
                'required': ['model_id', 'cost_card', 'figures', 'ratios', 'memory', 'load_s', 'kernel', 'kernels'],
                'properties': {
                    'cost_card': {'type': 'object', 'required': ['language', 'vision', 'ceilings', 'bounds']},
                    'figures': {'type': 'object', 'additionalProperties': SERIES},
                    'memory': {'type': 'object', 'additionalProperties': {'type': 'integer', 'minimum': 1}},
                },
            },
        },
        'table5': {'type': 'array', 'items': PROTOCOL},
        'table6': {'type': 'array', 'items': PROTOCOL},
        'against': {
            'type': 'array',
            'items': {
                'type': 'object',
                'required': ['model_id', 'rival', 'metric', 'ours', 'theirs', 'ratio', 'low', 'high'],
                'properties': {'ours': SERIES, 'theirs': SERIES, 'ratio': NUMBER},
            },
        },
    },
}


def options(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(list(map(str, arguments)))


@pytest.fixture(scope='module')
def finished(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a quick run of everything printed, and its record."""
    folder = tmp_path_factory.mktemp('run')
    tiny_models.write_gguf(folder / 'rival.gguf')
    parts = [word for part in ('figures', 'table5', 'table6') for word in ('--part', part)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = run(
            options(
                *(tiny_bundle, '--gguf', folder / 'rival.gguf', '--visual-tokens', 40, *parts),
                *('--against', 'llamacpp', '--quick', '--wait', 0, '--json', folder / 'figures.jsonl'),
            )
        )
    assert code == 0
    (line,) = (folder / 'figures.jsonl').read_text().splitlines()
    return printed.getvalue(), json.loads(line)


def test_the_record_is_one_line_of_the_promised_form(finished: tuple[str, dict[str, Any]]) -> None:
    jsonschema.validate(finished[1], RECORD)


def test_every_stage_and_question_has_its_figure(finished: tuple[str, dict[str, Any]]) -> None:
    (bundle,) = finished[1]['bundles']
    assert set(bundle['figures']) == {
        *('preprocess', 'vision engine', 'prefill', 'decode', 'first token, first question after start'),
        *(f'{what}, {frame} frame' for what in ('first token', 'yes/no', 'choice') for frame in ('new', 'known')),
        *('eight yes/no questions, one after the other', 'eight yes/no questions, one batch'),
    }
    unbound = [name for name, series in bundle['figures'].items() if series['share'] is None]
    assert unbound == ['preprocess']


def test_a_batch_of_questions_is_compared_with_one_after_the_other(finished: tuple[str, dict[str, Any]]) -> None:
    (bundle,) = finished[1]['bundles']
    ratio = bundle['ratios']['eight yes/no questions, one batch']
    together, in_turn = (
        bundle['figures'][f'eight yes/no questions, {way}'] for way in ('one batch', 'one after the other')
    )
    assert ratio['ratio'] == pytest.approx(in_turn['median'] / together['median'])
    assert ratio['low'] <= ratio['ratio'] <= ratio['high']
    assert 'one batch: ' in finished[0]


def test_what_was_kept_is_said(finished: tuple[str, dict[str, Any]]) -> None:
    (bundle,) = finished[1]['bundles']
    start, new, known = (
        bundle['figures'][f'first token, {which}']
        for which in ('first question after start', 'new frame', 'known frame')
    )
    assert start['reused_tokens'] == 0
    assert 0 < new['reused_tokens'] < known['reused_tokens'] < known['prompt_tokens']
    said = f'first token, new frame {new["reused_tokens"]} of {new["prompt_tokens"]}'
    assert said in ' '.join(finished[0].split())


def test_everybodys_kernel_is_said(finished: tuple[str, dict[str, Any]]) -> None:
    (bundle,) = finished[1]['bundles']
    assert bundle['kernels']['ours'] == bundle['kernel']
    assert bundle['kernels']['llamacpp']['kernel'] == 'llama.cpp'


def test_only_some_turns(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = [word for turn in ('vision', 'eight', 'decode') for word in ('--only', turn)]
    assert run(options(tiny_bundle, '--quick', '--wait', 0, *only, '--runs', 3, '--json', '-')) == 0
    record = json.loads(capsys.readouterr().out)
    assert list(record['bundles'][0]['figures']) == [
        *('preprocess', 'vision engine'),
        *('eight yes/no questions, one after the other', 'eight yes/no questions, one batch'),
        'decode',
    ]
    assert {one['n'] for one in record['bundles'][0]['figures'].values()} == {3}
    assert record['table5'] == []


def test_both_protocols_have_a_row_for_each_model(finished: tuple[str, dict[str, Any]]) -> None:
    record = finished[1]
    assert [row['name'] for row in record['table5']] == ['tiny cpu', 'rival']
    assert [row['name'] for row in record['table6']] == ['tiny cpu', 'rival, 40 visual tokens']
    seeing, blind = record['table6']
    assert seeing['ve_per_patch_ms'] == pytest.approx(seeing['ve_per_token_ms'] / 4)
    assert blind['ve_per_patch_ms'] is None
    assert {row['n_tokens'] for row in (*record['table5'], *record['table6'])} == {16}


def test_the_paper_stands_beside(finished: tuple[str, dict[str, Any]]) -> None:
    printed = finished[0]
    table5, table6 = printed.split("paper's Table 5")[1].split("paper's Table 6")
    phone, orin = (line for line in table5.splitlines() if line.startswith('MobileLLaMA 1.4B') and ' 4 ' in line)
    assert ('36.20' in phone, '28.32' in phone, '14.76' in phone) == (True, True, True)
    assert '66.79' in orin
    (row,) = (line for line in table6.splitlines() if line.startswith('MobileVLM 1.4B') and 'Snapdragon' in line)
    assert ('[6.82]' in row, '34,892' in row, '21.54' in row) == (True, True, True)
    assert '143 to 147 ms' in table6.replace('\n', ' ')
    assert 'Ours stopped at 16 tokens, the paper went on to 400' in table5.replace('\n', ' ')


def test_the_cost_card_comes_before_any_figure(finished: tuple[str, dict[str, Any]]) -> None:
    printed = finished[0]
    assert printed.index('The machine') < printed.index('Cost card') < printed.index('Figures of')


def test_every_rival_that_can_be_named_is_compared_in_something() -> None:
    assert set(RIVALS) == set(METRICS)


def test_rivals_are_compared_in_turn(finished: tuple[str, dict[str, Any]]) -> None:
    against = finished[1]['against']
    assert [one['metric'] for one in against] == list(METRICS['llamacpp'])
    for one in against:
        assert one['ours']['n'] == one['theirs']['n'] == 2
        assert one['low'] <= one['ratio'] <= one['high']
        assert one['ratio'] == pytest.approx(sum(one['theirs']['seconds']) / sum(one['ours']['seconds']), rel=0.01)


def test_a_record_on_standard_output_stands_alone(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(options(tiny_bundle, '--quick', '--wait', 0, '--part', 'table5', '--json', '-')) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)['table5'][0]['name'] == 'tiny cpu'
    assert "paper's Table 5" in printed.err


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('--against', 'mtmd'), '--against mtmd needs --mmproj'),
        (('--against', 'pytorch'), '--against pytorch needs --checkpoint'),
        (('--against', 'mtmd', '--mmproj', '/nowhere/m.gguf'), '/nowhere/m.gguf does not exist'),
        (('--gguf', '/nowhere/l.gguf'), '/nowhere/l.gguf does not exist'),
        (('--json', '/nowhere/figures.jsonl'), 'the folder of --json'),
        (('--against', 'llamacpp', '--only', 'new'), 'give --only prefill or decode'),
    ],
)
def test_what_would_fail_after_minutes_is_refused_at_once(
    tiny_bundle: Path, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, 'Contestant', None)
    with pytest.raises(SettingsError, match=message):
        run(options(tiny_bundle, *arguments))


def test_a_gguf_alone_cannot_be_compared(tmp_path: Path) -> None:
    tiny_models.write_gguf(tmp_path / 'l.gguf')
    with pytest.raises(SettingsError, match='compares bundles'):
        run(options('--gguf', tmp_path / 'l.gguf', '--against', 'llamacpp'))


def test_a_missing_bundle_says_so(tmp_path: Path) -> None:
    with pytest.raises(BundleMissingError):
        run(options(tmp_path / 'none', '--quick'))


SCRIPT = """
import argparse, sys
from mobilevlm_ros.bench.command import RIVALS, add_arguments, run
if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args())
"""


def test_an_interrupted_run_leaves_no_process(tiny_bundle: Path, tmp_path: Path) -> None:
    script = tmp_path / 'bench.py'
    script.write_text(SCRIPT)
    command = [sys.executable, script, tiny_bundle, '--against', 'llamacpp', '--runs', '100000', '--wait', '0']
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[2])}
    record = tmp_path / 'figures.jsonl'
    with subprocess.Popen(
        [*command, '--json', record], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        bench = psutil.Process(process.pid)
        # Ours, the rival, and the tracker that Python's own multiprocessing starts.
        wait_for(lambda: len(bench.children()) >= 3)
        children = bench.children()
        process.send_signal(signal.SIGINT)
        assert process.wait(20.0) != 0
        wait_for(lambda: not any(alive(child.pid) for child in children))
    assert not record.exists()


@pytest.mark.parametrize('arguments', [('--threads', '0'), ('--runs', '-1'), ('--part', 'all'), ('--only', 'all')])
def test_arguments_out_of_range_are_refused(arguments: tuple[str, str]) -> None:
    with pytest.raises(SystemExit):
        options(*arguments)
