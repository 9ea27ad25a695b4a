"""``mobilevlm train exam BUNDLE``: how well does it see? A table, and with ``--out`` JSON and plots."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mobilevlm_ros.build.console import ConsoleReporter
from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.evaluate.calibration import Calibration, calibrate
from mobilevlm_ros.paths import shared_file
from mobilevlm_ros.runtime.assistant import Assistant
from mobilevlm_ros.runtime.bundle import open_bundle
from mobilevlm_ros.runtime.loading import load_assistant
from mobilevlm_ros.train.calibration_plot import plot_calibration
from mobilevlm_ros.train.exam import ExamReport, Given, answer_all, majority
from mobilevlm_ros.train.exam_questions import ExamQuestion, read_exam

__all__ = ['add_exam_arguments', 'plot_scores', 'run_exam']


def add_exam_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument('bundle', metavar='BUNDLE', type=Path, help='folder of the bundle')
    parser.add_argument('--questions', metavar='FILE', type=Path, help="JSON lines; default: nano's exam")
    parser.add_argument('--images', metavar='DIR', type=Path, help='the pictures; default: images beside the questions')
    parser.add_argument('--also-blind', action='store_true', help='ask again with a grey picture')
    parser.add_argument('--untrained', metavar='BUNDLE', type=Path, help='a bundle to compare with, asked the same')
    parser.add_argument('--max-risk', metavar='P', type=float, default=0.1, help='wrong answers to allow; default: 0.1')
    parser.add_argument('--threads', metavar='N', type=int, default=0, help='default: as the bundle says')
    parser.add_argument('--out', metavar='DIR', type=Path, help='write exam.json, exam.png and calibration.png there')
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
        assistant = _load(options.bundle, options.threads)
        try:
            given = _asked(assistant, questions, reporter, f'{len(questions)} questions')
            report = ExamReport(assistant.model_id, given, majority(questions))
            if options.also_blind:
                report.blind = _asked(assistant, questions, reporter, 'the same about a grey picture', blind=True)
        finally:
            assistant.close()
        if options.untrained is not None:
            assistant = _load(options.untrained, options.threads)
            try:
                report.untrained = _asked(assistant, questions, reporter, f'the same of {options.untrained}')
            finally:
                assistant.close()
    closed = [one for one in given if one.kind == 'yes_no']
    calibration = _calibration(closed, options.max_risk)
    record = report.as_record() | {'calibration': None if calibration is None else calibration.as_record()}
    if options.json:
        print(json.dumps(record, ensure_ascii=False))
    else:
        _print(report, calibration, Console(file=sys.stdout))
    if options.out is not None:
        _write(options.out, record, report, calibration, closed)
    return 0


def _load(path: Path, n_threads: int) -> Assistant:
    return load_assistant(open_bundle(path), n_threads=n_threads)


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


def _calibration(closed: Sequence[Given], max_risk: float) -> Calibration | None:
    if not closed:
        return None
    confidences, right, pictures = zip(*((one.confidence, one.right, one.picture) for one in closed), strict=True)
    return calibrate(confidences, right, pictures, max_risk=max_risk)


def _print(report: ExamReport, calibration: Calibration | None, console: Console) -> None:
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
    if calibration is not None:
        _print_calibration(calibration, console)


def _print_calibration(calibration: Calibration, console: Console) -> None:
    console.print(
        f'yes/no confidence: mean {calibration.mean_confidence:.2f} at accuracy {calibration.accuracy:.2f}; '
        f'ECE {calibration.ece:.3f}, Brier {calibration.brier:.3f}',
        highlight=False,
        soft_wrap=True,
    )
    threshold = calibration.threshold
    if threshold.value is None:
        text = f'no limit of confidence keeps the risk at {threshold.max_risk:.0%}'
    else:
        text = (
            f'risk of at most {threshold.max_risk:.0%}: "unknown" below {threshold.value:.2f}; on the pictures that it '
            f'was not chosen on: {threshold.coverage:.0%} answered, {threshold.risk:.0%} of these wrong'
        )
    console.print(text, highlight=False, soft_wrap=True)


def _write(
    folder: Path,
    record: dict[str, object],
    report: ExamReport,
    calibration: Calibration | None,
    closed: Sequence[Given],
) -> None:
    try:
        (folder / 'exam.json').write_text(json.dumps(record, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
        plot_scores(report, folder / 'exam.png')
        if calibration is not None:
            confidences, right = [one.confidence for one in closed], [one.right for one in closed]
            title = f'{report.model_id}, yes/no'
            plot_calibration(calibration, confidences, right, folder / 'calibration.png', title)
    except OSError as error:
        raise SettingsError(f'{folder} cannot be written: {error}') from error


def plot_scores(report: ExamReport, path: Path) -> None:
    """Draw all columns by kind into a PNG file; the lines are 95 % intervals."""
    from matplotlib.figure import Figure

    columns = report.columns()
    kinds = list(columns['accuracy'])
    figure = Figure(figsize=(9, 4.2), layout='constrained')
    axes = figure.subplots()
    width = 0.8 / len(columns)
    for number, (name, column) in enumerate(columns.items()):
        found = [column[kind] for kind in kinds]
        values = [score.accuracy for score in found]
        below = [score.accuracy - score.interval[0] for score in found]
        above = [score.interval[1] - score.accuracy for score in found]
        places = [place + (number - (len(columns) - 1) / 2) * width for place in range(len(kinds))]
        axes.bar(places, values, width, yerr=[below, above], label=name, error_kw={'linewidth': 0.8})
    axes.set_xticks(range(len(kinds)), [f'{kind}\n{columns["accuracy"][kind].n}' for kind in kinds])
    axes.set(ylabel='accuracy', ylim=(0, 1), title=report.model_id)
    axes.legend()
    figure.savefig(path, dpi=110)
