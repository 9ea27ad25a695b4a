"""POPE on COCO (Li et al., 2023): is an object in the picture? Asked of random, popular and misleading objects.

Rules: LLaVA's eval_pope.py. The papers do not say which figure they print; LLaVA's is the mean F1 of the three parts,
and the MobileVLM papers stand beside it in one column, so that this comes first here.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mobilevlm_ros.errors import BenchmarkError
from mobilevlm_ros.evaluate.benchmarks.files import Record, find, find_image, read_lines, shown
from mobilevlm_ros.evaluate.benchmarks.items import SHORT_ANSWER, Benchmark, FileImage, Given, Item, Scores, latest

__all__ = ['POPE', 'Counts', 'says_yes']

CATEGORIES = ('random', 'popular', 'adversarial')


@dataclass
class Counts:
    """Answers by what is true and what was said; ``true_yes`` are the true positives."""

    true_yes: int = 0
    false_yes: int = 0
    true_no: int = 0
    false_no: int = 0

    def add(self, is_yes: bool, said_yes: bool) -> None:
        """Count one answer."""
        self.true_yes += is_yes and said_yes
        self.false_yes += not is_yes and said_yes
        self.true_no += not is_yes and not said_yes
        self.false_no += is_yes and not said_yes

    @property
    def n(self) -> int:
        """All answers."""
        return self.true_yes + self.false_yes + self.true_no + self.false_no

    @property
    def precision(self) -> float:
        """Of those that said yes; 0 of none, where the published script divides by zero. So for the next two."""
        return _share(self.true_yes, self.true_yes + self.false_yes)

    @property
    def recall(self) -> float:
        """Of those that are yes."""
        return _share(self.true_yes, self.true_yes + self.false_no)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return _share(2 * self.precision * self.recall, self.precision + self.recall)

    @property
    def accuracy(self) -> float:
        """Of all."""
        return _share(self.true_yes + self.true_no, self.n)

    @property
    def yes_ratio(self) -> float:
        """How many said yes."""
        return _share(self.true_yes + self.false_yes, self.n)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def says_yes(text: str) -> bool:
    """Whether an answer is taken for yes: where its first sentence has none of the words No, no and not."""
    words = text.split('.')[0].replace(',', '').split(' ')
    return not {'No', 'no', 'not'} & set(words)


def _questions(data: Path) -> Iterator[Record]:
    for record in read_lines(find(data, 'llava_pope_test.jsonl')):
        if record.text('category') not in CATEGORIES:
            category = shown(record.text('category'))
            raise BenchmarkError(f'{record.place}: the category is {category}, expected {", ".join(CATEGORIES)}')
        yield record


def _items(data: Path) -> Iterator[Item]:
    images = find(data, 'val2014')
    for number, record in enumerate(_questions(data)):
        text = record.text('text')
        image = FileImage(find_image(images, record.text('image'), record.place))
        yield Item(number, record.identity('question_id'), image, text, text, SHORT_ANSWER)


def _labelled(data: Path) -> Iterator[tuple[Record, Record]]:
    """Each question with its label: they belong together by their order within a category."""
    labels = {name: read_lines(find(data, f'coco/coco_pope_{name}.json')) for name in CATEGORIES}
    for question in _questions(data):
        category = question.text('category')
        label = next(labels[category], None)
        if label is None:
            raise BenchmarkError(
                f'{question.place}: coco/coco_pope_{category}.json has no label for it: it is too short'
            )
        if label.values.get('image', question.values.get('image')) != question.values.get('image'):
            raise BenchmarkError(
                f'{question.place} is about {shown(question.text("image"))}, but the label at its place, '
                f'{label.place}, about {shown(label.text("image"))}: the files are of different versions of POPE'
            )
        yield question, label


def _score(data: Path, answers: Sequence[Given], partial: bool) -> Scores:
    by_question = latest(answers)
    parts = {name: Counts() for name in CATEGORIES}
    for question, label in _labelled(data):
        question_id = str(question.identity('question_id'))
        if question_id in by_question:
            is_yes = label.text('label') != 'no'
            parts[question.text('category')].add(is_yes, says_yes(by_question[question_id].text))
        elif not partial:
            raise BenchmarkError(f'there is no answer to question {question_id} of {question.place}; POPE wants all')
    counted = {name: part for name, part in parts.items() if part.n}
    if not counted:
        raise BenchmarkError('none of the answers is to a question of POPE')
    figures = {
        'F1, mean of parts': 100.0 * sum(part.f1 for part in counted.values()) / len(counted),
        'Accuracy, mean of parts': 100.0 * sum(part.accuracy for part in counted.values()) / len(counted),
    }
    for name, part in counted.items():
        for what in ('f1', 'accuracy', 'precision', 'recall', 'yes_ratio'):
            figures[f'{name} {what}'] = 100.0 * getattr(part, what)
    missing = [name for name in CATEGORIES if name not in counted]
    notes = (f'no answers of the part {" and ".join(missing)}',) if missing else ()
    return Scores(figures, sum(part.n for part in counted.values()), notes)


def _submit(data: Path, answers: Sequence[Given], folder: Path) -> list[Path]:
    """One file a part, as POPE's own evaluate.py reads them."""
    by_question = latest(answers)
    lines = defaultdict(list)
    for question, label in _labelled(data):
        given = by_question.get(str(question.identity('question_id')))
        if given is not None:
            asked = label.values.get('text', question.text('text').split('\n')[0])
            record = {'question': asked, 'answer': given.text}
            lines[question.text('category')].append(json.dumps(record, ensure_ascii=False) + '\n')
    paths = []
    for category, written in lines.items():
        paths.append(folder / f'coco_pope_{category}_answers.json')
        paths[-1].write_text(''.join(written), encoding='utf-8')
    return paths


POPE = Benchmark('pope', 'POPE', '%', _items, _score, _submit)
