"""Our engine against another on the same machine, in the same run, turn by turn.

Every round asks each contestant the same thing once, so that whatever the machine does meanwhile it does to all. All
have the same threads, context and prompt, and sleep while others work. A ratio above 1 says that we are faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mobilevlm_ros.bench.process import Contestant
from mobilevlm_ros.bench.quiet import QuietMachine
from mobilevlm_ros.bench.scenes import QUESTION, SECOND_QUESTION
from mobilevlm_ros.bench.series import Ratio, Series, ratio_of_medians

__all__ = ['METRICS', 'Comparison', 'compare']

METRICS = {
    'llamacpp': ('prefill', 'decode'),
    'mtmd': ('first token, new frame', 'first token, known frame', 'vision engine'),
    'pytorch': ('first token, new frame', 'first token, known frame', 'vision engine', 'prefill', 'decode'),
}
"""What each rival is compared in."""
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


class _Turns:
    """Seconds by contestant and metric."""

    def __init__(self, machine: QuietMachine) -> None:
        self._machine = machine
        self.seconds: dict[tuple[str, str], list[float]] = {}
        self.foreign: dict[tuple[str, str], float] = {}
        self.counts = False

    def call(self, who: str, contestant: Contestant, metrics: Mapping[str, str], method: str, **arguments: Any) -> None:
        """One turn; ``metrics`` says under which name which part of the result is kept."""
        with self._machine.watch() as load:
            result = contestant.call(method, **arguments)
        if not self.counts:
            return
        for metric, part in metrics.items():
            key = who, metric
            self.seconds.setdefault(key, []).append(result[part] if part else result)
            self.foreign[key] = max(self.foreign.get(key, 0.0), load.foreign_cores)


def compare(
    ours: Contestant,
    rivals: Mapping[str, Contestant],
    machine: QuietMachine,
    *,
    tokens: list[int],
    n_runs: int,
    n_decoded: int,
    on_step: Callable[[str], None] = lambda text: None,
) -> list[Comparison]:
    """Measure ``n_runs`` rounds after one that does not count.

    :param rivals: by their name in ``METRICS``.
    :param tokens: the prompt of prefill and decode.
    """
    turns = _Turns(machine)
    everybody = {_OURS: ours, **rivals}
    wanted = {who: set(METRICS[who]) for who in rivals}
    wanted[_OURS] = {metric for metrics in wanted.values() for metric in metrics}
    for run in range(n_runs + 1):
        on_step(f'comparing, round {run} of {n_runs}')
        turns.counts = run > 0
        machine.wait()
        for metrics, method, arguments in _round(7000 + run, tokens, n_decoded):
            for who, contestant in everybody.items():
                if wanted[who] & set(metrics):
                    turns.call(who, contestant, metrics, method, **arguments)
    return [_comparison(turns, rival, metric, len(tokens), n_decoded) for rival in rivals for metric in METRICS[rival]]


def _round(index: int, tokens: list[int], n_decoded: int) -> list[tuple[dict[str, str], str, dict[str, Any]]]:
    """Parts of the result by metric (all of it for an empty name), the method, its arguments; in this order."""
    return [
        (
            {'first token, new frame': 'total_s', 'vision engine': 'vision_s'},
            'first_token',
            {'index': index, 'question': QUESTION},
        ),
        ({'first token, known frame': 'total_s'}, 'first_token', {'index': index, 'question': SECOND_QUESTION}),
        ({'prefill': ''}, 'prefill', {'tokens': tokens}),
        ({'decode': ''}, 'decode', {'tokens': tokens, 'n_tokens': n_decoded}),
    ]


def _comparison(turns: _Turns, rival: str, metric: str, n_prompt: int, n_decoded: int) -> Comparison:
    amount = {'prefill': n_prompt, 'decode': n_decoded}.get(metric, 0)
    ours, theirs = (
        Series(metric, tuple(turns.seconds[who, metric]), amount, None, turns.foreign[who, metric])
        for who in (_OURS, rival)
    )
    return Comparison(rival, metric, ours, theirs, ratio_of_medians(theirs.seconds, ours.seconds))
