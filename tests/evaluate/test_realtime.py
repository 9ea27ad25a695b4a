"""Playing at recorded speed: the node's queue, deadlines and ages hold, and what was missed is counted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import bag_runs
import bag_writing as writing
import pytest
from bag_runs import camera_bag, question

from mobilevlm_ros.bags import open_bag
from mobilevlm_ros.errors import EvaluationError
from mobilevlm_ros.evaluate.plan import Plan
from mobilevlm_ros.evaluate.realtime import RealtimeSettings, run_realtime
from mobilevlm_ros.evaluate.results import read_results, read_run
from mobilevlm_ros.runtime.assistant import Assistant
from mobilevlm_ros.runtime.loading import fake_assistant


def play(path: Path, questions: Any, out: Path, *, assistant: Assistant, **settings: Any) -> list[dict[str, Any]]:
    try:
        with open_bag(path) as bag:
            plan = Plan(bag, questions)
            record = bag_runs.recorded(out, bag, plan)
            run_realtime(
                bag, plan, assistant, out, record, RealtimeSettings(**settings), on_progress=lambda done, total: None
            )
    finally:
        assistant.close()
    return list(read_results(out))


def test_frames_come_when_they_were_recorded(tmp_path: Path) -> None:
    started_s = time.monotonic()
    rows = play(camera_bag(tmp_path / 'b'), [question()], tmp_path / 'out', assistant=fake_assistant(token_s=0.0))
    assert time.monotonic() - started_s >= 0.3
    assert len(rows) == 4
    for row in rows:
        realtime = row['realtime']
        assert realtime['asked_s'] >= 0.1 * row['frame_index']
        assert realtime['done_s'] >= realtime['asked_s']
        assert realtime['used_frame_index'] >= row['frame_index']
        assert realtime['met']
    run = read_run(tmp_path / 'out')
    assert run['finished']
    assert (run['realtime']['n_frames_played'], run['realtime']['n_asked']) == (4, 4)
    assert run['realtime']['n_frames_used'] + run['realtime']['n_frames_dropped'] == 4


def test_an_answer_after_its_deadline_is_none(tmp_path: Path) -> None:
    """The fake takes 0.2 s a token, and says more than one."""
    slow = question(format='text', truth='yes', deadline_s=0.05)
    rows = play(camera_bag(tmp_path / 'b', n=2), [slow], tmp_path / 'out', assistant=fake_assistant(token_s=0.2))
    assert {row['result_code'] for row in rows} == {'TIMEOUT'}
    assert [row['correct'] for row in rows] == [False, False]
    counts = read_run(tmp_path / 'out')['realtime']
    assert (counts['n_deadline'], counts['n_met'], counts['n_timeout']) == (2, 0, 2)


def test_a_full_queue_refuses(tmp_path: Path) -> None:
    questions = [question(f'q{number}', format='text', truth=None) for number in range(5)]
    rows = play(camera_bag(tmp_path / 'b', n=1), questions, tmp_path / 'out', assistant=fake_assistant(), queue_size=1)
    codes = [row['result_code'] for row in rows]
    assert codes.count('BUSY') >= 2
    assert read_run(tmp_path / 'out')['realtime']['n_busy'] == codes.count('BUSY')


def test_a_frame_that_was_old_when_it_came_is_stale(tmp_path: Path) -> None:
    path = camera_bag(tmp_path / 'b', n=2, delay_ns=500_000_000)
    rows = play(path, [question()], tmp_path / 'out', assistant=fake_assistant(token_s=0.0), max_frame_age_s=0.2)
    assert {row['result_code'] for row in rows} == {'STALE'}
    assert all(row['realtime']['stale'] and row['realtime']['age_s'] > 0.5 for row in rows)


def test_a_second_question_about_a_frame_reuses_it(tmp_path: Path) -> None:
    questions = [question(), question('second')]
    rows = play(camera_bag(tmp_path / 'b', n=1), questions, tmp_path / 'out', assistant=fake_assistant(token_s=0.0))
    assert [row['realtime']['reused'] for row in rows] == [False, True]
    counts = read_run(tmp_path / 'out')['realtime']
    assert (counts['n_frames_used'], counts['n_reused']) == (1, 1)


def test_half_a_play_cannot_go_on(tmp_path: Path) -> None:
    path, out = camera_bag(tmp_path / 'b', n=1), tmp_path / 'out'
    play(path, [question()], out, assistant=fake_assistant(token_s=0.0))
    with pytest.raises(EvaluationError, match='in real time cannot go on'):
        play(path, [question()], out, assistant=fake_assistant(token_s=0.0))


def test_a_broken_frame_is_an_answer_of_its_own(tmp_path: Path) -> None:
    message = writing.serialized(writing.raw_image(writing.pictures(1)[0], writing.START_NS))[:200]
    path = writing.write_bag(
        tmp_path / 'b', [writing.Message('/camera', writing.START_NS, message, 'sensor_msgs/msg/Image')]
    )
    (row,) = play(path, [question()], tmp_path / 'out', assistant=fake_assistant(token_s=0.0))
    assert row['result_code'] == 'BAD_IMAGE'
    assert read_run(tmp_path / 'out')['n_broken_frames'] == 1


def test_the_defaults_are_those_of_the_node() -> None:
    parameters = pytest.importorskip('mobilevlm_ros.node.parameters')
    node = {one.name: one.default for one in parameters.PARAMETERS}
    ours = RealtimeSettings()
    assert ours.queue_size == node['queue_size']
    assert ours.deadline_s == node['deadline_s']
    assert ours.max_frame_age_s == node['max_frame_age_s']
    assert ours.encode_ahead_duty == node['encode_ahead_duty']
    assert ours.encode_ahead_max_lag_s == node['encode_ahead_max_lag_s']
