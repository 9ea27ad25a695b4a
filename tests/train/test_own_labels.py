"""Labels that a person edited: what is read, what is left out, and where mistakes are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import write_picture

from mobilevlm_ros.errors import DatasetError, DatasetMissingError
from mobilevlm_ros.train.own_labels import LABELS, Labels, line_of, read_labels
from mobilevlm_ros.train.own_places import parse_line

DOOR = {'kind': 'yes_no', 'question': 'Is the door open?', 'answer': 'no'}
SIDE = {'kind': 'place', 'question': 'Where?', 'choices': ['left', 'right'], 'answer': 'Left'}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (1, 2, 3):
        write_picture(tmp_path / 'frames' / f'{number}.jpg', seed=number)
    return tmp_path


def frame(number: int = 1, *questions: dict[str, Any], **fields: Any) -> str:
    return json.dumps({'image': f'frames/{number}.jpg', 'time_s': 2.0 * number, 'questions': list(questions)} | fields)


def read(folder: Path, *lines: str) -> Labels:
    (folder / LABELS).write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return read_labels(folder / LABELS)


def mistakes(folder: Path, *lines: str) -> list[str]:
    """What is said of each mistake, from ``line:column`` on."""
    with pytest.raises(DatasetError) as error:
        read(folder, *lines)
    first, *listed = str(error.value).split('\n')
    assert first == f'{len(listed)} mistake{"s" if len(listed) > 1 else ""} in the labels:'
    assert all(line.startswith(f'{folder / LABELS}:') for line in listed)
    return [line.removeprefix(f'{folder / LABELS}:') for line in listed]


def mistake(folder: Path, line: str, at: str) -> str:
    """The only mistake, which is where ``at`` begins in the line."""
    (found,) = mistakes(folder, line)
    number, column, text = found.split(':', 2)
    assert number == '1'
    assert line[int(column) - 1 :].startswith(at)
    return text.strip()


def test_frames_come_by_time_with_what_is_asked_and_right(folder: Path) -> None:
    labels = read(folder, frame(2, DOOR), '', frame(1, SIDE, DOOR | {'answer': ['Yes']}))
    assert [one.time_s for one in labels.frames] == [2.0, 4.0]
    assert labels.frames[0].image == folder / 'frames' / '1.jpg'
    side, door = labels.frames[0].questions
    assert (side.answers, side.choices, side.text) == (('left',), ('left', 'right'), 'Where?')
    assert (door.kind, door.answers) == ('yes_no', ('Yes',))
    assert len({question.id for one in labels.frames for question in one.questions}) == 3


def test_what_has_no_answer_or_was_not_checked_is_counted_and_left_out(folder: Path) -> None:
    labels = read(
        folder,
        frame(1, DOOR, DOOR | {'answer': ''}),
        frame(2, DOOR, DOOR, checked=False),
        frame(3, {'kind': 'colour', 'question': '', 'answer': ''}, checked=True),
    )
    assert (len(labels.frames), labels.n_questions, labels.n_open, labels.n_unchecked) == (1, 1, 2, 1)


def test_several_answers_may_be_right_and_the_first_is_taught(folder: Path) -> None:
    name = {'kind': 'name', 'format': 'TEXT', 'question': 'What is it?', 'answer': ['sofa', ' couch ']}
    assert read(folder, frame(1, name)).frames[0].questions[0].answers == ('sofa', 'couch')


def test_windows_line_ends_and_byte_order_marks_are_no_mistakes(folder: Path) -> None:
    (folder / LABELS).write_bytes(b'\xef\xbb\xbf' + frame(1, DOOR).encode() + b'\r\n\r\n')
    assert read_labels(folder / LABELS).n_questions == 1


@pytest.mark.parametrize(
    ('line', 'at', 'expected'),
    [
        (frame(1, DOOR | {'answer': 'maybe'}), '"maybe"', "answer is 'maybe', expected yes or no"),
        (frame(1, SIDE | {'answer': 'middle'}), '"middle"', "answer is 'middle', expected left or right"),
        (frame(1, DOOR | {'kind': 'yesno'}), '"yesno"', "kind is 'yesno', expected yes_no, .*did you mean yes_no"),
        (frame(1, DOOR | {'format': 'CHOICE'}), '"CHOICE"', 'format is CHOICE, but the kind is yes_no: .* YES_NO'),
        (frame(1, SIDE | {'format': 'TEXT'}), '"TEXT"', 'kind is place with choices: expected CHOICE'),
        (frame(1, DOOR | {'format': 'yes'}), '"yes"', "format is 'yes', expected YES_NO, CHOICE or TEXT"),
        (frame(1, DOOR | {'question': ' '}), '" "', 'the question is empty'),
        (frame(1, DOOR | {'question': 'a <image>?'}), '"a <image>', 'stands for the picture'),
        (frame(1, DOOR | {'question': 'a\x07?'}), '"a\\u', 'control character U\\+0007'),
        (frame(1, DOOR | {'anwser': 'no'}), '"anwser"', "no field 'anwser', expected .*: did you mean answer"),
        (frame(1, DOOR | {'answer': 3}), '3}', 'answer is int, expected a text, or several'),
        (frame(1, DOOR | {'choices': ['a', 'b']}), '["a"', 'yes_no has no choices'),
        (frame(1, SIDE | {'choices': ['left']}), '["left"', 'at least two choices'),
        (frame(1, DOOR | {'kind': 'name', 'answer': 'a b c d e f g h i'}), '"a b', 'has 9 words, .* at most 8'),
        (frame(1, {'kind': 'yes_no', 'answer': 'no'}), '{"kind"', 'the question is empty'),
        (frame(1, DOOR, time_s='2'), '"2"', "time_s is '2', expected a number of seconds"),
        (frame(1, DOOR, checked='no'), '"no"', "checked is 'no', expected true or false"),
        (frame(1, DOOR, note='x'), '"note"', "there is no field 'note'"),
        (frame(1, questions=DOOR), '{"kind"', 'expected a list in \\[ \\]'),
        (frame(9, DOOR), '"frames/9.jpg"', "'frames/9.jpg' is not there: put it back, or delete this line"),
        (frame(1, DOOR, image='../1.jpg'), '"../1.jpg"', 'is not below'),
        (frame(1, DOOR, image=None), 'null', 'expected the name of a picture'),
        ('[1, 2]', '[1', 'expected an object with image'),
        (' {"image": "frames/1.jpg",}', '}', 'this is not JSON'),
        ('{“image”: 1}', '“image', 'this is not JSON'),
        ('{"image": "frames/1.jpg", "image": "frames/2.jpg"}', '"image": "frames/2', "field 'image' is there twice"),
        ('{"image": "frames/1.jpg", "time_s": NaN}', 'NaN', 'NaN is no number'),
    ],
)
def test_a_mistake_is_named_with_its_place(folder: Path, line: str, at: str, expected: str) -> None:
    import re

    assert re.search(expected, mistake(folder, line, at))


def test_all_mistakes_are_told_at_once(folder: Path) -> None:
    found = mistakes(folder, frame(1, DOOR | {'answer': 'x'}, SIDE | {'answer': 'y'}), '', '{', frame(2, time_s=None))
    assert [one.split(':')[0] for one in found] == ['1', '1', '3', '4']


def test_a_picture_that_is_there_twice_is_named_with_its_first_line(folder: Path) -> None:
    (found,) = mistakes(folder, frame(1, DOOR), frame(2, DOOR), frame(1, DOOR))
    assert found.startswith('3:11:') and 'is in line 1 already' in found


def test_a_deleted_and_a_broken_picture_are_named(folder: Path) -> None:
    (folder / 'frames' / '1.jpg').unlink()
    (folder / 'frames' / '2.jpg').write_bytes(b'\xff\xd8 cut off')
    found = mistakes(folder, frame(1, DOOR), frame(2, DOOR), frame(3, DOOR))
    assert 'is not there' in found[0] and 'cannot be read' in found[1] and len(found) == 2


def test_labels_that_nobody_wrote_are_refused(folder: Path) -> None:
    with pytest.raises(DatasetError, match='no question with an answer: write answers'):
        read(folder, frame(1, DOOR | {'answer': ''}))
    with pytest.raises(DatasetError, match='2 frames still say "checked": false'):
        read(folder, frame(1, DOOR, checked=False), frame(2, DOOR, checked=False))
    with pytest.raises(DatasetMissingError, match='train frames'):
        read_labels(folder / 'nowhere.jsonl')
    (folder / LABELS).write_bytes(b'{"image": "\xff"}')
    with pytest.raises(DatasetError, match='no UTF-8 text at byte 11'):
        read_labels(folder / LABELS)


def test_lines_that_are_written_are_read(folder: Path) -> None:
    questions = [DOOR | {'confidence': 0.7}]
    text = line_of('frames/1.jpg', 1.23456, questions) + line_of('frames/2.jpg', 3.0, questions, checked=False)
    (folder / LABELS).write_text(text)
    labels = read_labels(folder / LABELS)
    assert (labels.frames[0].time_s, len(labels.frames), labels.n_unchecked) == (1.235, 1, 1)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(values, st.sampled_from([None, 1]), st.booleans())
def test_every_part_of_a_line_is_where_it_is_said_to_be(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only).replace('\n', ' ')
    found, places = parse_line(text)
    assert found == value
    for path, column in places.items():
        part = value
        for step in path:
            part = part[step]
        assert json.JSONDecoder().raw_decode(text, column - 1)[0] == part
