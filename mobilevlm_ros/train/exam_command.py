"""``mobilevlm train exam BUNDLE``: how well does it see? A table, and with ``--out`` JSON and plots."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mobilevlm_ros.build.console import ConsoleReporter
from mobilevlm_ros.build.untrained import write_untrained
from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.paths import shared_file
from mobilevlm_ros.runtime.assistant import Assistant
from mobilevlm_ros.runtime.bundle import Bundle, open_bundle
from mobilevlm_ros.runtime.loading import load_assistant
from mobilevlm_ros.train.exam import ExamReport, Given, answer_all, majority
from mobilevlm_ros.train.exam_limits import Belief, beliefs_of, manifest_lines
from mobilevlm_ros.train.exam_questions import ExamQuestion, read_exam
from mobilevlm_ros.train.exam_report import as_record, belief_text, write_report

__all__ = ['add_exam_arguments', 'run_exam']


def add_exam_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument('bundle', metavar='BUNDLE', type=Path, help='folder of the bundle')
    parser.add_argument('--questions', metavar='FILE', type=Path, help="JSON lines; default: nano's exam")
    parser.add_argument('--images', metavar='DIR', type=Path, help='the pictures; default: images beside the questions')
    parser.add_argument('--also-blind', action='store_true', help='ask again with a grey picture')
    other = parser.add_mutually_exclusive_group()
    other.add_argument('--also-untrained', action='store_true', help='ask again with random weights in the projector')
    other.add_argument('--untrained', metavar='BUNDLE', type=Path, help='a bundle to compare with instead')
    parser.add_argument(
        '--max-risk',
        metavar='P',
        type=float,
        default=0.1,
        help='share of wrong answers above the limit of confidence that is proposed; default: 0.1',
    )
    parser.add_argument('--threads', metavar='N', type=int, default=0, help='default: as the bundle says')
    parser.add_argument('--out', metavar='DIR', type=Path, help='write the report, as JSON, Markdown and plots')
    parser.add_argument('--json', action='store_true', help='print the report as one JSON object')


def run_exam(options: argparse.Namespace) -> int:
    """Examine, print, write, and return 0.

    :raise BundleError: if a bundle cannot be used.
    :raise DatasetError: if the questions or a picture are missing or damaged.
    :raise EngineError: if the model fails.
    :raise SettingsError: if the risk is none, or the folder cannot be written.
    """
    if not 0.0 <= options.max_risk <= 1.0:
        raise SettingsError(f'--max-risk is between 0 and 1, found {options.max_risk}')
    questions = read_exam(options.questions or shared_file('models/nano/exam/questions.jsonl'), options.images)
    if options.out is not None:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f'--out {options.out} cannot be made: {error}') from error
    with ConsoleReporter(Console(stderr=True)) as reporter:
        bundle = open_bundle(options.bundle)
        assistant = load_assistant(bundle, n_threads=options.threads)
        try:
            given = _asked(assistant, questions, reporter, f'{len(questions)} questions')
            temperature = {one.name.lower(): value for one, value in bundle.temperature().items()}
            report = ExamReport(assistant.model_id, given, majority(questions), temperature=temperature)
            if options.also_blind:
                report.blind = _asked(assistant, questions, reporter, 'the same about a grey picture', blind=True)
        finally:
            assistant.close()
        if options.untrained is not None or options.also_untrained:
            with _untrained(bundle, options.untrained) as other:
                assistant = load_assistant(other, n_threads=options.threads)
                try:
                    report.untrained = _asked(assistant, questions, reporter, f'the same of {other.name}')
                finally:
                    assistant.close()
    found = beliefs_of(given, options.max_risk)
    if options.json:
        print(json.dumps(as_record(report, found), ensure_ascii=False))
    else:
        _print(report, found, Console(file=sys.stdout))
    if options.out is not None:
        write_report(options.out, report, found)
    return 0


@contextmanager
def _untrained(bundle: Bundle, given: Path | None) -> Iterator[Bundle]:
    """The bundle that was given, or one made for the moment."""
    if given is not None:
        yield open_bundle(given)
        return
    with tempfile.TemporaryDirectory(prefix='mobilevlm-') as folder:
        yield write_untrained(bundle, Path(folder) / 'untrained')


def _asked(
    assistant: Assistant,
    questions: Sequence[ExamQuestion],
    reporter: ConsoleReporter,
    step: str,
    *,
    blind: bool = False,
) -> list[Given]:
    reporter.step(step)
    return answer_all(assistant, questions, blind=blind, on_progress=reporter.progress)


def _print(report: ExamReport, found: Mapping[str, Belief], console: Console) -> None:
    columns = report.columns()
    table = Table('kind', 'questions', box=None, pad_edge=False, title=escape(report.model_id))
    for name in columns:
        table.add_column(name, justify='right')
    for kind, score in columns['accuracy'].items():
        low, high = score.interval
        cells = [f'{score.accuracy:.2f} ({low:.2f}-{high:.2f})']
        cells += [f'{column[kind].accuracy:.2f}' for name, column in columns.items() if name != 'accuracy']
        table.add_row(kind, str(score.n), *cells)
    console.print(table)
    for name, score in report.details().items():
        console.print(f'yes/no, {name}: {score.n_right} of {score.n} right', highlight=False)
    for name, belief in found.items():
        measured = belief.measured
        console.print(
            f'{name}, confidence: mean {measured.mean_confidence:.2f} at accuracy {measured.accuracy:.2f}; '
            f'ECE {measured.ece:.3f}, Brier {measured.brier:.3f}; {belief_text(belief)}',
            highlight=False,
            soft_wrap=True,
        )
    console.print(escape(manifest_lines(found, report.temperature)), highlight=False, end='')
