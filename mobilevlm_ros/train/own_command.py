"""``mobilevlm train own DIR``: from labelled frames to a bundle, and a table of what it gained.

Exit codes: 0 the bundle is there; 2 (raised as an error) something is wrong; 130 the training was stopped by Ctrl-C or
a termination, with a checkpoint, and ``--resume`` goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from mobilevlm_ros.build.console import ConsoleReporter
from mobilevlm_ros.train.own_labels import LABELS, Labels, read_labels
from mobilevlm_ros.train.own_split import DEFAULT_GAP_S, DEFAULT_SHARE, Split, split_by_time

__all__ = ['add_own_arguments', 'run_own']


def add_own_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument('folder', metavar='DIR', type=Path, help='what `mobilevlm train frames` made, and you labelled')
    parser.add_argument('--bundle', metavar='BUNDLE', type=Path, help='what the robot answers with; default: build it')
    parser.add_argument(
        '--base',
        metavar='CHECKPOINT',
        help="nano, a published name or a folder; default: the bundle's own, or nano",
    )
    parser.add_argument('--out', metavar='DIR', type=Path, help='folder of what is made; default: DIR/own')
    parser.add_argument('--profile', metavar='NAME', help="kind of device; default: the bundle's, or cpu")
    parser.add_argument('--config', metavar='FILE', default='own-data', help='of the training; default: own-data')
    parser.add_argument(
        '--set', metavar='KEY=VALUE', nargs='+', action='extend', default=[], help='over it: schedule.epochs=5'
    )
    parser.add_argument(
        '--held-out',
        metavar='P',
        type=float,
        default=DEFAULT_SHARE,
        help=f'share of the frames, the last ones, to be asked about; default: {DEFAULT_SHARE:g}',
    )
    parser.add_argument(
        '--gap',
        metavar='S',
        type=float,
        default=DEFAULT_GAP_S,
        help=f'seconds before them that are not learned from; default: {DEFAULT_GAP_S:g}',
    )
    parser.add_argument('--packages', metavar='DIR', type=Path, help='nano: folder with the wheels, not to download')
    parser.add_argument('--check', action='store_true', help='look at the labels and their split, and stop')
    parser.add_argument('--resume', action='store_true', help='go on with a run that was stopped')


def run_own(options: argparse.Namespace) -> int:
    """Check, train, build, examine, print; returns the exit code.

    :raise DatasetError: if the labels cannot be used.
    :raise MobileVLMError: see ``train_own``.
    """
    with ConsoleReporter(Console(stderr=True)) as reporter:
        reporter.step(f'labels in {options.folder / LABELS}')
        labels = read_labels(options.folder / LABELS, on_progress=reporter.progress)
        split = split_by_time(labels.frames, share=options.held_out, gap_s=options.gap)
        reporter.console.print(_described(labels, split), highlight=False, soft_wrap=True)
    if options.check:
        return 0
    from mobilevlm_ros.train.own_run import BUNDLE, OwnSettings, train_own

    settings = OwnSettings(
        folder=options.folder,
        out=options.out or options.folder / 'own',
        bundle=options.bundle,
        base=options.base,
        profile=options.profile,
        packages=options.packages,
        config=options.config,
        overrides=tuple(options.set),
        resume=options.resume,
    )
    report = train_own(settings, split, reporter)
    if report is None:
        reporter.console.print('· stopped, with a checkpoint; go on with the same command and --resume')
        return 130
    report.show(Console(file=sys.stdout))
    print(settings.out / BUNDLE)
    return 0


def _described(labels: Labels, split: Split) -> str:
    lines = [
        f'{len(labels.frames)} labelled frames, {labels.n_questions} answers',
        f'{len(split.train)} frames to learn from; the last {len(split.held_out)} (from {split.from_s:.1f} s on) to be '
        f'asked about; {len(split.dropped)} between them for neither',
    ]
    if labels.n_open or labels.n_unchecked:
        lines.append(
            f'not used: {labels.n_open} questions without an answer, {labels.n_unchecked} frames with "checked": false'
        )
    return '\n'.join(f'  {line}' for line in lines)
