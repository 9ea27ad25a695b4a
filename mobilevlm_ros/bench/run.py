"""One run of the benchmark: cost card, figures, the paper's protocols, comparisons, one JSON line.

Each bundle is loaded in a process of its own, and let go before the next. What is printed is also in the record.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status

from mobilevlm_ros.bench.card import PROMPT_TOKENS, CostCard, measure_ceilings
from mobilevlm_ros.bench.command import PARTS, TURNS
from mobilevlm_ros.bench.figures import CAMERA_SIZE, PROMPT_TEXT, measure_bundle
from mobilevlm_ros.bench.language_cost import LanguageCost
from mobilevlm_ros.bench.machine import describe_machine, git_describe, usable_cores, versions
from mobilevlm_ros.bench.paper import TABLE5_TOKENS, TABLE6_TOKENS
from mobilevlm_ros.bench.process import Contestant
from mobilevlm_ros.bench.protocols import Measured, complete, see, see_language_only
from mobilevlm_ros.bench.quiet import QuietMachine
from mobilevlm_ros.bench.report import Report
from mobilevlm_ros.bench.scenes import QUESTION, SECOND_QUESTION
from mobilevlm_ros.bench.versus import METRICS, TURN_OF, Comparison, compare
from mobilevlm_ros.bench.vision_cost import VisionCost
from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.paths import bundle_dir
from mobilevlm_ros.runtime.bundle import Bundle, open_bundle

__all__ = ['SCHEMA_VERSION', 'run_benchmark']

SCHEMA_VERSION = 2
_NARROWEST = 130
"""Columns of the tables where the output is no terminal."""


@dataclass(frozen=True)
class _Plan:
    """How much to measure."""

    n_threads: int
    n_runs: int
    n_decoded: int
    table5_tokens: int
    table6_tokens: int
    protocol_runs: int
    ceiling_s: float
    ceiling_bytes: int

    @classmethod
    def of(cls, options: argparse.Namespace) -> _Plan:
        """Of the arguments."""
        quick = options.quick
        return cls(
            n_threads=options.threads or usable_cores(),
            n_runs=options.runs or (2 if quick else 5),
            n_decoded=options.tokens or (8 if quick else 64),
            table5_tokens=16 if quick else TABLE5_TOKENS,
            table6_tokens=16 if quick else TABLE6_TOKENS,
            protocol_runs=options.runs or (1 if quick else 3),
            ceiling_s=0.05 if quick else 2.0,
            ceiling_bytes=(64 if quick else 256) << 20,
        )


@dataclass
class _Results:
    """What was found so far."""

    bundles: list[dict[str, Any]] = field(default_factory=list)
    language_models: list[dict[str, Any]] = field(default_factory=list)
    table5: list[Measured] = field(default_factory=list)
    table6: list[Measured] = field(default_factory=list)
    comparisons: list[tuple[str, Comparison]] = field(default_factory=list)


def run_benchmark(options: argparse.Namespace) -> int:
    """Do all that the arguments ask for; see ``bench.command``."""
    parts = set(options.part or _default_parts(options))
    bundles = [open_bundle(path) for path in _bundle_paths(options)]
    _check(options, bundles, parts)
    # The record goes to standard output alone when it is asked for there.
    console = Console(stderr=options.json == '-')
    if not console.is_terminal:
        console = Console(stderr=options.json == '-', width=max(_NARROWEST, console.width))
    plan = _Plan.of(options)
    settings = {
        **plan.__dict__,
        'only': list(options.only or TURNS),
        'quick': options.quick,
        'wait_s': options.wait,
        'torch_dtype': options.torch_dtype,
    }
    machine, libraries = describe_machine(), versions()
    results = _Results()
    report = Report(console)
    report.machine(machine, libraries, settings)
    with console.status('starting') as status:
        runner = _Runner(options, plan, parts, report, status, results)
        for bundle in bundles:
            runner.bundle(bundle)
        for path in options.gguf:
            runner.language_model(path)
    if results.table5:
        report.table5(results.table5)
    if results.table6:
        report.table6(results.table6)
    if options.json:
        record = _record(machine, libraries, settings, results)
        _write(json.dumps(record, ensure_ascii=False, allow_nan=False, default=str), options.json)
    return 0


def _default_parts(options: argparse.Namespace) -> tuple[str, ...]:
    if options.against:
        return ()
    return ('figures',) if options.only else PARTS


def _bundle_paths(options: argparse.Namespace) -> list[Path]:
    if options.bundles or options.gguf:
        return list(options.bundles)
    return [bundle_dir('nano', 'cpu')]


def _check(options: argparse.Namespace, bundles: list[Bundle], parts: set[str]) -> None:
    """Refuse at once what would fail after minutes.

    :raise SettingsError: if an argument is missing, or a file that was named.
    """
    needed = {'mtmd': ('--mmproj FILE', options.mmproj), 'pytorch': ('--checkpoint DIR', options.checkpoint)}
    for rival in options.against:
        name, value = needed.get(rival, ('', Path()))
        if value is None:
            raise SettingsError(f'--against {rival} needs {name}')
        metrics = {metric: TURN_OF[metric] for metric in METRICS[rival]}
        if options.only and not set(metrics.values()) & set(options.only):
            raise SettingsError(
                f'--against {rival} compares {", ".join(metrics)}; --only leaves none of them: '
                f'give --only {" or ".join(metrics.values())}'
            )
    if options.against and not bundles:
        raise SettingsError('--against compares bundles: name one, or leave out --gguf')
    for path in (*options.gguf, options.mmproj, options.checkpoint):
        if path is not None and not path.exists():
            raise SettingsError(f'{path} does not exist')
    if options.json and options.json != '-' and not Path(options.json).absolute().parent.is_dir():
        raise SettingsError(f'the folder of --json {options.json} does not exist')
    if not parts and not options.against:
        raise SettingsError(f'nothing to measure: give --part ({", ".join(PARTS)}) or --against')


class _Runner:
    """Measures one model after the other."""

    def __init__(
        self,
        options: argparse.Namespace,
        plan: _Plan,
        parts: set[str],
        report: Report,
        status: Status,
        results: _Results,
    ) -> None:
        self._options = options
        self._plan = plan
        self._parts = parts
        self._only = frozenset(options.only or TURNS)
        self._report = report
        self._status = status
        self._results = results
        self._machine = QuietMachine(options.wait, self._waiting)
        self._model = self._step = ''

    def bundle(self, bundle: Bundle) -> None:
        """Everything about one bundle."""
        self._model = bundle.model_id
        with ExitStack() as stack:
            language, vision = self._costs('of_bundle', bundle.path)
            card = self._card(language, vision)
            self._report.card(bundle.model_id, card)
            entry: dict[str, Any] = {'model_id': bundle.model_id, 'cost_card': card.as_record()}
            self._results.bundles.append(entry)
            self._say('loading')
            engine = stack.enter_context(self._ours(bundle))
            entry['kernel'] = engine.call('describe')['kernel']
            if 'figures' in self._parts:
                figures = measure_bundle(
                    engine,
                    card,
                    self._machine,
                    n_runs=self._plan.n_runs,
                    n_decoded=self._plan.n_decoded,
                    only=self._only,
                    on_step=self._say,
                )
                entry.update(figures.as_record())
                self._report.figures(figures)
            self._protocols(engine, bundle, card)
            if self._options.against:
                self._compare(engine, bundle)

    def language_model(self, path: Path) -> None:
        """The paper's protocols on a GGUF file alone."""
        self._model = path.name
        language = self._costs('of_gguf', path)
        card = self._card(language, None)
        self._report.card(path.name, card)
        entry = {'file': path.name, 'cost_card': card.as_record()}
        self._results.language_models.append(entry)
        with Contestant('language', gguf=str(path), n_threads=self._plan.n_threads) as engine:
            entry['kernel'] = engine.call('describe')['kernel']
            common = {'n_runs': self._plan.protocol_runs}
            if 'table5' in self._parts:
                self._say('Table 5')
                n_tokens = self._plan.table5_tokens
                row = complete(engine, path.stem, language, self._machine, n_tokens=n_tokens, **common)
                self._results.table5.append(row)
            if 'table6' in self._parts:
                self._say('Table 6')
                row = see_language_only(
                    engine,
                    f'{path.stem}, {self._options.visual_tokens} visual tokens',
                    language,
                    self._machine,
                    n_visual_tokens=self._options.visual_tokens,
                    n_tokens=self._plan.table6_tokens,
                    **common,
                )
                self._results.table6.append(row)

    def _ours(self, bundle: Bundle) -> Contestant:
        height, width = CAMERA_SIZE
        return Contestant('ours', bundle=str(bundle.path), n_threads=self._plan.n_threads, height=height, width=width)

    def _costs(self, method: str, path: Path) -> Any:
        self._say('reading shapes')
        with Contestant('shapes') as shapes:
            return shapes.call(method, path=str(path))

    def _card(self, language: LanguageCost, vision: VisionCost | None) -> CostCard:
        self._say('measuring the ceilings of this machine')
        self._machine.wait()
        with self._machine.watch() as load:
            ceilings = measure_ceilings(
                language,
                vision,
                self._plan.n_threads,
                seconds=self._plan.ceiling_s,
                buffer_bytes=self._plan.ceiling_bytes,
            )
        return CostCard(language, vision, replace(ceilings, foreign_cores=load.foreign_cores))

    def _protocols(self, engine: Contestant, bundle: Bundle, card: CostCard) -> None:
        name = f'{bundle.name} {bundle.profile}'
        n_runs = self._plan.protocol_runs
        if 'table5' in self._parts:
            self._say('Table 5')
            n_tokens = self._plan.table5_tokens
            row = complete(engine, name, card.language, self._machine, n_tokens=n_tokens, n_runs=n_runs)
            self._results.table5.append(row)
        if 'table6' in self._parts:
            self._say('Table 6')
            n_patches = card.vision.n_patches if card.vision is not None else 0
            n_tokens = self._plan.table6_tokens
            row = see(engine, name, card.language, n_patches, self._machine, n_tokens=n_tokens, n_runs=n_runs)
            self._results.table6.append(row)

    def _compare(self, engine: Contestant, bundle: Bundle) -> None:
        with ExitStack() as stack:
            rivals: dict[str, Contestant] = {}
            for rival in dict.fromkeys(self._options.against):
                self._say(f'loading {rival}')
                rivals[rival] = stack.enter_context(Contestant(rival, **self._rival_arguments(rival, engine, bundle)))
            comparisons = compare(
                engine,
                rivals,
                self._machine,
                tokens=engine.call('tokens', text=PROMPT_TEXT * 40)[:PROMPT_TOKENS],
                n_runs=self._plan.n_runs,
                n_decoded=self._plan.n_decoded,
                only=self._only,
                on_step=self._say,
            )
            kernels = {one.kind: one.call('describe').get('kernel') for one in (engine, *rivals.values())}
            memory = {rival: contestant.memory() for rival, contestant in rivals.items()}
        self._results.bundles[-1].update(rivals_memory=memory, kernels=kernels)
        self._results.comparisons += [(bundle.model_id, one) for one in comparisons]
        self._report.comparisons(comparisons, kernels, bundle.language['quantization'])

    def _rival_arguments(self, rival: str, engine: Contestant, bundle: Bundle) -> dict[str, Any]:
        height, width = CAMERA_SIZE
        common = {'n_threads': self._plan.n_threads}
        if rival == 'pytorch':
            parts = {text: engine.call('prompt_parts', question=text) for text in (QUESTION, SECOND_QUESTION)}
            return {
                **common,
                'checkpoint': str(self._options.checkpoint),
                'dtype': self._options.torch_dtype,
                'before': parts[QUESTION][0],
                'after': {text: part[1] for text, part in parts.items()},
                'height': height,
                'width': width,
            }
        adapter = '' if bundle.adapter_path is None else str(bundle.adapter_path)
        files = {**common, 'gguf': str(bundle.language_path), 'adapter': adapter}
        if rival == 'llamacpp':
            return files
        prompt = engine.call('prompt_parts', question='{question}')[2]
        return {**files, 'mmproj': str(self._options.mmproj), 'prompt': prompt, 'height': height, 'width': width}

    def _say(self, step: str) -> None:
        self._step = step
        self._status.update(f'{self._model}: {step}')

    def _waiting(self, cores: float) -> None:
        self._status.update(f'{self._model}: {self._step}; waiting, others take {cores:.1f} cores')


def _record(
    machine: dict[str, Any], libraries: dict[str, str], settings: dict[str, Any], results: _Results
) -> dict[str, Any]:
    return {
        'benchmark': 'engine',
        'schema': SCHEMA_VERSION,
        'time': datetime.now(timezone.utc).isoformat(timespec='seconds'),
        'machine': machine,
        'versions': libraries,
        'git': git_describe(),
        'settings': settings,
        'bundles': results.bundles,
        'language_models': results.language_models,
        'table5': [row.as_record() for row in results.table5],
        'table6': [row.as_record() for row in results.table6],
        'against': [{'model_id': model_id, **one.as_record()} for model_id, one in results.comparisons],
    }


def _write(line: str, to: str) -> None:
    if to == '-':
        sys.stdout.write(f'{line}\n')
        return
    try:
        with Path(to).open('a', encoding='utf-8') as file:
            file.write(f'{line}\n')
    except OSError as error:
        raise SettingsError(f'the record cannot be written to {to}: {error.strerror}') from error
