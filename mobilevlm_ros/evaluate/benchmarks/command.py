"""``mobilevlm evaluate gqa|sqa|textvqa|pope|mme|mmbench``: ask a benchmark's questions, and score as its paper does."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mobilevlm_ros.errors import BenchmarkError, SettingsError
from mobilevlm_ros.evaluate.benchmarks.asking import Source, Task, ask_all
from mobilevlm_ros.evaluate.benchmarks.catalogue import BENCHMARKS
from mobilevlm_ros.evaluate.benchmarks.items import Benchmark, Given, Scores, read_answers
from mobilevlm_ros.evaluate.benchmarks.paper import VISION_TABLE, row_of
from mobilevlm_ros.evaluate.benchmarks.record import RunRecord, question_hash, write_file
from mobilevlm_ros.paths import bundle_dir

__all__ = ['add_arguments', 'run']

_MOST_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments; which benchmark is meant, the parser says by ``set_defaults(benchmark=NAME)``."""
    parser.add_argument('--data', metavar='DIR', type=Path, required=True, help='folder of the benchmark, as published')
    parser.add_argument('--bundle', metavar='DIR', type=Path, help='who answers; default: the embedded default, nano')
    parser.add_argument('--server', metavar='URL', default='', help='who answers instead: vLLM, llama-server or alike')
    parser.add_argument(
        '--model', metavar='NAME', default='', help="the server's name for its model; default: its only"
    )
    parser.add_argument(
        '--server-key-env', metavar='NAME', default='', help="environment variable with the server's key"
    )
    parser.add_argument('--timeout', metavar='S', type=float, default=120.0, help='for one request; default: 120')
    parser.add_argument('--answers', metavar='FILE', type=Path, help='ask nobody: score answers of a published script')
    parser.add_argument('--out', metavar='DIR', type=Path, help='for answers and scores; default: evaluation/NAME')
    parser.add_argument('--limit', metavar='N', type=_positive, help='only the first N questions')
    parser.add_argument('--resume', action='store_true', help='go on with the run in --out')
    parser.add_argument(
        '--processes', metavar='N', type=_positive, default=1, help='share the questions out; default: 1'
    )
    parser.add_argument('--threads', metavar='N', type=_positive, default=0, help='of each process')
    parser.add_argument('--paper', metavar='MODEL', choices=sorted(VISION_TABLE), help='whose figure to print beside')
    parser.add_argument('--json', action='store_true', help='print the scores as one JSON object')


def run(options: argparse.Namespace) -> int:
    """Ask, score, print, write, and return 0.

    :raise BenchmarkError: if a file of the benchmark is missing, damaged or of another version.
    :raise SettingsError: if the arguments contradict each other or the folder of the run.
    :raise MobileVLMError: if whoever answers fails.
    """
    benchmark = BENCHMARKS[options.benchmark]
    out: Path = options.out or Path('evaluation') / benchmark.name
    started_s = time.monotonic()
    if options.answers is not None:
        if options.bundle or options.server or options.resume:
            raise SettingsError('--answers asks nobody: leave out --bundle, --server and --resume')
        model_id, problems = str(options.answers), list[str]()
        answers = list(read_answers(options.answers))[: options.limit]
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f'--out {out} cannot be made: {error.strerror}') from error
    else:
        model_id, answers, problems = _asked(benchmark, options, out)
    scores = benchmark.score(options.data, answers, options.limit is not None)
    try:
        written = benchmark.submit(options.data, answers, out)
    except OSError as error:
        raise BenchmarkError(f'{error.filename or out} cannot be written: {error.strerror}') from error
    paper = options.paper or row_of(model_id, VISION_TABLE)
    record = {
        'benchmark': benchmark.name,
        'model_id': model_id,
        'figures': scores.figures,
        'paper': {paper: VISION_TABLE[paper][benchmark.name]} if paper else {},
        'n_questions': scores.n_questions,
        'n_answers': len(answers),
        'limit': options.limit,
        'not_answered': problems,
        'notes': list(scores.notes),
        'seconds': time.monotonic() - started_s,
    }
    write_file(out / 'scores.json', json.dumps(record, indent=1, ensure_ascii=False) + '\n')
    if options.json:
        print(json.dumps(record, ensure_ascii=False))
    else:
        _print(benchmark, model_id, scores, paper, options.limit, problems, Console(file=sys.stdout))
        names = ', '.join(path.name for path in [*written[:_MOST_SHOWN], out / 'scores.json'])
        print(f'in {out}: {names}{" and more" if len(written) > _MOST_SHOWN else ""}')
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be 1 or more, found {value}')
    return value


def _source(options: argparse.Namespace) -> Source:
    if options.server:
        if options.bundle:
            raise SettingsError('give --bundle or --server, not both')
        key = os.environ.get(options.server_key_env, '') if options.server_key_env else ''
        if options.server_key_env and not key:
            raise SettingsError(f'the environment variable {options.server_key_env} holds no key')
        return Source(server=options.server, model=options.model, api_key=key, timeout_s=options.timeout)
    threads = options.threads
    if not threads and options.processes > 1:
        threads = max(1, len(os.sched_getaffinity(0)) // options.processes)
    return Source(options.bundle or bundle_dir('nano', 'cpu'), n_threads=threads)


def _asked(benchmark: Benchmark, options: argparse.Namespace, out: Path) -> tuple[str, list[Given], list[str]]:
    """Model, answers in the benchmark's order, and what was wrong with questions that got none."""
    source = _source(options)
    model_id = source.model_id()
    task = Task(benchmark.name, options.data, options.limit)
    record = RunRecord(out, benchmark.name, model_id, resume=options.resume)
    done = record.done()
    n_items = 0
    for item in task.items():  # all of it is looked at before a model is loaded
        if item.number in done and done[item.number] != question_hash(item.question_id, item.prompt):
            raise SettingsError(
                f'{record.predictions} has another question {item.number}: the data changed, start anew'
            )
        n_items += 1
    if not n_items:
        raise BenchmarkError(f'{options.data} has no questions of {benchmark.title}')
    task = Task(benchmark.name, options.data, options.limit, frozenset(done))
    n_done = sum(number < n_items for number in done)
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    progress = Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    )
    try:
        if n_done < n_items:
            with progress:
                bar = progress.add_task(benchmark.title, total=n_items, completed=n_done)
                for replies in ask_all(task, source, options.processes):
                    record.add(replies)
                    progress.advance(bar, len(replies))
    finally:
        record.close()
    return model_id, *record.answers(n_items)


def _print(
    benchmark: Benchmark,
    model_id: str,
    scores: Scores,
    paper: str,
    limit: int | None,
    problems: list[str],
    console: Console,
) -> None:
    table = Table('figure', box=None, pad_edge=False, title=f'{benchmark.title}, {scores.n_questions} questions')
    table.add_column(escape(model_id), justify='right')
    table.add_column(f'{paper} (paper)' if paper else 'paper', justify='right')
    for number, (name, value) in enumerate(scores.figures.items()):
        printed = f'{VISION_TABLE[paper][benchmark.name]:.1f}' if paper and not number else ''
        table.add_row(f'{name} ({benchmark.unit})' if not number else name, f'{value:.1f}', printed or '')
    console.print(table)
    notes = list(scores.notes)
    if not paper:
        notes.append(f'the paper has no figure for this model; its own: {_papers(benchmark.name)}')
    if limit is not None:
        notes.append(f'of the first {limit} questions only: nothing to compare with the paper')
    if problems:
        notes.append(
            f'questions that could not be asked, and count as wrong: {len(problems)}; the first: {problems[0]}'
        )
    for note in notes:
        console.print(f'note: {note}', highlight=False, markup=False, soft_wrap=True)


def _papers(benchmark: str) -> str:
    return ', '.join(
        f'{model} {row[benchmark]}' for model, row in VISION_TABLE.items() if model.startswith('mobilevlm')
    )
