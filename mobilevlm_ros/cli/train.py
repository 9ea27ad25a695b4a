"""``mobilevlm train ...``: the stages of training, and what belongs to them.

Robots have none of the libraries that training needs, so a command declares its arguments when it is called.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mobilevlm_ros.cli.arguments import Commands
from mobilevlm_ros.errors import DependencyError, SettingsError

__all__ = ['add_train']

STAGES = {
    'llm-pretrain': 'Train a language model from raw text, packed by `mobilevlm train tokenise`.',
    'sft': 'Teach a language model to answer, from dialogues without images.',
    'align': 'Train the projector, so that the language model sees; with a second rate the language model, too.',
    'instruct': 'Train projector and language model on dialogues about images.',
    'lora': 'Train adapters of the language model, and the projector.',
    'qlora': 'The same, with the frozen language model in 4 or 8 bits.',
}

# name: summary, module, and what its functions add_..._arguments and run_... are called after
OTHERS = {
    'merge': ('Put an adapter into the weights of its base.', 'command', 'merge'),
    'check': ('Look at dialogues before training on them.', 'check_command', 'check'),
    'tokenise': ('Turn raw text into shards for llm-pretrain.', 'tokenise', 'tokenise'),
    'features': ('Compute what the frozen vision tower sees in pictures, once.', 'nano_data.command', 'features'),
    'exam': (
        'How well does a bundle see? Real pictures, and questions that were answered by looking at them.',
        'exam_command',
        'exam',
    ),
    'curve': ('Draw the loss of runs over their steps.', 'curve', 'curve'),
    'nano': ('Train nano from nothing: all of its steps, each resumed where it was.', 'nano_whole', 'nano'),
    'frames': ('Pick frames out of recorded bags, to be labelled by a person.', 'own_frames_command', 'frames'),
    'own': ('Train on frames of your own robot, and see what it gained.', 'own_command', 'own'),
    'nano-base': ("Put nano's frozen parts together, as a checkpoint to train on.", 'nano_data.command', 'base'),
    'nano-data': ("Make nano's training data from packages.", 'nano_data.command', 'data'),
}

Declare = Callable[[argparse.ArgumentParser], None]


def add_train(commands: Commands) -> None:
    """Add the commands."""
    parser = commands.add('train', _nothing, 'Train: from raw text to a model that answers.')
    subparsers: Any = parser.add_subparsers(metavar='COMMAND', required=True, parser_class=_LateParser)

    def add(name: str, summary: str, declare: Declare) -> None:
        subparsers.add_parser(name, help=summary, description=summary, declare=declare)

    for stage, summary in STAGES.items():
        add(stage, summary, _stage(stage))
    for name, (summary, module, what) in OTHERS.items():
        add(name, summary, _other(module, what))


class _LateParser(argparse.ArgumentParser):
    """Declares its arguments when it is asked to parse some.

    :param declare: adds them, and the default ``run``; may import what it likes.
    """

    def __init__(self, *arguments: Any, declare: Declare, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._declare: Declare | None = declare

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in the base class."""
        if self._declare is not None:
            declare, self._declare = self._declare, None
            with _missing_libraries_named():
                declare(self)
        return super().parse_known_args(args, namespace)


@contextmanager
def _missing_libraries_named() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise DependencyError(
            f'training needs {error.name}, which is not installed: pip install -r requirements/train.txt'
        ) from error


def _declare_run(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    def late(options: argparse.Namespace) -> int:
        with _missing_libraries_named():
            return run(options)

    parser.set_defaults(run=late)


def _stage(stage: str) -> Declare:
    def declare(parser: argparse.ArgumentParser) -> None:
        from mobilevlm_ros.train.command import add_stage_arguments, run_training

        add_stage_arguments(parser)
        parser.set_defaults(stage=stage)
        _declare_run(parser, run_training)

    return declare


def _other(module: str, what: str) -> Declare:
    def declare(parser: argparse.ArgumentParser) -> None:
        found = importlib.import_module(f'mobilevlm_ros.train.{module}')
        getattr(found, f'add_{what}_arguments')(parser)
        _declare_run(parser, getattr(found, f'run_{what}'))

    return declare


def _nothing(options: argparse.Namespace) -> int:
    raise SettingsError('a command of `mobilevlm train` is missing')
