"""Our engine against another on the same machine, in the same run, turn by turn.

Every round asks each contestant the same thing once, so that whatever the machine does meanwhile it does to all; who
begins changes from round to round. All have the same threads, context and prompt, and sleep while others work. A ratio
above 1 says that we are faster.

What is kept between questions is what a robot's node keeps: our engine holds the prompt up to the image when a new
frame comes, because it has answered before. How many positions that saves is part of the result, and the first
question after the start, for which nothing is kept, is a metric of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mobilevlm_ros.bench.command import TURNS
from mobilevlm_ros.bench.process import Contestant
from mobilevlm_ros.bench.quiet import QuietMachine
from mobilevlm_ros.bench.scenes import QUESTION, SECOND_QUESTION
from mobilevlm_ros.bench.series import Ratio, Series, ratio_of_medians

__all__ = ['KNOWN', 'METRICS', 'NEW', 'START', 'TURN_OF', 'VISION', 'Comparison', 'compare']

START = 'first token, first question after start'
NEW = 'first token, new frame'
KNOWN = 'first token, known frame'
VISION = 'vision engine'

_SEEING = (NEW, START, KNOWN, VISION)
METRICS = {
    'llamacpp': ('prefill', 'decode'),
    'mtmd': _SEEING,
    'pytorch': (*_SEEING, 'prefill', 'decode'),
}
"""What each rival is compared in."""
TURN_OF = {START: 'start', NEW: 'new', KNOWN: 'known', VISION: 'vision', 'prefill': 'prefill', 'decode': 'decode'}
"""The turn (``bench.command.TURNS``) that each metric belongs to."""
_OURS = 'ours'


@dataclass(frozen=True)
class Comparison:
    """One metric against one rival."""

    rival: str
    metric: str
    ours: Series
    theirs: Series
    ratio: Ratio

    def as_record(self) -> dict[str, Any]:
        """For the JSON line."""
        return {
            'rival': self.rival,
            'metric': self.metric,
            'ours': self.ours.as_record(),
            'theirs': self.theirs.as_record(),
            **self.ratio.as_record(),
        }


@dataclass(frozen=True)
class _Step:
    """One thing that is asked of a contestant in a round.

    :ivar parts: which part of the result each metric is; all of it for an empty name. Of none: it never counts.
    :ivar needed: other metrics that need this step to go before.
    """

    method: str
    arguments: dict[str, Any]
    parts: dict[str, str]
    needed: tuple[str, ...] = ()

    def wanted_for(self, metrics: Collection[str]) -> bool:
        """Whether who is measured in ``metrics`` takes this step."""
        return any(metric in metrics for metric in (*self.parts, *self.needed))


class _Turns:
    """Seconds, foreign load and positions of prompts by contestant and metric."""

    def __init__(self, machine: QuietMachine) -> None:
        self._machine = machine
        self.seconds: dict[tuple[str, str], list[float]] = {}
        self.foreign: dict[tuple[str, str], float] = {}
        self.positions: dict[tuple[str, str], tuple[int, int]] = {}

    def take(self, who: str, contestant: Contestant, step: _Step, metrics: Collection[str], counts: bool) -> None:
        """One turn; only what is in ``metrics`` is kept, and only if the round counts."""
        with self._machine.watch() as load:
            result = contestant.call(step.method, **step.arguments)
        for metric, part in step.parts.items():
            if not counts or metric not in metrics:
                continue
            key = who, metric
            self.seconds.setdefault(key, []).append(result[part] if part else result)
            self.foreign[key] = max(self.foreign.get(key, 0.0), load.foreign_cores)
            if part == 'total_s':
                self.positions[key] = int(result['prompt_tokens']), int(result['reused_tokens'])

    def series(self, who: str, metric: str, amount: float) -> Series:
        """All rounds of one metric."""
        key = who, metric
        seconds, positions = tuple(self.seconds[key]), self.positions.get(key, (0, 0))
        return Series(metric, seconds, amount, None, self.foreign[key], *positions)


def compare(
    ours: Contestant,
    rivals: Mapping[str, Contestant],
    machine: QuietMachine,
    *,
    tokens: list[int],
    n_runs: int,
    n_decoded: int,
    only: Collection[str] = TURNS,
    on_step: Callable[[str], None] = lambda text: None,
) -> list[Comparison]:
    """Measure ``n_runs`` rounds after one that does not count.

    :param rivals: by their name in ``METRICS``.
    :param tokens: the prompt of prefill and decode.
    :param only: the turns that are wanted.
    """
    turns = _Turns(machine)
    wanted = {who: [metric for metric in METRICS[who] if TURN_OF[metric] in only] for who in rivals}
    wanted[_OURS] = [metric for metrics in wanted.values() for metric in metrics]
    everybody = {_OURS: ours, **rivals}
    for run in range(n_runs + 1):
        on_step(f'comparing, round {run} of {n_runs}')
        machine.wait()
        order = list(everybody.items())
        for steps in _round(7000 + run, tokens, n_decoded):
            for who, contestant in order if run % 2 else reversed(order):
                for step in steps[_OURS if who == _OURS else 'theirs']:
                    if step.wanted_for(wanted[who]):
                        turns.take(who, contestant, step, wanted[who], counts=run > 0)
    return [_comparison(turns, rival, metric, len(tokens), n_decoded) for rival in rivals for metric in wanted[rival]]


def _round(index: int, tokens: list[int], n_decoded: int) -> list[dict[str, list[_Step]]]:
    """What is done in turn: our steps, and those of the others."""
    first, other_first = ({'index': one, 'question': QUESTION} for one in (index, 1000 + index))
    new = _Step('first_token', first, {NEW: 'total_s', VISION: 'vision_s'}, needed=(KNOWN,))
    # Others keep nothing, so that each of their new frames is a first question after the start, too.
    theirs = _Step('first_token', first, {NEW: 'total_s', START: 'total_s', VISION: 'vision_s'})
    known = _Step('first_token', {'index': index, 'question': SECOND_QUESTION}, {KNOWN: 'total_s'})
    prefill = _Step('prefill', {'tokens': tokens}, {'prefill': ''})
    decode = _Step('decode', {'tokens': tokens, 'n_tokens': n_decoded}, {'decode': ''})
    return [
        {
            _OURS: [
                _Step('first_question', other_first, {START: 'total_s'}),
                # The last prefill and decode were prompts of their own, as no node has them between its questions.
                _Step('hold_prompt', {}, {}, needed=(NEW, VISION, KNOWN)),
                new,
            ],
            'theirs': [theirs],
        },
        *({_OURS: [step], 'theirs': [step]} for step in (known, prefill, decode)),
    ]


def _comparison(turns: _Turns, rival: str, metric: str, n_prompt: int, n_decoded: int) -> Comparison:
    amount = {'prefill': n_prompt, 'decode': n_decoded}.get(metric, 0)
    ours, theirs = (turns.series(who, metric, amount) for who in (_OURS, rival))
    return Comparison(rival, metric, ours, theirs, ratio_of_medians(theirs.seconds, ours.seconds))
