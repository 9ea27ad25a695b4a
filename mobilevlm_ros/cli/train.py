"""``mobilevlm train ...``: the stages of training, and what belongs to them.

Robots have none of the libraries that training needs, so a command declares its arguments when it is called.
"""

from __future__ import annotations

import argparse
import importlib

from mobilevlm_ros.cli.arguments import Commands
from mobilevlm_ros.cli.late import Declare, LateCommands, Run, no_command

__all__ = ['add_train']

STAGES = {
    'llm-pretrain': 'Train a language model from raw text, packed by `mobilevlm train tokenise`.',
    'sft': 'Teach a language model to answer, from dialogues without images.',
    'ground': 'Train the projector to name what is where, from pictures whose things are known with their places.',
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


def add_train(commands: Commands) -> None:
    """Add the commands."""
    parser = commands.add('train', no_command, 'Train: from raw text to a model that answers.')
    late = LateCommands(parser, 'training', 'requirements/train.txt')
    for stage, summary in STAGES.items():
        late.add(stage, summary, _stage(stage))
    for name, (summary, module, what) in OTHERS.items():
        late.add(name, summary, _other(module, what))


def _stage(stage: str) -> Declare:
    def declare(parser: argparse.ArgumentParser) -> Run:
        from mobilevlm_ros.train.command import add_stage_arguments, run_training

        add_stage_arguments(parser)
        parser.set_defaults(stage=stage)
        return run_training

    return declare


def _other(module: str, what: str) -> Declare:
    def declare(parser: argparse.ArgumentParser) -> Run:
        found = importlib.import_module(f'mobilevlm_ros.train.{module}')
        getattr(found, f'add_{what}_arguments')(parser)
        run: Run = getattr(found, f'run_{what}')
        return run

    return declare
