"""The recordings in tests/data hold what their description says, and the same in every storage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mobilevlm_ros.bags import open_bag
from mobilevlm_ros.evaluate.plan import Plan
from mobilevlm_ros.evaluate.questions import read_questions

DATA = Path(__file__).resolve().parents[1] / 'data'
BAGS = ('bag_mcap', 'bag_sqlite3')
STREET, CABIN = '/street/image_raw/compressed', '/cabin/image_raw'


@pytest.mark.parametrize('name', BAGS)
def test_topics(name: str) -> None:
    with open_bag(DATA / name) as bag:
        assert bag.notes == []
        assert {topic.name: (topic.type.split('/')[-1], topic.n_messages) for topic in bag.topics} == {
            CABIN: ('Image', 4),
            STREET: ('CompressedImage', 20),
        }
        assert (bag.end_ns() - bag.start_ns()) / 1e9 == 9.52
        sizes = {frame.topic: frame.decode().shape for frame in bag.frames()}
        assert bag.n_broken == 0
    assert sizes == {CABIN: (144, 176, 3), STREET: (204, 480, 3)}


def test_all_storages_hold_the_same_frames() -> None:
    found = []
    for name in BAGS:
        with open_bag(DATA / name) as bag:
            found.append(
                [(one.topic, one.index, one.stamp_ns, one.received_ns, one.serialized) for one in bag.frames()]
            )
    assert found[0] == found[1]


def test_the_footage_is_in_colour_and_moves() -> None:
    with open_bag(DATA / BAGS[0]) as bag:
        cabin = [frame.decode().astype(np.int16) for frame in bag.frames(CABIN)]
    bow_tie = cabin[0][100:115, 85:110].mean(axis=(0, 1))
    assert bow_tie[0] > 1.2 * bow_tie[2], 'red before blue: the channels are not exchanged'
    assert np.abs(cabin[0] - cabin[2]).mean() > 3


@pytest.mark.parametrize('name', BAGS)
def test_every_question_has_its_frames(name: str) -> None:
    with open_bag(DATA / name) as bag:
        plan = Plan(bag, read_questions(DATA / 'bag_questions.yaml'))
        counts = plan.count()
        frames = {
            question.id: [frame.index for frame, asked in plan.frames() if question in asked]
            for question in plan.questions
        }
    assert sum(counts.values()) == 42
    assert (frames['cars'], frames['bicycle'], frames['nobody']) == ([4, 5, 6], [9, 10], [18, 19])
    assert (frames['dog'], frames['walker'], frames['man']) == ([0, 4, 8, 12, 16], [15, 16], [0, 1, 2, 3])


def test_yes_and_no_are_balanced() -> None:
    with open_bag(DATA / BAGS[0]) as bag:
        plan = Plan(bag, read_questions(DATA / 'bag_questions.yaml'))
        truths = [one.shown_truth for _, asked in plan.frames() for one in asked if one.format == 'YES_NO']
    assert abs(truths.count('yes') - truths.count('no')) <= 1
