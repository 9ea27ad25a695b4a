"""``mobilevlm evaluate compare A B``: may B take the place of A? Says so in its exit code, for CI."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mobilevlm_ros.evaluate.compare import Comparison, Flip, Limits, compare_runs
from mobilevlm_ros.evaluate.paired import Paired
from mobilevlm_ros.evaluate.scored import BLOCK_S

__all__ = ['add_compare_arguments', 'run_compare']


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = 'Exit code: 0 B is accepted, 1 it is refused, 2 the runs cannot be compared.'
    parser.add_argument('first', metavar='A', type=Path, help='folder of the results that there are')
    parser.add_argument('second', metavar='B', type=Path, help='folder of the results that are to be accepted')
    parser.add_argument(
        '--alpha', metavar='P', type=float, default=0.05, help='level of significance to refuse at; default: 0.05'
    )
    parser.add_argument(
        '--max-drop', metavar='SHARE', type=float, help='refuse if accuracy falls by more, even if that may be chance'
    )
    parser.add_argument('--each-kind', action='store_true', help='refuse if one kind of question is worse')
    parser.add_argument(
        '--block',
        metavar='S',
        type=float,
        default=BLOCK_S,
        help=f'seconds of a recording that count as one group; 0: each frame is one; default: {BLOCK_S:g}',
    )
    parser.add_argument('--common', action='store_true', help='compare what both have, and leave out the rest')
    parser.add_argument('--show', metavar='N', type=int, default=20, help='flipped answers to print; default: 20')
    parser.add_argument('--json', action='store_true', help='print the comparison as one JSON object')


def run_compare(options: argparse.Namespace) -> int:
    """Compare and print; 0 if the second run is accepted, 1 if it is refused.

    :raise EvaluationError: if the results cannot be read or compared.
    :raise SettingsError: if an argument is out of its range.
    """
    limits = Limits(options.alpha, options.max_drop, options.each_kind)
    comparison = compare_runs(options.first, options.second, limits, block_s=options.block, common=options.common)
    if options.json:
        print(json.dumps(comparison.as_record(), ensure_ascii=False))
    else:
        _print(comparison, options.show, Console(file=sys.stdout))
    return 0 if comparison.accepted else 1


def _print(found: Comparison, n_flips: int, console: Console) -> None:
    before, after = found.accuracies
    table = Table(box=None, pad_edge=False, title=escape(f'{found.models[0]}  to  {found.models[1]}'))
    for name in ('kind', 'questions', 'gained', 'lost', 'difference', 'p', 'p by answer'):
        table.add_column(name, justify='left' if name == 'kind' else 'right')
    for kind, paired in found.kinds.items():
        table.add_row(escape(kind), *_cells(paired, found.kind_p[kind]))
    table.add_row('all', *_cells(found.overall, found.overall.p), style='bold')
    console.print(table)
    console.print(f'accuracy {before:.1%} to {after:.1%}, {found.overall.n_groups} groups of frames', highlight=False)
    if found.median_s is not None:
        console.print(f'median answer {found.median_s[0]:.3f} s to {found.median_s[1]:.3f} s', highlight=False)
    if len(found.kinds) > 1:
        console.print('p of a kind: for as many tests as there are kinds (Holm)', highlight=False)
    for what, n in (('without a truth', found.n_unscored), ('of one run only', found.n_left_out)):
        if n:
            console.print(f'{n} questions {what} are left out', highlight=False)
    _print_flips(found.flips, n_flips, console)
    if found.accepted:
        console.print('accepted: not significantly worse', style='green', highlight=False)
    for reason in found.reasons:
        console.print(f'refused: {reason}', style='red', highlight=False, markup=False, soft_wrap=True)


def _cells(paired: Paired, p: float) -> Sequence[str]:
    counts = str(paired.n), str(paired.n_gained), str(paired.n_lost)
    return *counts, f'{paired.difference:+.1%}', f'{p:.3g}', f'{paired.p_answers:.3g}'


def _print_flips(flips: Sequence[Flip], most: int, console: Console) -> None:
    ordered = sorted(flips, key=lambda flip: flip.gained)  # what was lost is what matters
    for flip in ordered[: max(0, most)]:
        mark = 'gained' if flip.gained else 'lost  '
        place = f'{flip.camera} frame {flip.frame_index}'
        text = f'{mark} {flip.question} ({place}): {flip.first!r} to {flip.second!r}, true is {flip.truth!r}'
        console.print(text, style='green' if flip.gained else 'red', highlight=False, markup=False, soft_wrap=True)
    if len(ordered) > most:
        console.print(f'and {len(ordered) - max(0, most)} flipped answers more (--show)', highlight=False)
