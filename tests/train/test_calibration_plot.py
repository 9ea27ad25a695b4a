"""The picture of a calibration."""

from __future__ import annotations

from pathlib import Path

from mobilevlm_ros.evaluate.calibration import calibrate
from mobilevlm_ros.train.calibration_plot import plot_calibration


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    confidences, right = [0.9, 0.8, 0.6], [True, False, True]
    figures = calibrate(confidences, right, ['a', 'b', 'c'])
    plot_calibration(figures, figures.threshold, confidences, right, tmp_path / 'calibration.png', 'a model')
    assert (tmp_path / 'calibration.png').read_bytes().startswith(b'\x89PNG')
