"""MME (Fu et al., 2023): two yes/no questions about each image, in ten categories of perception and four of cognition.

Rules: convert_answer_to_mme.py and the release's calculation.py. A category's score is the share of right answers plus
the share of images with both right, in percent. Papers print the sum over perception.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mobilevlm_ros.errors import BenchmarkError
from mobilevlm_ros.evaluate.benchmarks.files import find, find_image, read_lines, shown
from mobilevlm_ros.evaluate.benchmarks.items import (
    SHORT_ANSWER,
    SHORT_SUFFIX,
    Benchmark,
    FileImage,
    Given,
    Item,
    Scores,
    latest,
)

__all__ = ['COGNITION', 'MME', 'PERCEPTION', 'parse_answer']

PERCEPTION = (
    'existence', 'count', 'position', 'color', 'posters', 'celebrity', 'scene', 'landmark', 'artwork', 'OCR'
)  # fmt: skip
COGNITION = ('commonsense_reasoning', 'numerical_calculation', 'text_translation', 'code_reasoning')
_CLOSED = ' Please answer yes or no.'
_IMAGES = ('images', 'MME_Benchmark_release_version/MME_Benchmark', 'MME_Benchmark_release_version')
_LONGEST_FILE = 1 << 16


@dataclass(frozen=True)
class _Line:
    """One line of a category's file: what was asked of which image, what is right, and what was answered."""

    file: str
    question: str
    truth: str
    answer: str

    @property
    def is_right(self) -> bool:
        return parse_answer(self.answer) == self.truth.lower()


def _items(data: Path) -> Iterator[Item]:
    images = find(data, *_IMAGES)
    for number, record in enumerate(read_lines(find(data, 'llava_mme.jsonl'))):
        text, question_id = record.text('text'), record.text('question_id')
        _category(question_id, record.place)
        image = FileImage(find_image(images, record.text('image'), record.place))
        yield Item(number, question_id, image, text, text, SHORT_ANSWER)


def _category(question_id: str, place: str) -> str:
    category = question_id.split('/')[0]
    if category not in PERCEPTION + COGNITION:
        raise BenchmarkError(f'{place}: {shown(question_id)} should begin with a category of MME, such as existence/')
    return category


def parse_answer(answer: str) -> str:
    """``yes``, ``no``, or ``other``, which is always wrong; only the first four characters count."""
    start = answer.lower()[:4]
    if 'yes' in start:
        return 'yes'
    return 'no' if 'no' in start else 'other'


class _Truth:
    """The right answers, out of the release's folders; each category is read when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[str, str], dict[str, str]] = {}

    def of(self, category: str, file: str, prompt: str) -> tuple[str, str]:
        """The question as the release words it, and the right answer."""
        known = self._of_file(category, file)
        question = prompt.replace(SHORT_SUFFIX, '').strip() if SHORT_SUFFIX in prompt else prompt
        if _CLOSED.strip() not in question:
            question += _CLOSED
            if question not in known:
                question = question.replace(_CLOSED, f' {_CLOSED}')
        if question not in known:
            raise BenchmarkError(f'{self._path(category, file)} has no question {shown(question)}')
        return question, known[question]

    def _path(self, category: str, file: str) -> Path:
        inner = self._folder / category / 'questions_answers_YN'
        return (inner if inner.is_dir() else self._folder / category) / file

    def _of_file(self, category: str, file: str) -> dict[str, str]:
        if (category, file) not in self._known:
            path = self._path(category, file)
            try:
                with path.open(encoding='utf-8') as stream:
                    lines = stream.read(_LONGEST_FILE).splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise BenchmarkError(f'{path} with the right answers cannot be read: {error}') from error
            pairs = [line.strip().split('\t') for line in lines if line.strip()]
            for number, pair in enumerate(pairs, start=1):
                if len(pair) != 2 or pair[1].lower() not in ('yes', 'no'):
                    raise BenchmarkError(f'{path}, line {number}: expected a question, a tabulator and Yes or No')
            self._known[category, file] = {pair[0]: pair[1] for pair in pairs}
        return self._known[category, file]


def _lines(data: Path, answers: Sequence[Given]) -> dict[str, list[_Line]]:
    """The lines of each category's file, in the order of the answers."""
    truth = _Truth(find(data, *_IMAGES))
    lines: dict[str, list[_Line]] = defaultdict(list)
    for given in answers:
        question_id = str(given.question_id)
        category = _category(question_id, 'an answer')
        file = question_id.split('/')[-1].split('.')[0] + '.txt'
        if '\0' in file:
            raise BenchmarkError(f'{shown(question_id)} names no image of MME')
        question, right = truth.of(category, file, given.prompt)
        # Tabulators and line breaks would make more of a line than it is.
        lines[category].append(_Line(file, question, right, ' '.join(given.text.split())))
    return lines


def _category_score(category: str, lines: Sequence[_Line], partial: bool) -> tuple[float, int]:
    """A category's score, of 200, and how many answers are no yes and no no."""
    pairs = [lines[start : start + 2] for start in range(0, len(lines), 2)]
    if partial and len(pairs[-1]) == 1:
        pairs.pop()
    for pair in pairs:
        if len(pair) != 2 or pair[0].file != pair[1].file:
            raise BenchmarkError(
                f'category {category}: the answers about {pair[0].file} are no two that follow each other; MME scores '
                'them in pairs'
            )
    if not pairs:
        return 0.0, 0
    rights = [[line.is_right for line in pair] for pair in pairs]
    accuracy = sum(map(sum, rights)) / (2 * len(pairs))
    both = sum(map(all, rights)) / len(pairs)
    n_other = sum(parse_answer(line.answer) == 'other' for pair in pairs for line in pair)
    return 100.0 * (accuracy + both), n_other


def _score(data: Path, answers: Sequence[Given], partial: bool) -> Scores:
    latest(answers)
    lines = _lines(data, answers)
    scores, n_other, n = {}, 0, 0
    for category in PERCEPTION + COGNITION:
        if category in lines:
            scores[category], n_more = _category_score(category, lines[category], partial)
            n_other, n = n_other + n_more, n + len(lines[category])
        elif not partial:
            raise BenchmarkError(f'there are no answers of the category {category}; MME wants all of them')
    figures = {
        'Perception': sum(scores.get(category, 0.0) for category in PERCEPTION),
        'Cognition': sum(scores.get(category, 0.0) for category in COGNITION),
    }
    notes = (f'{n_other} answers are neither yes nor no, and count as wrong',) if n_other else ()
    return Scores(figures | scores, n, notes)


def _submit(data: Path, answers: Sequence[Given], folder: Path) -> list[Path]:
    """One file a category, as calculation.py reads them."""
    paths = []
    for category, lines in _lines(data, answers).items():
        paths.append(folder / f'{category}.txt')
        text = ''.join(f'{line.file}\t{line.question}\t{line.truth}\t{line.answer}\n' for line in lines)
        paths[-1].write_text(text, encoding='utf-8')
    return paths


MME = Benchmark('mme', 'MME', 'of 2000', _items, _score, _submit)
