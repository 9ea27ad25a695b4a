"""``mobilevlm evaluate ...``: recorded bags and the benchmarks of the paper, scored."""

from __future__ import annotations

import argparse

from mobilevlm_ros.cli.arguments import Commands
from mobilevlm_ros.cli.late import LateCommands, Run, no_command

__all__ = ['add_evaluate']

# The titles stand with the benchmarks themselves; they are imported only when one of them is called.
BENCHMARKS = {
    'gqa': 'GQA',
    'sqa': 'ScienceQA-IMG',
    'textvqa': 'TextVQA',
    'pope': 'POPE',
    'mme': 'MME',
    'mmbench': 'MMBench',
}


def add_evaluate(commands: Commands) -> None:
    """Add the commands."""
    parser = commands.add('evaluate', no_command, 'Evaluate: answers about recorded bags and benchmarks, scored.')
    late = LateCommands(parser, 'evaluating', 'requirements/evaluate.txt')
    late.add('bag', 'Ask questions about a recorded bag, score the answers, write a report.', _bag)
    late.add('report', 'Write the report of a run, also of one that is not finished.', _report)
    late.add('compare', 'May the second of two runs take the place of the first? Exit code 0 or 1.', _compare)
    for name, title in BENCHMARKS.items():
        late.add(name, f'{title}: ask, score, and compare with the paper.', _benchmark)
    late.add('language', "The paper's language benchmarks, by lm-evaluation-harness, of a GGUF.", _language)


def _bag(parser: argparse.ArgumentParser) -> Run:
    from mobilevlm_ros.evaluate.bag_command import add_bag_arguments, run_bag

    add_bag_arguments(parser)
    return run_bag


def _report(parser: argparse.ArgumentParser) -> Run:
    from mobilevlm_ros.evaluate.report_command import add_report_arguments, run_report

    add_report_arguments(parser)
    return run_report


def _compare(parser: argparse.ArgumentParser) -> Run:
    from mobilevlm_ros.evaluate.compare_command import add_compare_arguments, run_compare

    add_compare_arguments(parser)
    return run_compare


def _language(parser: argparse.ArgumentParser) -> Run:
    from mobilevlm_ros.evaluate.benchmarks.harness import add_language_arguments, run_language

    add_language_arguments(parser)
    return run_language


def _benchmark(parser: argparse.ArgumentParser) -> Run:
    from mobilevlm_ros.evaluate.benchmarks.command import add_arguments, run

    parser.set_defaults(benchmark=parser.prog.rpartition(' ')[2])
    add_arguments(parser)
    return run
