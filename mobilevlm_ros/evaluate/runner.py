"""Asks the questions about a bag, frame after frame, and writes the answers down as they come.

Nothing grows with the bag: a frame is decoded, asked about and dropped. A run that was stopped goes on where it was,
because every answer names its question and frame. Playing in real time is ``realtime.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mobilevlm_ros.bags import Bag, BagFrame, BrokenMessage
from mobilevlm_ros.errors import BadImageError, MobileVLMError
from mobilevlm_ros.evaluate.answerer import Answerer, Reply
from mobilevlm_ros.evaluate.plan import Plan
from mobilevlm_ros.evaluate.questions import BagQuestion
from mobilevlm_ros.evaluate.record import RunRecord
from mobilevlm_ros.evaluate.results import ResultsWriter
from mobilevlm_ros.evaluate.rows import Pass, Pictures, key_of, row_of
from mobilevlm_ros.types import Frame

__all__ = ['decoded', 'run_offline']

GREY = 128

OnProgress = Callable[[int, int], None]
"""Told how many answers there are, and how many there will be."""


def run_offline(
    bag: Bag, plan: Plan, answerer: Answerer, out: Path, record: RunRecord, *, blind: bool, on_progress: OnProgress
) -> None:
    """Ask everything that has no answer yet, as fast as it goes.

    :param blind: ask every question about a grey picture, too.
    :raise BagRangeError: if a question has no frame; before anything is asked.
    :raise BagError: if the bag is damaged; what was answered is kept, here and below.
    :raise DiskSpaceError: if the disk is full.
    :raise MobileVLMError: if whoever answers cannot go on.
    """
    passes: list[Pass] = ['seen', 'blind'] if blind else ['seen']
    n_expected = sum(plan.count().values()) * len(passes)
    record.fields['n_expected'] = n_expected
    runner = _Runner(bag, answerer, out)
    with ResultsWriter(out) as results:
        n_done = 0
        record.save(results.n_rows)
        try:
            for frame, questions in plan.frames():
                todo = {
                    pass_: [one for one in questions if key_of(pass_, one, frame) not in results] for pass_ in passes
                }
                if any(todo.values()):
                    for row in runner.rows(frame, todo):
                        results.add(row)
                n_done += len(questions) * len(passes)
                on_progress(n_done, n_expected)
                record.save_now_and_then(results.n_rows)
            results.sync()
            record.save(results.n_rows, finished=True)
        except BaseException:
            with suppress(MobileVLMError):  # a second error would hide the first
                record.save(results.n_rows)
            raise


class _Runner:
    """Turns a frame and its questions into lines."""

    def __init__(self, bag: Bag, answerer: Answerer, out: Path) -> None:
        self._bag = bag
        self._answerer = answerer
        self._pictures = Pictures(out, [topic.name for topic in bag.topics])
        # A grey picture has no content, so that what was answered about one holds for all of its size.
        self._blind: dict[tuple[str, tuple[int, ...]], Reply] = {}

    def rows(self, message: BagFrame, todo: dict[Pass, list[BagQuestion]]) -> list[dict[str, Any]]:
        """The lines of one frame; none if it does not decode, which is counted."""
        started_s = time.monotonic()
        frame = decoded(self._bag, message)
        if frame is None:
            return []
        image_s = time.monotonic() - started_s
        model_id = self._answerer.model_id
        found = []
        if todo['seen']:
            image = self._pictures.save(message, frame.rgb_hwc)
            replies = self._answerer.answer_many(frame, [one.asked() for one in todo['seen']])
            for question, reply in zip(todo['seen'], replies, strict=True):
                timing = replace(
                    reply.timing,
                    image_s=image_s,
                    first_text_s=reply.timing.first_text_s and reply.timing.first_text_s + image_s,
                    total_s=reply.timing.total_s + image_s,
                )
                reply = replace(reply, timing=timing)
                found.append(row_of('seen', question, message, reply, model_id, frame_id=frame.frame_id, image=image))
        for question, reply in self._without_seeing(todo.get('blind', []), frame):
            found.append(row_of('blind', question, message, reply, model_id, frame_id=frame.frame_id))
        return found

    def _without_seeing(self, questions: Sequence[BagQuestion], frame: Frame) -> list[tuple[BagQuestion, Reply]]:
        shape = frame.rgb_hwc.shape
        new = [one for one in questions if (one.id, shape) not in self._blind]
        if new:
            grey = replace(frame, rgb_hwc=np.full(shape, GREY, np.uint8))
            replies = self._answerer.answer_many(grey, [one.asked() for one in new])
            self._blind |= {(one.id, shape): reply for one, reply in zip(new, replies, strict=True)}
        return [(one, self._blind[one.id, shape]) for one in questions]


def decoded(bag: Bag, message: BagFrame) -> Frame | None:
    """The frame of a message, or None if it is broken, which is counted."""
    try:
        return message.frame()
    except BadImageError as error:
        bag.count_broken(BrokenMessage(message.topic, message.index, message.received_ns, str(error)))
        return None
