"""The description of a run over a bag: what was asked of whom, and how far it has come.

A run may go on in a folder only if it is the same run: the same model, bag, clock and way of asking, and the same
wording of every question that has answers there.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import mobilevlm_ros
from mobilevlm_ros.bags import Bag, BrokenMessage
from mobilevlm_ros.errors import EvaluationError
from mobilevlm_ros.evaluate.plan import Plan
from mobilevlm_ros.evaluate.results import RUN, read_results, read_run, write_run

__all__ = ['RunRecord']

_SAVE_EVERY_S = 10.0


class RunRecord:
    """See the module; also counts the time that a run took, over all its parts.

    :param answerer: who answers: ``model_id``, and what else names it.
    :param questions_file: path and hash.
    :param settings: how it is asked; a run goes on only with equal ones.
    :raise EvaluationError: if the folder holds answers of another run.
    """

    def __init__(
        self,
        out: Path,
        bag: Bag,
        plan: Plan,
        *,
        answerer: Mapping[str, Any],
        questions_file: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> None:
        self._out = out
        self._bag = bag
        self._started_s = time.monotonic()
        self._saved_s = self._started_s
        self.fields: dict[str, Any] = {
            'finished': False,
            'bundle': dict(answerer),
            'bag': {
                'path': str(bag.path),
                'topics': [
                    {
                        'topic': topic.name,
                        'type': topic.type,
                        'n_messages': topic.n_messages,
                        'first_ns': topic.first_ns,
                        'last_ns': topic.last_ns,
                        'first_stamp_ns': topic.first_stamp_ns,
                        'last_stamp_ns': topic.last_stamp_ns,
                    }
                    for topic in bag.topics
                ],
                'start_ns': bag.start_ns('receive'),
                'end_ns': bag.end_ns('receive'),
                'notes': bag.notes,
            },
            'questions_file': dict(questions_file),
            'questions': [one.as_record() | {'camera': plan.topics[one.id]} for one in plan.questions],
            'settings': dict(settings),
            'machine': _machine(),
            'started': _now(),
            'n_expected': None,
            'n_done': 0,
            'realtime': None,
        }
        self._earlier_s = 0.0
        if (out / RUN).is_file():
            self._go_on(read_run(out))

    def _go_on(self, before: Mapping[str, Any]) -> None:
        for what, shown in (('model', _model), ('bag', _bag), ('way of asking', _settings)):
            there, here = shown(before), shown(self.fields)
            if there != here:
                raise EvaluationError(
                    f'{self._out} holds results of another {what} ({there}), this run has {here}: give another --out'
                )
        answered = {row['question_id'] for row in read_results(self._out)}
        new = {question['id']: question for question in self.fields['questions']}
        for question in before['questions']:
            if question['id'] in answered and new.get(question['id']) != question:
                raise EvaluationError(
                    f'{self._out} holds answers to the question {question["id"]!r}, which is another one now, or gone: '
                    'give another --out, or give a changed question another id'
                )
        self._earlier_s = before['wall_s']
        self.fields['started'] = before['started']

    def save(self, n_done: int, *, finished: bool = False) -> None:
        """Write the description.

        :raise DiskSpaceError: if there is no room.
        """
        broken = self._bag.broken
        self.fields |= {
            'finished': finished,
            'n_done': n_done,
            'updated': _now(),
            'wall_s': self._earlier_s + time.monotonic() - self._started_s,
            'broken_frames': [_broken(one) for one in broken],
            'n_broken_frames': self._bag.n_broken,
        }
        write_run(self._out, self.fields)
        self._saved_s = time.monotonic()

    def save_now_and_then(self, n_done: int) -> None:
        """The same, unless that was a few seconds ago."""
        if time.monotonic() - self._saved_s > _SAVE_EVERY_S:
            self.save(n_done)


def _model(run: Mapping[str, Any]) -> str:
    return ' '.join(str(run['bundle'][name]) for name in ('model_id', 'hash') if run['bundle'].get(name))


def _bag(run: Mapping[str, Any]) -> list[Any]:
    """What a bag is known by, wherever it lies."""
    return [(topic['topic'], topic['n_messages'], topic['first_ns']) for topic in run['bag']['topics']]


def _settings(run: Mapping[str, Any]) -> dict[str, Any]:
    """What makes answers comparable; a blind pass can be added later."""
    return {name: value for name, value in run['settings'].items() if name != 'blind'}


def _broken(message: BrokenMessage) -> dict[str, Any]:
    fields = asdict(message)
    return {
        'camera': fields['topic'],
        'frame_index': fields['index'],
        'received_ns': fields['received_ns'],
        'message': fields['problem'],
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec='seconds')


def _machine() -> dict[str, Any]:
    return {
        'platform': platform.platform(),
        'cpu': platform.processor() or platform.machine(),
        'n_cpus': len(os.sched_getaffinity(0)),
        'python': platform.python_version(),
        'package_version': mobilevlm_ros.__version__,
    }
