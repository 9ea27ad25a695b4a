"""The arguments of ``mobilevlm bench``; the work is in ``bench.run``, imported when the command runs."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ['PARTS', 'RIVALS', 'TURNS', 'add_arguments', 'run']

PARTS = ('figures', 'table5', 'table6')
RIVALS = ('llamacpp', 'mtmd', 'pytorch')
TURNS = ('start', 'new', 'known', 'vision', 'closed', 'eight', 'prefill', 'decode')
"""What figures and comparisons are made of: the first question after the start, a new frame, a known frame, the vision
engine, yes/no and choice, eight yes/no questions on a frame, a prompt of tokens, and decoding."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add('bundles', metavar='BUNDLE', type=Path, nargs='*', help='folders; default: the embedded default, nano')
    add(
        '--gguf',
        metavar='FILE',
        type=Path,
        action='append',
        default=[],
        help="a language model alone, for the paper's tables; may be given again",
    )
    add(
        '--visual-tokens',
        metavar='N',
        type=_positive,
        default=576,
        help="of a --gguf in the protocol of Table 6; default: 576, LLaVA-1.5's",
    )
    add(
        '--part',
        choices=PARTS,
        action='append',
        help='measure this only; may be given again; default: everything, or nothing but --against if that is given',
    )
    add(
        '--only',
        choices=TURNS,
        action='append',
        help='of figures and --against: this only; may be given again; default: everything',
    )
    add('--against', choices=RIVALS, action='append', default=[], help='compare, turn by turn; may be given again')
    add('--mmproj', metavar='FILE', type=Path, help='for --against mtmd: vision tower and projector in GGUF')
    add('--checkpoint', metavar='DIR', type=Path, help='for --against pytorch: the model in the published layout')
    add('--torch-dtype', choices=('float32', 'bfloat16'), default='float32', help='for --against pytorch')
    add('--threads', metavar='N', type=_positive, default=0, help='of every contestant; default: all cores')
    add(
        '--runs',
        metavar='N',
        type=_positive,
        default=0,
        help="of each series, besides warming up; default: 5, of the paper's tables 3",
    )
    add('--tokens', metavar='N', type=_positive, default=0, help='in a decoding run; default: 64')
    add('--wait', metavar='S', type=float, default=10.0, help='longest wait for a quiet machine each time; default: 10')
    add('--quick', action='store_true', help='seconds instead of minutes: few runs, short answers, rough ceilings')
    add('--json', metavar='FILE', help='append the record as one line to FILE; - prints it')
    shapes = parser.add_argument_group(
        "the paper's tables for shapes",
        'models with random weights, made for the occasion; what --json FILE has is kept',
    )
    add = shapes.add_argument
    add('--shapes', metavar='NAME', nargs='*', help="models by their manifests; default: all of the paper's tables")
    add('--quantization', metavar='Q', action='append', default=[], help="default: the paper's Q8_0 and Q4_K_S")
    add('--tokenizer', metavar='FILE', type=Path, help='tokenizer.model, tokenizer.json or GGUF; default: made up')
    add('--work', metavar='DIR', type=Path, help='where a model is while it is measured; default: the temporary folder')
    add('--minutes', metavar='N', type=float, default=0.0, help='begin nothing that would end later; default: no limit')


def run(options: argparse.Namespace) -> int:
    """Measure and print; returns the exit code.

    :raise MobileVLMError: if something that was asked for cannot be measured.
    """
    if options.shapes is not None:
        from mobilevlm_ros.bench.shape_run import run_shapes

        return run_shapes(options)
    from mobilevlm_ros.bench.run import run_benchmark

    return run_benchmark(options)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be 1 or more, found {value}')
    return value
