"""``mobilevlm build``, ``plan``, ``fetch`` and ``init``: from a name to a bundle that can be asked."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console

from mobilevlm_ros.build.console import ConsoleReporter
from mobilevlm_ros.cli.arguments import Commands
from mobilevlm_ros.paths import bundle_dir
from mobilevlm_ros.runtime.bundle import Bundle

__all__ = ['add_build']


def add_build(commands: Commands) -> None:
    """Add the commands."""
    build = commands.add('build', _build, 'Build a bundle: everything that answers with one model on one device.')
    build.add_argument(
        'model', metavar='MODEL', help='nano (the embedded default), a published name, or the folder of a checkpoint'
    )
    build.add_argument('--profile', default='cpu', help='kind of device: a file of engines/, or a .yaml of your own')
    build.add_argument('--out', metavar='DIR', type=Path, help='default: in the cache folder')
    build.add_argument('--images', metavar='DIR', type=Path, help='pictures to calibrate and compare with')
    build.add_argument('--adapter', metavar='DIR', type=Path, help='LoRA adapter, as peft saves it')
    build.add_argument('--mmproj', action='store_true', help="also write mmproj.gguf, for llama.cpp's own tools")
    build.add_argument('--packages', metavar='DIR', type=Path, help='nano: folder with the wheels, not to download')

    plan = commands.add('plan', _plan, 'Build the TensorRT plan of a bundle, on the device where it will run.')
    plan.add_argument('bundle', metavar='DIR', type=Path, help='a bundle of a profile with the backend tensorrt')

    fetch = commands.add('fetch', _fetch, 'Download a published checkpoint.')
    fetch.add_argument('model', metavar='NAME', help='for example mobilevlm_v2-1.7b')
    fetch.add_argument('--from', dest='folder', metavar='DIR', type=Path, help='take it from a local folder')

    init = commands.add('init', _init, 'Write a checkpoint of full size with random weights, to measure with.')
    init.add_argument('model', metavar='NAME', help='for example mobilevlm_v2-1.7b')
    init.add_argument('--random', action='store_true', required=True, help='say that you know what you get')
    init.add_argument('--out', metavar='DIR', type=Path, required=True)
    init.add_argument('--tokenizer', metavar='FILE', type=Path, help='a tokenizer.model; default: a made-up one')
    init.add_argument('--seed', type=int, default=0, help='default: 0')
    init.add_argument('--dtype', choices=['bf16', 'fp16', 'fp32'], default='bf16', help='default: bf16')


def _build(options: argparse.Namespace) -> int:
    from mobilevlm_ros.build.making import make_bundle

    name = Path(os.path.abspath(options.model)).name  # a name for `.`, too
    out = options.out or bundle_dir(name, Path(options.profile).stem)
    with ConsoleReporter() as reporter:
        bundle = make_bundle(
            options.model,
            options.profile,
            out,
            reporter,
            images=options.images,
            adapter=options.adapter,
            packages=options.packages,
            mmproj=options.mmproj,
        )
    reporter.console.print(f'{bundle.model_id}, {bundle.size_bytes >> 20} MiB', highlight=False)
    _print_parity(reporter.console, bundle)
    print(bundle.path)
    return 0


def _print_parity(console: Console, bundle: Bundle) -> None:
    """The parity report as a table."""
    from rich.markup import escape
    from rich.table import Table

    from mobilevlm_ros.build.parity import read_report

    report = read_report(bundle)
    columns = ('stage', 'metric', 'worst', 'mean', 'scale', 'of', 'limit')
    # Without lines between the columns it fits 80 characters.
    table = Table(*columns, title=escape(f'compared with {report.reference}'), box=None, pad_edge=False)
    for stage in report.stages:
        scale, limit = ('' if value is None else f'{value:.6g}' for value in (stage.scale, stage.limit))
        numbers = (f'{stage.worst:.6f}', f'{stage.mean:.6f}', scale, str(stage.n), limit)
        table.add_row(escape(stage.stage), escape(stage.metric), *numbers)
    console.print(table)


def _plan(options: argparse.Namespace) -> int:
    from mobilevlm_ros.build.plan import plan_bundle

    with ConsoleReporter() as reporter:
        bundle = plan_bundle(options.bundle, reporter)
    _print_parity(reporter.console, bundle)
    print(bundle.path)
    return 0


def _fetch(options: argparse.Namespace) -> int:
    from mobilevlm_ros.model.fetch import fetch

    with ConsoleReporter() as reporter:
        reporter.step(options.model)
        path = fetch(options.model, source=options.folder, on_progress=reporter.progress)
    print(path)
    return 0


def _init(options: argparse.Namespace) -> int:
    from mobilevlm_ros.model.publish import init_random

    with ConsoleReporter() as reporter:
        reporter.step(f'{options.model} with random weights')
        path = init_random(
            options.model,
            options.out,
            dtype=options.dtype,
            seed=options.seed,
            tokenizer=options.tokenizer,
            on_progress=reporter.progress,
        )
    print(path)
    return 0
