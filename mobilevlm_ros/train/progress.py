"""Shows a run to people and keeps its figures: a bar in a terminal, lines elsewhere, TensorBoard, and one JSON a step.

``log.jsonl`` is the record that plots are made of: a resumed run takes it up where its checkpoint was made, so that it
has every step once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mobilevlm_ros.train.run_log import LOG, read_log

__all__ = ['Bar', 'StepLog', 'StopWhenAsked', 'remaining']

_MEASURED_STEPS = 3
_LINE_EVERY_S = 10.0
_SHOWN = ('loss', 'grad_norm', 'learning_rate')


class Bar(TrainerCallback):
    """The current step and the time that remains; in a file, a line now and then.

    After a few steps it says how long the run will take, as measured.
    """

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn('{task.fields[figures]}'),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task(title, total=None, figures='')
        self._first: tuple[int, float] | None = None
        self._last_line_s = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the bar, where it belongs."""
        self._progress.update(self._task, total=state.max_steps, completed=state.global_step)
        if self._console.is_terminal:
            self._progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar; estimate once."""
        self._progress.update(self._task, completed=state.global_step)
        now = time.monotonic()
        if self._first is None:  # the first step also warms up
            self._first = (state.global_step, now)
        elif state.global_step == self._first[0] + _MEASURED_STEPS:
            step_s = (now - self._first[1]) / _MEASURED_STEPS
            rest = remaining(step_s * (state.max_steps - state.global_step))
            self._console.print(f'· {step_s:.3g} s a step, measured: {rest} for the rest', highlight=False)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Show the newest figures."""
        if not logs or 'loss' not in logs:
            return
        figures = '  '.join(f'{name} {logs[name]:.4g}' for name in _SHOWN if name in logs)
        self._progress.update(self._task, figures=figures)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._last_line_s > _LINE_EVERY_S or state.global_step == 1):
            self._last_line_s = now
            self._console.print(f'· step {state.global_step} of {state.max_steps}: {figures}', highlight=False)

    def close(self) -> None:
        """Take the bar away."""
        if self._console.is_terminal:
            self._progress.stop()


class StepLog(TrainerCallback):
    """Figures of every logged step, in ``log.jsonl`` and for TensorBoard.

    :param folder: of the run.
    :param step: that the run goes on from; later lines are of a run that did not reach its checkpoint.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / LOG
        kept = [line for line in read_log(folder) if line['step'] <= step]
        self._path.write_text(''.join(json.dumps(line) + '\n' for line in kept))
        self._board: Any = _board(folder / 'tensorboard', step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Keep the figures."""
        if not logs or 'loss' not in logs:
            return
        with self._path.open('a') as file:
            file.write(json.dumps({'step': state.global_step, **logs}) + '\n')
        if self._board is not None:
            for name, value in logs.items():
                self._board.add_scalar(name, value, state.global_step)

    def close(self) -> None:
        """Write what TensorBoard has not got yet."""
        if self._board is not None:
            self._board.close()


class StopWhenAsked(TrainerCallback):
    """Ends the run after the step in which it was asked to, with a checkpoint.

    :param asked: whether to stop; asked once a step, by every process.
    """

    def __init__(self, asked: Callable[[], bool]) -> None:
        self._asked = asked
        self.stopped = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop?"""
        if state.global_step < state.max_steps and self._asked():
            self.stopped = control.should_save = control.should_training_stop = True


def remaining(seconds: float) -> str:
    """A length of time for people."""
    minutes = int(seconds // 60)
    if minutes < 1:
        return f'{seconds:.0f} s'
    days, hours = divmod(minutes // 60, 24)
    if days:
        return f'{days} d {hours} h'
    return f'{hours} h {minutes % 60} min' if hours else f'{minutes} min'


def _board(folder: Path, step: int) -> Any:
    """TensorBoard's writer, if it is installed; steps after ``step`` are taken back."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=step + 1 if step else None)
