"""GQA, testdev-balanced (Hudson and Manning, 2019): short answers, exact match.

Rules: convert_gqa_for_eval.py (a final full stop goes, letters become small) and the dataset's own eval.py.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from mobilevlm_ros.errors import BenchmarkError
from mobilevlm_ros.evaluate.benchmarks.files import Record, find, find_image, read_document, read_lines
from mobilevlm_ros.evaluate.benchmarks.items import SHORT_ANSWER, Benchmark, FileImage, Given, Item, Scores, latest

__all__ = ['GQA']

_QUESTIONS = ('llava_gqa_testdev_balanced.jsonl',)
_IMAGES = ('images', 'data/images')
_TRUTH = ('testdev_balanced_questions.json', 'data/testdev_balanced_questions.json')


def _items(data: Path) -> Iterator[Item]:
    images = find(data, *_IMAGES)
    for number, record in enumerate(read_lines(find(data, *_QUESTIONS))):
        text = record.text('text')
        image = FileImage(find_image(images, record.text('image'), record.place))
        yield Item(number, record.identity('question_id'), image, text, text, SHORT_ANSWER)


def prediction(text: str) -> str:
    """An answer as it is compared."""
    return text.rstrip('.').lower()


def _score(data: Path, answers: Sequence[Given], partial: bool) -> Scores:
    by_question = latest(answers)
    path = find(data, *_TRUTH)
    right: dict[str, list[bool]] = defaultdict(list)
    for question_id, value in Record.of(read_document(path), str(path)).values.items():
        question = Record.of(value, f'{path}, question {question_id}')
        if question.values.get('isBalanced') is not True:
            continue
        if question_id not in by_question:
            if partial:
                continue
            raise BenchmarkError(f'there is no answer to question {question_id} of {path}; GQA wants all of them')
        is_right = prediction(by_question[question_id].text) == question.text('answer')
        types = Record.of(question.values.get('types'), f'{question.place}, types')
        right['Accuracy'].append(is_right)
        right['Open' if types.text('structural') == 'query' else 'Binary'].append(is_right)
        for kind in ('structural', 'semantic'):
            right[f'{kind} {types.text(kind)}'].append(is_right)
    if not right:
        raise BenchmarkError(f'none of the answers is to a balanced question of {path}')
    order = ['Accuracy', 'Binary', 'Open', *sorted(name for name in right if ' ' in name)]
    figures = {name: 100.0 * sum(right[name]) / len(right[name]) for name in order if name in right}
    return Scores(figures, len(right['Accuracy']))


def _submit(data: Path, answers: Sequence[Given], folder: Path) -> list[Path]:
    path = folder / 'testdev_balanced_predictions.json'
    records = [{'questionId': str(one.question_id), 'prediction': prediction(one.text)} for one in answers]
    path.write_text(json.dumps(records, ensure_ascii=False), encoding='utf-8')
    return [path]


GQA = Benchmark('gqa', 'GQA testdev-balanced', '%', _items, _score, _submit)
