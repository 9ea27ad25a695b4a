"""The noise guard, on a clock and counters of the test."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from mobilevlm_ros.bench import quiet
from mobilevlm_ros.bench.process import Contestant
from mobilevlm_ros.bench.quiet import QuietMachine


class Machine:
    """Counters that advance by given foreign and own loads, in cores."""

    def __init__(self, foreign: list[float], own: float = 0.0) -> None:
        self._foreign = foreign
        self._own = own
        self._now = quiet._Reading(0.0, 100.0, 10.0)
        self._odd = False

    def read(self) -> quiet._Reading:
        """Every second reading ends a window of one second."""
        if self._odd:
            load = self._foreign.pop(0) if len(self._foreign) > 1 else self._foreign[0]
            now = self._now
            self._now = quiet._Reading(now.at_s + 1, now.machine_s + load + self._own, now.own_s + self._own)
        self._odd = not self._odd
        return self._now


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(quiet, '_WINDOW_S', 0.001)
    yield


@pytest.mark.usefixtures('instant')
def test_it_waits_until_others_are_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr(quiet, '_read', Machine([1.5, 0.8, 0.05, 1.5]).read)
    assert QuietMachine(60.0, seen.append).wait() == pytest.approx(0.05)
    assert seen == pytest.approx([1.5, 0.8])


@pytest.mark.usefixtures('instant')
def test_it_goes_on_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, '_read', Machine([1.5]).read)
    started_s = time.monotonic()
    assert QuietMachine(0.05).wait() == pytest.approx(1.5)
    assert time.monotonic() - started_s < 5.0


@pytest.mark.usefixtures('instant')
def test_what_this_process_and_its_children_do_is_not_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, '_read', Machine([0.3], own=1.6).read)
    with QuietMachine(1.0).watch() as load:
        pass
    assert load.foreign_cores == pytest.approx(0.3)


def test_the_work_of_a_child_counts_as_own() -> None:
    with Contestant('limits', n_threads=1, seconds=0.4) as child:
        before = quiet._read()
        child.call('fp32_flops', product=(64, 64, 64))
        after = quiet._read()
    # It works for 0.4 s unless others take its core; the machine as a whole cannot have done less.
    assert after.own_s - before.own_s >= 0.05
    assert after.machine_s - before.machine_s >= after.own_s - before.own_s - 0.1


def test_a_block_too_short_to_tell_takes_the_load_of_the_wait_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, '_WINDOW_S', 2.0)
    guard = QuietMachine(0.05)
    monkeypatch.setattr(quiet, '_read', Machine([0.9]).read)
    assert guard.wait() == pytest.approx(0.9)
    with guard.watch() as load:
        pass
    assert load.foreign_cores == pytest.approx(0.9)
