"""``mobilevlm train frames BAG``: from a recording to a folder of frames that a person labels."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from mobilevlm_ros.build.console import ConsoleReporter
from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.runtime.bundle import open_bundle
from mobilevlm_ros.runtime.loading import load_assistant
from mobilevlm_ros.train.own_asked import parse_asked, suggest
from mobilevlm_ros.train.own_frames import SHEET, empty_entries, pick_frames, write_labels
from mobilevlm_ros.train.own_labels import LABELS
from mobilevlm_ros.train.own_looks import Limits

__all__ = ['add_frames_arguments', 'run_frames']


def add_frames_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    limits = Limits()
    parser.add_argument('bags', metavar='BAG', type=Path, nargs='+', help='what `ros2 bag record` wrote')
    parser.add_argument('--out', metavar='DIR', type=Path, required=True, help='a new folder, to be labelled')
    parser.add_argument('--topic', metavar='NAME', help='with images; default: the only one')
    parser.add_argument('--every', metavar='S', type=float, default=2.0, help='look at a frame so often; default: 2')
    parser.add_argument('--frames', metavar='N', type=int, default=200, help='take so many at most; default: 200')
    parser.add_argument(
        '--ask',
        metavar='QUESTION',
        action='append',
        default=[],
        help='about every frame, again and again: "yes_no: Is the door open?", "place: Where is it? [left | right]"',
    )
    parser.add_argument('--suggest', metavar='BUNDLE', type=Path, help='let a bundle answer, to be corrected')
    parser.add_argument(
        '--darkest',
        metavar='N',
        type=float,
        default=limits.darkest,
        help=f'least mean brightness of a frame, of 255; default: {limits.darkest:g}',
    )
    parser.add_argument(
        '--blur',
        metavar='P',
        type=float,
        default=limits.blur,
        help=f'most blur of a frame, 0 to 1; default: {limits.blur:g}',
    )
    parser.add_argument(
        '--change',
        metavar='N',
        type=float,
        default=limits.change,
        help=f'least change of some part of the picture, of 255; 0: take duplicates, too; default: {limits.change:g}',
    )
    parser.add_argument('--max-side', metavar='N', type=int, default=1280, help='pixels; default: 1280')


def run_frames(options: argparse.Namespace) -> int:
    """Pick, write, and return 0.

    :raise MobileVLMError: see ``pick_frames``, ``parse_asked``, ``open_bundle`` and ``suggest``.
    """
    asked = [parse_asked(written) for written in options.ask]
    if options.suggest is not None and not asked:
        raise SettingsError('--suggest needs questions to answer: give them with --ask "yes_no: Is the door open?"')
    bundle = None if options.suggest is None else open_bundle(options.suggest)
    with ConsoleReporter(Console(stderr=True)) as reporter:
        reporter.step(f'looking through {len(options.bags)} bag{"s" if len(options.bags) > 1 else ""}')
        picked = pick_frames(
            options.bags,
            options.out,
            topic=options.topic,
            every_s=options.every,
            n_most=options.frames,
            max_side=options.max_side,
            limits=Limits(darkest=options.darkest, blur=options.blur, change=options.change),
            on_progress=reporter.progress,
        )
        left_out = ', '.join(f'{n} {reason}' for reason, n in sorted(picked.left_out.items()))
        reporter.step(f'{len(picked.images)} frames' + (f'; left out: {left_out}' if left_out else ''))
        entries = empty_entries(len(picked.images), asked)
        if bundle is not None:
            assistant = load_assistant(bundle)
            reporter.step(f'what {assistant.model_id} answers')
            try:
                for number, (image, _) in enumerate(picked.images):
                    entries[number] = suggest(assistant, options.out / image, asked)
                    reporter.progress(number + 1, len(picked.images))
            finally:
                assistant.close()
        write_labels(options.out, picked.images, entries, checked=bundle is None)
    todo = 'write the answers' if bundle is None else 'correct the answers and set "checked" to true'
    print(f'{options.out / SHEET} shows them; {todo} in {options.out / LABELS}')
    return 0
