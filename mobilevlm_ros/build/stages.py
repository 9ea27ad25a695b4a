"""The work folder of a build: finished stages are kept, so that an interrupted build goes on where it stopped.

A stage makes named files from inputs that have a fingerprint. It writes to temporary names, which become the real ones
when it ends, and is noted in ``stages.json`` only then: a file in the folder is whole or not there. A stage whose
fingerprint is the same, and whose files still have the sizes that were noted, is not run again. When the last stage is
done the folder is renamed to its final place, in one step.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import psutil

from mobilevlm_ros.errors import BuildError

__all__ = ['Reporter', 'SilentReporter', 'Workshop', 'check_memory', 'check_room']

_NOTES = 'stages.json'


class Reporter(Protocol):
    """Told what is being done; the command line draws it."""

    def step(self, text: str) -> None:
        """Something begins."""
        ...

    def progress(self, done: float, total: float) -> None:
        """How far the current step is, in any unit."""
        ...


class SilentReporter:
    """Tells nobody."""

    def step(self, text: str) -> None:
        """Nothing."""

    def progress(self, done: float, total: float) -> None:
        """Nothing."""


class Workshop:
    """See the module.

    :param out: where the result will stand; the work folder is ``OUT.partial`` beside it.
    :raise BuildError: if the folder cannot be made, or another process is building there.
    """

    def __init__(self, out: Path, reporter: Reporter) -> None:
        self.out = out
        self.folder = out.with_name(out.name + '.partial')
        self.reporter = reporter
        if out.exists() and not out.is_dir():
            raise BuildError(f'{out} is there already and no folder: choose another --out')
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BuildError(f'cannot make {self.folder}: {error.strerror}. Choose another place: --out.') from error
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise BuildError(f'another process is building {out}: wait for it, or choose another --out') from error
        self._notes = self._read_notes()
        for path in self.folder.iterdir():
            if path.name.startswith('.'):
                _remove(path)

    def close(self) -> None:
        """Let others build here; the folder and its finished stages stay."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def path(self, name: str) -> Path:
        """Where the file ``name`` of the result is or will be."""
        return self.folder / name

    def stage(
        self, name: str, title: str, inputs: Sequence[object], outputs: Sequence[str], work: Callable[[Path], None]
    ) -> tuple[str, ...]:
        """Make ``outputs``, unless they were made from the same inputs before.

        A stage may run another one within its work, whose files it needs only then.

        :param inputs: everything that the result depends on; compared by their ``repr``.
        :param outputs: names of files; one that ends with ``?`` need not be made.
        :param work: makes the files in the folder that it is given.
        :return: names of the files that there are now.
        :raise BuildError: if it did not make them, or the disk is full.
        """
        fingerprint = hashlib.sha256(repr((name, *inputs)).encode()).hexdigest()
        if self._is_finished(name, fingerprint):
            self.reporter.step(f'{title}: finished earlier')
            return tuple(self._notes[name]['bytes'])
        self.reporter.step(title)
        self.discard(name)
        scratch = self.folder / f'.{name}'
        try:
            scratch.mkdir()
            work(scratch)
            made = [output.rstrip('?') for output in outputs if (scratch / output.rstrip('?')).exists()]
            missing = [output for output in outputs if not output.endswith('?') and output not in made]
            if missing:
                raise BuildError(f'the stage {name!r} did not make {", ".join(missing)}: a mistake in the builder')
            for output in made:
                (scratch / output).replace(self.folder / output)
        except OSError as error:
            raise BuildError(
                f'{title}: {error.filename or self.folder}: {error.strerror}. Free some space, or choose another '
                'place with --out; finished stages are kept.'
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        sizes = {output: (self.folder / output).stat().st_size for output in made}
        self._notes[name] = {'fingerprint': fingerprint, 'bytes': sizes}
        self._write_notes()
        return tuple(made)

    def discard(self, name: str) -> None:
        """Remove the files of a stage: those of a finished one that nobody needs any more, or stale ones."""
        for output in self._notes.pop(name, {}).get('bytes', {}):
            _remove(self.folder / output)
        self._write_notes()

    def finish(self, names: Collection[str]) -> None:
        """Put the folder in its final place, over an earlier result.

        :param names: the files that are the result; others, left by an interrupted build of something else, go.
        :raise BuildError: if it cannot be moved there.
        """
        replaced = self.out.with_name(f'.{self.out.name}.replaced')
        try:
            for path in self.folder.iterdir():
                if path.name not in names:
                    _remove(path)
            _remove(replaced)
            if self.out.exists():
                self.out.rename(replaced)
            self.folder.rename(self.out)
        except OSError as error:
            raise BuildError(f'cannot move {self.folder} to {self.out}: {error.strerror}') from error
        finally:
            # Ctrl-C may come between the two, or the second fail: then the earlier result goes back.
            if replaced.exists() and not self.out.exists():
                replaced.rename(self.out)
            _remove(replaced)

    def _is_finished(self, name: str, fingerprint: str) -> bool:
        note = self._notes.get(name)
        if note is None or note['fingerprint'] != fingerprint:
            return False
        return all(
            (self.folder / output).is_file() and (self.folder / output).stat().st_size == size
            for output, size in note['bytes'].items()
        )

    def _read_notes(self) -> dict[str, Any]:
        try:
            notes = json.loads((self.folder / _NOTES).read_text())
            return {
                str(name): {
                    'fingerprint': str(note['fingerprint']),
                    'bytes': {str(Path(file).name): int(size) for file, size in note['bytes'].items()},
                }
                for name, note in notes.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # whatever it is, everything is made again

    def _write_notes(self) -> None:
        temporary = self.folder / f'.{_NOTES}'
        try:
            temporary.write_text(json.dumps(self._notes, indent=2))
            temporary.replace(self.folder / _NOTES)
        except OSError as error:
            raise BuildError(f'cannot write {self.folder / _NOTES}: {error.strerror}. Free some space.') from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            path.unlink()


def check_room(folder: Path, needed_bytes: int, what: str) -> None:
    """Refuse before starting rather than run into a full disk after minutes.

    :param folder: where the files will be written; need not exist yet.
    :raise BuildError: if less than ``needed_bytes`` is free there, or it cannot be looked at.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise BuildError(f'cannot look at {existing}: {error.strerror}. Choose another place with --out.') from error
    if free < needed_bytes:
        raise BuildError(
            f'{existing} has {free >> 20} MiB free, {what} takes {needed_bytes >> 20} MiB: free some space, or choose '
            'another place with --out'
        )


def check_memory(needed_bytes: int, what: str) -> None:
    """Refuse before starting rather than be killed, or make the computer swap, after minutes.

    :raise BuildError: if less than ``needed_bytes`` is free.
    """
    available = psutil.virtual_memory().available
    if available < needed_bytes:
        raise BuildError(
            f'{available >> 20} MiB of memory are free, {what} takes {needed_bytes >> 20} MiB: stop other programs, or '
            'build on a larger computer and copy the bundle'
        )
