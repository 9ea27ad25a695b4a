"""Labels as LLaVA's dialogues: one record a question, worded exactly as the robot will ask it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from mobilevlm_ros.errors import TrainingError
from mobilevlm_ros.runtime.formats import prepare
from mobilevlm_ros.train.dialogue import IMAGE_MARK
from mobilevlm_ros.train.own_labels import LabelledFrame

__all__ = ['records_text', 'write_records']


def records_text(frames: Sequence[LabelledFrame], images: Path) -> str:
    """The file that the stages read.

    :param images: the folder that its pictures are named from.
    """
    records = [
        {
            'id': question.id,
            'image': Path(os.path.relpath(frame.image, images)).as_posix(),
            'conversations': [
                {'from': 'human', 'value': f'{IMAGE_MARK}\n{prepare(question.asked()).text}'},
                {'from': 'gpt', 'value': question.answers[0]},
            ],
        }
        for frame in frames
        for question in frame.questions
    ]
    return json.dumps(records, indent=1, ensure_ascii=False) + '\n'


def write_records(path: Path, frames: Sequence[LabelledFrame], images: Path, *, resume: bool) -> None:
    """Write the file.

    :param resume: it is there already and must say the same, or another run would be resumed.
    :raise TrainingError: if it says something else, or cannot be written.
    """
    text = records_text(frames, images)
    try:
        if resume and path.is_file() and path.read_text(encoding='utf-8') != text:
            raise TrainingError(
                f'the labels, or how they are split, have changed since {path.parent} was begun: start anew with '
                'another --out, or change them back'
            )
        path.write_text(text, encoding='utf-8')
    except OSError as error:
        raise TrainingError(f'{path} cannot be written: {error.strerror or error}') from error
