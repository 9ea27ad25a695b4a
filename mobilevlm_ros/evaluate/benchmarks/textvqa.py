"""TextVQA 0.5.1 validation (Singh et al., 2019): short answers, scored by how many of ten people agree.

The published question file has OCR tokens in its prompts, and the paper's figures are with them. Rules:
LLaVA's eval_textvqa.py and m4c_evaluator.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mobilevlm_ros.errors import BenchmarkError
from mobilevlm_ros.evaluate.benchmarks.files import Record, find, find_image, read_document, read_lines, shown
from mobilevlm_ros.evaluate.benchmarks.items import SHORT_ANSWER, Benchmark, FileImage, Given, Item, Scores
from mobilevlm_ros.evaluate.benchmarks.textvqa_words import normalise

__all__ = ['TEXT_VQA', 'question_of', 'soft_score']

_N_PEOPLE = 10
_OLD_PROMPT = re.compile(r'Question: (.*?) Short answer:', re.DOTALL)

Key = tuple[str, str]


def _items(data: Path) -> Iterator[Item]:
    images = find(data, 'train_images')
    for number, record in enumerate(read_lines(find(data, 'llava_textvqa_val_v051_ocr.jsonl'))):
        text = record.text('text')
        question_of(text, record.place)
        image = FileImage(find_image(images, record.text('image'), record.place))
        yield Item(number, record.identity('question_id'), image, text, text, SHORT_ANSWER)


def question_of(prompt: str, place: str) -> str:
    """The question in a prompt, in small letters.

    :raise BenchmarkError: if the prompt has none of the published forms.
    """
    lines = prompt.split('\n')
    if prompt.startswith('OCR tokens: '):
        found = _OLD_PROMPT.search(prompt)
        if found is not None:
            return found[1].lower()
    elif 'Reference OCR token: ' in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith('Reference OCR token:') else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise BenchmarkError(
        f'{place}: {shown(prompt)} is no prompt of TextVQA: expected the question, perhaps a line "Reference OCR '
        'token: ...", and a line that says how to answer'
    )


def soft_score(answer: str, people: Sequence[str]) -> float:
    """How right an answer is: mean over the people of min(1, n / 3), where n others gave the same answer.

    :param people: the answers of ten people.
    """
    same = sum(normalise(one) == normalise(answer) for one in people)
    if not same:
        return 0.0
    return (same * min(1.0, (same - 1) / 3) + (len(people) - same) * min(1.0, same / 3)) / len(people)


def _truth(data: Path) -> dict[Key, Record]:
    """The questions by image and text; the last one counts where there are several, as published."""
    path = find(data, 'TextVQA_0.5.1_val.json')
    listed = Record.of(read_document(path), str(path)).values.get('data')
    if not isinstance(listed, list):
        raise BenchmarkError(f'{path}: "data" should be a list of questions, found {shown(listed)}')
    records = (Record.of(value, f'{path}, question {index + 1}') for index, value in enumerate(listed))
    return {(str(one.identity('image_id')), one.text('question').lower()): one for one in records}


def _matched(data: Path, answers: Sequence[Given]) -> Iterator[tuple[Given, Record]]:
    truth = _truth(data)
    for answer in answers:
        key = str(answer.question_id), question_of(answer.prompt, f'the answer to {answer.question_id}')
        if key not in truth:
            raise BenchmarkError(f'TextVQA_0.5.1_val.json has no question {shown(key[1])} about image {key[0]}')
        yield answer, truth[key]


def _score(data: Path, answers: Sequence[Given], partial: bool) -> Scores:
    scores = []
    for answer, question in _matched(data, answers):
        people = question.texts('answers')
        if len(people) != _N_PEOPLE:
            raise BenchmarkError(f'{question.place} has {len(people)} answers, expected those of {_N_PEOPLE} people')
        scores.append(soft_score(answer.text, people))
    if not scores:
        raise BenchmarkError('there are no answers to score')
    return Scores({'Accuracy': 100.0 * sum(scores) / len(scores)}, len(scores))


def _submit(data: Path, answers: Sequence[Given], folder: Path) -> list[Path]:
    path = folder / 'textvqa_val_predictions.json'
    records = [
        {'question_id': question.whole('question_id'), 'answer': answer.text}
        for answer, question in _matched(data, answers)
    ]
    path.write_text(json.dumps(records, ensure_ascii=False), encoding='utf-8')
    return [path]


TEXT_VQA = Benchmark('textvqa', 'TextVQA validation, with OCR tokens', '%', _items, _score, _submit)
