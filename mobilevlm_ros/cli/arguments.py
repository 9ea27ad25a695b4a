"""What the commands share: how one is added, and how arguments are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

__all__ = ['Commands', 'positive']


class Commands:
    """Adds commands to a parser.

    :param parser: the parser of ``mobilevlm`` itself.
    """

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._subparsers: Any = parser.add_subparsers(metavar='COMMAND', required=True)

    def add(self, name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        """The parser of a new command; ``run`` returns its exit code."""
        parser: argparse.ArgumentParser = self._subparsers.add_parser(name, help=summary, description=summary)
        parser.set_defaults(run=run)
        return parser


def positive(text: str) -> int:
    """A whole number above zero."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be 1 or more, found {value}')
    return value
