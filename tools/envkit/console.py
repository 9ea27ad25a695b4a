"""Shows a set-up as one calm line per step: a moving line on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

QUIET_BEAT_S = 20.0  # between progress lines where the output is no terminal
SPINNER = '|/-\\'


def elapsed(seconds: float) -> str:
    """Return a short duration: '8 s', '4 min 05 s'."""
    if seconds < 60:
        return f'{seconds:.0f} s'
    return f'{int(seconds) // 60} min {int(seconds) % 60:02d} s'


class Step:
    """One step on the console; `detail` is what it is busy with."""

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        """Show that the step begins."""
        self.title = title
        self.detail = ''
        self._stream = stream or sys.stdout
        self._moving = self._stream.isatty()
        self._start = time.monotonic()
        self._last_beat = self._start
        self._ticks = 0
        if not self._moving:
            self._line(f'  .. {title}')

    def tick(self) -> None:
        """Refresh the line; call it a few times a second."""
        now = time.monotonic()
        text = f'{self.title}  {elapsed(now - self._start)}'
        if self.detail:
            text += f'  {self.detail}'
        if self._moving:
            self._ticks += 1
            width = shutil.get_terminal_size().columns - 6
            spinner = SPINNER[self._ticks % len(SPINNER)]
            self._stream.write(f'\r\033[K  {spinner}  {text[:width]}')
            self._stream.flush()
        elif now - self._last_beat >= QUIET_BEAT_S:
            self._last_beat = now
            self._line(f'     {text}')

    def end(self, mark: str) -> None:
        """Show the outcome ('ok', 'FAILED', 'stopped') and how long it took."""
        clear = '\r\033[K' if self._moving else ''
        self._line(f'{clear}  {mark} {self.title}  {elapsed(time.monotonic() - self._start)}')

    def _line(self, text: str) -> None:
        self._stream.write(text + '\n')
        self._stream.flush()
