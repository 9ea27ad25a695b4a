"""Scores of small files in the published formats, against figures computed by hand."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st
from tiny_benchmarks import (
    LETTER,
    PEOPLE,
    SHORT,
    given,
    write_gqa,
    write_lines,
    write_mmbench,
    write_mme,
    write_pope,
    write_scienceqa,
    write_textvqa,
)

from mobilevlm_ros.errors import BenchmarkError
from mobilevlm_ros.evaluate.benchmarks.catalogue import BENCHMARKS
from mobilevlm_ros.evaluate.benchmarks.gqa import GQA
from mobilevlm_ros.evaluate.benchmarks.items import Given
from mobilevlm_ros.evaluate.benchmarks.mmbench import MMBENCH, read_option
from mobilevlm_ros.evaluate.benchmarks.mme import COGNITION, MME, PERCEPTION, parse_answer
from mobilevlm_ros.evaluate.benchmarks.pope import POPE, says_yes
from mobilevlm_ros.evaluate.benchmarks.scienceqa import SCIENCE_QA, parse_letter
from mobilevlm_ros.evaluate.benchmarks.textvqa import TEXT_VQA, question_of, soft_score
from mobilevlm_ros.evaluate.benchmarks.textvqa_words import normalise

# -- GQA --------------------------------------------------------------------------------------------------------------


def gqa_answers(*texts: str) -> list[Given]:
    return [Given(f'00{number}', '', text) for number, text in enumerate(texts, start=1)]


def test_gqa_matches_exactly_but_for_case_and_full_stop(tmp_path: Path) -> None:
    scores = GQA.score(write_gqa(tmp_path), gqa_answers('Yes.', 'CAFÉ', 'a man', ''), False)
    assert scores.figures == {
        'Accuracy': 50.0,
        'Binary': 50.0,
        'Open': 50.0,
        'semantic attr': 100.0,
        'semantic cat': 100.0,
        'semantic rel': 0.0,
        'structural choose': 0.0,
        'structural query': 50.0,
        'structural verify': 100.0,
    }
    assert scores.n_questions == 4  # the unbalanced one does not count


def test_gqa_takes_the_last_of_several_answers(tmp_path: Path) -> None:
    answers = [*gqa_answers('yes', 'café', 'man', 'left'), Given('001', '', 'no'), Given('unknown', '', 'no')]
    assert GQA.score(write_gqa(tmp_path), answers, False).figures['Accuracy'] == 75.0


def test_gqa_wants_every_answer_unless_only_a_part_was_asked(tmp_path: Path) -> None:
    write_gqa(tmp_path)
    with pytest.raises(BenchmarkError, match='question 003'):
        GQA.score(tmp_path, gqa_answers('yes', 'café'), False)
    assert GQA.score(tmp_path, gqa_answers('yes', 'tea'), True).figures['Accuracy'] == 50.0


def test_gqa_is_handed_in_as_its_scorer_reads_it(tmp_path: Path) -> None:
    (path,) = GQA.submit(write_gqa(tmp_path), gqa_answers('Yes.', 'Café'), tmp_path)
    assert json.loads(path.read_text()) == [
        {'questionId': '001', 'prediction': 'yes'},
        {'questionId': '002', 'prediction': 'café'},
    ]


# -- ScienceQA --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('text', 'letter'),
    [
        ('B', 'B'),
        ('B. cm', 'B'),
        ('The answer is B.', 'B'),
        ('So: The answer is Z.', 'Z'),
        ('The answer is A. The answer is B.', 'FAILED'),
        ('The answer is B', 'FAILED'),  # the pattern's full stop stands for any character, but for one
        ('b', 'FAILED'),
        ('B.', 'FAILED'),
        ('F', 'FAILED'),
        ('', 'FAILED'),
    ],
)
def test_scienceqa_reads_letters_in_three_forms(text: str, letter: str) -> None:
    assert parse_letter(text) == letter


def test_scienceqa_counts_questions_with_an_image(tmp_path: Path) -> None:
    write_scienceqa(tmp_path)
    answers = [Given('4', '<image>\nHow long?', 'B'), Given('5', '<image>\nWhich?', 'The answer is D.')]
    scores = SCIENCE_QA.score(tmp_path, answers, False)
    assert scores.figures['IMG-Accuracy'] == 50.0 and scores.n_questions == 2
    assert scores.figures['Accuracy of all, missing ones wrong'] == pytest.approx(100 / 3)
    assert scores.notes == ('1 answers name no option, and count as wrong',)  # there is no option D
    assert SCIENCE_QA.score(tmp_path, answers[:1], True).figures == {'IMG-Accuracy': 100.0}


def test_scienceqa_takes_the_last_answer_and_no_number_for_none(tmp_path: Path) -> None:
    answers = [Given('4', '<image>', 'B'), Given('4', '<image>', 'A'), Given('5', '<image>', 'nonsense')]
    assert SCIENCE_QA.score(write_scienceqa(tmp_path), answers, True).figures['IMG-Accuracy'] == 0.0


def test_scienceqa_is_handed_in_with_indices(tmp_path: Path) -> None:
    answers = [Given('4', '<image>', 'B'), Given('5', '<image>', '?')]
    (path,) = SCIENCE_QA.submit(write_scienceqa(tmp_path), answers, tmp_path)
    result = json.loads(path.read_text())
    assert result['results'] == {'4': 1, '5': -1} and result['acc'] == 50.0


# -- TextVQA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('raw', 'clean'),
    [
        ('The  Nokia.', 'nokia'),
        ('an apple a day', 'apple day'),
        ('Two', '2'),
        ('none', '0'),
        ('twenty-one', 'twenty 1'),  # a dash between letters is a space
        ('well- known', 'well known'),  # one beside a space is nothing
        ('1,000', '1000'),
        ('$5.99', '$5.99'),
        ('U.S.A.', 'usa'),
        ("dont it's", "don't it 's"),
        ("couldntve couldnt've", "couldntve couldn't've"),
        ('what?!', 'what'),
        ('a', ''),
        ('', ''),
        ('line\nbreak\ttab', 'line break tab'),
        ('Ünïcode — 東京', 'ünïcode — 東京'),
        ('11:30', '11:30'),
        ('. ' * 40, ' '.join('.' * 8)),  # only 32 full stops go
    ],
)
def test_textvqa_normalises_as_published(raw: str, clean: str) -> None:
    assert normalise(raw) == clean


@pytest.mark.parametrize(
    ('answer', 'score'),
    [
        # Four of ten say Nokia: left out one of them, 3 others (1.0), left out another, 4 (1.0).
        ('Nokia', 1.0),
        # Two: (2 x 1/3 + 8 x 2/3) / 10.
        ('Samsung', 0.6),
        ('lg', 0.6),
        # One: (0 + 9 x 1/3) / 10.
        ('sony', 0.3),
        ('motorola', 0.0),
        ('', 0.0),
    ],
)
def test_textvqa_scores_by_how_many_agree(answer: str, score: float) -> None:
    assert soft_score(answer, PEOPLE['What is the brand?']) == pytest.approx(score)


@drawn(st.lists(st.sampled_from(['a b', 'c', 'd', 'e']), min_size=10, max_size=10), st.sampled_from(['b', 'c', 'd']))
def test_textvqa_equals_leaving_out_each_person_in_turn(people: list[str], answer: str) -> None:
    """The definition, written out."""
    same = [normalise(one) == answer for one in people]
    if not any(same):
        assert soft_score(answer, people) == 0.0
        return
    parts = [min(1.0, (sum(same) - same[left_out]) / 3) for left_out in range(10)]
    assert soft_score(answer, people) == pytest.approx(sum(parts) / 10)


@pytest.mark.parametrize(
    'prompt',
    [
        f'What IS it?\nReference OCR token: A, B{SHORT}',
        f'Reference OCR token: A\nWhat IS it?{SHORT}',
        f'What IS it?{SHORT}',
        'OCR tokens: A. Question: What IS it? Short answer:',
    ],
)
def test_textvqa_finds_the_question_in_each_published_prompt(prompt: str) -> None:
    assert question_of(prompt, 'here') == 'what is it?'


@pytest.mark.parametrize('prompt', ['What is it?', 'a\nb\nc', 'OCR tokens: A', 'a\nReference OCR token: A\nb\nc'])
def test_textvqa_refuses_other_prompts(prompt: str) -> None:
    with pytest.raises(BenchmarkError, match=r'here.*no prompt of TextVQA'):
        question_of(prompt, 'here')


def textvqa_answers(*texts: str) -> list[Given]:
    asked = [('i1', 'What is the brand?'), ('i1', 'How many?'), ('i2', 'Says what?')]
    return [
        Given(image, f'{question}\nReference OCR token: A, B{SHORT}', text)
        for (image, question), text in zip(asked, texts, strict=False)
    ]


def test_textvqa_averages_over_questions_of_the_same_image_too(tmp_path: Path) -> None:
    scores = TEXT_VQA.score(write_textvqa(tmp_path), textvqa_answers('Samsung', 'two', 'Go'), False)
    assert scores.figures['Accuracy'] == pytest.approx(100 * (0.6 + 1.0 + 0.3) / 3)


def test_textvqa_names_unknown_questions_and_incomplete_truth(tmp_path: Path) -> None:
    write_textvqa(tmp_path)
    with pytest.raises(BenchmarkError, match=r"no question 'what\?' about image i9"):
        TEXT_VQA.score(tmp_path, [Given('i9', f'What?{SHORT}', 'x')], False)
    path = tmp_path / 'TextVQA_0.5.1_val.json'
    truth = json.loads(path.read_text())
    truth['data'][1]['answers'].pop()
    path.write_text(json.dumps(truth))
    with pytest.raises(BenchmarkError, match='question 2 has 9 answers'):
        TEXT_VQA.score(tmp_path, textvqa_answers('a', 'b'), False)


def test_textvqa_is_handed_in_by_its_own_numbers(tmp_path: Path) -> None:
    (path,) = TEXT_VQA.submit(write_textvqa(tmp_path), textvqa_answers('a', 'b', 'ç'), tmp_path)
    assert json.loads(path.read_text())[2] == {'question_id': 34604, 'answer': 'ç'}


# -- POPE -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('text', 'is_yes'),
    [
        ('Yes', True),
        ('no', False),
        ('No, there is none', False),
        ('It is not there', False),
        ('There is. No doubt', True),  # the first sentence counts
        ('NO', True),  # spelled otherwise is no no
        ('Nope', True),
        ("There isn't", True),
        ('', True),
        ('.no', True),
        ('no\n', True),  # "no\n" is another word
    ],
)
def test_pope_takes_for_yes_whatever_has_no_no(text: str, is_yes: bool) -> None:
    assert says_yes(text) is is_yes


def test_pope_scores_each_part_and_their_mean(tmp_path: Path) -> None:
    # random: yes/no/yes/no answered yes/yes/no/no -> 1 TP, 1 FP, 1 FN, 1 TN; popular all right; adversarial all yes
    answers = given('Yes', 'Yes', 'No', 'no', 'No.', 'yes', 'yes', 'yes')
    figures = POPE.score(write_pope(tmp_path), answers, False).figures
    assert figures['random f1'] == figures['random accuracy'] == 50.0
    assert figures['popular f1'] == 100.0
    assert figures['adversarial precision'] == 50.0 and figures['adversarial recall'] == 100.0
    assert figures['adversarial yes_ratio'] == 100.0
    assert figures['F1, mean of parts'] == pytest.approx(100 * (0.5 + 1.0 + 2 / 3) / 3)
    assert figures['Accuracy, mean of parts'] == pytest.approx(100 * (0.5 + 1.0 + 0.5) / 3)


def test_pope_of_nothing_but_no_is_zero_instead_of_an_error(tmp_path: Path) -> None:
    figures = POPE.score(write_pope(tmp_path), given(*['no'] * 8), False).figures
    assert figures['F1, mean of parts'] == 0.0 and figures['random accuracy'] == 50.0


def test_pope_pairs_by_question_not_by_luck(tmp_path: Path) -> None:
    write_pope(tmp_path)
    answers = given('Yes', 'Yes', 'No', 'no', 'No.', 'yes', 'yes', 'yes')
    assert POPE.score(tmp_path, answers[::-1], False) == POPE.score(tmp_path, answers, False)
    with pytest.raises(BenchmarkError, match='question 3'):
        POPE.score(tmp_path, answers[:3] + answers[4:], False)
    part = POPE.score(tmp_path, answers[:4], True)
    assert part.figures['F1, mean of parts'] == 50.0 and part.notes == (
        'no answers of the part popular and adversarial',
    )


def test_pope_of_another_version_is_refused(tmp_path: Path) -> None:
    write_pope(tmp_path)
    path = tmp_path / 'coco' / 'coco_pope_popular.json'
    path.write_text(path.read_text().replace('a.jpg', 'b.jpg'))
    with pytest.raises(BenchmarkError, match='different versions'):
        POPE.score(tmp_path, given(*['no'] * 8), False)
    path.write_text('')
    with pytest.raises(BenchmarkError, match='too short'):
        POPE.score(tmp_path, given(*['no'] * 8), False)


def test_pope_is_handed_in_part_by_part(tmp_path: Path) -> None:
    paths = POPE.submit(write_pope(tmp_path), given(*'abcdefgh'), tmp_path)
    assert [path.name for path in paths] == [
        f'coco_pope_{n}_answers.json' for n in ('random', 'popular', 'adversarial')
    ]
    line = json.loads(paths[1].read_text().splitlines()[1])
    assert line == {'question': 'Is there a popular 1?', 'answer': 'f'}


# -- MME --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('answer', 'parsed'),
    [
        ('Yes', 'yes'),
        ('NO.', 'no'),
        ('not really', 'no'),
        ('know', 'no'),  # so it is published
        ('It is. Yes', 'other'),  # only four characters count
        ('yeah', 'other'),
        ('', 'other'),
    ],
)
def test_mme_reads_four_characters(answer: str, parsed: str) -> None:
    assert parse_answer(answer) == parsed


def mme_answers(category: str, *texts: str) -> list[Given]:
    """To the four questions of a category."""
    questions = [f'Is it {category}?', 'Is it not?'] * 2
    names = ['0001', '0001', '0002', '0002']
    return [
        Given(f'{category}/{name}.png', question + SHORT, text)
        for name, question, text in zip(names, questions, texts, strict=False)
    ]


def test_mme_adds_the_share_of_right_answers_and_of_right_pairs(tmp_path: Path) -> None:
    categories = PERCEPTION + COGNITION
    write_mme(tmp_path, categories)
    answers = [one for name in categories[2:] for one in mme_answers(name, 'yes', 'yes', 'no', 'other')]
    answers += mme_answers('existence', 'Yes', 'No', 'yes.', 'Yes')  # 3 of 4, 1 of 2 pairs
    answers += mme_answers('count', 'Yes', 'no', 'Yes,\nit is', 'no')  # all
    scores = MME.score(tmp_path, answers, False)
    assert scores.figures['existence'] == 75.0 + 50.0 and scores.figures['count'] == 200.0
    assert scores.figures['OCR'] == 25.0 and scores.figures['code_reasoning'] == 25.0
    assert scores.figures['Perception'] == 125.0 + 200.0 + 8 * 25.0
    assert scores.figures['Cognition'] == 4 * 25.0
    assert scores.notes == ('12 answers are neither yes nor no, and count as wrong',)


def test_mme_wants_all_categories_in_whole_pairs(tmp_path: Path) -> None:
    write_mme(tmp_path, ('existence', 'count'))
    answers = mme_answers('existence', 'Yes', 'No', 'Yes')
    with pytest.raises(BenchmarkError, match=r'0002\.txt'):
        MME.score(tmp_path, answers, False)
    assert MME.score(tmp_path, answers, True).figures['Perception'] == 200.0  # the odd one is left out
    with pytest.raises(BenchmarkError, match='category count'):
        MME.score(tmp_path, mme_answers('existence', *'abcd'), False)
    mixed = [answers[0], answers[2], answers[1]]
    with pytest.raises(BenchmarkError, match='pairs'):
        MME.score(tmp_path, mixed, True)


def test_mme_names_what_it_does_not_know(tmp_path: Path) -> None:
    write_mme(tmp_path, ('existence',))
    with pytest.raises(BenchmarkError, match='has no question'):
        MME.score(tmp_path, [Given('existence/0001.png', 'What?', 'yes')], True)
    with pytest.raises(BenchmarkError, match='should begin with a category'):
        MME.score(tmp_path, [Given('../0001.png', 'What?', 'yes')], True)
    (tmp_path / 'images/existence/0001.txt').write_text('Is it? Please answer yes or no.\tPerhaps\n')
    with pytest.raises(BenchmarkError, match='line 1: expected'):
        MME.score(tmp_path, mme_answers('existence', 'yes'), True)


def test_mme_is_handed_in_category_by_category(tmp_path: Path) -> None:
    write_mme(tmp_path, ('existence', 'count'))
    answers = mme_answers('existence', 'Yes\tand\nno') + mme_answers('count', 'yes', 'No')
    existence, count = MME.submit(tmp_path, answers, tmp_path)
    assert existence.read_text() == '0001.txt\tIs it existence? Please answer yes or no.\tYes\tYes and no\n'
    # The second question of the release has two spaces, which the published question file has not.
    assert count.read_text().splitlines()[1] == '0001.txt\tIs it not?  Please answer yes or no.\tNo\tNo'


# -- MMBench ----------------------------------------------------------------------------------------------------------

OPTIONS = {'A': 'a red car', 'B': 'Blue', 'C': '10', 'D': 'dog'}


@pytest.mark.parametrize(
    ('answer', 'option'),
    [
        ('B', 'B'),
        ('B.', 'B'),
        ('(C)', 'C'),
        ('Answer: D.', 'D'),
        ('answer :C', 'C'),
        ('it is blue', 'B'),
        ('BLUE', 'B'),
        ('A dog is there now', 'D'),  # the A may be the article, so that the text decides
        ('A B', ''),  # a tie
        ('A dog', 'A'),  # with three words or less it is a letter
        ('blue dog', ''),
        ('', ''),
        ('E', 'E'),  # one letter more than there are options is read, and is wrong
        ('b', ''),
        ('100', 'C'),  # contains the text of C
        ('Failed to obtain answer via API', ''),
    ],
)
def test_mmbench_reads_letters_then_texts(answer: str, option: str) -> None:
    assert read_option(answer, OPTIONS) == option


def mmbench_answers(**texts: str) -> list[Given]:
    return [Given(int(index[1:]), '', text) for index, text in texts.items()]


def test_mmbench_counts_a_question_only_if_every_rotation_is_right(tmp_path: Path) -> None:
    write_mmbench(tmp_path)
    right: dict[str, str] = {'q7': 'A', 'q1000007': 'cat', 'q8': 'C.', 'q1000008': '(B)', 'q2000008': 'A'}
    figures = MMBENCH.score(tmp_path, mmbench_answers(**right), False).figures
    assert figures['CircularEval'] == figures['Vanilla, first rotation only'] == 100.0
    wrong = right | {'q2000008': 'what?'}
    scores = MMBENCH.score(tmp_path, mmbench_answers(**wrong), False)
    assert scores.figures['CircularEval'] == 50.0 and scores.figures['Vanilla, first rotation only'] == 100.0
    assert scores.figures['category c8'] == 0.0 and scores.figures['category c7'] == 100.0
    assert scores.notes[0].startswith('1 answers name no option')
    del wrong['q2000008']
    assert MMBENCH.score(tmp_path, mmbench_answers(**wrong), False).figures['CircularEval'] == 50.0
    part = MMBENCH.score(tmp_path, mmbench_answers(**wrong), True)
    assert part.figures['CircularEval'] == 100.0 and part.notes == ('rotations without an answer were left out',)


def test_mmbench_takes_the_last_of_several_answers(tmp_path: Path) -> None:
    write_mmbench(tmp_path)
    answers = [*mmbench_answers(q7='A', q1000007='B'), *mmbench_answers(q7='B')]
    assert MMBENCH.score(tmp_path, answers, True).figures['CircularEval'] == 0.0


@pytest.mark.parametrize(
    ('row', 'message'),
    [
        ({'index': 7, 'question': 'q', 'A': 'x', 'B': 'y', 'answer': 'Z'}, "row 1: the answer is 'Z'"),
        ({'index': '7.5', 'question': 'q', 'A': 'x', 'B': 'y', 'answer': 'A', 'category': 'c'}, 'row 1: "index"'),
    ],
)
def test_mmbench_names_a_bad_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    write_mmbench(tmp_path, [row])
    with pytest.raises(BenchmarkError, match=message):
        MMBENCH.score(tmp_path, mmbench_answers(q7='A'), False)


def test_mmbench_refuses_an_index_that_is_there_twice(tmp_path: Path) -> None:
    row = {'index': 7, 'question': 'q', 'A': 'x', 'B': 'y', 'answer': 'A'}
    write_mmbench(tmp_path, [row, row])
    with pytest.raises(BenchmarkError, match='row 2: the index 7 is there twice'):
        MMBENCH.score(tmp_path, mmbench_answers(q7='A'), False)


def test_mmbench_is_handed_in_as_a_workbook(tmp_path: Path) -> None:
    answers = mmbench_answers(q7='A', q8='<b> & \x00"é"')
    (path,) = MMBENCH.submit(write_mmbench(tmp_path), answers, tmp_path)
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            ElementTree.fromstring(archive.read(name))
        sheet = ElementTree.fromstring(archive.read('xl/worksheets/sheet1.xml'))
    space = '{http://schemas.openxmlformats.org/spreadsheetml/2006/main}'
    rows = [{cell.get('r'): ''.join(cell.itertext()) for cell in row} for row in sheet.iter(f'{space}row')]
    names = ['index', 'question', 'A', 'B', 'C', 'D', 'prediction', 'answer', 'split']
    assert list(rows[0].values()) == names
    assert rows[1]['A2'] == '7' and rows[1]['B2'] == 'Which\tone?' and rows[1]['G2'] == 'A' and 'E2' not in rows[1]
    assert rows[3]['G4'] == '<b> & "é"' and 'G3' not in rows[2]


# -- all --------------------------------------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[Path], Path]] = {
    'gqa': write_gqa,
    'sqa': write_scienceqa,
    'textvqa': write_textvqa,
    'pope': write_pope,
    'mme': lambda folder: write_mme(folder, ('existence', 'code_reasoning')),
    'mmbench': write_mmbench,
}


@pytest.mark.parametrize('name', BENCHMARKS)
def test_questions_are_numbered_and_asked_in_the_published_words(tmp_path: Path, name: str) -> None:
    items = list(BENCHMARKS[name].items(WRITERS[name](tmp_path)))
    assert [item.number for item in items] == list(range(len(items)))
    letters = name in ('sqa', 'mmbench')
    assert all(item.text.endswith(LETTER if letters else SHORT) for item in items)
    assert {item.max_tokens for item in items} == {1024 if letters else 128}
    assert all('<image>' not in item.text for item in items)
    assert all(item.image.read().ndim == 3 for item in items)


def test_prompts_of_letters_are_built_as_published(tmp_path: Path) -> None:
    science = list(SCIENCE_QA.items(write_scienceqa(tmp_path)))
    assert [item.question_id for item in science] == ['4', '5']
    assert science[0].text == f'How long?\nA. mm\nB. cm{LETTER}'
    assert science[0].prompt == f'<image>\nHow long?\nA. mm\nB. cm{LETTER}'
    bench = list(MMBENCH.items(write_mmbench(tmp_path)))
    assert bench[0].text == f'Which\tone?\nA. cat\nB. dog{LETTER}'
    assert bench[2].prompt == 'Look.\nWell.\nSay "hi"\nA. é\nB. 2\nC. 3'
    assert bench[2].extra == {'round_id': 0, 'options': ['é', '2', '3'], 'option_char': ['A', 'B', 'C']}


@pytest.mark.parametrize('name', BENCHMARKS)
def test_no_answers_are_no_score_of_zero(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path)
    with pytest.raises(BenchmarkError, match='no answers'):
        BENCHMARKS[name].score(tmp_path, [], True)


def test_what_is_wrong_with_a_question_is_named_with_its_line(tmp_path: Path) -> None:
    write_gqa(tmp_path)
    path = tmp_path / 'llava_gqa_testdev_balanced.jsonl'
    for record, message in (
        ({'question_id': 1, 'image': 'gone.jpg', 'text': 'x'}, r'line 1: the image .*gone\.jpg is not there'),
        ({'question_id': 1, 'image': '../secret.jpg', 'text': 'x'}, 'line 1: .* does not lie in'),
        ({'question_id': 1, 'image': 'n1.jpg', 'text': 5}, 'line 1: "text" should be a text, found 5'),
        ({'question_id': None, 'image': 'n1.jpg', 'text': 'x'}, 'line 1: "question_id" should be'),
        ({'image': 'n1.jpg', 'text': 'x'}, 'line 1: "question_id" is missing'),
    ):
        write_lines(path, [record])
        with pytest.raises(BenchmarkError, match=message):
            list(GQA.items(tmp_path))
    with pytest.raises(BenchmarkError, match='has none of images'):
        list(GQA.items(tmp_path / 'images'))
