"""A small real bag with hand-written questions, evaluated with nano in every storage: the same answers from each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bag_writing as writing
import numpy as np
import pytest
from PIL import Image

from mobilevlm_ros.bags import open_bag
from mobilevlm_ros.build.nano import build_nano
from mobilevlm_ros.cli import main
from mobilevlm_ros.evaluate.results import read_results, read_run
from mobilevlm_ros.paths import bundle_dir
from mobilevlm_ros.runtime.loading import load_assistant_from
from mobilevlm_ros.types import AnswerFormat, Question

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

QUESTIONS = Path(__file__).resolve().parents[1] / 'data' / 'bag_questions.yaml'
PICTURES = ('alley', 'aloe', 'apple', 'astronaut', 'barrier', 'bedroom')


@pytest.fixture(scope='module')
def nano() -> Path:
    path = bundle_dir('nano', 'cpu')
    build_nano(path)
    return path


def messages() -> list[writing.Message]:
    """What two cameras see, one picture a second."""
    paths = [writing.EXAM_IMAGES / f'{name}.jpg' for name in PICTURES]
    pixels = [np.asarray(Image.open(path).convert('RGB')) for path in paths]
    second = 1_000_000_000
    front = writing.stream('/front/image_raw', pixels, every_ns=second)
    hand = writing.stream('/hand/image_raw/compressed', pixels, every_ns=second, compressed=True)
    return [*front, *hand]


def evaluated(nano: Path, bag: Path, out: Path, *options: str) -> list[dict[str, Any]]:
    arguments = ['evaluate', 'bag', str(bag), '--questions', str(QUESTIONS), '--out', str(out), '--bundle', str(nano)]
    assert main([*arguments, *options]) == 0
    return list(read_results(out))


def test_nano_answers_about_a_bag(nano: Path, tmp_path: Path) -> None:
    bag = writing.write_bag(tmp_path / 'mcap', messages())
    rows = evaluated(nano, bag, tmp_path / 'out', '--blind')
    seen = {row['question_id']: row for row in rows if row['pass'] == 'seen'}
    assert {row['result_code'] for row in rows} <= {'OK', 'UNKNOWN'}
    assert len(seen) == 10 and len(rows) == 2 * (10 + 2), 'one is asked three times'
    assert read_run(tmp_path / 'out')['finished']
    assert (tmp_path / 'out' / 'report.html').stat().st_size > 10_000
    # The same frame and question, asked as the node asks.
    assistant = load_assistant_from(nano)
    try:
        with open_bag(bag) as opened:
            frame = next(opened.frames('/hand/image_raw/compressed', start_s=1.0)).frame()
        answer = assistant.ask(Question('Is there a plant in the picture?', AnswerFormat.YES_NO), frame)
    finally:
        assistant.close()
    plant = seen['plant']
    assert (plant['answer'], plant['prompt_hash']) == (answer.text, answer.prompt_hash)
    assert plant['confidence'] == pytest.approx(answer.confidence, abs=1e-3)


def test_the_storage_makes_no_difference(nano: Path, tmp_path: Path) -> None:
    plain = writing.write_bag(tmp_path / 'mcap', messages())
    packed = writing.write_bag(tmp_path / 'sqlite', messages(), storage='sqlite3', compression='file', n_parts=2)
    of_plain, of_packed = (evaluated(nano, bag, tmp_path / f'{bag.name}_out') for bag in (plain, packed))
    assert [(row['key'], row['answer'], row['prompt_hash']) for row in of_plain] == [
        (row['key'], row['answer'], row['prompt_hash']) for row in of_packed
    ]
