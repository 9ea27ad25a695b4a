"""Dialogue files: good records are whole, and every kind of bad one is counted and named, never passed on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import record, write_json, write_picture

from mobilevlm_ros.errors import DatasetError, DatasetMissingError, DatasetSyntaxError
from mobilevlm_ros.train import records as records_module
from mobilevlm_ros.train.problems import MAX_EXAMPLES
from mobilevlm_ros.train.records import read_records
from mobilevlm_ros.train.templates import Turn

GOOD = record('Hello', 'Hi there', id='good')


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with ``a.png`` and ``sub/b.jpg``, beside a picture that is none of the data's business."""
    write_picture(tmp_path / 'images' / 'a.png')
    write_picture(tmp_path / 'images' / 'sub' / 'b.jpg')
    write_picture(tmp_path / 'secret.png')
    return tmp_path / 'images'


def test_a_record_keeps_id_image_and_turns(tmp_path: Path, images: Path) -> None:
    data = write_json(tmp_path / 'data.json', record('<image>\nWhat?', 'A cat.', id=7, image='sub/b.jpg', model='x'))

    (found,) = read_records(data, images)

    assert found.id == '7'
    assert found.image == images / 'sub' / 'b.jpg'
    assert found.turns == (Turn('human', '<image>\nWhat?'), Turn('gpt', 'A cat.'))
    assert found.place == 'data.json:1'
    assert found.n_words == 4


def test_json_lines_are_read_too(tmp_path: Path, images: Path) -> None:
    data = tmp_path / 'data.jsonl'
    data.write_text('\n'.join(json.dumps(one) for one in (GOOD, record('<image>', 'x', image='a.png'))))

    assert [one.image for one in read_records(data, images)] == [None, images / 'a.png']


def test_a_leading_answer_is_no_problem(tmp_path: Path) -> None:
    turns = [{'from': 'gpt', 'value': 'Welcome.'}, *GOOD['conversations']]
    data = write_json(tmp_path / 'data.json', {'id': 1, 'conversations': turns})

    assert len(read_records(data, None)) == 1


def test_records_are_a_sequence(tmp_path: Path) -> None:
    found = read_records(write_json(tmp_path / 'data.json', GOOD, GOOD, GOOD), None)

    assert len(found[1:]) == 2
    assert found[-1] in list(found)
    assert not len(found.problems)


BAD: dict[str, tuple[object, str, str]] = {
    'a number': (5, 'no record', 'found int'),
    'null': (None, 'no record', 'found nothing'),
    'a text': ('hello', 'no record', "found 'hello'"),
    'no conversations': ({'id': 1}, 'no dialogue', 'found nothing'),
    'conversations that are a text': ({'conversations': 'abc'}, 'no dialogue', "found 'abc'"),
    'conversations that are empty': ({'conversations': []}, 'no dialogue', 'empty'),
    'a turn that is a text': ({'conversations': ['hi']}, 'malformed turn', "turn 1 .* found 'hi'"),
    'a value that is a number': (record('a', 5), 'malformed turn', 'turn 2 .* found int'),
    'a value that is missing': ({'conversations': [{'from': 'human'}]}, 'malformed turn', 'found nothing'),
    'a role of another format': (
        {'conversations': [{'from': 'user', 'value': 'a'}]},
        'unknown role',
        '\'user\', expected "human" or "gpt"',
    ),
    'a role that is a list': ({'conversations': [{'from': [], 'value': 'a'}]}, 'unknown role', 'from list'),
    'two questions in a row': (
        {'conversations': [{'from': 'human', 'value': 'a'}] * 2},
        'roles do not alternate',
        'turn 2 .* human, not gpt',
    ),
    'two leading answers': (
        {'conversations': [{'from': 'gpt', 'value': 'a'}] * 2 + GOOD['conversations']},
        'roles do not alternate',
        'turn 1 .* gpt, not human',
    ),
    'an answer alone': ({'conversations': [{'from': 'gpt', 'value': 'a'}]}, 'no question', 'asks'),
    'an unanswered question': (record('a', 'b', 'c'), 'no answer', 'last question'),
    'an empty answer': (record('a', ' \n'), 'empty answer', 'turn 2'),
    'an empty question': (record('', 'a'), 'empty question', 'turn 1'),
    'half a character': (record('a', '\ud83d'), 'no Unicode', 'turn 2'),
    'more turns than are read': (record(*'ab' * 1025), 'too long', '2050 turns'),
    'a mark without an image': (record('<image>', 'a'), 'image mark without image', 'no "image"'),
    'an image without a mark': (record('a', 'b', image='a.png'), 'image never shown', 'no question holds'),
    'a mark that is dropped with a leading answer': (
        {
            'conversations': [{'from': 'gpt', 'value': '<image>'}, *GOOD['conversations']],
            'image': 'a.png',
        },
        'image never shown',
        'no question holds',
    ),
    'two marks': (record('<image> <image>', 'a', image='a.png'), 'several images', '2 times'),
    'marks in two questions': (record('<image>', 'a', '<image>', 'b', image='a.png'), 'several images', '2 times'),
    'a list of images': (record('<image>', 'a', image=['a.png', 'a.png']), 'several images', 'lists 2'),
    'a mark in an answer': (record('<image>', 'a <image>', image='a.png'), 'image mark in an answer', 'question'),
    'an image that is null': (record('<image>', 'a', image=None), 'malformed image', 'found nothing'),
    'an image that is a number': (record('<image>', 'a', image=3), 'malformed image', 'found int'),
    'an image without a name': (record('<image>', 'a', image=''), 'malformed image', "found ''"),
    'an image with a null character': (record('<image>', 'a', image='a\0.png'), 'malformed image', 'found'),
    'an image that is half a character': (record('<image>', 'a', image='\ud83d'), 'missing image', 'not in'),
    'an image that is not there': (record('<image>', 'a', image='b.png'), 'missing image', "'b.png' is not in"),
    'an image with an endless name': (record('<image>', 'a', image='x' * 5000), 'missing image', 'xx'),
    'an image that is a folder': (record('<image>', 'a', image='sub'), 'missing image', 'no file'),
    'an image above the folder': (record('<image>', 'a', image='../secret.png'), 'image outside the folder', 'lie'),
    'an image above the folder, round a corner': (
        record('<image>', 'a', image='sub/../../secret.png'),
        'image outside the folder',
        'lie',
    ),
    'an image anywhere': (record('<image>', 'a', image='/etc/hostname'), 'image outside the folder', 'lie'),
    'the folder itself': (record('<image>', 'a', image='sub/..'), 'image outside the folder', 'lie'),
    'an image of no bytes': (record('<image>', 'a', image='empty.png'), 'broken image', '0 bytes'),
}


@pytest.mark.parametrize('case', BAD)
def test_a_bad_record_is_named_and_skipped(tmp_path: Path, images: Path, case: str) -> None:
    value, kind, detail = BAD[case]
    (images / 'empty.png').touch()

    found = read_records(write_json(tmp_path / 'data.json', GOOD, value, GOOD), images, on_bad='skip')

    assert [one.id for one in found] == ['good', 'good']
    (problem,) = found.problems
    assert (problem.kind, problem.count) == (kind, 1)
    assert re.search(detail, problem.examples[0].detail)
    assert problem.examples[0].place == 'data.json:1'


@pytest.mark.parametrize('case', BAD)
def test_a_bad_record_refuses_the_data(tmp_path: Path, images: Path, case: str) -> None:
    (images / 'empty.png').touch()
    data = write_json(tmp_path / 'data.json', GOOD, BAD[case][0])

    with pytest.raises(DatasetError, match=f'1 of 2 records of .*{BAD[case][1]}.*--on-bad skip'):
        read_records(data, images, on_bad='refuse')


def test_a_path_that_stays_inside_is_followed(tmp_path: Path, images: Path) -> None:
    data = write_json(tmp_path / 'data.json', record('<image>', 'a', image='sub/../a.png'))

    assert read_records(data, images)[0].image == images / 'a.png'


def test_a_linked_folder_of_images_is_followed(tmp_path: Path, images: Path) -> None:
    (tmp_path / 'elsewhere').mkdir()
    write_picture(tmp_path / 'elsewhere' / 'c.png')
    (images / 'coco').symlink_to(tmp_path / 'elsewhere')
    data = write_json(tmp_path / 'data.json', record('<image>', 'a', image='coco/c.png'))

    assert len(read_records(data, images)) == 1


def test_a_huge_image_file_is_not_read(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, 'MAX_IMAGE_BYTES', 10)
    data = write_json(tmp_path / 'data.json', GOOD, record('<image>', 'a', image='a.png'))

    assert read_records(data, images, on_bad='skip').problems.count('broken image') == 1


def test_problems_are_counted_by_kind_with_the_first_examples(tmp_path: Path) -> None:
    silent = [record('a', '', id=f'silent {number}') for number in range(MAX_EXAMPLES + 3)]
    data = write_json(tmp_path / 'data.json', GOOD, *silent, record('a', id='lonely'))

    problems = read_records(data, None, on_bad='skip').problems

    assert [(one.kind, one.count) for one in problems] == [('empty answer', MAX_EXAMPLES + 3), ('no answer', 1)]
    assert [one.record for one in next(iter(problems)).examples] == [f'silent {n}' for n in range(MAX_EXAMPLES)]
    assert problems.total == MAX_EXAMPLES + 4


def test_a_record_without_an_id_is_named_by_its_number(tmp_path: Path) -> None:
    data = write_json(tmp_path / 'data.json', GOOD, {'conversations': []})

    (problem,) = read_records(data, None, on_bad='skip').problems

    assert problem.examples[0].record == '#2'


def test_what_is_shown_of_the_data_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    data = write_json(tmp_path / 'data.json', GOOD, record('a', '', id='\x1b[31mred\x07' + 'x' * 1000))

    with pytest.raises(DatasetError) as caught:
        read_records(data, None)

    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_bad_lines_are_named_with_their_place(tmp_path: Path) -> None:
    data = tmp_path / 'data.jsonl'
    data.write_text(f'{json.dumps(GOOD)}\n{{"id": \n')

    (problem,) = read_records(data, None, on_bad='skip').problems

    assert problem.kind == 'no JSON'
    assert problem.examples[0].place == 'data.jsonl:2'


@pytest.mark.parametrize('on_bad', ['skip', 'refuse'])
def test_a_file_that_is_cut_off_is_refused_either_way(tmp_path: Path, on_bad: Any) -> None:
    data = write_json(tmp_path / 'data.json', GOOD, GOOD)
    data.write_text(data.read_text()[:-20])

    with pytest.raises(DatasetSyntaxError, match='line 1, column'):
        read_records(data, None, on_bad=on_bad)


def test_data_without_a_good_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match='no record that can be trained on: 1 × no dialogue'):
        read_records(write_json(tmp_path / 'data.json', {}), None, on_bad='skip')
    with pytest.raises(DatasetError, match='it is empty'):
        read_records(write_json(tmp_path / 'data.json'), None, on_bad='skip')


def test_images_without_a_folder_are_a_problem(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match='--images'):
        read_records(write_json(tmp_path / 'data.json', record('<image>', 'a', image='a.png')), None)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetMissingError, match='nowhere'):
        read_records(write_json(tmp_path / 'data.json', GOOD), tmp_path / 'nowhere')


_JUNK = st.recursive(
    st.none()
    | st.integers(-2, 2)
    | st.sampled_from(['human', 'gpt', '<image>', '', 'a', '../x', 'a.png', '\0', '\ud800']),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(['id', 'image', 'conversations', 'from', 'value']), inner, max_size=5)
    ),
    max_leaves=12,
)


@given(values=st.lists(_JUNK, min_size=1, max_size=5))
def test_no_junk_gets_through_or_brings_the_reader_down(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any]
) -> None:
    folder = tmp_path_factory.getbasetemp() / 'junk'
    folder.mkdir(exist_ok=True)
    data = write_json(folder / 'data.json', GOOD, *values)

    found = read_records(data, folder, on_bad='skip')

    assert len(found) + found.problems.total == 1 + len(values)
    for one in found:
        assert all(isinstance(turn.text, str) and turn.text.strip() for turn in one.turns[-2:])
        assert one.turns[-1].role == 'gpt'
