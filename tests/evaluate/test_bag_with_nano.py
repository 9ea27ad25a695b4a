"""The committed recordings of real footage with hand-written questions, evaluated with nano: the same from each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mobilevlm_ros.bags import open_bag
from mobilevlm_ros.build.nano import build_nano
from mobilevlm_ros.cli import main
from mobilevlm_ros.evaluate.results import read_results, read_run
from mobilevlm_ros.paths import bundle_dir
from mobilevlm_ros.runtime.loading import load_assistant_from
from mobilevlm_ros.types import AnswerFormat, Question

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

DATA = Path(__file__).resolve().parents[1] / 'data'
QUESTIONS = DATA / 'bag_questions.yaml'
N_QUESTIONS, N_ANSWERS, N_SCORED = 25, 42, 41


@pytest.fixture(scope='module')
def nano() -> Path:
    path = bundle_dir('nano', 'cpu')
    build_nano(path)
    return path


@pytest.fixture(scope='module')
def evaluated(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run over the mcap lies, with its blind pass."""
    out = tmp_path_factory.mktemp('runs') / 'mcap'
    evaluate(nano, DATA / 'bag_mcap', out, '--blind')
    return out


def evaluate(nano: Path, bag: Path, out: Path, *options: str) -> list[dict[str, Any]]:
    arguments = ['evaluate', 'bag', str(bag), '--questions', str(QUESTIONS), '--out', str(out), '--bundle', str(nano)]
    assert main([*arguments, *options]) == 0
    return list(read_results(out))


def test_nano_answers_every_question(evaluated: Path) -> None:
    rows = list(read_results(evaluated))
    assert {row['result_code'] for row in rows} <= {'OK', 'UNKNOWN'}
    assert len(rows) == 2 * N_ANSWERS
    assert len({row['question_id'] for row in rows}) == N_QUESTIONS
    assert sum(row['correct'] is not None for row in rows) == 2 * N_SCORED
    assert read_run(evaluated)['finished']
    assert (evaluated / 'report.html').stat().st_size > 10_000


def test_seeing_helps_nano(evaluated: Path) -> None:
    """Weak on purpose: a model that answers about another picture, or a blank one, does not pass."""
    n_right = {'seen': 0, 'blind': 0}
    for row in read_results(evaluated):
        n_right[row['pass']] += bool(row['correct'])
    assert n_right['seen'] > n_right['blind']


@pytest.mark.parametrize(('question_id', 'within'), [('man-in-suit', 1e-4), ('helmet', 0.03)])
def test_nano_answers_as_the_assistant_of_the_node(
    nano: Path, evaluated: Path, question_id: str, within: float
) -> None:
    """``helmet`` is computed together with two others, where a quantised matrix's products round differently."""
    row = next(row for row in read_results(evaluated) if (row['question_id'], row['pass']) == (question_id, 'seen'))
    assistant = load_assistant_from(nano)
    try:
        with open_bag(DATA / 'bag_mcap') as bag:
            frame = next(one for one in bag.frames(row['camera']) if one.index == row['frame_index']).frame()
        answer = assistant.ask(Question(row['question'], AnswerFormat.YES_NO), frame)
    finally:
        assistant.close()
    assert row['answer'] == answer.options[answer.probabilities.index(max(answer.probabilities))]
    assert row['prompt_hash'] == answer.prompt_hash
    assert row['confidence'] == pytest.approx(max(answer.probabilities), abs=within)


def test_the_storage_makes_no_difference(nano: Path, evaluated: Path, tmp_path: Path) -> None:
    of_mcap = [row for row in read_results(evaluated) if row['pass'] == 'seen']
    of_sqlite3 = evaluate(nano, DATA / 'bag_sqlite3', tmp_path / 'out')
    shown = [[(row['key'], row['answer'], row['prompt_hash']) for row in rows] for rows in (of_mcap, of_sqlite3)]
    assert shown[0] == shown[1]
