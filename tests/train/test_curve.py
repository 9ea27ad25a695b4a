"""Curves of the loss, from the logs of runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilevlm_ros.errors import SettingsError, TrainingError
from mobilevlm_ros.train.curve import add_curve_arguments, read_curve, run_curve, smoothed
from mobilevlm_ros.train.run_log import LOG


def write_run(folder: Path, n: int = 40) -> Path:
    folder.mkdir()
    lines = [json.dumps({'step': step, 'loss': 4.0 / step, 'learning_rate': 1e-3}) for step in range(1, n + 1)]
    (folder / LOG).write_text('\n'.join([*lines, json.dumps({'step': n, 'eval': 1}), '{"step": 41, "lo']))
    return folder


def run(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    add_curve_arguments(parser)
    return run_curve(parser.parse_args([str(argument) for argument in arguments]))


def test_several_runs_are_drawn_and_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / 'plots' / 'loss.png'
    assert run(write_run(tmp_path / 'align'), write_run(tmp_path / 'lora', 10), '--out', out) == 0

    assert out.read_bytes().startswith(b'\x89PNG')
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        'align: 40 of 40 steps logged, loss 4.000 to 0.101',
        'lora: 10 of 10 steps logged, loss 4.000 to 0.400',
    ]


def test_a_curve_has_every_logged_loss(tmp_path: Path) -> None:
    """Neither what is no loss nor a line that was cut short."""
    curve = read_curve(write_run(tmp_path / 'run'))

    assert curve.steps.tolist() == list(range(1, 41))
    np.testing.assert_allclose(curve.losses, 4.0 / curve.steps)


@settings(deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=50), st.integers(1, 60))
def test_a_smoothed_value_is_the_mean_of_its_window(losses: list[float], window: int) -> None:
    found = smoothed(np.array(losses), window)
    expected = [np.mean(losses[max(0, i + 1 - window) : i + 1]) for i in range(len(losses))]
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize('content', [None, '', '[1, 2]\n', '{"step": 1, "loss": "much"}\n'])
def test_a_folder_without_losses_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / LOG).write_text(content)
    with pytest.raises(TrainingError, match=tmp_path.name):
        read_curve(tmp_path)


def test_what_cannot_be_drawn_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / 'run')
    with pytest.raises(SettingsError, match=r'loss\.txt'):
        run(folder, '--out', tmp_path / 'loss.txt')
    with pytest.raises(SettingsError, match='cannot be written'):
        run(folder, '--out', folder / LOG / 'loss.png')
