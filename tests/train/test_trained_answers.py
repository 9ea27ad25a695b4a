"""From a stage of training to a robot's answer: the product becomes a bundle, and the bundle has learned the lesson.

The pictures that are asked about were not trained on: other noise, the same colours.
"""

from __future__ import annotations

import importlib
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from numpy.typing import NDArray

from mobilevlm_ros.build.making import make_bundle
from mobilevlm_ros.build.stages import SilentReporter
from mobilevlm_ros.runtime.loading import load_assistant_from
from mobilevlm_ros.train.lora import merge_adapter
from mobilevlm_ros.train.stage import Outcome, run_stage
from mobilevlm_ros.types import Frame, Question

pytestmark = pytest.mark.slow

PROFILE = """
name: exact
device: tests
vision: {backend: onnxruntime, precision: fp32, n_threads: 1}
language: {quantization: F32, kv_type: f32, n_threads: 1, n_threads_batch: 1}
parity: {logits_cosine: 0.9999}
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, data and a profile."""
    folder = tmp_path_factory.mktemp('answers')
    tiny_runs.write_base(folder / 'base')
    (folder / 'exact.yaml').write_text(PROFILE)
    return folder


@pytest.fixture(scope='module')
def instructed(folder: Path) -> Outcome:
    """Taught all of it: projector and language model."""
    tiny_runs.write_data(folder / 'instruct')
    return run_stage(tiny_runs.config(folder / 'instruct', 'instruct', folder / 'base', schedule={'max_steps': 60}))


@pytest.fixture(scope='module')
def adapted(folder: Path) -> Outcome:
    """Taught by an adapter of the language model, and the projector."""
    tiny_runs.write_data(folder / 'lora')
    rates = {'projector': 5e-3, 'language': 1e-2}
    return run_stage(
        tiny_runs.config(folder / 'lora', 'lora', folder / 'base', learning_rate=rates, schedule={'max_steps': 120})
    )


def picture(colour: str, seed: int) -> NDArray[np.uint8]:
    """A picture of one colour that nobody trained on, uint8 ``[40, 40, 3]``."""
    noise = np.random.default_rng(seed).normal(tiny_runs.COLOURS[colour], 12.0, (40, 40, 3))
    return np.clip(noise, 0, 255).astype(np.uint8)


def answers(bundle: Path) -> list[str]:
    """To the question about each colour."""
    assistant = load_assistant_from(bundle)
    try:
        found = [
            assistant.ask(Question(tiny_runs.QUESTION, max_tokens=4), Frame(picture(colour, 100 + i)))
            for i, colour in enumerate(tiny_runs.COLOURS)
        ]
    finally:
        assistant.close()
    return [answer.text for answer in found]


def build(folder: Path, name: str, model: Path, adapter: Path | None = None) -> Path:
    return make_bundle(str(model), str(folder / 'exact.yaml'), folder / name, SilentReporter(), adapter=adapter).path


@pytest.fixture(scope='module')
def bundle(folder: Path, instructed: Outcome) -> Path:
    """Of the instructed model."""
    return build(folder, 'bundle', instructed.products['model'])


def test_an_instructed_model_answers(bundle: Path) -> None:
    assert answers(bundle) == list(tiny_runs.COLOURS)


def test_the_base_knew_nothing(folder: Path) -> None:
    assert answers(build(folder, 'untrained', folder / 'base')) != list(tiny_runs.COLOURS)


def test_a_model_with_its_adapter_answers(folder: Path, adapted: Outcome) -> None:
    made = build(folder, 'adapted', adapted.products['model'], adapted.products['adapter'])
    assert (made / 'adapter.gguf').is_file()
    assert answers(made) == list(tiny_runs.COLOURS)


def test_a_merged_model_answers(folder: Path, adapted: Outcome) -> None:
    merged = merge_adapter(folder / 'base', adapted.products['adapter'], folder / 'merged', dtype='fp32')
    assert answers(build(folder, 'merged-bundle', merged)) == list(tiny_runs.COLOURS)


@pytest.fixture
def robots(monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """The robot of the node's tests, on a graph of its own."""
    pytest.importorskip('rclpy', reason='ROS 2 is not installed')
    os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    os.environ.setdefault('ROS_DOMAIN_ID', str(random.randint(1, 101)))
    monkeypatch.setattr(sys, 'path', [*sys.path, str(Path(__file__).parents[1] / 'node')])
    yield importlib.import_module('robot').Robot


def test_a_trained_model_answers_through_the_node(bundle: Path, robots: type) -> None:
    robot = robots({'bundle': str(bundle), 'max_frame_age_s': 60.0}).start()
    try:
        for i, colour in enumerate(tiny_runs.COLOURS):
            robot.show(robot.image(picture(colour, 200 + i)))
            assert robot.ask(tiny_runs.QUESTION, max_tokens=4).text == colour
    finally:
        robot.close()
