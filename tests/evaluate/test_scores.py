"""Scores against figures computed by hand, on results as an evaluation writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import answer, question, write_folder

from mobilevlm_ros.errors import EvaluationError, SettingsError
from mobilevlm_ros.evaluate.latency import spread_of
from mobilevlm_ros.evaluate.scored import answers_in, collect, group_of
from mobilevlm_ros.evaluate.scores import score


def test_accuracy_is_by_kind_and_of_all() -> None:
    rows = [
        answer('a', 0, kind='door'),
        answer('a', 1, kind='door', correct=False),
        answer('b', 0, kind='count'),
        answer('c', 0, kind='free', correct=None),
    ]
    scores = score(rows, [])
    assert {kind: (one.seen.n_right, one.seen.n) for kind, one in scores.kinds.items()} == {
        'door': (1, 2),
        'count': (1, 1),
    }
    assert (scores.overall.seen.n_right, scores.overall.seen.n) == (2, 3)
    assert (scores.n, scores.n_unscored) == (4, 1)


def test_a_question_without_an_answer_is_wrong_and_counted() -> None:
    failed = answer('a', 1, correct=False, answer='', result_code='TIMEOUT', timing={'total_s': 9.0})
    scores = score([answer('a', 0), failed], [])
    assert (scores.n_failed, scores.overall.seen.value) == (1, 0.5)
    assert scores.codes == {'OK': 1, 'TIMEOUT': 1}
    assert scores.latency.stages['new']['total_s'].n == 1


def test_answers_about_one_second_are_one_group() -> None:
    stamps = [0.0, 0.4, 0.9, 1.1]
    rows = [answer('a', frame, received_ns=int(stamp * 1e9)) for frame, stamp in enumerate(stamps)]
    assert score(rows, []).overall.seen.n_groups == 2
    assert score(rows, [], block_s=10.0).overall.seen.n_groups == 1
    assert score(rows, [], block_s=0.0).overall.seen.n_groups == 4


def test_cameras_are_of_one_group_by_time_and_of_two_by_frame() -> None:
    left, right = answer(camera='/left'), answer(camera='/right')
    assert group_of(left, 1.0) == group_of(right, 1.0)
    assert group_of(left, 0.0) != group_of(right, 0.0)
    with pytest.raises(SettingsError, match='block'):
        group_of(left, -1.0)


def test_blind_answers_are_compared_where_both_were_given() -> None:
    rows = [answer('a', frame) for frame in range(6)]
    rows += [answer('a', frame, blind=True, correct=frame == 0) for frame in range(5)]
    overall = score(rows, []).overall
    assert overall.blind is not None and overall.sight is not None
    assert (overall.seen.n, overall.blind.n_right, overall.blind.n) == (6, 1, 5)
    assert (overall.sight.n_gained, overall.sight.n_lost) == (4, 0)
    assert overall.sight.p == pytest.approx(2 / 16)
    assert score(rows[:6], []).overall.blind is None


def test_the_majority_answer_is_the_one_that_most_frames_accept() -> None:
    questions = [
        question('a', 'count', (2,), checker='number', tolerance=1),
        question('b', 'count', (3,), checker='number'),
        question('c', 'count', (8,), checker='number'),
        question('d', 'door', ('yes',)),
    ]
    rows = [answer('a', frame, kind='count') for frame in range(2)]
    rows += [answer('b', 0, kind='count'), *(answer('c', frame, kind='count') for frame in range(2))]
    rows += [answer('d', frame, correct=False) for frame in range(4)]
    scores = score(rows, questions)
    count, door = scores.kinds['count'], scores.kinds['door']
    assert count.majority is not None and door.majority is not None and scores.overall.majority is not None
    assert (count.majority_answer, count.majority.n_right, count.majority.n) == ('3', 3, 5)
    assert (door.majority_answer, door.majority.n_right) == ('yes', 4)
    assert (scores.overall.majority.n_right, scores.overall.majority.n) == (7, 9)


def test_the_majority_may_be_a_value_in_json() -> None:
    asked = question('a', 'door', ('open',), checker='json_field', field='door.state')
    kind = score([answer('a', 0)], [asked]).kinds['door']
    assert kind.majority is not None and kind.majority.value == 1.0
    assert kind.majority_answer == '{"door": {"state": "open"}}'


def test_no_majority_where_the_questions_do_not_say_what_is_accepted() -> None:
    scores = score([answer('a', 0), answer('b', 0, kind='count')], [question('a')])
    assert scores.kinds['door'].majority is not None
    assert scores.kinds['count'].majority is None and scores.overall.majority is None


def test_abstaining_by_hand() -> None:
    given_ = [(0.9, True), (0.8, False), (0.7, True), (0.6, False)]
    rows = [answer('a', frame, confidence=sure, correct=right) for frame, (sure, right) in enumerate(given_)]
    rows.append(answer('a', 9, confidence=None))
    abstention = score(rows, []).abstention
    assert abstention is not None and abstention.n == 4
    assert abstention.limits == (0.9, 0.8, 0.7, 0.6)
    assert abstention.coverages == (0.25, 0.5, 0.75, 1.0)
    assert abstention.accuracies == pytest.approx((1, 1 / 2, 2 / 3, 1 / 2))
    assert abstention.mean_accuracy == pytest.approx((1 + 1 / 2 + 2 / 3 + 1 / 2) / 4)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30))
def test_all_answers_have_the_accuracy_of_the_run(given_: list[tuple[float, bool]]) -> None:
    rows = [answer('a', frame, confidence=sure, correct=right) for frame, (sure, right) in enumerate(given_)]
    scores = score(rows, [])
    assert scores.abstention is not None and scores.calibration is not None
    assert scores.abstention.coverages[-1] == 1.0
    assert scores.abstention.accuracies[-1] == pytest.approx(scores.overall.seen.value)
    assert scores.calibration.accuracy == pytest.approx(scores.overall.seen.value)


def test_long_curves_keep_their_ends() -> None:
    rows = [answer('a', frame, confidence=frame / 1000) for frame in range(1000)]
    abstention = score(rows, []).abstention
    assert abstention is not None and 100 < len(abstention.limits) <= 201
    assert (abstention.limits[0], abstention.limits[-1]) == (0.999, 0.0)


def test_models_that_tell_no_confidence_are_not_calibrated() -> None:
    scores = score([answer('a', 0, confidence=None)], [])
    assert scores.abstention is None and scores.calibration is None


def test_known_frames_are_timed_apart() -> None:
    rows = [answer('a', frame, timing={'total_s': 1.0 + frame}) for frame in range(3)]
    rows.append(answer('a', 7, timing={'total_s': 0.1, 'vision_reused': True}))
    stages = score(rows, []).latency.stages
    assert stages['new']['total_s'].percentiles[50] == 2.0 and stages['new']['total_s'].longest == 3.0
    assert (stages['known']['total_s'].n, stages['known']['total_s'].mean) == (1, 0.1)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_percentiles_rise_and_stay_inside(seconds: list[float]) -> None:
    spread = spread_of(seconds)
    values = [min(seconds), *spread.percentiles.values(), spread.longest]
    assert values == sorted(values)
    assert spread.percentiles[50] == pytest.approx(float(np.median(seconds)))


def test_neighbours_agree_by_hand() -> None:
    given_ = ['yes', 'Yes.', 'no', 'no', 'yes']
    rows = [answer('a', 3 * frame, answer=text) for frame, text in enumerate(given_)][::-1]
    rows.append(answer('a', 13, answer='', result_code='TIMEOUT', correct=False))
    rows.append(answer('b', 1, answer='no'))
    neighbours = score(rows, []).consistency.neighbours
    assert neighbours is not None and (neighbours.n_right, neighbours.n) == (2, 4)


def test_cameras_are_not_each_other_s_neighbours() -> None:
    rows = [answer('a', 0, camera='/left'), answer('a', 1, camera='/right', answer='no')]
    assert score(rows, []).consistency.neighbours is None


@pytest.mark.parametrize(
    ('there', 'negated', 'consistent'),
    [('yes', 'no', 1), ('no', 'yes', 1), ('yes', 'yes', 0), ('perhaps', 'no', 0), ('perhaps', 'perhaps', 0)],
)
def test_a_negation_wants_the_opposite(there: str, negated: str, consistent: int) -> None:
    rows = [
        answer('not', 0, answer=negated, negation_of='there'),
        answer('there', 0, answer=there),
        answer('not', 1, answer=negated, negation_of='there'),
    ]
    negations = score(rows, []).consistency.negations
    assert negations is not None and (negations.n_right, negations.n) == (consistent, 1)


def test_deadlines_are_counted_where_there_were_some() -> None:
    def realtime(met: bool, deadline_s: float | None = 1.0) -> dict[str, Any]:
        return {'deadline_s': deadline_s, 'met': met, 'age_s': 0.1, 'reused': False, 'stale': False}

    rows = [answer('a', frame, realtime=realtime(frame > 0)) for frame in range(4)]
    rows.append(answer('a', 9, realtime=realtime(True, None)))
    met = score(rows, []).met
    assert met is not None and (met.n_right, met.n) == (3, 4)
    assert score([answer()], []).met is None


def test_nothing_answered_is_no_error() -> None:
    scores = score([], [])
    assert (scores.n, scores.kinds, scores.latency.stages) == (0, {}, {})
    assert scores.as_record()['consistency'] == {'neighbours': None, 'negations': None}


@pytest.mark.parametrize('changes', [{'result_code': 'PERFECT'}, {'timing': {}}, {'kind': None}])
def test_a_line_of_another_version_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    broken = answer('a', 1) | changes
    if changes.get('kind', '') is None:
        del broken['kind']
    folder = write_folder(tmp_path, [answer('a', 0), broken])
    with pytest.raises(EvaluationError, match='answer 2'):
        collect(answers_in(folder))


def test_a_line_that_was_cut_is_left_out(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [answer('a', frame) for frame in range(3)])
    path = folder / 'results.jsonl'
    path.write_bytes(path.read_bytes()[:-20])
    assert len(collect(answers_in(folder)).seen) == 2
