"""One contestant in a process of its own, commanded over a pipe.

So that its memory can be told apart, its thread pool meets no other, and its end frees everything. A child is killed,
never asked, when its handle closes; it kills itself when its parent is gone, and ignores Ctrl-C, which is the parent's
to handle. No child is left behind, whatever ends the run.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mobilevlm_ros.errors import EngineError, MobileVLMError

__all__ = ['KINDS', 'Contestant', 'memory_of']

KINDS = {
    'limits': ('mobilevlm_ros.bench.limits', 'Limits'),
    'llamacpp': ('mobilevlm_ros.bench.contestants.llamacpp', 'LlamaCppLoop'),
    'mtmd': ('mobilevlm_ros.bench.contestants.mtmd', 'MtmdPath'),
    'ours': ('mobilevlm_ros.bench.contestants.ours', 'OurEngine'),
    'language': ('mobilevlm_ros.bench.contestants.ours', 'OurLanguageEngine'),
    'pytorch': ('mobilevlm_ros.bench.contestants.pytorch', 'PyTorchModel'),
    'random models': ('mobilevlm_ros.bench.random_model', 'RandomModels'),
    'shapes': ('mobilevlm_ros.bench.shapes', 'Shapes'),
}
"""Module and class of each kind of child."""

_PR_SET_PDEATHSIG = 1


def memory_of(pid: int | str = 'self') -> dict[str, int]:
    """Resident memory of a process, in bytes.

    :return: ``peak``, the greatest so far (VmHWM); ``own`` now; and ``mapped`` now: files that were read as memory,
        which count towards the peak although the system can take their pages back at any time.
    """
    names = {'VmHWM': 'peak', 'RssAnon': 'own', 'RssFile': 'mapped'}
    lines = (line.partition(':') for line in Path(f'/proc/{pid}/status').read_text().splitlines())
    return {names[name]: int(value.split()[0]) << 10 for name, _, value in lines if name in names}


class Contestant:
    """A child process that holds one object of ``KINDS`` and calls its methods.

    :param kind: a key of ``KINDS``.
    :param environment: variables that libraries read once, when they are loaded.
    :param arguments: of the object's construction; plain data.
    :raise MobileVLMError: if the construction raises it.
    """

    def __init__(self, kind: str, environment: Mapping[str, str] | None = None, /, **arguments: Any) -> None:
        self.kind = kind
        context = multiprocessing.get_context('spawn')
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, os.getpid(), kind, arguments), name=f'bench-{kind}', daemon=True
        )
        try:
            with _variables(environment or {}):
                self._process.start()
            theirs.close()
            self._receive()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the child."""
        assert self._process.pid is not None
        return self._process.pid

    def call(self, method: str, /, **arguments: Any) -> Any:
        """Call a method in the child and wait for its result.

        :raise MobileVLMError: what the method raised.
        :raise EngineError: if it raised something else, or the child died.
        """
        try:
            self._connection.send((method, arguments))
        except OSError as error:
            raise self._died() from error
        return self._receive()

    def memory(self) -> dict[str, int]:
        """See ``memory_of``."""
        return memory_of(self.pid)

    def close(self) -> None:
        """End the child; may be called again."""
        self._connection.close()
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self) -> Any:
        try:
            status, value = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._died() from error
        if status == 'error':
            raise value
        if status == 'crash':
            raise EngineError(f'the benchmark process {self.kind!r} failed:\n{value}')
        return value

    def _died(self) -> EngineError:
        self._process.join(5.0)
        return EngineError(
            f'the benchmark process {self.kind!r} ended with code {self._process.exitcode}: '
            'a crash in a native library, or the system took it for want of memory (see dmesg)'
        )


@contextmanager
def _variables(changes: Mapping[str, str]) -> Iterator[None]:
    """Environment variables, as long as the block runs: a spawned child inherits them."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _serve(connection: Connection, parent: int, kind: str, arguments: dict[str, Any]) -> None:
    """The child: make the object, then answer calls until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prctl = getattr(ctypes.CDLL(None), 'prctl', None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before the line above
        return
    module, name = KINDS[kind]
    made: list[Any] = []
    if not _reply(connection, lambda: made.append(getattr(importlib.import_module(module), name)(**arguments))):
        return
    while True:
        try:
            method, call_arguments = connection.recv()
        except EOFError:
            return
        _reply(connection, lambda m=method, a=call_arguments: getattr(made[0], m)(**a))


def _reply(connection: Connection, work: Any) -> bool:
    """Do the work and send what became of it; returns whether it worked."""
    try:
        connection.send(('ok', work()))
        return True
    except MobileVLMError as error:
        connection.send(('error', error))
    except Exception:  # whatever it is, the parent must be told rather than wait for ever
        connection.send(('crash', traceback.format_exc()))
    return False
