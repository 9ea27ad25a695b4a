"""Commands whose arguments are declared when they are called: each needs only its own libraries."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mobilevlm_ros.errors import DependencyError, SettingsError

__all__ = ['Declare', 'LateCommands', 'Run', 'no_command']

Run = Callable[[argparse.Namespace], int]
Declare = Callable[[argparse.ArgumentParser], Run]
"""Adds the arguments, and returns what runs the command."""


class LateCommands:
    """Adds commands below one command.

    :param parser: of the command above.
    :param what: what the commands do, for messages.
    :param requirements: the file with the libraries that they need.
    """

    def __init__(self, parser: argparse.ArgumentParser, what: str, requirements: str) -> None:
        self._subparsers: Any = parser.add_subparsers(metavar='COMMAND', required=True, parser_class=_LateParser)
        self._what = what
        self._requirements = requirements

    def add(self, name: str, summary: str, declare: Declare) -> None:
        """Add a command; ``declare`` may import what it likes."""

        def declared(parser: argparse.ArgumentParser) -> None:
            with self._missing_libraries_named():
                run = declare(parser)

            def late(options: argparse.Namespace) -> int:
                with self._missing_libraries_named():
                    return run(options)

            parser.set_defaults(run=late)

        self._subparsers.add_parser(name, help=summary, description=summary, declare=declared)

    @contextmanager
    def _missing_libraries_named(self) -> Iterator[None]:
        try:
            yield
        except ModuleNotFoundError as error:
            raise DependencyError(
                f'{self._what} needs {error.name}, which is not installed: pip install -r {self._requirements}'
            ) from error


class _LateParser(argparse.ArgumentParser):
    """Declares its arguments when it is asked to parse some."""

    def __init__(self, *arguments: Any, declare: Callable[[argparse.ArgumentParser], None], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._declare: Callable[[argparse.ArgumentParser], None] | None = declare

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in the base class."""
        if self._declare is not None:
            declare, self._declare = self._declare, None
            declare(self)
        return super().parse_known_args(args, namespace)


def no_command(options: argparse.Namespace) -> int:
    """What runs if the command below is missing."""
    raise SettingsError('a command is missing: see --help')
