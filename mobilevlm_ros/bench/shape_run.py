"""The paper's two tables for models of known shapes with random weights: ours and their rivals, one after the other.

Each model is made, measured and removed before the next, in a folder that goes whatever ends the run. What is done is
kept as it comes (``shape_rows``), so that the same command goes on where it was stopped. A row that the machine has no
room for is named and left out; none is begun that would end after the time that was given.
"""

from __future__ import annotations

import argparse
import hashlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status

from mobilevlm_ros.bench.machine import describe_machine, git_describe, usable_cores, versions
from mobilevlm_ros.bench.paper import TABLE5_TOKENS, TABLE6_TOKENS
from mobilevlm_ros.bench.process import Contestant
from mobilevlm_ros.bench.protocols import Measured, complete, see
from mobilevlm_ros.bench.quiet import QuietMachine
from mobilevlm_ros.bench.report import Report
from mobilevlm_ros.bench.shape_rows import PAPER_MODELS, DoneRows, Row, rows_of
from mobilevlm_ros.build.quantization_types import check_quantization
from mobilevlm_ros.build.stages import check_memory, check_room
from mobilevlm_ros.errors import BuildError, MobileVLMError, SettingsError
from mobilevlm_ros.model.manifest import read_manifest

__all__ = ['run_shapes']

_HEIGHT, _WIDTH = 480, 640
_TABLES = {'table5': 5, 'table6': 6}


def run_shapes(options: argparse.Namespace) -> int:
    """Measure what is not done yet, and print both tables; see ``bench.command``.

    :return: 0 if every row is there now, 1 if some are missing.
    :raise SettingsError: if an argument is wrong.
    """
    rows = _wanted(options)
    settings = {
        'n_threads': options.threads or usable_cores(),
        'n_runs': options.runs or (1 if options.quick else 3),
        'n_tokens': {5: 16 if options.quick else TABLE5_TOKENS, 6: 16 if options.quick else TABLE6_TOKENS},
        'tokenizer': _sha256(options.tokenizer),
    }
    machine, libraries = describe_machine(), versions()
    about = {'machine': machine, 'versions': libraries, 'git': git_describe(), 'wait_s': options.wait}
    circumstances = {**settings, 'cpu': machine['cpu'], 'cores': machine['cores']}
    done = DoneRows(Path(options.json) if options.json else None, circumstances)
    console = Console(width=None if Console().is_terminal else max(130, Console().width))
    report = Report(console)
    report.machine(machine, libraries, circumstances)
    with console.status('starting') as status:
        missing = _ShapeRun(options, settings, console, status, done, about).measure(rows)
    if done.measured(5):
        report.table5(done.measured(5))
    if done.measured(6):
        report.table6(done.measured(6))
    for row, reason in missing:
        console.print(f'missing: {row.name}, Table {row.table}: {reason}', style='yellow', markup=False)
    return 1 if missing else 0


def _wanted(options: argparse.Namespace) -> list[Row]:
    """All rows that the arguments ask for; what would fail after minutes is refused."""
    if options.bundles or options.gguf or options.against or options.only:
        raise SettingsError('--shapes makes its own models: give no BUNDLE, --gguf, --against or --only with it')
    if options.json == '-':
        raise SettingsError('--shapes keeps its rows in a file, to go on from: give --json FILE')
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise SettingsError(f'the folder of --json {options.json} does not exist')
    for path in (options.tokenizer, options.work):
        if path is not None and not path.exists():
            raise SettingsError(f'{path} does not exist')
    parts = options.part or list(_TABLES)
    if not set(parts) <= set(_TABLES):
        raise SettingsError(f'--shapes is for the tables: give --part {" or ".join(_TABLES)}')
    for quantization in options.quantization:
        check_quantization(quantization)
    configs = [read_manifest(name) for name in dict.fromkeys(options.shapes or PAPER_MODELS)]
    return rows_of(configs, {_TABLES[part] for part in parts}, options.quantization)


def _sha256(path: Path | None) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path is not None else 'made up'


class _ShapeRun:
    """One run over the rows."""

    def __init__(
        self,
        options: argparse.Namespace,
        settings: Mapping[str, Any],
        console: Console,
        status: Status,
        done: DoneRows,
        about: Mapping[str, Any],
    ) -> None:
        self._options = options
        self._settings = settings
        self._console = console
        self._status = status
        self._done = done
        self._about = about
        self._machine = QuietMachine(options.wait, self._waiting)
        self._step = ''

    def measure(self, rows: list[Row]) -> list[tuple[Row, str]]:
        """Measure what is not done; returns what is missing, and why."""
        started_s = time.monotonic()
        missing: list[tuple[Row, str]] = []
        with (
            _ended_by_sigterm(),
            tempfile.TemporaryDirectory(prefix='mobilevlm-shapes-', dir=self._options.work) as work,
        ):
            folder, made = Path(work), ''
            for number, row in enumerate(rows, 1):
                place = f'{number} of {len(rows)}: {row.name}, Table {row.table}'
                if self._done.has(row):
                    self._print(f'{place}: done earlier')
                    continue
                if made != row.name:  # the files of Table 5 serve Table 6, too
                    _empty(folder)
                made = row.name
                try:
                    self._check(row, time.monotonic() - started_s, folder)
                    self._measure(row, place, folder)
                except SettingsError:  # the file of rows cannot be written: going on would be for nothing
                    raise
                except MobileVLMError as error:
                    reason = str(error).replace('--out', '--work')
                    missing.append((row, reason))
                    self._print(f'{place}: left out, {reason}')
                    made = ''
        return missing

    def _check(self, row: Row, passed_s: float, folder: Path) -> None:
        """Whether there is time and room for a row.

        :raise BuildError: if not.
        """
        given_s, expected_s = 60 * self._options.minutes, self._done.expected_s(row) or 0.0
        if given_s and passed_s + expected_s > given_s:
            takes = f', the row takes about {expected_s:.0f} s' if expected_s else ''
            advice = 'give the same command again' if expected_s < given_s else 'give more'
            raise BuildError(
                f'{max(0.0, given_s - passed_s):.0f} s are left of --minutes {self._options.minutes:g}{takes}: {advice}'
            )
        there = sum(path.stat().st_size for path in folder.iterdir())
        check_room(folder, row.disk_bytes - there, row.name)
        check_memory(row.memory_bytes, row.name)

    def _measure(self, row: Row, place: str, folder: Path) -> None:
        started_s = time.monotonic()
        expected_s = self._done.expected_s(row)
        about = f' (about {expected_s:.0f} s)' if expected_s else ''
        self._say(f'{place}{about}: writing random weights')
        self._make(row, folder)
        self._say(f'{place}{about}: measuring')
        measured, kernel = self._measured(row, folder)
        took_s = time.monotonic() - started_s
        record = {**self._about, 'kernel': kernel, 'time': datetime.now(timezone.utc).isoformat(timespec='seconds')}
        self._done.add(row, measured, took_s, record)
        self._print(
            f'{place}: prompt {measured.prompt:.1f} tok/s, eval {measured.eval:.1f} tok/s, '
            f'total {measured.total_s:.1f} s; took {took_s:.0f} s'
        )

    def _make(self, row: Row, folder: Path) -> None:
        """Write the files of a row that are not there."""
        tokenizer = str(self._options.tokenizer or '')
        with Contestant('random models') as models:
            if not any(folder.iterdir()):
                models.call(
                    'write_language',
                    config=row.config,
                    quantization=row.quantization,
                    tokenizer=tokenizer,
                    folder=str(folder),
                )
            if row.table == 6:
                models.call('write_bundle', config=row.config, quantization=row.quantization, folder=str(folder))

    def _measured(self, row: Row, folder: Path) -> tuple[Measured, dict[str, Any]]:
        """The row, and whose products it was measured with."""
        n_threads = self._settings['n_threads']
        common = {'n_tokens': self._settings['n_tokens'][row.table], 'n_runs': self._settings['n_runs']}
        with Contestant('shapes') as shapes:
            if row.table == 5:
                path = str(folder / 'language.gguf')
                cost = shapes.call('of_gguf', path=path)
            else:
                cost, vision = shapes.call('of_bundle', path=str(folder))
        if row.table == 5:
            with Contestant('language', gguf=path, n_threads=n_threads) as engine:
                measured = complete(engine, row.name, cost, self._machine, **common)
                return measured, engine.call('describe')['kernel']
        size = {'height': _HEIGHT, 'width': _WIDTH}
        with Contestant('ours', bundle=str(folder), n_threads=n_threads, **size) as engine:
            n_patches = vision.n_patches if vision else 0
            measured = see(engine, row.name, cost, n_patches, self._machine, **common)
            return measured, engine.call('describe')['kernel']

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False)

    def _say(self, step: str) -> None:
        self._step = step
        self._status.update(step)
        if not self._console.is_terminal:
            self._print(step)

    def _waiting(self, cores: float) -> None:
        self._status.update(f'{self._step}; waiting, others take {cores:.1f} cores')


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as an exception, so that the files of a model go then, too."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
