"""What people see of a build."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mobilevlm_ros.build.console import ConsoleReporter
from mobilevlm_ros.build.stages import Reporter


def reporter_on(terminal: bool) -> tuple[ConsoleReporter, io.StringIO]:
    file = io.StringIO()
    return ConsoleReporter(Console(file=file, force_terminal=terminal, width=100, color_system=None)), file


@pytest.mark.parametrize('terminal', [False, True], ids=['file', 'terminal'])
def test_every_step_is_a_line(terminal: bool) -> None:
    reporter, file = reporter_on(terminal)
    with reporter:
        for step in ('first', 'second'):
            reporter.step(step)
            reporter.progress(1, 4)
            reporter.progress(4, 4)

    lines = [line.strip() for line in file.getvalue().splitlines()]
    assert any(line.endswith('· first') for line in lines)
    assert any(line.endswith('· second') for line in lines)


def test_in_a_file_there_are_lines_only() -> None:
    reporter, file = reporter_on(False)
    with reporter:
        reporter.step('first')
        reporter.progress(1, 2)

    assert file.getvalue() == '· first\n'


def test_a_terminal_sees_the_current_step_with_the_time_that_remains() -> None:
    reporter, file = reporter_on(True)
    with reporter:
        reporter.step('quantising')
        reporter.progress(1, 2)
        reporter._progress.refresh()

    text = file.getvalue()
    assert text.count('quantising') >= 2
    assert '0:00:00' in text
    assert '━' in text


def test_text_is_not_read_as_markup() -> None:
    reporter, file = reporter_on(False)
    with reporter:
        reporter.step('folder [bold]x[/] and [/nothing]')

    assert 'folder [bold]x[/] and [/nothing]' in file.getvalue()


@pytest.mark.parametrize('total', [0, 0.0])
def test_nothing_of_nothing_is_no_error(total: float) -> None:
    reporter, _ = reporter_on(True)
    with reporter:
        reporter.progress(0, total)
        reporter.step('empty')
        reporter.progress(0, total)


def test_an_error_passes_and_the_terminal_is_left_as_it_was() -> None:
    reporter, file = reporter_on(True)
    with pytest.raises(KeyboardInterrupt), reporter:
        reporter.step('first')
        raise KeyboardInterrupt

    # The cursor is shown again.
    assert file.getvalue().rfind('\x1b[?25h') > file.getvalue().rfind('\x1b[?25l')


def test_it_is_a_reporter() -> None:
    reporter: Reporter = ConsoleReporter()
    reporter.progress(1, 2)
