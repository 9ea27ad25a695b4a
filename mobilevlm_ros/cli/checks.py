"""``mobilevlm doctor``, ``demo`` and ``bench``: is everything in place, does it work, and how fast?"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
from pathlib import Path

from mobilevlm_ros.bench.command import add_arguments as add_bench_arguments
from mobilevlm_ros.bench.command import run as run_bench
from mobilevlm_ros.cli.arguments import Commands
from mobilevlm_ros.paths import bundle_dir

__all__ = ['add_checks']


def add_checks(commands: Commands) -> None:
    """Add the commands."""
    doctor = commands.add('doctor', _doctor, 'Look at this machine and the ROS graph, and say what to do next.')
    doctor.add_argument('--bundle', metavar='DIR', type=Path, help='default: the embedded default, nano')
    doctor.add_argument('--seconds', type=float, default=2.0, help='how long to look at the graph; default: 2')
    doctor.add_argument('--json', action='store_true', help='print the findings as one JSON object')

    demo = commands.add('demo', _demo, 'Start the node, play camera footage into it, and ask.')
    demo.add_argument('--bundle', metavar='DIR', type=Path, help='default: the embedded default, built if it is not')
    demo.add_argument('--out', metavar='DIR', type=Path, default=Path('demo_output'), help='default: demo_output')
    demo.add_argument('--packages', metavar='DIR', type=Path, help='folder with the wheels, instead of downloading')

    bench = commands.add('bench', run_bench, "How fast a bundle is, beside this machine's limits and beside others.")
    add_bench_arguments(bench)


def _doctor(options: argparse.Namespace) -> int:
    from mobilevlm_ros.doctor import examine, print_report

    report = examine(options.bundle or bundle_dir('nano', 'cpu'), graph_s=options.seconds)
    if options.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        print_report(report)
    return 0 if report.healthy else 1


def _demo(options: argparse.Namespace) -> int:
    from mobilevlm_ros.errors import DependencyError

    for module in ('rclpy', 'mobilevlm_msgs'):
        if importlib.util.find_spec(module) is None:
            raise DependencyError(
                f'the demo needs ROS 2, but {module} is not installed: run `make demo`, or source your workspace first'
            )
    from mobilevlm_ros.node.demo.run import run_demo

    return run_demo(options.bundle, options.out, options.packages)
