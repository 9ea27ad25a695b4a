"""``mobilevlm train curve RUN...``: the loss of runs over their steps, drawn from their logs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import SettingsError, TrainingError
from mobilevlm_ros.train.run_log import LOG, read_log

__all__ = ['Curve', 'add_curve_arguments', 'plot_curves', 'read_curve', 'run_curve', 'smoothed']

_SHARE = 0.05


@dataclass(frozen=True)
class Curve:
    """One run.

    :ivar name: of its folder.
    :ivar steps: int64 ``[n]``, rising.
    :ivar losses: float64 ``[n]``.
    """

    name: str
    steps: NDArray[np.int64]
    losses: NDArray[np.float64]

    @property
    def window(self) -> int:
        """Steps that a smoothed value is the mean of."""
        return max(1, math.ceil(_SHARE * len(self.steps)))


def add_curve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of drawing."""
    parser.add_argument('runs', metavar='RUN', type=Path, nargs='+', help=f'folder of a run, with its {LOG}')
    parser.add_argument('--out', metavar='FILE', type=Path, required=True, help='a PNG or SVG file')


def run_curve(options: argparse.Namespace) -> int:
    """Draw, say where each run began and ended, and return 0.

    :raise TrainingError: if a folder has no log of a run.
    :raise SettingsError: if the file cannot be written.
    """
    curves = [read_curve(folder) for folder in options.runs]
    plot_curves(curves, options.out)
    for curve in curves:
        means = smoothed(curve.losses, curve.window)
        print(f'{curve.name}: {len(means)} of {curve.steps[-1]} steps logged, loss {means[0]:.3f} to {means[-1]:.3f}')
    return 0


def read_curve(folder: Path) -> Curve:
    """The losses in the log of a run.

    :raise TrainingError: if there are none.
    """
    lines = [line for line in read_log(folder) if isinstance(line, dict) and {'step', 'loss'} <= line.keys()]
    if not lines:
        raise TrainingError(f'{folder} has no {LOG} with losses: give the folder that `out` of a run named')
    try:
        steps = np.array([int(line['step']) for line in lines])
        losses = np.array([float(line['loss']) for line in lines])
    except (TypeError, ValueError) as error:
        raise TrainingError(f'{folder / LOG} holds something that is no loss ({error})') from error
    return Curve(folder.resolve().name, steps, losses)


def smoothed(losses: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean of each value and those before it, ``window`` in all; of as many as there are at the beginning.

    :return: float64 ``[n]``.
    """
    sums = np.cumsum(np.concatenate([[0.0], losses]))
    last = np.arange(1, len(losses) + 1)
    first = np.maximum(0, last - window)
    return (sums[last] - sums[first]) / (last - first)


def plot_curves(curves: Sequence[Curve], path: Path) -> None:
    """Draw every loss faintly, and the smoothed ones over them.

    :raise SettingsError: if the file cannot be written, or is of a kind that cannot be drawn.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout='constrained')
    axes = figure.subplots()
    for number, curve in enumerate(curves):
        colour = f'C{number % 10}'
        axes.plot(curve.steps, curve.losses, color=colour, alpha=0.25, linewidth=0.8)
        label = f'{curve.name} (mean of {curve.window})'
        axes.plot(curve.steps, smoothed(curve.losses, curve.window), color=colour, label=label)
    axes.set(xlabel='step', ylabel='loss', ylim=(0, None))
    axes.legend()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise SettingsError(f'--out {path} cannot be written: {error}') from error
