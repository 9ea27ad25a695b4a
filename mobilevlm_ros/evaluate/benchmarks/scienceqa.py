"""ScienceQA-IMG, the questions of the test split that have an image (Lu et al., 2022): the letter of an option.

Rules: LLaVA's eval_science_qa.py, which takes an answer that cannot be read for wrong (the random choice behind its
``return -1`` never runs). Published scripts ask the questions without an image, too; the figure that papers print does
not count them, so that they are not asked here. Images are cropped to a square, not padded: model_vqa_science.py
leaves the padding out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mobilevlm_ros.errors import BenchmarkError
from mobilevlm_ros.evaluate.benchmarks.files import Record, find, find_image, read_document, shown
from mobilevlm_ros.evaluate.benchmarks.items import (
    LETTER_SUFFIX,
    LONG_ANSWER,
    Benchmark,
    FileImage,
    Given,
    Item,
    Scores,
    latest,
)

__all__ = ['SCIENCE_QA', 'parse_letter']

LETTERS = ('A', 'B', 'C', 'D', 'E')
FAILED = 'FAILED'
_SENTENCE = re.compile(r'The answer is ([A-Z]).')


def _items(data: Path) -> Iterator[Item]:
    path = find(data, 'llava_test_CQM-A.json')
    images = find(data, 'images/test', 'test')
    questions = read_document(path)
    if not isinstance(questions, list):
        raise BenchmarkError(f'{path} should be a list of questions, found {shown(questions)}')
    number = 0
    for index, value in enumerate(questions):
        record = Record.of(value, f'{path}, question {index + 1}')
        if 'image' not in record.values:
            continue
        turns = record.values.get('conversations')
        turn = Record.of(turns[0] if isinstance(turns, list) and turns else None, f'{record.place}, first turn')
        asked = turn.text('value').replace('<image>', '').strip()
        text = f'{asked}\n{LETTER_SUFFIX}'
        image = FileImage(find_image(images, record.text('image'), record.place))
        yield Item(number, record.identity('id'), image, text, f'<image>\n{text}', LONG_ANSWER)
        number += 1


def parse_letter(text: str) -> str:
    """The option that an answer means, or ``FAILED``."""
    if text in LETTERS:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == '. ':
        return text[0]
    found = _SENTENCE.findall(text)
    return str(found[0]) if len(found) == 1 else FAILED


def _judged(data: Path, answers: Sequence[Given], partial: bool) -> Iterator[tuple[str, Given | None, int, bool]]:
    """Of each question: id, answer, index of the option that it means (-1: none), and whether that is right."""
    by_question = latest(answers)
    splits_path, problems_path = find(data, 'pid_splits.json'), find(data, 'problems.json')
    problems = Record.of(read_document(problems_path), str(problems_path))
    splits = Record.of(read_document(splits_path), str(splits_path))
    for question_id in splits.texts('test'):
        if question_id not in problems.values:
            raise BenchmarkError(f'{problems_path} has no problem {question_id}, which {splits_path} names')
        problem = Record.of(problems.values[question_id], f'{problems_path}, problem {question_id}')
        given = by_question.get(question_id)
        if given is None and partial:
            continue
        letter = parse_letter(given.text) if given else FAILED
        options = LETTERS[: len(problem.texts('choices'))]
        index = options.index(letter) if letter in options else -1
        yield question_id, given, index, index == problem.whole('answer')


def _score(data: Path, answers: Sequence[Given], partial: bool) -> Scores:
    n, n_right, n_image, n_image_right, n_unread = 0, 0, 0, 0, 0
    for _, given, index, is_right in _judged(data, answers, partial):
        n += 1
        n_right += is_right
        if given is not None and '<image>' in given.prompt:
            n_image += 1
            n_image_right += is_right
            n_unread += index < 0
    if not n_image:
        raise BenchmarkError('none of the answers is to a question of the test split with an image')
    figures = {'IMG-Accuracy': 100.0 * n_image_right / n_image}
    if n > n_image:
        figures['Accuracy of all, missing ones wrong'] = 100.0 * n_right / n
    notes = (f'{n_unread} answers name no option, and count as wrong',) if n_unread else ()
    return Scores(figures, n_image, notes)


def _submit(data: Path, answers: Sequence[Given], folder: Path) -> list[Path]:
    judged = list(_judged(data, answers, True))
    n_right = sum(is_right for *_, is_right in judged)
    result: dict[str, Any] = {
        'acc': 100.0 * n_right / max(len(judged), 1),
        'correct': n_right,
        'count': len(judged),
        'results': {question_id: index for question_id, _, index, _ in judged},
        'outputs': {question_id: given.text for question_id, given, _, _ in judged if given is not None},
    }
    path = folder / 'scienceqa_result.json'
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False), encoding='utf-8')
    return [path]


SCIENCE_QA = Benchmark('sqa', 'ScienceQA-IMG test', '%', _items, _score, _submit, aspect='square')
