"""Small bags of real pictures with questions, and runs over them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import bag_writing as writing

from mobilevlm_ros.bags import Bag, open_bag
from mobilevlm_ros.evaluate.answerer import Answerer
from mobilevlm_ros.evaluate.plan import Plan
from mobilevlm_ros.evaluate.questions import BagQuestion
from mobilevlm_ros.evaluate.record import RunRecord
from mobilevlm_ros.evaluate.results import read_results
from mobilevlm_ros.evaluate.runner import OnProgress, run_offline

WHO = {'model_id': 'tiny', 'hash': 'abc', 'path': '', 'warning': ''}


def question(id_: str = 'q', **fields: Any) -> BagQuestion:
    base = {'id': id_, 'text': 'Is the car red?', 'when': 'each_frame', 'format': 'yes_no', 'truth': 'yes'}
    return BagQuestion.model_validate(base | fields)


def camera_bag(path: Path, n: int = 4, **options: Any) -> Path:
    """One camera, a picture every 0.1 s."""
    return writing.write_bag(path, writing.stream('/camera', writing.pictures(n), **options))


def opened(path: Path) -> AbstractContextManager[Bag]:
    return open_bag(path)


def recorded(out: Path, bag: Bag, plan: Plan, **settings: Any) -> RunRecord:
    file = {'path': 'q.yaml', 'sha256': '0'}
    return RunRecord(out, bag, plan, answerer=WHO, questions_file=file, settings={'blind': False} | settings)


def run(
    path: Path,
    questions: Sequence[BagQuestion],
    answerer: Answerer,
    out: Path,
    *,
    blind: bool = False,
    on_progress: OnProgress = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Ask; returns all lines."""
    with open_bag(path) as bag:
        plan = Plan(bag, questions)
        record = recorded(out, bag, plan, blind=blind)
        run_offline(bag, plan, answerer, out, record, blind=blind, on_progress=on_progress)
    return list(read_results(out))
