"""``mobilevlm evaluate language``: a GGUF file in lm-evaluation-harness, on the tasks of the paper's Table 3.

The harness (``lm_eval``) is not among this package's requirements, but for tests: who wants this installs it. Written
against version 0.4.13 (``lm_eval.api.model.LM``, ``lm_eval.simple_evaluate``).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mobilevlm_ros.errors import DependencyError, SettingsError
from mobilevlm_ros.evaluate.benchmarks.language import LanguageScorer
from mobilevlm_ros.evaluate.benchmarks.paper import LANGUAGE_TABLE, LANGUAGE_TASKS, row_of
from mobilevlm_ros.evaluate.benchmarks.record import write_file

__all__ = ['add_language_arguments', 'harness_model', 'run_language']

_MAX_TOKENS = 256


def add_language_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument('gguf', metavar='FILE', type=Path, help='a language model, as `mobilevlm build` writes it')
    parser.add_argument('--tasks', metavar='A,B', default=','.join(LANGUAGE_TASKS), help="default: the paper's")
    parser.add_argument('--limit', metavar='N', type=int, help='only the first N questions of each task')
    parser.add_argument('--threads', metavar='N', type=int, default=0, help='default: all cores but one')
    parser.add_argument('--gpu-layers', metavar='N', type=int, default=0, help='layers on the GPU; -1: all')
    parser.add_argument('--n-ctx', metavar='N', type=int, default=2048, help='longest text in tokens; default: 2048')
    parser.add_argument('--no-bos', action='store_true', help='do not begin texts with the token that starts them')
    parser.add_argument(
        '--paper', metavar='MODEL', choices=sorted(LANGUAGE_TABLE), help='whose figures to print beside'
    )
    parser.add_argument('--out', metavar='FILE', type=Path, help='write the figures there, as JSON')


def run_language(options: argparse.Namespace) -> int:
    """Run the tasks, print, write, and return 0.

    :raise DependencyError: if lm_eval is not installed.
    :raise EngineError: if the file cannot be loaded.
    :raise SettingsError: if a task is not one of the paper's.
    """
    tasks = [task.strip() for task in options.tasks.split(',') if task.strip()]
    unknown = sorted(set(tasks) - set(LANGUAGE_TASKS))
    if unknown or not tasks:
        raise SettingsError(f'--tasks are of {", ".join(LANGUAGE_TASKS)}; found {options.tasks!r}')
    harness, base = _harness()
    scorer = LanguageScorer.open(
        options.gguf,
        n_ctx=options.n_ctx,
        n_threads=options.threads,
        n_gpu_layers=options.gpu_layers,
        add_bos=not options.no_bos,
    )
    try:
        model = harness_model(base, scorer)
        figures: dict[str, float] = {}
        for n_examples, group in groupby(sorted(tasks, key=lambda task: LANGUAGE_TASKS[task]), LANGUAGE_TASKS.get):
            together = list(group)
            found = harness.simple_evaluate(
                model=model, tasks=together, num_fewshot=n_examples, limit=options.limit, bootstrap_iters=0
            )
            figures |= {task: float(found['results'][task]['acc,none']) for task in together}
    finally:
        scorer.close()
    paper = options.paper or row_of(options.gguf.name, LANGUAGE_TABLE)
    _print(options.gguf.name, {task: figures[task] for task in tasks}, paper)
    if options.out is not None:
        record = {'file': str(options.gguf), 'limit': options.limit, 'bos': not options.no_bos, 'accuracy': figures}
        write_file(options.out, json.dumps(record, indent=1) + '\n')
    return 0


def _harness() -> tuple[Any, type]:
    try:
        return importlib.import_module('lm_eval'), importlib.import_module('lm_eval.api.model').LM
    except ImportError as error:
        raise DependencyError(
            f'language benchmarks need lm-evaluation-harness ({error}): pip install lm_eval. docs/benchmarks.md has '
            'its own command for a checkpoint'
        ) from error


def harness_model(base: type, scorer: LanguageScorer) -> Any:
    """A model of the harness that asks ``scorer``.

    :param base: ``lm_eval.api.model.LM``.
    """

    class GgufModel(base):
        """What the harness calls; requests have ``args``."""

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """Of each (context, continuation): log probability, and whether greedy decoding says it."""
            scored = []
            pairs = [request.args for request in requests]
            for pair, result in zip(pairs, scorer.log_likelihoods(pairs), strict=True):
                self.cache_hook.add_partial('loglikelihood', pair, result)
                scored.append(result)
            return scored

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            """Not offered."""
            raise NotImplementedError("perplexity of whole documents: none of the paper's tasks asks for it")

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            """The greedy continuation of each (context, options)."""
            texts = []
            for request in requests:
                context, wanted = request.args
                if wanted.get('do_sample') or wanted.get('temperature'):
                    raise NotImplementedError('only greedy decoding is offered')
                until = wanted.get('until') or []
                until = [until] if isinstance(until, str) else list(until)
                texts.append(scorer.generate(context, until, int(wanted.get('max_gen_toks', _MAX_TOKENS))))
                self.cache_hook.add_partial('generate_until', request.args, texts[-1])
            return texts

    return GgufModel()


def _print(name: str, figures: dict[str, float], paper: str) -> None:
    table = Table('task', 'examples', box=None, pad_edge=False, title='Accuracy')
    table.add_column(name, justify='right')
    table.add_column(f'{paper} (paper)' if paper else 'paper', justify='right')
    for task, value in figures.items():
        printed = f'{LANGUAGE_TABLE[paper][task]:.4g}' if paper else ''
        table.add_row(task, str(LANGUAGE_TASKS[task]), f'{value:.4f}', printed)
    Console(file=sys.stdout).print(table)
