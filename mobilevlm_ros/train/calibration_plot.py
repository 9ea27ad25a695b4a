"""Draws whether a model's confidence can be believed, and what a limit of confidence costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mobilevlm_ros.evaluate.calibration import Calibration, Threshold, risk_coverage

__all__ = ['plot_calibration']


def plot_calibration(
    calibration: Calibration,
    threshold: Threshold,
    confidences: Sequence[float],
    right: Sequence[bool],
    path: Path,
    title: str,
) -> None:
    """Draw reliability, risk against coverage, and what the limit does, into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout='constrained')
    left, other = figure.subplots(1, 2)
    figure.suptitle(f'{title}: ECE {calibration.ece:.3f}, Brier {calibration.brier:.3f}, {calibration.n} answers')
    lowest = min(one.low for one in calibration.bins)
    left.plot([lowest, 1], [lowest, 1], linestyle='--', color='grey', label='calibrated')
    bins = calibration.bins
    left.plot([one.confidence for one in bins], [one.accuracy for one in bins], marker='o', label='measured')
    for one in bins:
        left.annotate(str(one.n), (one.confidence, one.accuracy), textcoords='offset points', xytext=(4, -10))
    left.set(xlabel='confidence', ylabel='accuracy', ylim=(0, 1.03))
    left.legend()
    _, coverages, risks = risk_coverage(confidences, right)
    other.plot(coverages, risks)
    other.axhline(threshold.max_risk, linestyle='--', color='grey', label=f'risk {threshold.max_risk:.0%}')
    if threshold.value is not None:
        label = f'limit {threshold.value:.2f}, on the other half'
        other.plot([threshold.coverage], [threshold.risk], marker='x', linestyle='', color='black', label=label)
    other.set(xlabel='coverage', ylabel='risk', ylim=(0, None))
    other.legend()
    figure.savefig(path, dpi=110)
