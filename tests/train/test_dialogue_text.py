"""Dialogues without images: ShareGPT's and Alpaca's files, what is trained of them, and what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vocabularies import write_chatml

from mobilevlm_ros.errors import DatasetError, DatasetMissingError, DatasetSyntaxError
from mobilevlm_ros.model.tokenizer_files import write_made_up_tokenizer
from mobilevlm_ros.train.dialogue import IGNORED, Turn
from mobilevlm_ros.train.dialogue_text import DialogueFormat, read_dialogues
from mobilevlm_ros.train.templates import encode_dialogue
from mobilevlm_ros.train.tokens import open_tokenizer

SHAREGPT = {
    'id': 'QWJhYvA_0',
    'model': '',
    'conversations': [
        {'from': 'human', 'value': 'What is on the table?'},
        {'from': 'gpt', 'value': 'A cup.'},
        {'from': 'human', 'value': 'Which colour has it?'},
        {'from': 'gpt', 'value': 'It is red.'},
    ],
}
ALPACA = {'instruction': 'Name the colour.', 'input': 'A ripe lemon.', 'output': 'Yellow.'}


def write(path: Path, records: object, *, as_lines: bool = False) -> Path:
    lines = records if isinstance(records, list) else [records]
    path.write_text('\n'.join(json.dumps(line) for line in lines) if as_lines else json.dumps(lines))
    return path


def said(*texts: str) -> list[dict[str, str]]:
    return [{'from': ('human', 'gpt')[n % 2], 'value': text} for n, text in enumerate(texts)]


@pytest.mark.parametrize('as_lines', [False, True])
def test_sharegpt_is_read_turn_by_turn(as_lines: bool, tmp_path: Path) -> None:
    (record,) = read_dialogues(write(tmp_path / 'a.json', SHAREGPT, as_lines=as_lines), 'vicuna', 'v1')
    assert (record.id, record.image, record.place) == ('QWJhYvA_0', None, 'a.json:1')
    assert record.turns == (
        Turn('human', 'What is on the table?'),
        Turn('gpt', 'A cup.'),
        Turn('human', 'Which colour has it?'),
        Turn('gpt', 'It is red.'),
    )


def test_what_other_models_said_counts_as_the_models(tmp_path: Path) -> None:
    turns = [{'from': 'user', 'value': 'a'}, {'from': 'chatgpt', 'value': 'b'}]
    (record,) = read_dialogues(write(tmp_path / 'a.json', {'conversations': turns}), 'vicuna', 'v1')
    assert (record.id, record.turns) == ('#1', (Turn('human', 'a'), Turn('gpt', 'b')))


def test_an_answer_without_a_question_and_a_question_without_an_answer_are_left_off(tmp_path: Path) -> None:
    turns = said('', 'from before', 'a', 'b', 'never answered')[1:]
    (record,) = read_dialogues(write(tmp_path / 'a.json', {'conversations': turns}), 'vicuna', 'v1')
    assert record.turns == (Turn('human', 'a'), Turn('gpt', 'b'))


def test_alpacas_input_has_a_place_of_its_own_in_its_template(tmp_path: Path) -> None:
    path = write(tmp_path / 'a.json', ALPACA)
    asked, answer = read_dialogues(path, 'alpaca', 'alpaca')[0].turns
    assert asked == Turn('human', 'Name the colour.', 'A ripe lemon.')
    assert answer == Turn('gpt', 'Yellow.')


@pytest.mark.parametrize('template', ['v1', 'chatml'])
def test_alpacas_input_is_not_lost_in_other_templates(template: str, tmp_path: Path) -> None:
    (record,) = read_dialogues(write(tmp_path / 'a.json', ALPACA), 'alpaca', template)
    assert record.turns[0] == Turn('human', 'Name the colour.\nA ripe lemon.')


@pytest.mark.parametrize('more', [{}, {'input': ''}, {'input': ' \n'}])
def test_alpacas_input_may_be_missing(more: dict[str, str], tmp_path: Path) -> None:
    path = write(tmp_path / 'a.json', {'instruction': 'Say yes.', 'output': 'Yes.', **more})
    for template in ('alpaca', 'v1'):
        assert read_dialogues(path, 'alpaca', template)[0].turns[0] == Turn('human', 'Say yes.')


def test_only_answers_are_trained_in_vicunas_template(tmp_path: Path) -> None:
    write_made_up_tokenizer(tmp_path / 'tokenizer.model', 1000)
    tokenizer = open_tokenizer(tmp_path / 'tokenizer.model')
    (record,) = read_dialogues(write(tmp_path / 'a.json', SHAREGPT), 'vicuna', 'v1')
    encoded = encode_dialogue(record.turns, 'v1', tokenizer, 2048)
    ends = [tokenizer.eos_id]
    assert [label for label in encoded.labels if label != IGNORED] == [
        *tokenizer.encode('A cup.'),
        *ends,
        *tokenizer.encode('It is red.'),
        *ends,
    ]


@pytest.mark.parametrize('context', ['A ripe lemon.', ''])
def test_only_the_output_is_trained_in_alpacas_template(context: str, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(write_chatml(tmp_path))
    (record,) = read_dialogues(write(tmp_path / 'a.json', {**ALPACA, 'input': context}), 'alpaca', 'alpaca')
    encoded = encode_dialogue(record.turns, 'alpaca', tokenizer, 2048)
    trained = [label for label in encoded.labels if label != IGNORED]
    assert trained == [*tokenizer.encode('Yellow.'), tokenizer.eos_id]
    heading = tokenizer.encode(f'### Input:\n{context}\n\n### Response:')
    n_prompt = len(encoded.labels) - len(trained)
    assert (encoded.input_ids[n_prompt - len(heading) : n_prompt] == heading) == bool(context)


BAD: list[tuple[DialogueFormat, Any, str]] = [
    ('vicuna', 'text', 'no record'),
    ('vicuna', {'id': 'a'}, 'no dialogue'),
    ('vicuna', {'conversations': []}, 'no dialogue'),
    ('vicuna', {'conversations': 'text'}, 'no dialogue'),
    ('vicuna', {'conversations': ['a', 'b']}, 'malformed turn'),
    ('vicuna', {'conversations': [*said('a'), {'from': 'gpt'}]}, 'malformed turn'),
    ('vicuna', {'conversations': [*said('a'), {'from': 'gpt', 'value': None}]}, 'malformed turn'),
    ('vicuna', {'conversations': [{'from': 'system', 'value': 'a'}, *said('b', 'c')]}, 'unknown role'),
    ('vicuna', {'conversations': [{'from': ['human'], 'value': 'a'}]}, 'unknown role'),
    ('vicuna', {'conversations': said('a', 'b') + said('', 'c')[1:]}, 'roles do not alternate'),
    ('vicuna', {'conversations': said('a')}, 'no answer'),
    ('vicuna', {'conversations': said('', 'b')[1:]}, 'no question'),
    ('vicuna', {'conversations': said('a', ' \n')}, 'empty answer'),
    ('vicuna', {'conversations': said('', 'a')}, 'empty question'),
    ('vicuna', {'conversations': said('what does <image> do?', 'a')}, 'image mark without image'),
    ('vicuna', {'conversations': said('a', '\ud800')}, 'no Unicode'),
    ('vicuna', {'conversations': said(*'ab' * 1025)}, 'too long'),
    ('vicuna', {'image': 'a.jpg', 'conversations': said('<image>\na', 'b')}, 'has an image'),
    ('vicuna', ALPACA, 'no dialogue'),
    ('alpaca', {'instruction': 'a'}, 'malformed turn'),
    ('alpaca', {'output': 'a'}, 'malformed turn'),
    ('alpaca', {**ALPACA, 'input': 3}, 'malformed turn'),
    ('alpaca', {**ALPACA, 'input': 'an <image>'}, 'image mark without image'),
    ('alpaca', {**ALPACA, 'instruction': ''}, 'empty question'),
    ('alpaca', {**ALPACA, 'output': ''}, 'empty answer'),
    ('alpaca', SHAREGPT, 'malformed turn'),
]


@pytest.mark.parametrize(('form', 'record', 'kind'), BAD)
def test_a_record_that_cannot_be_used_is_named_and_left_out(
    form: DialogueFormat, record: object, kind: str, tmp_path: Path
) -> None:
    good = SHAREGPT if form == 'vicuna' else ALPACA
    path = write(tmp_path / 'a.json', [good, record], as_lines=True)
    records = read_dialogues(path, form, 'alpaca', on_bad='skip')
    assert len(records) == 1
    assert [(problem.kind, problem.count) for problem in records.problems] == [(kind, 1)]
    (example,) = next(iter(records.problems)).examples
    assert example.place == 'a.json:2'
    with pytest.raises(DatasetError, match=rf'1 of 2 records of .*a.json cannot be trained on: 1 × {kind}'):
        read_dialogues(path, form, 'alpaca')


def test_a_broken_line_is_counted_too(tmp_path: Path) -> None:
    (tmp_path / 'a.jsonl').write_text(f'{json.dumps(ALPACA)}\n{{"instruction": "half\n')
    records = read_dialogues(tmp_path / 'a.jsonl', 'alpaca', 'alpaca', on_bad='skip')
    assert (len(records), records.problems.count('no JSON')) == (1, 1)


def test_a_file_without_a_dialogue_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match='holds no dialogue that can be trained on: 1 × no dialogue'):
        read_dialogues(write(tmp_path / 'a.json', ALPACA), 'vicuna', 'v1', on_bad='skip')


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetMissingError, match='is not there'):
        read_dialogues(tmp_path / 'missing.json', 'vicuna', 'v1')
    (tmp_path / 'cut.json').write_text(json.dumps([SHAREGPT])[:-40])
    with pytest.raises(DatasetSyntaxError, match='is it cut off'):
        read_dialogues(tmp_path / 'cut.json', 'vicuna', 'v1', on_bad='skip')
