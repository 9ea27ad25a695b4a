"""Held-out frames are a block of time, and no neighbours of what is learned from."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilevlm_ros.errors import DatasetError, SettingsError
from mobilevlm_ros.train.own_labels import LabelledFrame
from mobilevlm_ros.train.own_split import split_by_time


def frames(*times: float) -> list[LabelledFrame]:
    return [LabelledFrame(Path(f'{number}.jpg'), time_s, ()) for number, time_s in enumerate(sorted(times))]


def test_the_last_quarter_is_held_out_behind_a_gap() -> None:
    split = split_by_time(frames(*range(0, 40, 2)), share=0.25, gap_s=5.0)
    assert [one.time_s for one in split.held_out] == [30, 32, 34, 36, 38]
    assert [one.time_s for one in split.dropped] == [26, 28]
    assert split.train[-1].time_s == 24 and split.from_s == 30


@given(
    st.lists(st.floats(0, 1e4), min_size=2, max_size=60),
    st.floats(0.01, 0.99),
    st.floats(0, 100, allow_subnormal=False),
)
def test_no_frame_is_lost_and_none_is_near_the_examination(times: list[float], share: float, gap_s: float) -> None:
    given_frames = frames(*times)
    try:
        split = split_by_time(given_frames, share=share, gap_s=gap_s)
    except DatasetError:
        return
    assert sorted(split.train + split.dropped + split.held_out, key=lambda one: int(one.image.stem)) == given_frames
    assert split.train and len(split.held_out) >= share * len(times)
    assert max(one.time_s for one in split.train) <= min(one.time_s for one in split.held_out) - gap_s
    assert max(one.time_s for one in split.train) < split.from_s


def test_too_little_to_split_is_named() -> None:
    with pytest.raises(DatasetError, match='1 labelled frame: expected at least 2'):
        split_by_time(frames(3.0))
    with pytest.raises(DatasetError, match=r'1 of 4 .* held out, and 3 lie within the 5 s before .* span 3.0 s'):
        split_by_time(frames(0, 1, 2, 3))
    with pytest.raises(DatasetError, match='no frame is left to learn from'):
        split_by_time(frames(2, 2, 2))


@pytest.mark.parametrize(('share', 'gap_s'), [(0.0, 5.0), (1.0, 5.0), (0.2, -1.0), (0.2, float('nan'))])
def test_shares_and_gaps_that_are_none_are_refused(share: float, gap_s: float) -> None:
    with pytest.raises(SettingsError, match=r'--held-out|--gap'):
        split_by_time(frames(1, 2), share=share, gap_s=gap_s)
