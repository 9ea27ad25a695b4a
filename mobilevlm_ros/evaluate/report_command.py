"""``mobilevlm evaluate report DIR``: score and show results that are there, of a run that is finished or not."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mobilevlm_ros.evaluate.intervals import Share
from mobilevlm_ros.evaluate.report import Bounds, Report, write_report
from mobilevlm_ros.evaluate.scored import BLOCK_S
from mobilevlm_ros.evaluate.scores import KindScore, Scores

__all__ = ['add_report_arguments', 'print_scores', 'run_report']


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument('folder', metavar='DIR', type=Path, help='folder of the results')
    parser.add_argument(
        '--block',
        metavar='S',
        type=float,
        default=BLOCK_S,
        help=f'seconds of the recording that count as one group; 0: each frame is one; default: {BLOCK_S:g}',
    )
    parser.add_argument('--max-risk', metavar='P', type=float, default=0.1, help='wrong answers to allow; default: 0.1')
    bounds = Bounds()
    for name, most in (('frames', bounds.frames), ('answers', bounds.answers)):
        parser.add_argument(
            f'--{name}', metavar='N', type=int, default=most, help=f'{name} to show at most; default: {most}'
        )


def run_report(options: argparse.Namespace) -> int:
    """Write the report, print its scores, and return 0.

    :raise DiskSpaceError: if there is no room.
    :raise EvaluationError: if the results cannot be read, or the report cannot be written.
    :raise SettingsError: if an argument is out of its range.
    """
    bounds = Bounds(options.frames, options.answers)
    report = write_report(options.folder, block_s=options.block, max_risk=options.max_risk, bounds=bounds)
    print_scores(report, Console(file=sys.stdout))
    return 0


def print_scores(report: Report, console: Console) -> None:
    """Print what the report says first, and where it is."""
    scores = report.scores
    table = Table(box=None, pad_edge=False)
    for name in ('kind', 'right', 'accuracy', 'blind', 'majority'):
        table.add_column(name, justify='left' if name == 'kind' else 'right')
    for kind, one in scores.kinds.items():
        table.add_row(escape(kind), *_cells(one))
    if scores.kinds:
        table.add_row('all', *_cells(scores.overall), style='bold')
        console.print(table)
    for text in _sentences(scores):
        console.print(text, highlight=False, soft_wrap=True)
    console.print(f'{report.html}', highlight=False, markup=False, soft_wrap=True)


def _cells(one: KindScore) -> tuple[str, ...]:
    counts = f'{one.seen.n_right} of {one.seen.n}'
    return (
        counts,
        f'{one.seen.value:.2f} ({one.seen.low:.2f}-{one.seen.high:.2f})',
        *map(_bare, (one.blind, one.majority)),
    )


def _bare(share: Share | None) -> str:
    return '-' if share is None else f'{share.value:.2f}'


def _sentences(scores: Scores) -> list[str]:
    found = []
    if scores.n_unscored:
        found.append(f'{scores.n_unscored} of {scores.n} answers are to questions without a truth')
    if scores.n_failed:
        found.append(f'{scores.n_failed} of {scores.n} questions got no answer')
    for known, stages in scores.latency.stages.items():
        n, percentiles = stages['total_s'].n, stages['total_s'].percentiles
        found.append(f'{known} frame: median {percentiles[50]:.3f} s, p95 {percentiles[95]:.3f} s ({n} answers)')
    if scores.met is not None:
        found.append(f'{scores.met.n_right} of {scores.met.n} deadlines met')
    return found
