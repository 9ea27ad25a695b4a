"""What counts as a right answer, what the file of questions may hold, and that the committed exam is whole."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mobilevlm_ros.errors import DatasetMissingError, DatasetSyntaxError, RecordError
from mobilevlm_ros.paths import shared_file
from mobilevlm_ros.train.exam_questions import KINDS, ExamQuestion, normalise, read_exam
from mobilevlm_ros.types import AnswerFormat

QUESTION: dict[str, Any] = {'id': 'q', 'image': 'a.jpg', 'kind': 'name', 'question': 'What is it?', 'answers': ['cup']}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / 'images').mkdir()
    Image.new('RGB', (8, 8)).save(tmp_path / 'images' / 'a.jpg')
    return tmp_path


def write(folder: Path, *records: object) -> Path:
    path = folder / 'questions.jsonl'
    path.write_text('\n'.join(json.dumps(record) for record in records))
    return path


@pytest.mark.parametrize(
    ('answer', 'expected'),
    [
        ('A Cup.', 'cup'),
        ('It is a red cup!', 'red cup'),
        ('  the  sky ', 'sky'),
        ("It's blue", 'blue'),
        ('There are two.', 'two'),
        ('t-shirt', 't shirt'),
        ('another', 'another'),
        ('', ''),
        ('.', ''),
    ],
)
def test_what_does_not_matter_is_taken_away(answer: str, expected: str) -> None:
    assert normalise(answer) == expected


@pytest.mark.parametrize(
    ('answer', 'expected'),
    [('dogs', 'dog'), ('cherries', 'cherry'), ('benches', 'bench'), ('boxes', 'box'), ('two dogs', 'two dog')]
    + [(word, word) for word in ('bus', 'glass', 'grass', 'cactus', 'tie')],
)
def test_plurals_become_singulars(answer: str, expected: str) -> None:
    assert normalise(answer, plural=True) == expected
    assert normalise(answer) == answer


def test_the_whole_answer_has_to_be_right() -> None:
    question = ExamQuestion('q', Path('a.jpg'), 'name', 'What is it?', ('cup', 'mug'))
    assert question.is_right('A mug.') and question.is_right('Cups')
    assert not question.is_right('cup of tea') and not question.is_right('') and not question.is_right('a')


def test_a_colour_keeps_its_last_letter() -> None:
    question = ExamQuestion('q', Path('a.jpg'), 'colour', 'Which?', ('red',))
    assert question.is_right('Red') and not question.is_right('reds')


def test_kinds_are_asked_in_their_formats() -> None:
    image = Path('a.jpg')
    closed = ExamQuestion('q', image, 'place', 'Where?', ('left',), ('left', 'right')).asked()
    assert (closed.format, closed.choices, closed.text) == (AnswerFormat.CHOICE, ('left', 'right'), 'Where?')
    assert ExamQuestion('q', image, 'yes_no', 'Is it?', ('yes',)).asked().format is AnswerFormat.YES_NO
    open_one = ExamQuestion('q', image, 'name', 'What is it?', ('cup',)).asked()
    assert open_one.format is AnswerFormat.TEXT
    assert open_one.text == 'What is it?\nAnswer the question using a single word or phrase.'


def test_questions_are_read(folder: Path) -> None:
    record = QUESTION | {'kind': 'yes_no', 'answers': ['no'], 'negative': 'hard'}
    (question,) = read_exam(write(folder, record))
    image = folder / 'images' / 'a.jpg'
    assert question == ExamQuestion('q', image, 'yes_no', 'What is it?', ('no',), negative='hard')


@pytest.mark.parametrize(
    'change',
    [
        {'kind': 'smell'},
        {'answers': []},
        {'answers': 'cup'},
        {'answers': [1]},
        {'answer': 'cup'},
        {'question': ' '},
        {'id': 7},
        {'kind': 'yes_no'},
        {'kind': 'place', 'choices': ['left', 'right']},
        {'negative': 'maybe'},
    ],
)
def test_what_is_no_question_is_refused(folder: Path, change: dict[str, Any]) -> None:
    with pytest.raises(RecordError, match=r'questions\.jsonl, line 2'):
        read_exam(write(folder, QUESTION, QUESTION | {'id': 'r'} | change))


def test_an_id_is_there_once(folder: Path) -> None:
    with pytest.raises(RecordError, match="'q' is there already"):
        read_exam(write(folder, QUESTION, QUESTION))


def test_a_missing_picture_is_named(folder: Path) -> None:
    with pytest.raises(DatasetMissingError, match=r'b\.jpg'):
        read_exam(write(folder, QUESTION | {'image': 'b.jpg'}))


def test_missing_broken_and_empty_files_are_told_apart(folder: Path) -> None:
    path = folder / 'questions.jsonl'
    with pytest.raises(DatasetMissingError, match='cannot be read'):
        read_exam(path)
    path.write_text('{"id": ')
    with pytest.raises(DatasetSyntaxError, match='line 1'):
        read_exam(path)
    path.write_text('\n\n')
    with pytest.raises(DatasetSyntaxError, match='no question'):
        read_exam(path)


# -- the committed exam ---------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def exam() -> list[ExamQuestion]:
    return read_exam(shared_file('models/nano/exam/questions.jsonl'))


@pytest.fixture(scope='module')
def sources() -> Any:
    return yaml.safe_load(shared_file('models/nano/exam/sources.yaml').read_text(encoding='utf-8'))


def test_it_is_large_enough_and_balanced(exam: list[ExamQuestion]) -> None:
    kinds = Counter(question.kind for question in exam)
    assert len(exam) >= 200 and len({question.image for question in exam}) >= 60
    assert set(kinds) == set(KINDS) and min(kinds.values()) >= 20
    closed = Counter(question.answers for question in exam if question.kind == 'yes_no')
    assert closed[('yes',)] == closed[('no',)] and kinds['yes_no'] >= 100


def test_every_no_says_how_hard_it_is(exam: list[ExamQuestion]) -> None:
    closed = [question for question in exam if question.kind == 'yes_no']
    assert all(bool(question.negative) == (question.answers == ('no',)) for question in closed)
    assert sum(question.negative == 'hard' for question in closed) >= 50


def test_nothing_is_asked_twice(exam: list[ExamQuestion]) -> None:
    asked = Counter((question.image, question.text.lower()) for question in exam)
    assert [key for key, times in asked.items() if times > 1] == []


def test_accepted_answers_are_listed_once(exam: list[ExamQuestion]) -> None:
    assert all(normalise(answer) for question in exam for answer in question.answers)
    for question in exam:
        assert len(set(question.answers)) == len(question.answers), question.id


def test_every_picture_has_its_source_and_is_asked_about(exam: list[ExamQuestion], sources: Any) -> None:
    folder = shared_file('models/nano/exam/images')
    assert {question.image.name for question in exam} == set(sources) == {path.name for path in folder.iterdir()}


def test_pictures_are_what_the_sources_say(sources: Any) -> None:
    folder = shared_file('models/nano/exam/images')
    assert len({source['sha256'] for source in sources.values()}) == len(sources)
    for name, source in sources.items():
        data = (folder / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == source['sha256'], name
        assert len(data) <= 80_000 and max(source['size']) <= 640, name
        with Image.open(folder / name) as image:
            assert (image.format, list(image.size), image.mode) == ('JPEG', source['size'], 'RGB'), name


def test_sources_name_package_version_file_and_licence(sources: Any) -> None:
    for name, source in sources.items():
        assert '==' in source['package'] and source['path'] and source['licence'], name
        assert len(source['source_sha256']) == 64, name


def test_a_clip_gives_few_frames(sources: Any) -> None:
    clips = Counter(source['path'] for source in sources.values() if 'frame' in source)
    assert max(clips.values()) <= 4
