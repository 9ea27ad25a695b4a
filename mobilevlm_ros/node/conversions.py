"""Between ROS messages and the nouns of this package; copies fields, decides nothing."""

from __future__ import annotations

import math
from typing import Any

from builtin_interfaces.msg import Time as TimeMsg
from mobilevlm_msgs.msg import Answer as AnswerMsg
from mobilevlm_msgs.msg import Timing as TimingMsg

from mobilevlm_ros.errors import AnswerFormatError, BadImageError, BadQuestionError
from mobilevlm_ros.runtime.images import decode_compressed, to_rgb
from mobilevlm_ros.types import Answer, AnswerFormat, Frame, Question, Timing

__all__ = [
    'answer_msg',
    'carries_image',
    'fill_result',
    'printable',
    'question_from',
    'request_frame',
    'stamp_msg',
    'stamp_ns',
    'unchecked_question',
]

REQUEST_CAMERA = 'request'


def stamp_ns(stamp: Any) -> int:
    """Nanoseconds of a ``builtin_interfaces/Time``."""
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


def stamp_msg(nanoseconds: int) -> TimeMsg:
    """The inverse of ``stamp_ns``."""
    return TimeMsg(sec=nanoseconds // 1_000_000_000, nanosec=nanoseconds % 1_000_000_000)


def unchecked_question(request: Any, question_id: str) -> Question:
    """The question as it came, for the answer to one that cannot be asked."""
    return Question(request.question, camera=request.camera, id=question_id)


def question_from(request: Any, question_id: str, default_deadline_s: float | None) -> Question:
    """The question of an ``AskImage`` request or goal, or of a ``Question`` message.

    :raise AnswerFormatError: if the format is none.
    :raise BadQuestionError: if a number makes no sense.
    """
    try:
        answer_format = AnswerFormat(request.format)
    except ValueError as error:
        raise AnswerFormatError(
            f'unknown answer format {request.format}: expected 0 (TEXT), 1 (YES_NO), 2 (CHOICE) or 3 (JSON)'
        ) from error
    for name in ('deadline_s', 'max_frame_age_s'):
        value = getattr(request, name)
        if not math.isfinite(value) or value < 0:
            raise BadQuestionError(f'{name} must be a number of seconds, 0 or more; found {value}')
    return Question(
        text=request.question,
        format=answer_format,
        choices=tuple(request.choices),
        json_schema=request.json_schema,
        camera=request.camera,
        id=question_id,
        max_tokens=request.max_tokens or None,
        deadline_s=request.deadline_s or default_deadline_s,
        max_frame_age_s=request.max_frame_age_s or None,
    )


def _has_raw(request: Any) -> bool:
    raw = request.image
    return bool(raw.height or raw.width or len(raw.data))


def carries_image(request: Any) -> bool:
    """Whether an image came with a request; a message of the question topic carries none."""
    return hasattr(request, 'image') and (_has_raw(request) or bool(len(request.compressed_image.data)))


def request_frame(request: Any, now_ns: int) -> Frame:
    """The image that came with a request, decoded.

    :raise BadImageError: if there are two, or it cannot be decoded.
    """
    raw, compressed = request.image, request.compressed_image
    has_raw = _has_raw(request)
    if has_raw and len(compressed.data):
        raise BadImageError('the request has both an image and a compressed image: send one')
    header = raw.header if has_raw else compressed.header
    rgb_hwc = _raw_pixels(raw) if has_raw else decode_compressed(compressed.data, compressed.format)
    stamp = stamp_ns(header.stamp)
    age_s = (now_ns - stamp) / 1e9 if stamp else 0.0
    return Frame(rgb_hwc, camera=REQUEST_CAMERA, frame_id=header.frame_id, stamp_ns=stamp, age_s=age_s)


def _raw_pixels(image: Any) -> Any:
    """The RGB pixels of a ``sensor_msgs/Image``; raises ``BadImageError``."""
    return to_rgb(
        image.data,
        encoding=image.encoding,
        height=image.height,
        width=image.width,
        step=image.step,
        is_bigendian=bool(image.is_bigendian),
    )


def _timing_msg(timing: Timing) -> TimingMsg:
    return TimingMsg(**vars(timing))


def answer_msg(answer: Answer) -> AnswerMsg:
    """The message of an answer."""
    message = AnswerMsg(
        camera=printable(answer.camera),
        age_s=answer.age_s,
        question_id=printable(answer.question.id),
        question=printable(answer.question.text),
        result_code=int(answer.result_code),
        message=printable(answer.message),
        text=printable(answer.text),
        format=int(answer.question.format),
        truncated=answer.truncated,
        confidence=answer.confidence,
        options=list(answer.options),
        probabilities=list(answer.probabilities),
        option_mass=answer.option_mass,
        timing=_timing_msg(answer.timing),
        model_id=answer.model_id,
        prompt_hash=answer.prompt_hash,
    )
    message.header.stamp = stamp_msg(answer.stamp_ns)
    message.header.frame_id = answer.frame_id
    return message


def printable(text: str) -> str:
    """Text that every DDS vendor and tool can carry: no NUL, which ends strings, and no lone surrogates."""
    return text.replace('\0', '\ufffd').encode(errors='replace').decode()


def fill_result(result: Any, answer: Answer) -> Any:
    """Fill a service response or an action result."""
    result.success = answer.success
    result.detail = answer_msg(answer)
    result.answer = result.detail.text
    return result
