"""``mobilevlm train check DATA``: is this data fit to train on?

Exit codes: 0 it is; 1 something is wrong with it; 2 (raised as an error) it could not be looked at.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mobilevlm_ros.build.console import ConsoleReporter
from mobilevlm_ros.runtime.preprocess import PreprocessSpec
from mobilevlm_ros.train.check import DatasetReport, check_dataset
from mobilevlm_ros.train.templates import TEMPLATES
from mobilevlm_ros.train.tokens import open_tokenizer

__all__ = ['add_check_arguments', 'run_check']


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument('data', metavar='DATA', type=Path, help='dialogues: JSON, or JSON lines')
    parser.add_argument(
        '--format', choices=['llava', 'vicuna', 'alpaca'], default='llava', help='of the data; default: llava'
    )
    parser.add_argument('--images', metavar='DIR', type=Path, help='folder that image paths are relative to')
    parser.add_argument('--template', choices=TEMPLATES, default='v1', help='default: v1')
    parser.add_argument(
        '--tokenizer', metavar='PATH', type=Path, help='tokenizer.model, tokenizer.json or their folder: count tokens'
    )
    parser.add_argument('--max-tokens', metavar='N', type=int, default=2048, help='longest sample; default: 2048')
    parser.add_argument('--image-size', metavar='N', type=int, default=336, help='pixels a side; default: 336')
    parser.add_argument('--aspect', choices=['pad', 'square'], default='pad', help='default: pad; stage 1: square')
    parser.add_argument('--no-decode', action='store_true', help='only look whether images are there: much faster')
    parser.add_argument(
        '--on-bad', choices=['skip', 'refuse'], default='refuse', help='whether bad records fail the check (refuse)'
    )
    parser.add_argument('--json', action='store_true', help='print the report as one JSON object')


def run_check(options: argparse.Namespace) -> int:
    """Check, print, and return the exit code.

    :raise DatasetMissingError: if the data or the folder of images is not there.
    :raise CheckpointError: if the tokenizer cannot be read.
    :raise SettingsError: if template and tokenizer do not fit each other.
    """
    tokenizer = None if options.tokenizer is None else open_tokenizer(options.tokenizer)
    spec = None if options.no_decode else PreprocessSpec(options.image_size, options.aspect)
    with ConsoleReporter(Console(stderr=True)) as reporter:
        reporter.step(f'checking {options.data}')
        report = check_dataset(
            options.data,
            options.images,
            form=options.format,
            tokenizer=tokenizer,
            template=options.template,
            max_tokens=options.max_tokens,
            spec=spec,
            on_progress=reporter.progress,
        )
    if options.json:
        print(json.dumps(report.as_json()))
    else:
        _print(report, Console(file=sys.stdout))
    return 0 if report.flawless or (options.on_bad == 'skip' and report.usable) else 1


def _print(report: DatasetReport, console: Console) -> None:
    console.print(
        f'{report.n_good} of {report.n_records} records can be trained on: {report.n_with_image} with an image '
        f'({report.n_images} files), {report.n_text_only} text only; {report.n_answers} answers',
        highlight=False,
        soft_wrap=True,
    )
    counts = report.tokens
    if counts is None:
        console.print('tokens were not counted, nor masks checked: give --tokenizer', highlight=False, soft_wrap=True)
    else:
        share = counts.trained / counts.total if counts.total else 0.0
        console.print(
            f'{counts.total} tokens, {share:.1%} of them trained; the longest sample has {counts.longest}; '
            f'{counts.n_cut} are cut',
            highlight=False,
            soft_wrap=True,
        )
    if len(report.problems):
        table = Table('problem', 'records', 'for example', box=None, pad_edge=False)
        for problem in report.problems:
            examples = '\n'.join(str(example) for example in problem.examples)
            table.add_row(escape(problem.kind), str(problem.count), escape(examples))
        console.print(table)
    if report.broken_off:
        console.print(f'the rest cannot be read: {escape(report.broken_off)}', highlight=False, soft_wrap=True)
