"""One line of the results: what was asked about which frame, and what came of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevlm_ros.bags import BagFrame
from mobilevlm_ros.errors import EvaluationError
from mobilevlm_ros.evaluate.answerer import Reply
from mobilevlm_ros.evaluate.questions import BagQuestion
from mobilevlm_ros.evaluate.results import replace_file

__all__ = ['FRAMES', 'Pass', 'Pictures', 'key_of', 'row_of']

Pass = Literal['seen', 'blind']
FRAMES = 'frames'
FIRST_FAILURE = 100
"""Result codes from here on mean that there was no answer, not that it was unsure."""
_MOST_PIXELS = 640
_JPEG_QUALITY = 80


def key_of(pass_: Pass, question: BagQuestion, frame: BagFrame) -> str:
    """Names an answer within a run."""
    return f'{pass_}/{question.id}{frame.topic}/{frame.index}'


def row_of(
    pass_: Pass,
    question: BagQuestion,
    frame: BagFrame,
    reply: Reply,
    model_id: str,
    *,
    frame_id: str = '',
    image: str = '',
    realtime: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The line.

    :param frame: that the question was asked about.
    :param image: of the frame, relative to the folder of the results.
    """
    failed = reply.result_code >= FIRST_FAILURE
    right = question.is_right(reply.text)
    return {
        'key': key_of(pass_, question, frame),
        'pass': pass_,
        'question_id': question.id,
        'kind': question.kind or question.format.lower(),
        'question': question.text,
        'format': question.format,
        'choices': list(question.choices),
        'truth': question.shown_truth,
        'answer': reply.text,
        'correct': right and not failed if right is not None else None,
        'result_code': reply.result_code.name,
        'message': reply.message,
        'confidence': reply.confidence,
        'options': list(reply.options),
        'probabilities': list(reply.probabilities),
        'truncated': reply.truncated,
        'camera': frame.topic,
        'frame_index': frame.index,
        'stamp_ns': frame.stamp_ns,
        'received_ns': frame.received_ns,
        'frame_id': frame_id,
        'image': image,
        'timing': asdict(reply.timing),
        'prompt_hash': reply.prompt_hash,
        'model_id': model_id,
        'negation_of': question.negation_of,
        'neighbours': question.id,
        'realtime': realtime,
    }


class Pictures:
    """Keeps small pictures of the frames that were asked about, for people.

    :param out: folder of the results.
    :param topics: all that there may be frames of.
    :raise EvaluationError: if the folder cannot be made.
    """

    def __init__(self, out: Path, topics: Sequence[str]) -> None:
        self._out = out
        # Numbered, because `/a/b` and `/a_b` would have one name.
        self._names = {
            topic: f'{number}_{re.sub("[^A-Za-z0-9]+", "_", topic).strip("_")[:60]}'
            for number, topic in enumerate(sorted(topics))
        }
        try:
            (out / FRAMES).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvaluationError(f'{out / FRAMES} cannot be made: {error.strerror}') from error

    def save(self, frame: BagFrame, rgb_hwc: NDArray[np.uint8]) -> str:
        """Save the picture of a frame, unless it is there; returns its path relative to the folder of the results.

        :raise DiskSpaceError: if there is no room.
        """
        relative = f'{FRAMES}/{self._names[frame.topic]}_{frame.index:06}.jpg'
        path = self._out / relative
        if not path.exists():
            replace_file(path, jpeg(rgb_hwc, _MOST_PIXELS))
        return relative


def jpeg(rgb_hwc: NDArray[np.uint8], most_pixels: int) -> bytes:
    """A JPEG file, scaled down so that its longer side has at most so many pixels."""
    picture = Image.fromarray(rgb_hwc)
    picture.thumbnail((most_pixels, most_pixels))
    buffer = BytesIO()
    picture.save(buffer, 'JPEG', quality=_JPEG_QUALITY)
    return buffer.getvalue()
