"""``mobilevlm evaluate bag BAG``: ask questions about a recording, and write a scored report."""

from __future__ import annotations

import argparse
import os
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mobilevlm_ros.bags import Bag, open_bag
from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.evaluate.answerer import Answerer, BundleAnswerer
from mobilevlm_ros.evaluate.plan import Plan
from mobilevlm_ros.evaluate.questions import file_hash, read_questions
from mobilevlm_ros.evaluate.realtime import RealtimeSettings, check_unplayed, run_realtime
from mobilevlm_ros.evaluate.record import RunRecord
from mobilevlm_ros.evaluate.report import write_report
from mobilevlm_ros.evaluate.runner import run_offline
from mobilevlm_ros.evaluate.server import ServerAnswerer
from mobilevlm_ros.evaluate.template import write_template
from mobilevlm_ros.paths import bundle_dir
from mobilevlm_ros.runtime.bundle import open_bundle

__all__ = ['add_bag_arguments', 'run_bag']


def add_bag_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    defaults = RealtimeSettings()
    parser.add_argument('bag', metavar='BAG', type=Path, help='folder of rosbag2, or one of its .mcap or .db3 files')
    parser.add_argument('--questions', metavar='FILE', type=Path, help='.yaml or .jsonl; see --init')
    parser.add_argument('--out', metavar='DIR', type=Path, required=True, help='for answers and report; a run that was '
                        'stopped goes on there')  # fmt: skip
    parser.add_argument('--init', action='store_true', help='ask nothing: write questions to be filled in, with '
                        'pictures, into --out')  # fmt: skip
    parser.add_argument('--every', metavar='S', type=float, default=1.0, help='with --init: a picture each S seconds')
    parser.add_argument('--bundle', metavar='DIR', type=Path, help='who answers; default: the embedded default, nano')
    parser.add_argument('--server', metavar='URL', default='', help='who answers instead: vLLM, llama-server or alike')
    parser.add_argument('--model', metavar='NAME', default='', help="the server's name for its model")
    parser.add_argument(
        '--server-key-env', metavar='NAME', default='', help="environment variable with the server's key"
    )
    parser.add_argument('--threads', metavar='N', type=int, default=0, help='default: as the bundle says')
    parser.add_argument('--blind', action='store_true', help='ask everything about a grey picture, too')
    parser.add_argument('--stamp', choices=['header', 'receive'], default='header', help='whose clock the seconds in '
                        'the questions are of: that of the camera or of the recorder; default: header')  # fmt: skip
    live = parser.add_argument_group('in real time')
    live.add_argument('--realtime', action='store_true', help='play at recorded speed, through the queue of the node')
    live.add_argument('--deadline', metavar='S', type=float, default=defaults.deadline_s,
                      help=f'for questions that name none; default: {defaults.deadline_s:g}')  # fmt: skip
    live.add_argument('--max-frame-age', metavar='S', type=float, default=defaults.max_frame_age_s,
                      help=f'default: {defaults.max_frame_age_s:g}')  # fmt: skip
    live.add_argument('--queue-size', metavar='N', type=int, default=defaults.queue_size,
                      help=f'default: {defaults.queue_size}')  # fmt: skip
    live.add_argument('--encode-ahead-duty', metavar='SHARE', type=float, default=defaults.encode_ahead_duty,
                      help='default: 0, off')  # fmt: skip


def run_bag(options: argparse.Namespace) -> int:
    """Ask, score, report; returns 0.

    :raise BagError: if the bag cannot be used.
    :raise QuestionFileError: if the questions cannot.
    :raise SettingsError: if arguments do not go together.
    :raise EvaluationError: if ``--out`` holds another run.
    :raise DiskSpaceError: if the disk is full.
    :raise MobileVLMError: if whoever answers cannot.
    """
    _check(options)
    console = Console(stderr=True)
    with open_bag(options.bag) as bag:
        for note in bag.notes:
            console.print(f'note: {note}', style='yellow', highlight=False, markup=False, soft_wrap=True)
        if options.init:
            print(write_template(bag, options.out, every_s=options.every, clock=options.stamp))
            return 0
        plan = Plan(bag, read_questions(options.questions), options.stamp)
        if options.realtime:
            check_unplayed(options.out)
        answerer, described = _answerer(options)
        with closing(answerer):
            _run(options, bag, plan, answerer, described, console)
        if bag.n_broken:
            console.print(f'{bag.n_broken} broken images, the first: {bag.broken[0].problem}', style='yellow',
                          highlight=False, markup=False, soft_wrap=True)  # fmt: skip
    report = write_report(options.out)
    print(report.html)
    return 0


def _check(options: argparse.Namespace) -> None:
    if options.init:
        return
    if options.questions is None:
        raise SettingsError('--questions FILE is missing; --init writes one to be filled in')
    if options.realtime and (options.server or options.blind):
        raise SettingsError('--realtime plays to a bundle on this machine, and not to a grey picture: leave out '
                            '--server and --blind')  # fmt: skip
    if options.server and options.bundle:
        raise SettingsError('either --bundle or --server answers, not both')
    for name in ('deadline', 'max_frame_age', 'queue_size'):
        value = getattr(options, name)
        if value is not None and not 0 < value < float('inf'):
            raise SettingsError(f'--{name.replace("_", "-")} is above 0, found {value}')
    if not 0 <= options.encode_ahead_duty <= 1:
        raise SettingsError(f'--encode-ahead-duty is a share, 0 to 1, found {options.encode_ahead_duty}')


def _answerer(options: argparse.Namespace) -> tuple[Answerer, dict[str, Any]]:
    """Who answers, and how the description of the run names it."""
    if options.server:
        key = os.environ.get(options.server_key_env, '') if options.server_key_env else ''
        if options.server_key_env and not key:
            raise SettingsError(f'the environment variable {options.server_key_env} is not set')
        server = ServerAnswerer(options.server, options.model, api_key=key)
        return server, {'model_id': server.model_id, 'server': options.server, 'path': '', 'hash': '', 'warning': ''}
    path = options.bundle or bundle_dir('nano', 'cpu')
    bundle = open_bundle(path)
    answerer = BundleAnswerer.open(path, n_threads=options.threads)
    return answerer, {
        'model_id': answerer.model_id,
        'path': str(bundle.path),
        'hash': bundle.hash,
        'warning': bundle.warning,
    }


def _run(
    options: argparse.Namespace, bag: Bag, plan: Plan, answerer: Answerer, described: dict[str, Any], console: Console
) -> None:
    live = RealtimeSettings(
        queue_size=options.queue_size,
        deadline_s=options.deadline,
        max_frame_age_s=options.max_frame_age,
        encode_ahead_duty=options.encode_ahead_duty,
    )
    settings = {'stamp': options.stamp, 'realtime': options.realtime, 'blind': options.blind}
    record = RunRecord(
        options.out,
        bag,
        plan,
        answerer=described,
        questions_file={'path': str(options.questions), 'sha256': file_hash(options.questions)},
        settings=settings | asdict(live) if options.realtime else settings,
    )
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task('answers', total=None)

        def on_progress(n_done: int, n_expected: int) -> None:
            progress.update(task, completed=n_done, total=n_expected)

        if options.realtime:
            assert isinstance(answerer, BundleAnswerer)
            run_realtime(bag, plan, answerer.assistant, options.out, record, live, on_progress=on_progress)
        else:
            run_offline(bag, plan, answerer, options.out, record, blind=options.blind, on_progress=on_progress)
