"""MMBench-dev (Liu et al., 2023): one of up to four options; right only if right in every rotation of the options.

Rules: model_vqa_mmbench.py for the prompt, OpenCompass's tools/eval_mmbench.py for the scores. Where an answer names no
option that its rules can read, that tool asks ChatGPT, and falls back on a random letter. Here such an answer is wrong,
as in VLMEvalKit's exact matching, and their number is told.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mobilevlm_ros.errors import BenchmarkError
from mobilevlm_ros.evaluate.benchmarks.files import Record, find, read_table, shown
from mobilevlm_ros.evaluate.benchmarks.items import (
    LETTER_SUFFIX,
    LONG_ANSWER,
    Base64Image,
    Benchmark,
    Given,
    Item,
    Scores,
    latest,
)
from mobilevlm_ros.evaluate.benchmarks.workbook import write_workbook

__all__ = ['MMBENCH', 'read_option']

LETTERS = ('A', 'B', 'C', 'D')
_ROTATION = 1_000_000
"""Rotated copies of question 57 have the indices 1000057, 2000057 and so on."""
_TABLES = ('mmbench_dev_en_20231003.tsv', 'mmbench_dev_20230712.tsv')
_NOT_SUBMITTED = ('hint', 'category', 'source', 'image', 'comment', 'l2-category')
_NO_VALUE = {
    '', '#N/A', '#N/A N/A', '#NA', '-1.#IND', '-1.#QNAN', '-NaN', '-nan', '1.#IND', '1.#QNAN', '<NA>', 'N/A', 'NA',
    'NULL', 'NaN', 'None', 'n/a', 'nan', 'null',
}  # fmt: skip
"""What pandas, and so the published script, reads as an empty cell."""
_MORE_NO_VALUE = ('nan', 'none')
"""What the published script itself takes for one, in any case."""
_AROUND = [
    ('', '.'), ('', ','), ('', ':'), ('', ')'), ('', ').'), ('(', ')'), ('(', ').'), (':', ''), (':', ','), (':', '.'),
    (':', ')'), (':', ').'),
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Row:
    """A row without its image."""

    index: int
    answer: str
    options: Mapping[str, str]
    category: str
    ability: str
    cells: Mapping[str, str]


def _table(data: Path) -> Iterator[Record]:
    return read_table(find(data, *_TABLES))


def _index(record: Record) -> int:
    text = record.text('index')
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise BenchmarkError(f'{record.place}: "index" should be a whole number, found {shown(text)}')
    return int(text)


def _is_none(text: str) -> bool:
    return text in _NO_VALUE or text.lower() in _MORE_NO_VALUE


def _items(data: Path) -> Iterator[Item]:
    for number, record in enumerate(_table(data)):
        options: list[str] = []
        for letter in LETTERS:
            if _is_none(record.text(letter)):
                break
            options.append(record.text(letter))
        hint, question = record.text('hint'), record.text('question')
        lines = [] if _is_none(hint) else [hint]
        lines += [question, *(f'{letter}. {option}' for letter, option in zip(LETTERS, options, strict=False))]
        prompt = '\n'.join(lines)
        extra = {'round_id': 0, 'options': options, 'option_char': list(LETTERS[: len(options)])}
        image = Base64Image(record.text('image'), record.place)
        yield Item(number, _index(record), image, f'{prompt}\n{LETTER_SUFFIX}', prompt, LONG_ANSWER, extra)


def read_option(answer: str, options: Mapping[str, str]) -> str:
    """The option that an answer means: a letter by itself, or the text of exactly one option; empty if none.

    :param options: by letter.
    """
    words = answer.split()
    letters = 'ABCDE'
    if 'Failed to obtain answer via API' in answer:
        return _by_text(answer, options)
    found = [letter for letter in letters if letter in words]
    # An A among other words may be the article.
    if len(found) == 1 and not ('A' in words and len(words) > 3):
        return found[0]
    for before, after in _AROUND:
        found = [letter for letter in letters if before + letter + after in words]
        if len(found) == 1:
            return found[0]
    return _by_text(answer, options)


def _by_text(answer: str, options: Mapping[str, str]) -> str:
    found = [letter for letter, option in options.items() if option.lower() in answer.lower()]
    return found[0] if len(found) == 1 else ''


def _rows(data: Path) -> dict[int, _Row]:
    rows: dict[int, _Row] = {}
    for record in _table(data):
        index = _index(record)
        if index in rows:
            raise BenchmarkError(f'{record.place}: the index {index} is there twice')
        answer = record.text('answer')
        options = {letter: text for letter in LETTERS if (text := record.text(letter)) not in _NO_VALUE}
        if answer not in LETTERS:
            raise BenchmarkError(f'{record.place}: the answer is {shown(answer)}, expected one of {", ".join(LETTERS)}')
        cells = {name: text for name, text in record.values.items() if name not in _NOT_SUBMITTED}
        ability = str(record.values.get('l2-category', ''))
        rows[index] = _Row(index, answer, options, record.text('category'), ability, cells)
    return rows


def _score(data: Path, answers: Sequence[Given], partial: bool) -> Scores:
    by_question = latest(answers)
    groups: dict[int, list[bool]] = defaultdict(list)
    upright: list[bool] = []
    rows = _rows(data)
    n_unread = 0
    for index in sorted(rows):
        row, given = rows[index], by_question.get(str(index))
        if given is None and partial:
            continue
        # A spreadsheet has no empty text, so that the published tool reads "nan".
        text = given.text if given and given.text else 'nan'
        option = read_option(text, row.options)
        n_unread += not option
        groups[index % _ROTATION].append(option == row.answer)
        if index < _ROTATION:
            upright.append(option == row.answer)
    hits = {base: all(rights) for base, rights in groups.items() if base in rows}
    if not hits:
        raise BenchmarkError('none of the answers is to a question of MMBench')
    figures = {'CircularEval': _percent(list(hits.values())), 'Vanilla, first rotation only': _percent(upright)}
    for kind, name_of in (('ability', lambda row: row.ability), ('category', lambda row: row.category)):
        parts: dict[str, list[bool]] = defaultdict(list)
        for base, hit in hits.items():
            parts[name_of(rows[base])].append(hit)
        figures |= {f'{kind} {name}': _percent(parts[name]) for name in sorted(parts) if name}
    notes = [f'{n_unread} answers name no option, and count as wrong; the published tool would ask ChatGPT']
    if partial:
        notes.append('rotations without an answer were left out')
    return Scores(figures, len(hits), tuple(notes[not n_unread :]))


def _percent(rights: Sequence[bool]) -> float:
    return 100.0 * sum(rights) / len(rights) if rights else 0.0


def _submit(data: Path, answers: Sequence[Given], folder: Path) -> list[Path]:
    """The workbook that convert_mmbench_for_submission.py makes."""
    by_question = latest(answers)
    path = folder / 'predictions.xlsx'

    def lines() -> Iterator[list[int | str]]:
        for number, row in enumerate(_rows(data).values()):
            names, cells = list(row.cells), list(row.cells.values())
            if number == 0:
                yield [*names[:6], 'prediction', *names[6:]]
            given = by_question.get(str(row.index))
            written = [row.index if name == 'index' else cell for name, cell in zip(names, cells, strict=True)]
            yield [*written[:6], given.text if given else '', *written[6:]]

    write_workbook(path, lines())
    return [path]


MMBENCH = Benchmark('mmbench', 'MMBench-dev (en)', '%', _items, _score, _submit)
