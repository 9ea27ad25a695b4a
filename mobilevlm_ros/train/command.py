"""``mobilevlm train STAGE`` and ``mobilevlm train merge``: the arguments, and what is printed.

Exit codes: 0 the product is there; 2 (raised as an error) the run could not start or go on; 130 it was stopped by
Ctrl-C or a termination, with a checkpoint, and says how to go on.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mobilevlm_ros.errors import SettingsError

__all__ = ['add_merge_arguments', 'add_stage_arguments', 'asked_to_stop', 'run_merge', 'run_training']


def add_stage_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a stage."""
    parser.add_argument(
        '--config', metavar='FILE', required=True, help='a YAML file, or the name of one in config/train'
    )
    parser.add_argument('--resume', action='store_true', help='go on from the newest checkpoint of the run')
    parser.add_argument('--card', action='store_true', help='say what it would cost, and stop before the first step')
    parser.add_argument(
        'overrides', metavar='KEY=VALUE', nargs='*', help='over the file, such as schedule.max_steps=100'
    )


def run_training(options: argparse.Namespace) -> int:
    """Train the stage ``options.stage``; returns the exit code.

    :raise MobileVLMError: see ``run_stage``.
    """
    from rich.console import Console

    from mobilevlm_ros.train.config import read_config

    config = read_config(options.config, options.overrides)
    if config.stage != options.stage:
        raise SettingsError(
            f'{options.config} is for stage {config.stage}, not {options.stage}: run `mobilevlm train {config.stage} '
            f'--config {options.config}`'
        )
    from mobilevlm_ros.train.stage import run_stage

    console = Console(stderr=True)
    with asked_to_stop() as asked:
        outcome = run_stage(
            config, resume=options.resume, console=console, asked_to_stop=asked.__bool__, card_only=options.card
        )
    if outcome.stopped:
        again = ['mobilevlm', 'train', options.stage, '--config', options.config, '--resume', *options.overrides]
        console.print(f'· stopped after step {outcome.step}, with a checkpoint; go on with', highlight=False)
        console.print(shlex.join(again), highlight=False, soft_wrap=True)
        return 130
    for path in outcome.products.values():
        print(path)
    return 0


class _Asked:
    """Whether a signal has come."""

    def __init__(self) -> None:
        self._is_set = False

    def __bool__(self) -> bool:
        return self._is_set

    def set(self) -> None:
        """It has."""
        self._is_set = True


@contextmanager
def asked_to_stop() -> Iterator[_Asked]:
    """The first Ctrl-C, or a termination, ends the run after its step; the second Ctrl-C at once."""
    asked = _Asked()

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        os.write(2, b'\nstopping after this step; once more to stop at once, without a checkpoint\n')
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of merging."""
    parser.add_argument('base', metavar='BASE', type=Path, help='the checkpoint that the adapter was trained on')
    parser.add_argument('adapter', metavar='ADAPTER', type=Path, help='folder that stage lora or qlora left')
    parser.add_argument('--out', metavar='DIR', type=Path, required=True, help='the merged checkpoint')
    parser.add_argument(
        '--dtype', choices=['bf16', 'fp16', 'fp32'], default='fp16', help="default: fp16, as upstream's tool"
    )


def run_merge(options: argparse.Namespace) -> int:
    """Merge; returns the exit code.

    :raise MobileVLMError: see ``merge_adapter``.
    """
    from mobilevlm_ros.build.console import ConsoleReporter
    from mobilevlm_ros.train.lora import merge_adapter

    with ConsoleReporter() as reporter:
        reporter.step(f'merging {options.adapter} into {options.base}')
        out = merge_adapter(
            options.base, options.adapter, options.out, dtype=options.dtype, on_progress=reporter.progress
        )
    print(out)
    return 0
