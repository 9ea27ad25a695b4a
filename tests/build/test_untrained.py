"""A bundle with random weights in its projector: that, and nothing else, is another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_models
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from mobilevlm_ros.build.untrained import write_untrained
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.model.config import ProjectorConfig
from mobilevlm_ros.model.projectors import build_projector
from mobilevlm_ros.runtime.bundle import Bundle, open_bundle
from mobilevlm_ros.runtime.loading import load_assistant
from mobilevlm_ros.types import Frame, Question

PROJECTOR = 'model.mm_projector.'


def tensors(bundle: Bundle) -> dict[str, NDArray[Any]]:
    return {one.name: numpy_helper.to_array(one) for one in onnx.load(bundle.vision_path).graph.initializer}


@pytest.fixture
def trained(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


def test_only_the_projector_is_another(trained: Bundle, tmp_path: Path) -> None:
    made = write_untrained(trained, tmp_path / 'out')
    before, after = tensors(trained), tensors(made)

    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].shape == value.shape and after[name].dtype == value.dtype
        assert np.array_equal(after[name], value) is not name.startswith(PROJECTOR), name
    assert made.language_path.read_bytes() == trained.language_path.read_bytes()
    assert {key: made.description[key] for key in ('prompt', 'vision', 'language')} == {
        key: trained.description[key] for key in ('prompt', 'vision', 'language')
    }


def test_it_answers_and_says_what_it_is(trained: Bundle, tmp_path: Path) -> None:
    made = open_bundle(write_untrained(trained, tmp_path / 'out').path)  # every hash is right
    assistant = load_assistant(made)
    try:
        answer = assistant.ask(Question('what is it', max_tokens=2), Frame(np.zeros((32, 32, 3), np.uint8)))
    finally:
        assistant.close()
    assert answer.model_id.startswith('tiny-untrained-cpu@')
    assert 'random weights' in made.warning


def test_the_seed_decides(trained: Bundle, tmp_path: Path) -> None:
    first, again, other = (
        tensors(write_untrained(trained, tmp_path / str(number), seed)) for number, seed in enumerate((1, 1, 2))
    )
    for name in first:
        assert np.array_equal(first[name], again[name])
    assert any(not np.array_equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize('kind', ['ldpnet', 'ldpnetv2', 'mlp2x_gelu', 'linear'])
def test_values_spread_as_pytorchs_own(tmp_path: Path, kind: str) -> None:
    """Layer by layer; small tensors are compared by their bounds only."""
    from mobilevlm_ros.build.vision_graph import write_vision_graph
    from mobilevlm_ros.runtime.bundle import DESCRIPTION, file_entry

    path = tiny_models.write_bundle(tmp_path / 'bundle')
    shapes, n_embd = ProjectorConfig(kind), tiny_models.TinyLlama.n_embd
    torch.manual_seed(0)
    module = build_projector(shapes, tiny_models.TINY_VISION.width, n_embd)
    theirs = {f'{PROJECTOR}{name}': value.numpy() for name, value in module.state_dict().items()}
    tower = {name: value for name, value in tiny_models.vision_weights().items() if not name.startswith(PROJECTOR)}
    write_vision_graph(tower | theirs, tiny_models.TINY_VISION, shapes, n_embd, path / 'vision.onnx')
    description = json.loads((path / DESCRIPTION).read_text())
    description['files']['vision.onnx'] = file_entry(path / 'vision.onnx')
    (path / DESCRIPTION).write_text(json.dumps(description))

    ours = tensors(write_untrained(open_bundle(path), tmp_path / 'out'))
    found = {name: value for name, value in ours.items() if name.startswith(PROJECTOR)}
    assert found.keys() <= theirs.keys() and len(found) > 1
    for name, value in found.items():
        assert np.abs(value).max() <= 3 * np.abs(theirs[name]).max() + 0.02, name
        if value.size > 250:
            assert value.std() == pytest.approx(theirs[name].std(), rel=0.15), name


def test_what_has_no_projector_in_floating_point_is_refused(trained: Bundle, tmp_path: Path) -> None:
    path = tiny_models.write_bundle(tmp_path / 'bundle')
    model = onnx.load(path / 'vision.onnx')
    for one in model.graph.initializer:
        one.name = one.name.replace(PROJECTOR, 'x.')
    for node in model.graph.node:
        node.input[:] = [name.replace(PROJECTOR, 'x.') for name in node.input]
    onnx.save(model, path / 'vision.onnx')
    opened = Bundle(path, trained.description, '')
    with pytest.raises(BuildError, match='no projector in floating point'):
        write_untrained(opened, tmp_path / 'out')
    vision = trained.description['vision'] | {'backend': 'openvino'}
    with pytest.raises(BuildError, match='one of openvino'):
        write_untrained(Bundle(path, trained.description | {'vision': vision}, ''), tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
