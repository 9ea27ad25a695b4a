"""The figures of one bundle: each stage alone, first tokens on new and known frames, closed questions, memory.

Each is a series of equal runs with its bound from the cost card. The order of runs is that of a robot's day: a new
frame, then more questions on it, so that what is called known really was asked about before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mobilevlm_ros.bench.card import PROMPT_TOKENS, CostCard
from mobilevlm_ros.bench.process import Contestant
from mobilevlm_ros.bench.quiet import QuietMachine
from mobilevlm_ros.bench.scenes import CHOICES, QUESTION, SECOND_QUESTION, YES_NO_QUESTIONS
from mobilevlm_ros.bench.series import Series

__all__ = ['CAMERA_SIZE', 'PROMPT_TEXT', 'BundleFigures', 'measure_bundle']

PROMPT_TEXT = 'A robot looks at a kitchen. On the table there are two cups, a plate and a knife. '
"""Repeated to the wanted length, for prompts of tokens only."""
CAMERA_SIZE = 480, 640
"""Rows and columns of the frames: a usual camera's."""
_TOGETHER = 'one batch'
_WAYS = ('one after the other', _TOGETHER)
"""Of asking several questions."""


@dataclass
class BundleFigures:
    """What ``measure_bundle`` found.

    :ivar description: see ``OurEngine.describe``.
    :ivar series: by name.
    :ivar memory: of a fresh process that loaded the bundle and answered one question.
    """

    description: dict[str, Any]
    series: dict[str, Series] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    def as_record(self) -> dict[str, Any]:
        """For the JSON line."""
        return {
            **self.description,
            'memory': self.memory,
            'figures': {name: one.as_record() for name, one in self.series.items()},
        }


class _Collector:
    """Gathers seconds under names, and the foreign load while they were taken."""

    def __init__(self, machine: QuietMachine) -> None:
        self._machine = machine
        self.seconds: dict[str, list[float]] = {}
        self.foreign: dict[str, list[float]] = {}

    @contextmanager
    def round(self) -> Iterator[Callable[[str, float], None]]:
        """One round of measurements after a wait for quiet; gives a function that takes a name and its seconds."""
        taken: list[tuple[str, float]] = []
        self._machine.wait()
        with self._machine.watch() as load:
            yield lambda name, seconds: taken.append((name, seconds))
        for name, seconds in taken:
            self.seconds.setdefault(name, []).append(seconds)
            self.foreign.setdefault(name, []).append(load.foreign_cores)

    def series(self, name: str, amount: float = 0.0, bound_s: float | None = None) -> Series:
        """All rounds of one name; as busy as the busiest of them."""
        return Series(name, tuple(self.seconds[name]), amount, bound_s, max(self.foreign[name]))


def measure_bundle(
    engine: Contestant,
    card: CostCard,
    machine: QuietMachine,
    *,
    n_runs: int,
    n_decoded: int,
    on_step: Callable[[str], None] = lambda text: None,
) -> BundleFigures:
    """Measure a bundle that a fresh ``ours`` process has just loaded.

    :param n_runs: of each series, after one that does not count.
    :param n_decoded: tokens of a decoding run.
    """
    figures = BundleFigures(engine.call('describe'))
    on_step('warming up')
    engine.call('first_token', index=0, question=QUESTION)
    figures.memory = engine.memory()
    collector = _Collector(machine)
    timings: dict[str, dict[str, float]] = {}
    for run in range(1, n_runs + 1):
        on_step(f'frames and questions, {run} of {n_runs}')
        _ask_round(engine, collector, timings, run)
    tokens = _prompt(engine)
    engine.call('decode', tokens=tokens, n_tokens=2)
    for run in range(1, n_runs + 1):
        on_step(f'prompts and decoding, {run} of {n_runs}')
        with collector.round() as take:
            take('prefill', engine.call('prefill', tokens=tokens))
        with collector.round() as take:
            take('decode', engine.call('decode', tokens=tokens, n_tokens=n_decoded))
    for run in range(n_runs + 1):
        on_step(f'eight questions, {run} of {n_runs}')
        engine.call('first_token', index=3000 + run, question=QUESTION)
        for way in _WAYS:
            with collector.round() as take:
                result = engine.call(
                    'ask_several', index=3000 + run, questions=YES_NO_QUESTIONS, together=way == _TOGETHER
                )
                if run:
                    take(f'eight yes/no questions, {way}', result['total_s'])
    figures.series = _with_bounds(collector, timings, card, len(tokens), n_decoded)
    return figures


def _prompt(engine: Contestant) -> list[int]:
    tokens: list[int] = engine.call('tokens', text=PROMPT_TEXT * 40)
    return tokens[:PROMPT_TOKENS]


def _ask_round(engine: Contestant, collector: _Collector, timings: dict[str, dict[str, float]], run: int) -> None:
    asks: tuple[tuple[str, int, dict[str, Any]], ...] = (
        ('first token, new frame', run, {'question': QUESTION}),
        ('first token, known frame', run, {'question': SECOND_QUESTION}),
        ('yes/no, known frame', run, {'question': YES_NO_QUESTIONS[0], 'format_name': 'YES_NO'}),
        ('choice, known frame', run, {'question': 'Which place?', 'format_name': 'CHOICE', 'choices': CHOICES}),
        ('yes/no, new frame', 1000 + run, {'question': YES_NO_QUESTIONS[0], 'format_name': 'YES_NO'}),
        ('choice, new frame', 2000 + run, {'question': 'Which place?', 'format_name': 'CHOICE', 'choices': CHOICES}),
    )
    for name, index, question in asks:
        with collector.round() as take:
            timing = engine.call('ask', index=index, **question)
            take(name, timing['total_s'])
            if 'new' in name:
                take('preprocess', timing['preprocess_s'])
                take('vision engine', timing['vision_s'])
        timings[name] = timing


def _with_bounds(
    collector: _Collector,
    timings: dict[str, dict[str, float]],
    card: CostCard,
    n_prompt: int,
    n_decoded: int,
) -> dict[str, Series]:
    series = {'preprocess': collector.series('preprocess')}
    series['vision engine'] = collector.series('vision engine', bound_s=card.vision_bound_s)
    for name, timing in timings.items():
        reused = int(timing['reused_tokens'])
        prefill_s = card.prefill_bound_s(int(timing['prompt_tokens']) - reused, reused)
        vision_s = card.vision_bound_s if 'new' in name else 0.0
        series[name] = collector.series(name, bound_s=None if vision_s is None else vision_s + prefill_s)
    known = timings['yes/no, known frame']
    past, own = int(known['reused_tokens']), int(known['prompt_tokens'] - known['reused_tokens'])
    for way in _WAYS:
        n = len(YES_NO_QUESTIONS)
        bound_s = card.prefill_bound_s(n * own, past) if way == _TOGETHER else n * card.prefill_bound_s(own, past)
        name = f'eight yes/no questions, {way}'
        series[name] = collector.series(name, bound_s=bound_s)
    series['prefill'] = collector.series('prefill', n_prompt, card.prefill_bound_s(n_prompt))
    middle = n_prompt + n_decoded // 2
    series['decode'] = collector.series('decode', n_decoded, n_decoded * card.decode_bound_s(middle))
    return series
