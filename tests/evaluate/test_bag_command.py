"""``mobilevlm evaluate bag`` and what stands around it."""

from __future__ import annotations

from pathlib import Path

import bag_writing as writing
import pytest
import yaml
from bag_runs import camera_bag

from mobilevlm_ros.bags import open_bag
from mobilevlm_ros.cli import main
from mobilevlm_ros.errors import BagTopicError, EvaluationError
from mobilevlm_ros.evaluate.questions import read_questions
from mobilevlm_ros.evaluate.results import read_results, read_run
from mobilevlm_ros.evaluate.template import write_template


def two_cameras(path: Path) -> Path:
    pictures = writing.pictures(4)
    return writing.write_bag(
        path,
        [
            *writing.stream('/front', pictures, every_ns=10**9),
            *writing.stream('/rear<b>', pictures, every_ns=10**9, compressed=True),
        ],
    )


# -- a template -------------------------------------------------------------------------------------------------------


def test_a_template_can_be_asked_as_it_is(tmp_path: Path) -> None:
    with open_bag(two_cameras(tmp_path / 'b')) as bag:
        path = write_template(bag, tmp_path / 'out', every_s=2.0)
    questions = read_questions(path)
    assert [one.id for one in questions if one.id.startswith('person')] == [
        'person-0-000000',
        'person-0-000002',
        'person-1-000000',
        'person-1-000002',
    ]
    assert {one.is_right('yes') for one in questions} == {None}, 'the truth is for a person to fill in'
    assert questions[-1].when.stamp_ns == writing.START_NS + 2 * 10**9


def test_a_template_shows_its_pictures(tmp_path: Path) -> None:
    with open_bag(two_cameras(tmp_path / 'b')) as bag:
        write_template(bag, tmp_path / 'out', every_s=2.0)
    page = (tmp_path / 'out' / 'index.html').read_text()
    pictures = sorted((tmp_path / 'out' / 'frames').iterdir())
    assert len(pictures) == 4
    assert all(f'src="frames/{picture.name}"' in page for picture in pictures)
    assert '/rear&lt;b&gt;' in page and '<b>' not in page


def test_work_in_a_template_is_not_overwritten(tmp_path: Path) -> None:
    with open_bag(two_cameras(tmp_path / 'b')) as bag:
        write_template(bag, tmp_path / 'out')
        with pytest.raises(EvaluationError, match='is there already'):
            write_template(bag, tmp_path / 'out')


def test_more_pictures_than_anybody_looks_at_are_refused(tmp_path: Path) -> None:
    with open_bag(two_cameras(tmp_path / 'b')) as bag, pytest.raises(EvaluationError, match='use --every'):
        write_template(bag, tmp_path / 'out', every_s=0.001)


def test_a_bag_without_images_has_no_template(tmp_path: Path) -> None:
    path = writing.write_bag(tmp_path / 'b', [writing.Message('/chatter', 1, writing.text('hello'))])
    with open_bag(path) as bag, pytest.raises(BagTopicError):
        write_template(bag, tmp_path / 'out')


# -- the command ------------------------------------------------------------------------------------------------------


def asked(tmp_path: Path, bundle: Path, *options: str) -> int:
    questions = [{'id': 'q', 'text': 'Is the car red?', 'when': 'each_frame', 'format': 'yes_no', 'truth': 'yes'}]
    (tmp_path / 'q.yaml').write_text(yaml.safe_dump(questions))
    arguments = ['evaluate', 'bag', str(tmp_path / 'b'), '--questions', str(tmp_path / 'q.yaml')]
    return main([*arguments, '--out', str(tmp_path / 'out'), '--bundle', str(bundle), *options])


def test_a_bag_becomes_a_report(tmp_path: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    camera_bag(tmp_path / 'b')
    assert asked(tmp_path, tiny_bundle, '--blind') == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / 'out' / 'report.html')
    assert (tmp_path / 'out' / 'report.html').is_file()
    run = read_run(tmp_path / 'out')
    assert (run['finished'], run['n_done'], run['bundle']['path']) == (True, 8, str(tiny_bundle))
    assert asked(tmp_path, tiny_bundle, '--blind') == 0, 'again, with nothing left to do'
    assert len(list(read_results(tmp_path / 'out'))) == 8


def test_a_bag_is_played(tmp_path: Path, tiny_bundle: Path) -> None:
    camera_bag(tmp_path / 'b')
    assert asked(tmp_path, tiny_bundle, '--realtime', '--deadline', '5') == 0
    run = read_run(tmp_path / 'out')
    assert run['settings']['deadline_s'] == 5
    assert run['realtime']['n_asked'] == 4


def test_a_play_cannot_go_on_and_says_so(tmp_path: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a whole one nor one that was stopped; and neither by asking offline in its folder."""
    camera_bag(tmp_path / 'b')
    assert asked(tmp_path, tiny_bundle, '--realtime') == 0
    before = (tmp_path / 'out' / 'results.jsonl').read_bytes()
    assert asked(tmp_path, tiny_bundle, '--realtime') == 2
    assert 'cannot go on in the middle: give another --out' in ' '.join(capsys.readouterr().err.split())
    assert asked(tmp_path, tmp_path / 'no bundle', '--realtime') == 2
    assert 'cannot go on in the middle' in ' '.join(capsys.readouterr().err.split()), 'before a model is loaded'
    assert asked(tmp_path, tiny_bundle) == 2
    assert 'another way of asking' in ' '.join(capsys.readouterr().err.split())
    assert (tmp_path / 'out' / 'results.jsonl').read_bytes() == before


def test_a_template_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_cameras(tmp_path / 'b')
    assert main(['evaluate', 'bag', str(tmp_path / 'b'), '--init', '--out', str(tmp_path / 'out'), '--every', '2']) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / 'out' / 'questions.yaml')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--realtime', '--blind'], '--realtime plays'),
        (['--server', 'http://localhost:1'], 'either --bundle or --server'),
        (['--deadline', '-1'], '--deadline is above 0'),
        (['--encode-ahead-duty', '2'], 'is a share'),
    ],
)
def test_arguments_that_do_not_go_together(
    tmp_path: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert asked(tmp_path, tiny_bundle, *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('command', ['bag', 'compare', 'gqa', 'sqa', 'textvqa', 'pope', 'mme', 'mmbench'])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(['evaluate', command, '--help'])
    assert left.value.code == 0
    assert f'mobilevlm evaluate {command}' in capsys.readouterr().out


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__('sys').modules, 'mobilevlm_ros.evaluate.bag_command', None)
    assert main(['evaluate', 'bag', 'x']) == 2
    assert 'requirements/evaluate.txt' in capsys.readouterr().err
