"""The newest frame of each camera, and the gate that lets no old one through."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mobilevlm_ros.errors import BadImageError, NoFrameError, StaleFrameError, UnknownCameraError
from mobilevlm_ros.runtime.frames import FrameStore, PendingFrame

SECOND = 10**9


class FakeClock:
    def __init__(self, now_ns: int = 1000 * SECOND) -> None:
        self.now_ns = now_ns

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(clock: FakeClock) -> FrameStore:
    return FrameStore(['front'], clock)


def pixels(number: int) -> NDArray[np.uint8]:
    return np.full((1, 1, 3), number % 256, np.uint8)


def arrival(clock: FakeClock, number: int = 0, stamp_ns: int = 0) -> PendingFrame:
    return PendingFrame(stamp_ns, clock.now_ns, lambda: (pixels(number), f'frame {number}'))


def test_the_newest_frame_is_taken(store: FrameStore, clock: FakeClock) -> None:
    store.put('front', arrival(clock, 1))
    store.put('front', arrival(clock, 2))

    frame = store.take('front', 1.0)

    assert frame.frame_id == 'frame 2'
    np.testing.assert_array_equal(frame.rgb_hwc, pixels(2))


def test_a_frame_carries_where_it_came_from(store: FrameStore, clock: FakeClock) -> None:
    store.put('front', arrival(clock, 1, stamp_ns=clock.now_ns - SECOND))
    clock.now_ns += SECOND // 2

    frame = store.take('front', 2.0)

    assert (frame.camera, frame.frame_id, frame.stamp_ns) == ('front', 'frame 1', 999 * SECOND)
    assert frame.age_s == pytest.approx(1.5)


def test_a_frame_at_its_limit_is_taken_and_one_beyond_is_not(store: FrameStore, clock: FakeClock) -> None:
    store.put('front', arrival(clock))
    clock.now_ns += 2 * SECOND
    assert store.take('front', 2.0).age_s == 2.0

    clock.now_ns += 1

    with pytest.raises(StaleFrameError, match=r"camera 'front' is 2\.000 s old, the limit is 2\.000 s"):
        store.take('front', 2.0)


def test_a_stale_frame_is_named_by_the_error(store: FrameStore, clock: FakeClock) -> None:
    store.put('front', arrival(clock, 3))
    clock.now_ns += 5 * SECOND

    with pytest.raises(StaleFrameError) as caught:
        store.take('front', 1.0)

    assert (caught.value.frame.frame_id, caught.value.frame.age_s) == ('frame 3', 5.0)


def test_a_limit_that_is_no_number_lets_nothing_through(store: FrameStore, clock: FakeClock) -> None:
    store.put('front', arrival(clock))

    with pytest.raises(StaleFrameError):
        store.take('front', math.nan)


def test_a_stamp_in_the_future_does_not_make_a_frame_fresh(store: FrameStore, clock: FakeClock) -> None:
    store.put('front', arrival(clock, stamp_ns=clock.now_ns + 3600 * SECOND))
    clock.now_ns += 3 * SECOND

    with pytest.raises(StaleFrameError):
        store.take('front', 2.0)


def test_an_old_stamp_makes_a_frame_old_however_late_it_arrived(store: FrameStore, clock: FakeClock) -> None:
    store.put('front', arrival(clock, stamp_ns=clock.now_ns - 10 * SECOND))

    with pytest.raises(StaleFrameError):
        store.take('front', 2.0)


def test_without_a_stamp_the_time_of_arrival_counts(store: FrameStore, clock: FakeClock) -> None:
    store.put('front', arrival(clock, stamp_ns=0))
    clock.now_ns += SECOND

    assert store.take('front', 2.0).age_s == 1.0


def test_time_spent_decoding_counts(store: FrameStore, clock: FakeClock) -> None:
    def slow() -> tuple[NDArray[np.uint8], str]:
        clock.now_ns += 3 * SECOND
        return pixels(0), ''

    store.put('front', PendingFrame(0, clock.now_ns, slow))

    with pytest.raises(StaleFrameError):
        store.take('front', 2.0)


def test_a_frame_is_decoded_once(store: FrameStore, clock: FakeClock) -> None:
    calls = []

    def decode() -> tuple[NDArray[np.uint8], str]:
        calls.append(1)
        return pixels(0), ''

    store.put('front', PendingFrame(0, clock.now_ns, decode))
    store.take('front', 1.0)
    store.take('front', 1.0)

    assert calls == [1]


def test_a_frame_that_nobody_asks_about_is_not_decoded(store: FrameStore, clock: FakeClock) -> None:
    def decode() -> Any:
        raise AssertionError('decoded')

    store.put('front', PendingFrame(0, clock.now_ns, decode))
    store.put('front', arrival(clock, 7))

    assert store.take('front', 1.0).frame_id == 'frame 7'


def test_a_bad_image_is_told_and_the_next_one_taken(store: FrameStore, clock: FakeClock) -> None:
    def decode() -> Any:
        raise BadImageError('step is 5 bytes')

    store.put('front', PendingFrame(0, clock.now_ns, decode))
    with pytest.raises(BadImageError, match='step'):
        store.take('front', 1.0)
    store.put('front', arrival(clock, 1))

    assert store.take('front', 1.0).frame_id == 'frame 1'


def test_no_frame_yet(store: FrameStore) -> None:
    with pytest.raises(NoFrameError, match=r"camera 'front' has arrived yet"):
        store.take('front', 1.0)


def test_a_frame_from_before_the_clock_was_set_back_is_none(store: FrameStore, clock: FakeClock) -> None:
    store.put('front', arrival(clock, 1))
    clock.now_ns -= 1
    with pytest.raises(NoFrameError, match='since time jumped back'):
        store.take('front', 1.0)


def test_cleared_frames_are_gone_until_the_next(store: FrameStore, clock: FakeClock) -> None:
    store.put('front', arrival(clock, 1))
    store.clear()
    with pytest.raises(NoFrameError, match='since time jumped back'):
        store.take('front', 1.0)

    store.put('front', arrival(clock, 2))

    assert store.take('front', 1.0).frame_id == 'frame 2'


def test_the_only_camera_need_not_be_named(store: FrameStore, clock: FakeClock) -> None:
    store.put('front', arrival(clock))

    assert store.take('', 1.0).camera == 'front'


def test_one_of_several_cameras_must_be_named(clock: FakeClock) -> None:
    store = FrameStore(['front', 'back'], clock)
    store.put('front', arrival(clock))

    with pytest.raises(UnknownCameraError, match='name one of the cameras: front, back'):
        store.take('', 1.0)


@pytest.mark.parametrize('cameras', [[], ['front'], ['front', 'back']])
def test_an_unknown_camera_is_named_with_those_that_exist(clock: FakeClock, cameras: list[str]) -> None:
    store = FrameStore(cameras, clock)

    with pytest.raises(UnknownCameraError, match=f"no camera 'left'.*: {', '.join(cameras) or 'none'}"):
        store.take('left', 1.0)


def test_cameras_do_not_see_each_others_frames(clock: FakeClock) -> None:
    store = FrameStore(['front', 'back'], clock)
    store.put('front', arrival(clock, 1))

    with pytest.raises(NoFrameError):
        store.take('back', 1.0)


def test_status_tells_count_age_and_clock_offset(clock: FakeClock) -> None:
    store = FrameStore(['front', 'back'], clock)
    store.put('front', arrival(clock, 1))
    store.put('front', arrival(clock, 2, stamp_ns=clock.now_ns + SECOND))
    clock.now_ns += 2 * SECOND

    front, back = store.status()

    assert (front.camera, front.n_frames, front.age_s, front.stamp_offset_s) == ('front', 2, 2.0, -1.0)
    assert (back.camera, back.n_frames, back.age_s, back.stamp_offset_s) == ('back', 0, None, None)


STAMPS = st.just(0) | st.integers(-5 * SECOND, 5 * SECOND)
STEPS = st.one_of(
    st.tuples(st.just('arrive'), STAMPS),
    st.tuples(st.just('wait'), st.integers(-SECOND, 3 * SECOND)),
    st.tuples(st.just('ask'), st.floats(0.0, 4.0)),
    st.tuples(st.just('clear'), st.just(0)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=40))
def test_no_answer_is_ever_about_an_old_frame(steps: list[tuple[str, float]]) -> None:
    """Whatever arrives with whatever stamp: the newest frame, never beyond its limit, and refused only if beyond it.

    Also when the clock is set back: a frame from the future of the clock has no age that could be trusted.
    """
    clock = FakeClock()
    store = FrameStore(['front'], clock)
    newest: tuple[int, int, int] | None = None
    for number, (what, value) in enumerate(steps):
        if what == 'arrive':
            stamp_ns = clock.now_ns + int(value) if value else 0
            newest = (number, clock.now_ns, stamp_ns)
            store.put('front', arrival(clock, number, stamp_ns))
        elif what == 'wait':
            clock.now_ns += int(value)
        elif what == 'clear':
            store.clear()
            newest = None
        elif newest is None or clock.now_ns < newest[1]:
            with pytest.raises(NoFrameError):
                store.take('front', value)
        else:
            arrived_number, arrived_ns, stamp_ns = newest
            since_arrival_s = (clock.now_ns - arrived_ns) / 1e9
            since_stamp_s = (clock.now_ns - stamp_ns) / 1e9 if stamp_ns else 0.0
            try:
                frame = store.take('front', value)
            except StaleFrameError:
                assert since_arrival_s > value or since_stamp_s > value
            else:
                assert frame.frame_id == f'frame {arrived_number}'
                assert since_arrival_s <= value
                assert since_stamp_s <= value
                assert frame.age_s >= since_arrival_s
