"""What can stop a set-up. Every message says what was found, what was expected and what to run."""

from __future__ import annotations


class SetupError(Exception):
    """The set-up cannot go on."""


class CommandFailed(SetupError):
    """A command of a step ended with an error; `tail` holds the last lines that it printed."""

    def __init__(self, command: list[str], returncode: int, tail: list[str]) -> None:
        """Keep what is needed to explain the failure."""
        super().__init__(f'{command[0]} ended with {returncode}')
        self.command = command
        self.returncode = returncode
        self.tail = tail


HINTS = (
    ('No space left on device', 'free some disk space (3 GB are needed) and run again'),
    (
        'ensurepip is not',
        "this Python lacks its venv part: install it (on Debian and Ubuntu 'python3-venv') "
        'or choose another interpreter with make venv PYTHON=...',
    ),
    ('Python.h', 'this Python lacks its C headers: choose another interpreter with make venv PYTHON=...'),
    (
        'No matching distribution',
        'the package index has no such version for this Python: '
        'check PIP_INDEX_URL, or choose Python 3.11 with make venv PYTHON=...',
    ),
    ('Connection', 'check the network and the proxy settings (HTTPS_PROXY, PIP_INDEX_URL) and run again'),
    ('name resolution', 'check the network and the proxy settings (HTTPS_PROXY, PIP_INDEX_URL) and run again'),
    ('timed out', 'the network is slow: run again, what was downloaded is kept'),
    ('Killed', 'memory ran out: run again with fewer compilers, e.g. CMAKE_BUILD_PARALLEL_LEVEL=1'),
    ('internal compiler error', 'memory may have run out: run again with CMAKE_BUILD_PARALLEL_LEVEL=1'),
)


def hint_for(tail: list[str]) -> str:
    """Return what to try after a failure that ended with these lines."""
    text = '\n'.join(tail)
    for needle, hint in HINTS:
        if needle in text:
            return hint
    return 'run again (finished steps are kept); if it fails the same way, delete .venv first'
