"""The figures of one bundle: each stage alone, first tokens on new and known frames, closed questions, memory.

Each is a series of equal runs with its bound from the cost card. The order of runs is that of a robot's day: a first
question, a new frame, then more questions on it, so that what is called known really was asked about before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mobilevlm_ros.bench.card import PROMPT_TOKENS, CostCard
from mobilevlm_ros.bench.command import TURNS
from mobilevlm_ros.bench.process import Contestant
from mobilevlm_ros.bench.quiet import QuietMachine
from mobilevlm_ros.bench.scenes import CHOICES, QUESTION, SECOND_QUESTION, YES_NO_QUESTIONS
from mobilevlm_ros.bench.series import Ratio, Series, ratio_of_medians
from mobilevlm_ros.bench.versus import KNOWN, NEW, START, VISION

__all__ = ['CAMERA_SIZE', 'PROMPT_TEXT', 'BundleFigures', 'measure_bundle']

PROMPT_TEXT = 'A robot looks at a kitchen. On the table there are two cups, a plate and a knife. '
"""Repeated to the wanted length, for prompts of tokens only."""
CAMERA_SIZE = 480, 640
"""Rows and columns of the frames: a usual camera's."""
_IN_TURN, _TOGETHER = (f'eight yes/no questions, {way}' for way in ('one after the other', 'one batch'))
_PREPROCESS = 'preprocess'


@dataclass
class BundleFigures:
    """What ``measure_bundle`` found.

    :ivar description: see ``OurEngine.describe``.
    :ivar series: by name.
    :ivar ratios: of series of the same work: name of the faster way to how many times as fast it is as the other.
    :ivar memory: of a fresh process that loaded the bundle and answered one question.
    """

    description: dict[str, Any]
    series: dict[str, Series] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    def as_record(self) -> dict[str, Any]:
        """For the JSON line."""
        return {
            **self.description,
            'memory': self.memory,
            'figures': {name: one.as_record() for name, one in self.series.items()},
            'ratios': {name: one.as_record() for name, one in self.ratios.items()},
        }


@dataclass(frozen=True)
class _Ask:
    """A question of a round.

    :ivar turn: the turn that it belongs to.
    :ivar needed: whether it is asked even if its turn is not wanted, because others come after it.
    """

    turn: str
    name: str
    index: int
    question: dict[str, Any]
    method: str = 'ask'
    needed: bool = False


class _Collector:
    """Gathers seconds under names, the foreign load while they were taken, and the positions of prompts."""

    def __init__(self, machine: QuietMachine) -> None:
        self._machine = machine
        self.seconds: dict[str, list[float]] = {}
        self.foreign: dict[str, list[float]] = {}
        self.positions: dict[str, tuple[int, int]] = {}

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
        positions = self.positions.get(name, (0, 0))
        return Series(name, tuple(self.seconds[name]), amount, bound_s, max(self.foreign[name]), *positions)


def measure_bundle(
    engine: Contestant,
    card: CostCard,
    machine: QuietMachine,
    *,
    n_runs: int,
    n_decoded: int,
    only: Collection[str] = TURNS,
    on_step: Callable[[str], None] = lambda text: None,
) -> BundleFigures:
    """Measure a bundle that a fresh ``ours`` process has just loaded.

    :param n_runs: of each series, after one that does not count.
    :param n_decoded: tokens of a decoding run.
    :param only: the turns that are wanted.
    """
    figures = BundleFigures(engine.call('describe'))
    on_step('warming up')
    engine.call('first_token', index=0, question=QUESTION)
    figures.memory = engine.memory()
    collector = _Collector(machine)
    for run in range(1, n_runs + 1):
        on_step(f'frames and questions, {run} of {n_runs}')
        _ask_round(engine, collector, run, only)
    tokens = _prompt(engine)
    _continue_rounds(engine, collector, tokens, n_runs, n_decoded, only, on_step)
    if 'eight' in only:
        for run in range(n_runs + 1):
            on_step(f'eight questions, {run} of {n_runs}')
            _eight_round(engine, collector, run)
        figures.ratios[_TOGETHER] = ratio_of_medians(collector.seconds[_IN_TURN], collector.seconds[_TOGETHER])
    figures.series = _with_bounds(collector, card, len(tokens), n_decoded)
    return figures


def _prompt(engine: Contestant) -> list[int]:
    tokens: list[int] = engine.call('tokens', text=PROMPT_TEXT * 40)
    return tokens[:PROMPT_TOKENS]


def _ask_round(engine: Contestant, collector: _Collector, run: int, only: Collection[str]) -> None:
    yes_no = {'question': YES_NO_QUESTIONS[0], 'format_name': 'YES_NO'}
    choice = {'question': 'Which place?', 'format_name': 'CHOICE', 'choices': CHOICES}
    asks = (
        _Ask('start', START, 4000 + run, {'question': QUESTION}, 'first_question'),
        _Ask('new', NEW, run, {'question': QUESTION}, needed=bool({'vision', 'known', 'closed'} & set(only))),
        _Ask('known', KNOWN, run, {'question': SECOND_QUESTION}),
        _Ask('closed', 'yes/no, known frame', run, yes_no),
        _Ask('closed', 'choice, known frame', run, choice),
        _Ask('closed', 'yes/no, new frame', 1000 + run, yes_no),
        _Ask('closed', 'choice, new frame', 2000 + run, choice),
    )
    for ask in asks:
        if ask.turn not in only and not ask.needed:
            continue
        with collector.round() as take:
            timing = engine.call(ask.method, index=ask.index, **ask.question)
            if ask.turn in only:
                take(ask.name, timing['total_s'])
                collector.positions[ask.name] = int(timing['prompt_tokens']), int(timing['reused_tokens'])
            if 'vision' in only and timing['vision_s']:
                take(_PREPROCESS, timing['preprocess_s'])
                take(VISION, timing['vision_s'])


def _continue_rounds(
    engine: Contestant,
    collector: _Collector,
    tokens: list[int],
    n_runs: int,
    n_decoded: int,
    only: Collection[str],
    on_step: Callable[[str], None],
) -> None:
    asks: dict[str, dict[str, Any]] = {'prefill': {'tokens': tokens}, 'decode': {'tokens': tokens}}
    asks = {name: arguments for name, arguments in asks.items() if name in only}
    if not asks:
        return
    engine.call('decode', tokens=tokens, n_tokens=2)
    for run in range(1, n_runs + 1):
        on_step(f'prompts and decoding, {run} of {n_runs}')
        for name, arguments in asks.items():
            n_tokens = {'n_tokens': n_decoded} if name == 'decode' else {}
            with collector.round() as take:
                take(name, engine.call(name, **arguments, **n_tokens))


def _eight_round(engine: Contestant, collector: _Collector, run: int) -> None:
    """Both ways on one known frame; which is first changes from round to round, and round 0 does not count."""
    engine.call('first_token', index=3000 + run, question=QUESTION)
    for name in (_IN_TURN, _TOGETHER) if run % 2 else (_TOGETHER, _IN_TURN):
        asked = {'index': 3000 + run, 'questions': YES_NO_QUESTIONS, 'together': name == _TOGETHER}
        with collector.round() as take:
            result = engine.call('ask_several', **asked)
            if run:
                take(name, result['total_s'])
        collector.positions[name] = int(result['prompt_tokens']), int(result['reused_tokens'])


def _with_bounds(collector: _Collector, card: CostCard, n_prompt: int, n_decoded: int) -> dict[str, Series]:
    middle = n_prompt + n_decoded // 2
    rates = {
        'prefill': (n_prompt, card.prefill_bound_s(n_prompt)),
        'decode': (n_decoded, n_decoded * card.decode_bound_s(middle)),
    }
    series = {}
    # Stages first, rates last.
    for name in sorted(collector.seconds, key=lambda name: (name not in (_PREPROCESS, VISION), name in rates)):
        if name in rates:
            series[name] = collector.series(name, *rates[name])
        elif name in (_PREPROCESS, VISION):
            series[name] = collector.series(name, bound_s=card.vision_bound_s if name == VISION else None)
        else:
            series[name] = collector.series(name, bound_s=_question_bound_s(name, collector.positions[name], card))
    return series


def _question_bound_s(name: str, positions: tuple[int, int], card: CostCard) -> float | None:
    """Least time of a question, or of eight on a known frame."""
    n_all, n_reused = positions
    n_own = n_all - n_reused
    if name == _TOGETHER:
        return card.prefill_bound_s(len(YES_NO_QUESTIONS) * n_own, n_reused)
    prefill_s = card.prefill_bound_s(n_own, n_reused)
    if name == _IN_TURN:
        return len(YES_NO_QUESTIONS) * prefill_s
    if 'known' in name:
        return prefill_s
    return None if card.vision_bound_s is None else card.vision_bound_s + prefill_s
