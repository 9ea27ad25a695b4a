"""Shows a build to people: steps as lines, and the current one as a bar with the time that remains."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ['ConsoleReporter']


class ConsoleReporter:
    """See the module; implements ``stages.Reporter``.

    :param console: where to; None: the standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        columns = (TextColumn('{task.description}'), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self.console, transient=True)
        self._task: TaskID | None = None

    def __enter__(self) -> ConsoleReporter:
        if self.console.is_interactive:  # in a file there are lines only
            self._progress.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.console.is_interactive:
            self._progress.stop()

    def step(self, text: str) -> None:
        """A line; its bar moves until something is known of it."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self.console.print(f'· {escape(text)}', highlight=False)
        self._task = self._progress.add_task(escape(text), total=None)

    def progress(self, done: float, total: float) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total)
