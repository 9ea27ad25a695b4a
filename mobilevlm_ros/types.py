"""The nouns of the house: what a frame, a question and an answer are.

Plain frozen dataclasses without behaviour beyond validation. They know neither ROS nor any engine; the numbers of
``ResultCode`` and ``AnswerFormat`` are those of ``mobilevlm_msgs/Answer`` (a test holds the two together).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

__all__ = ['Answer', 'AnswerFormat', 'Check', 'Frame', 'Question', 'ResultCode', 'Timing']


class ResultCode(IntEnum):
    """What became of a question; in ranges, so that a planner can branch on the hundreds."""

    OK = 0
    UNKNOWN = 1
    INCOMPLETE = 2
    NO_FRAME = 100
    STALE = 101
    UNKNOWN_CAMERA = 102
    BAD_IMAGE = 103
    BAD_QUESTION = 200
    TOO_LONG = 201
    BAD_FORMAT = 202
    BUSY = 300
    CANCELED = 301
    TIMEOUT = 302
    NOT_ACTIVE = 303
    ENGINE_ERROR = 400


class AnswerFormat(IntEnum):
    """The form that the asker wants the answer in."""

    TEXT = 0
    YES_NO = 1
    CHOICE = 2
    JSON = 3


@dataclass(frozen=True)
class Frame:
    """One decoded image and where it came from.

    :ivar rgb_hwc: pixels, uint8 ``[height, width, 3]``, RGB.
    :ivar stamp_ns: time stamp of the image in nanoseconds of the source's clock; 0 if it has none.
    :ivar age_s: its age in seconds when the question about it was taken up.
    """

    rgb_hwc: NDArray[np.uint8]
    camera: str = ''
    frame_id: str = ''
    stamp_ns: int = 0
    age_s: float = 0.0


@dataclass(frozen=True)
class Question:
    """What is asked, and how the answer is wanted.

    ``None`` means: the default of whoever answers (see ``AssistantSettings``).
    """

    text: str
    format: AnswerFormat = AnswerFormat.TEXT
    choices: tuple[str, ...] = ()
    json_schema: str = ''
    camera: str = ''
    id: str = ''
    max_tokens: int | None = None
    deadline_s: float | None = None
    max_frame_age_s: float | None = None


@dataclass
class Timing:
    """Seconds of a steady clock by stage; filled in as the stages end. The same fields as ``mobilevlm_msgs/Timing``."""

    queue_s: float = 0.0
    image_s: float = 0.0
    preprocess_s: float = 0.0
    vision_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    first_text_s: float = 0.0
    total_s: float = 0.0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    vision_reused: bool = False


@dataclass(frozen=True)
class Answer:
    """What was answered; the same fields as ``mobilevlm_msgs/Answer``.

    ``text`` is never an error message: that is ``message``.
    """

    question: Question
    result_code: ResultCode
    message: str = ''
    text: str = ''
    truncated: bool = False
    confidence: float = 0.0
    options: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    option_mass: float = 0.0
    camera: str = ''
    frame_id: str = ''
    stamp_ns: int = 0
    age_s: float = 0.0
    model_id: str = ''
    prompt_hash: str = ''
    timing: Timing = field(default_factory=Timing)

    @property
    def success(self) -> bool:
        """Whether the asker got what was asked for."""
        return self.result_code is ResultCode.OK


@dataclass(frozen=True)
class Check:
    """One finding of the doctor.

    :ivar level: ``ok``, ``note`` (works without), or ``problem``.
    :ivar advice: what to do; empty if nothing.
    """

    area: str
    name: str
    level: str
    found: str
    advice: str = ''
