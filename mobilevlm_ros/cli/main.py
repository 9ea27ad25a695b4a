"""The parser, and what becomes of errors.

Exit codes: 0 it worked; 1 the question was not answered, or the doctor found something; 2 wrong arguments or set-up;
130 interrupted. Rooms are imported when their command runs, so that each command needs only its own libraries.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import mobilevlm_ros
from mobilevlm_ros.cli.arguments import Commands
from mobilevlm_ros.cli.ask import add_ask
from mobilevlm_ros.cli.build import add_build
from mobilevlm_ros.cli.checks import add_checks
from mobilevlm_ros.cli.evaluate import add_evaluate
from mobilevlm_ros.cli.train import add_train
from mobilevlm_ros.errors import MobileVLMError

__all__ = ['build_parser', 'main']


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        options = build_parser().parse_args(arguments)
        code: int = options.run(options)
    except MobileVLMError as error:
        print(f'mobilevlm: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('mobilevlm: interrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        return 0
    return code


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = argparse.ArgumentParser(prog='mobilevlm', description=mobilevlm_ros.__doc__)
    parser.add_argument('--version', action='version', version=f'mobilevlm_ros {mobilevlm_ros.__version__}')
    commands = Commands(parser)
    add_ask(commands)
    add_build(commands)
    add_train(commands)
    add_evaluate(commands)
    add_checks(commands)
    return parser
