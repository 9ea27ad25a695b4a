"""Which frames are learned from and which are kept for the examination: a block of time, and a gap before it.

Neighbouring frames of a recording are nearly the same picture, so frames that are drawn at random would be asked about
after they were all but learned. The last part of the recording is held out whole, and what was recorded just before it
is used for neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mobilevlm_ros.errors import DatasetError, SettingsError
from mobilevlm_ros.train.own_labels import LabelledFrame

__all__ = ['DEFAULT_GAP_S', 'DEFAULT_SHARE', 'Split', 'split_by_time']

DEFAULT_SHARE = 0.25
DEFAULT_GAP_S = 5.0


@dataclass(frozen=True)
class Split:
    """Frames by what they are for, each by time.

    :ivar dropped: in the gap; used for nothing.
    :ivar from_s: when the held-out block begins.
    """

    train: tuple[LabelledFrame, ...]
    held_out: tuple[LabelledFrame, ...]
    dropped: tuple[LabelledFrame, ...]
    from_s: float


def split_by_time(
    frames: Sequence[LabelledFrame], *, share: float = DEFAULT_SHARE, gap_s: float = DEFAULT_GAP_S
) -> Split:
    """Hold out the last frames.

    :param frames: by time.
    :param share: of the labelled frames that are held out, rounded up; frames of one moment stay together.
    :param gap_s: frames that were recorded less than this before the held-out block are not learned from.
    :raise SettingsError: if the share or the gap is none.
    :raise DatasetError: if nothing is left to learn from, or to ask about.
    """
    if not 0.0 < share < 1.0:
        raise SettingsError(f'--held-out is a share of the frames between 0 and 1, found {share}')
    if not 0.0 <= gap_s < math.inf:
        raise SettingsError(f'--gap is a number of seconds from 0 on, found {gap_s}')
    if len(frames) < 2:
        raise DatasetError(
            f'{len(frames)} labelled frame{"" if len(frames) == 1 else "s"}: expected at least 2, one to learn from '
            'and one to ask about. Label more frames'
        )
    from_s = frames[len(frames) - math.ceil(share * len(frames))].time_s
    held_out = tuple(frame for frame in frames if frame.time_s >= from_s)
    before = [frame for frame in frames if frame.time_s < from_s]
    train = tuple(frame for frame in before if frame.time_s <= from_s - gap_s)
    if not train:
        span_s = frames[-1].time_s - frames[0].time_s
        raise DatasetError(
            f'no frame is left to learn from: {len(held_out)} of {len(frames)} labelled frames are held out, and '
            f'{len(before)} lie within the {gap_s:g} s before them; the labelled frames span {span_s:.1f} s. Label '
            'frames of a longer time, or lower --gap or --held-out'
        )
    return Split(train, held_out, tuple(frame for frame in before if frame.time_s > from_s - gap_s), from_s)
