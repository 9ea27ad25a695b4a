"""Scores against figures computed by hand, and an exam of a real, tiny bundle from the command line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mobilevlm_ros.errors import BundleMissingError, SettingsError
from mobilevlm_ros.runtime.assistant import Assistant
from mobilevlm_ros.train.exam import ExamReport, Given, Score, answer_all, majority, scores
from mobilevlm_ros.train.exam_command import add_exam_arguments, run_exam
from mobilevlm_ros.train.exam_questions import ExamQuestion, read_exam


def answered(kind: str, right: bool, negative: str = '') -> Given:
    return Given('q', 'a.jpg', kind, 'yes', right, 0.9, negative)


def question(kind: str, *answers: str) -> ExamQuestion:
    return ExamQuestion('q', Path('a.jpg'), kind, 'Which?', answers)


def test_accuracy_is_by_kind_and_of_all() -> None:
    given = [answered('yes_no', True), answered('yes_no', False), answered('colour', True)]
    assert scores(given) == {'yes_no': Score(1, 2), 'colour': Score(1, 1), 'all': Score(2, 3)}


def test_yes_and_no_are_told_apart() -> None:
    given = [
        answered('yes_no', True),
        answered('yes_no', False, 'hard'),
        answered('yes_no', True, 'easy'),
        answered('colour', False),
    ]
    details = ExamReport('m', given, {}).details()
    assert details == {'answer is yes': Score(1, 1), 'answer is no': Score(1, 2), 'answer is no, hard': Score(0, 1)}


def test_the_majority_counts_every_accepted_answer() -> None:
    questions = [
        question('colour', 'red', 'orange'),
        question('colour', 'orange'),
        question('colour', 'red'),
        question('colour', 'orange', 'yellow'),
        question('name', 'dogs'),
        question('name', 'dog', 'puppy'),
        question('name', 'cat'),
    ]
    best = majority(questions)
    assert best['colour'] == ('orange', Score(3, 4))
    assert best['name'] == ('dog', Score(2, 3))
    assert best['all'][1] == Score(5, 7)


# -- a tiny bundle --------------------------------------------------------------------------------------------------


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    (tmp_path / 'images').mkdir()
    for name, colour in (('a.jpg', 'red'), ('b.jpg', 'blue')):
        Image.new('RGB', (32, 32), colour).save(tmp_path / 'images' / name)
    records: list[dict[str, Any]] = [
        {'kind': 'yes_no', 'question': 'Is it red?', 'answers': ['yes']},
        {'kind': 'yes_no', 'question': 'Is it big?', 'answers': ['no'], 'negative': 'hard'},
        {'kind': 'place', 'question': 'Where?', 'answers': ['left'], 'choices': ['left', 'right']},
        {'kind': 'colour', 'question': 'Which colour?', 'answers': ['red']},
    ]
    path = tmp_path / 'questions.jsonl'
    numbered = enumerate((record, image) for image in ('b.jpg', 'a.jpg') for record in records)
    path.write_text('\n'.join(json.dumps({'id': f'q{n}', 'image': image} | record) for n, (record, image) in numbered))
    return path


def run(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    add_exam_arguments(parser)
    return run_exam(parser.parse_args([str(argument) for argument in arguments]))


def test_every_question_gets_the_answer_that_the_assistant_gives(tiny_assistant: Assistant, questions: Path) -> None:
    asked = read_exam(questions)
    seen: list[tuple[float, float]] = []
    given = answer_all(tiny_assistant, asked, on_progress=lambda done, total: seen.append((done, total)))
    assert [one.picture for one in given] == ['a.jpg'] * 4 + ['b.jpg'] * 4
    assert {one.id for one in given} == {one.id for one in asked}
    assert seen == [(4, 8), (8, 8)]
    by_id = {one.id: one for one in asked}
    assert all(one.right == by_id[one.id].is_right(one.answer) for one in given)
    assert all(one.answer in ('yes', 'no') and one.confidence >= 0.5 for one in given if one.kind == 'yes_no')
    assert all(one.answer in ('left', 'right') for one in given if one.kind == 'place')


def test_blind_answers_do_not_depend_on_the_picture(tiny_assistant: Assistant, questions: Path) -> None:
    given = answer_all(tiny_assistant, read_exam(questions), blind=True)
    first, second = given[:4], given[4:]
    assert [(one.answer, one.confidence) for one in first] == [(one.answer, one.confidence) for one in second]


def test_the_command_prints_a_table_and_writes_its_files(
    tiny_bundle: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / 'out'
    arguments = ('--questions', questions, '--also-blind', '--untrained', tiny_bundle, '--out', out)
    assert run(tiny_bundle, *arguments) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ('accuracy', 'blind', 'majority', 'untrained', 'ECE', 'yes_no'))
    record = json.loads((out / 'exam.json').read_text())
    assert set(record['scores']) == {'accuracy', 'blind', 'majority', 'untrained'}
    assert record['scores']['accuracy'] == record['scores']['untrained']
    assert record['scores']['majority']['yes_no']['accuracy'] == 0.5
    assert len(record['answers']) == len(record['blind_answers']) == 8
    assert {name: found['n'] for name, found in record['calibration'].items()} == {'yes_no': 4, 'choice': 2}
    assert record['proposed'] == ''
    assert '| yes_no | 4 | ' in (out / 'exam.md').read_text()
    for name in ('exam.png', 'calibration-yes_no.png', 'calibration-choice.png'):
        assert (out / name).read_bytes().startswith(b'\x89PNG')


def test_the_untrained_projector_is_a_column(
    tiny_bundle: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_bundle, '--questions', questions, '--also-untrained', '--json') == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record['scores']) == {'accuracy', 'majority', 'untrained'}
    seen, untrained = ([one['confidence'] for one in record[name]] for name in ('answers', 'untrained_answers'))
    assert seen != untrained


def test_the_report_is_one_json_object(tiny_bundle: Path, questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_bundle, '--questions', questions, '--json') == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record['scores']) == {'accuracy', 'majority'} and record['model_id']


def test_what_is_wrong_is_said_before_a_model_is_loaded(tiny_bundle: Path, questions: Path, tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(SettingsError, match='max-risk'):
        run(tiny_bundle, '--questions', questions, '--max-risk', '2')
    with pytest.raises(SettingsError, match='file'):
        run(tiny_bundle, '--questions', questions, '--out', tmp_path / 'file')
    with pytest.raises(BundleMissingError):
        run(tmp_path / 'nowhere', '--questions', questions)


@pytest.mark.model
@pytest.mark.timeout(600)
def test_nano_does_better_on_pictures_than_without() -> None:
    """A few questions only; models/nano holds the figures of all."""
    from mobilevlm_ros.build.nano import build_nano
    from mobilevlm_ros.paths import bundle_dir, shared_file
    from mobilevlm_ros.runtime.loading import load_assistant_from

    path = bundle_dir('nano', 'cpu')
    build_nano(path)
    exam = read_exam(shared_file('models/nano/exam/questions.jsonl'))
    few = [one for one in exam if one.kind in ('yes_no', 'name')][:60]
    assistant = load_assistant_from(path)
    try:
        seen, blind = (sum(one.right for one in answer_all(assistant, few, blind=way)) for way in (False, True))
    finally:
        assistant.close()
    assert seen > blind
