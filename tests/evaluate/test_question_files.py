"""Files of questions: what they can say, and how a mistake in one is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mobilevlm_ros.errors import QuestionFileError
from mobilevlm_ros.evaluate.questions import BagQuestion, read_questions
from mobilevlm_ros.types import AnswerFormat

GOOD = {'id': 'q', 'text': 'Is it red?', 'when': {'every_s': 1.0}, 'format': 'yes_no', 'truth': 'yes'}


def read(tmp_path: Path, text: str, name: str = 'questions.yaml') -> list[BagQuestion]:
    path = tmp_path / name
    path.write_text(text)
    return read_questions(path)


def problem(tmp_path: Path, text: str, name: str = 'questions.yaml') -> str:
    with pytest.raises(QuestionFileError) as caught:
        read(tmp_path, text, name)
    return str(caught.value)


def lines(*records: dict[str, Any]) -> str:
    return ''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in records)


def test_yaml_and_json_lines_say_the_same(tmp_path: Path) -> None:
    yaml = """
- id: open
  text: "What is \\u2028 on the table?"
  camera: /front
  when: {from_s: 1, to_s: 2.5, every_s: 0.5}
  short: true
  truth: {checker: number, accepted: 3, tolerance: 1}
  kind: count
- id: door
  text: Is the door open?
  when: each_frame
  format: yes_no
  truth: no
"""
    first = {
        'id': 'open',
        'text': 'What is \u2028 on the table?',
        'camera': '/front',
        'when': {'from_s': 1, 'to_s': 2.5, 'every_s': 0.5},
        'short': True,
        'truth': {'checker': 'number', 'accepted': [3], 'tolerance': 1},
        'kind': 'count',
    }
    second = {'id': 'door', 'text': 'Is the door open?', 'when': 'each_frame', 'format': 'YES_NO', 'truth': 'no'}
    from_yaml, from_lines = read(tmp_path, yaml), read(tmp_path, lines(first, second), 'q.jsonl')
    assert [one.as_record() for one in from_yaml] == [one.as_record() for one in from_lines]
    assert from_yaml[0].asked().text.endswith('single word or phrase.')
    assert from_yaml[0].is_right('2') and not from_yaml[0].is_right('5')
    assert (from_yaml[1].asked().format, from_yaml[1].shown_truth) == (AnswerFormat.YES_NO, 'no')


def test_a_question_without_truth_is_neither_right_nor_wrong(tmp_path: Path) -> None:
    (one,) = read(tmp_path, '- {id: q, text: What is it, when: each_frame, truth: null}')
    assert one.is_right('anything') is None
    assert one.as_record()['truth'] is None


def test_a_schema_may_be_written_as_yaml(tmp_path: Path) -> None:
    text = """
- id: j
  text: Describe it
  when: {at_s: 0}
  format: json
  schema: {type: object, properties: {open: {type: boolean}}, required: [open]}
  truth: {field: open, accepted: true}
"""
    (one,) = read(tmp_path, text)
    assert json.loads(one.asked().json_schema)['required'] == ['open']
    assert one.is_right('{"open": true}') and not one.is_right('{"open": false}')


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('- {id: q, text: a, wen: each_frame}', "line 1, column 25: unknown key 'wen'; did you mean 'when'?"),
        ('- {id: q, text: a}', "line 1, column 3: the key 'when' is missing"),
        ('- {id: 5, text: a, when: each_frame}', 'line 1, column 8: id: Input should be a valid string, found 5'),
        ('- {id: a/b, text: a, when: each_frame}', 'column 8: id:'),
        ('- {id: q, text: "", when: each_frame}', 'column 17: text:'),
        ('- {id: q, text: a, when: never}', 'line 1, column 26: when:'),
        ('- {id: q, text: a, when: {}}', 'when: expected one of each_frame'),
        ('- {id: q, text: a, when: {at_s: 1, to_s: 2}}', 'when: expected one of each_frame'),
        ('- {id: q, text: a, when: {from_s: 3, to_s: 2}}', 'when: the range ends (2.0 s) before it begins (3.0 s)'),
        ('- {id: q, text: a, when: {every_s: 0}}', 'column 36: when.every_s: Input should be greater than 0'),
        ('- {id: q, text: a, when: {evry_s: 1}}', "unknown key 'when.evry_s'; did you mean 'every_s'?"),
        ('- {id: q, text: a, when: each_frame, format: maybe}', 'column 46: format:'),
        ('- {id: q, text: a, when: each_frame, choices: [a, b]}', 'choices are for the format choice'),
        ('- {id: q, text: a, when: each_frame, format: choice, choices: [a]}', 'at least two choices, found 1'),
        ('- {id: q, text: a, when: each_frame, format: choice, choices: [a, on]}', 'column 67: choices.1:'),
        ('- {id: q, text: a, when: each_frame, format: json}', 'needs json_schema'),
        ('- {id: q, text: a, when: each_frame, format: yes_no, truth: maybe}', "no possible answer is 'maybe'"),
        ('- {id: q, text: a, when: each_frame, truth: {checker: guess, accepted: a}}', 'column 55: truth.checker:'),
        ('- {id: q, text: a, when: each_frame, truth: {checker: number, accepted: a}}', 'expects numbers, found'),
        ('- {id: q, text: a, when: each_frame, truth: {accepted: a, tolerance: 1}}', 'truth.tolerance is for'),
        ('- {id: q, text: a, when: each_frame, truth: {accepted: [[1]]}}', 'truth.accepted.0: expected a text'),
        ('- {id: q, text: a, when: each_frame, truth: {accepted: []}}', 'truth.accepted:'),
        ('- {id: q, text: a, when: each_frame}\n- {id: q, text: b, when: each_frame}', "line 2, column 8: the id 'q'"),
        ('- {id: q, text: a, when: each_frame, negation_of: p, format: yes_no}', 'column 51: negation_of'),
        ('- {id: q, text: a, text: b, when: each_frame}', "line 1, column 20: the key 'text' is there twice"),
        ('- 3', 'the question: Input should be'),
        ('id: q', 'line 1, column 1: expected a list of questions'),
        ('- id: q\n  text: [', 'line 2, column 10: no YAML'),
        ('', 'holds no question'),
        ('- &a [*a]', 'no YAML: found unconstructable recursive node'),
        ('- !!python/object:os.system {}', 'no YAML'),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, text: str, expected: str) -> None:
    found = problem(tmp_path, text)
    assert str(tmp_path / 'questions.yaml') in found
    assert expected in found


def test_a_mistake_in_json_lines_is_named_with_its_place(tmp_path: Path) -> None:
    bad = json.dumps(GOOD | {'id': 'p'}).replace('"when"', '"whn"')
    found = problem(tmp_path, f'{json.dumps(GOOD)}\n\n{bad}\n', 'q.jsonl')
    assert f"q.jsonl, line 3, column {bad.index('{', 1) + 1}: unknown key 'whn'" in found
    assert "q.jsonl, line 3, column 1: the key 'when' is missing" in found
    assert 'line 2, column 7: no JSON' in problem(tmp_path, f'{json.dumps(GOOD)}\n{{"id":}}', 'q.jsonl')


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    found = problem(tmp_path, ''.join(f'- {{id: q{number}, text: a}}\n' for number in range(30)))
    assert found.count("'when' is missing") == 20
    assert '10 more' in found


def test_a_negation_is_of_the_same_frames(tmp_path: Path) -> None:
    opposite = GOOD | {'id': 'n', 'negation_of': 'q', 'truth': 'no'}
    assert len(read(tmp_path, lines(GOOD, opposite), 'q.jsonl')) == 2
    elsewhere = opposite | {'when': {'every_s': 2.0}}
    assert 'the same camera and the same when' in problem(tmp_path, lines(GOOD, elsewhere), 'q.jsonl')


@pytest.mark.parametrize(('name', 'data'), [('q.txt', b''), ('q.yaml', b'\xff\xfe\x00'), ('q.jsonl', b'\xc3(')])
def test_another_file_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(QuestionFileError, match=name):
        read_questions(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(QuestionFileError, match=r'none\.yaml cannot be read: No such file'):
        read_questions(tmp_path / 'none.yaml')


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=120) | st.text('-{}[]:,&*!|>"\'# \n\tidtextwhen01', max_size=60).map(str.encode))
@pytest.mark.parametrize('name', ['q.yaml', 'q.jsonl'])
def test_no_file_is_more_than_refused(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(QuestionFileError):
        read_questions(tmp_path / name)
