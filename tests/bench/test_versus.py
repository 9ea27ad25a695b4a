"""Turns of a comparison: what is kept, who begins, what is left out; with real engines on both sides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from mobilevlm_ros.bench.command import TURNS
from mobilevlm_ros.bench.process import Contestant
from mobilevlm_ros.bench.quiet import QuietMachine
from mobilevlm_ros.bench.versus import KNOWN, METRICS, NEW, START, TURN_OF, VISION, Comparison, compare


class Noted:
    """A contestant whose calls are noted."""

    def __init__(self, name: str, inner: Contestant, calls: list[tuple[str, str]]) -> None:
        self.name, self.inner, self.calls = name, inner, calls

    def call(self, method: str, **arguments: Any) -> Any:
        self.calls.append((self.name, method))
        return self.inner.call(method, **arguments)


@pytest.fixture(scope='module')
def pair(tiny_bundle: Path) -> Iterator[tuple[Contestant, Contestant]]:
    """Two engines of ours; the second stands for a rival."""
    arguments = {'bundle': str(tiny_bundle), 'n_threads': 1, 'height': 40, 'width': 56}
    with Contestant('ours', **arguments) as ours, Contestant('ours', **arguments) as theirs:
        yield ours, theirs


def compared(
    pair: tuple[Contestant, Contestant], *only: str, rival: str = 'pytorch'
) -> tuple[dict[str, Comparison], list[tuple[str, str]]]:
    calls: list[tuple[str, str]] = []
    for one in pair:  # so that frames of an earlier test are new again
        one.call('first_question', index=1, question='?')
    ours = cast(Contestant, Noted('ours', pair[0], calls))
    theirs = cast(Contestant, Noted('theirs', pair[1], calls))
    found = compare(
        *(ours, {rival: theirs}, QuietMachine(0.0)),
        **{'tokens': pair[0].call('tokens', text='the table'), 'n_runs': 2, 'n_decoded': 3, 'only': only or TURNS},
    )
    return {one.metric: one for one in found}, calls


def test_a_new_frame_finds_the_prompt_held_although_other_prompts_came_between(
    pair: tuple[Contestant, Contestant],
) -> None:
    found, _ = compared(pair)
    assert tuple(found) == METRICS['pytorch']
    n_before = len(pair[0].call('prompt_parts', question='?')[0])
    assert found[START].ours.n_reused == 0
    assert found[NEW].ours.n_reused == n_before
    assert found[KNOWN].ours.n_reused > n_before
    assert {one.ours.n_prompt > 0 for one in found.values()} == {True, False}
    assert {len(one.ours.seconds) for one in found.values()} == {2}


def test_of_the_others_a_first_question_is_a_new_frame(pair: tuple[Contestant, Contestant]) -> None:
    found, calls = compared(pair, 'start', 'new', rival='mtmd')
    assert found[START].theirs.seconds == found[NEW].theirs.seconds
    assert found[START].ours.seconds != found[NEW].ours.seconds
    assert {method for who, method in calls if who == 'theirs'} == {'first_token'}


def test_who_begins_changes(pair: tuple[Contestant, Contestant]) -> None:
    _, calls = compared(pair, 'prefill')
    assert [who for who, _ in calls] == ['theirs', 'ours', 'ours', 'theirs', 'theirs', 'ours']


def test_a_known_frame_was_asked_about_even_if_new_frames_do_not_count(pair: tuple[Contestant, Contestant]) -> None:
    found, calls = compared(pair, 'known')
    assert list(found) == [KNOWN]
    assert found[KNOWN].ours.n_reused > found[KNOWN].ours.n_prompt // 2
    assert [method for who, method in calls if who == 'ours'] == 3 * ['hold_prompt', 'first_token', 'first_token']
    assert [method for who, method in calls if who == 'theirs'] == 3 * ['first_token']


def test_the_vision_engine_is_timed_within_new_frames(pair: tuple[Contestant, Contestant]) -> None:
    found, _ = compared(pair, 'vision', rival='mtmd')
    assert list(found) == [VISION]
    assert found[VISION].ours.n_prompt == 0


def test_every_metric_belongs_to_a_turn() -> None:
    assert {metric for metrics in METRICS.values() for metric in metrics} == set(TURN_OF)
    assert set(TURN_OF.values()) < set(TURNS)
