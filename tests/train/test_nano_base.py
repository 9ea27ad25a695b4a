"""nano's frozen parts as a checkpoint: the same numbers as nano's bundle has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mobilevlm_ros.build.nano import NanoSource
from mobilevlm_ros.build.stages import SilentReporter
from mobilevlm_ros.errors import CheckpointError
from mobilevlm_ros.model.checkpoint import Checkpoint, open_checkpoint
from mobilevlm_ros.runtime.language.llamacpp_library import load_library
from mobilevlm_ros.train.nano_base import interpolate_positions, write_nano_base
from mobilevlm_ros.train.tokens import open_tokenizer


def test_positions_of_the_same_grid_stay() -> None:
    positions = np.random.default_rng(0).standard_normal((17, 8)).astype(np.float32)
    assert interpolate_positions(positions, 4) is positions


def test_positions_are_interpolated_as_transformers_does() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    model: Any = CLIPVisionModel(config)
    embeddings = getattr(model, 'vision_model', model).embeddings
    positions = embeddings.position_embedding.weight.detach().numpy()
    expected = embeddings.interpolate_pos_encoding(torch.zeros(1, 37, 16), 48, 48)[0].detach().numpy()
    np.testing.assert_allclose(interpolate_positions(positions, 6), expected, atol=1e-6)


def test_another_resolution_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='224 or 384'):
        write_nano_base(tmp_path / 'base', resolution=300)


@pytest.fixture(scope='module')
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The real one (this may download 170 MB)."""
    return open_checkpoint(write_nano_base(tmp_path_factory.mktemp('nano') / 'base', projector='shipped'))


@pytest.mark.model
@pytest.mark.timeout(600)
class TestReal:
    """On the real parts."""

    def test_tower_and_projector_are_those_of_the_bundle(self, base: Checkpoint) -> None:
        expected = NanoSource(None, SilentReporter()).vision_weights()
        assert len(base.vision_weights) > 200
        for name in base.vision_weights:
            np.testing.assert_array_equal(base.vision_weights[name], expected[name])

    def test_the_language_model_says_what_the_bundles_says(self, base: Checkpoint, tmp_path: Path) -> None:
        load_library()  # before llama_cpp is imported in any other way
        import llama_cpp

        from mobilevlm_ros.model.mobilevlm import load_mobilevlm

        path = tmp_path / 'language.gguf'
        path.write_bytes(NanoSource(None, SilentReporter()).language_file())
        llama = llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False)
        tokens = open_tokenizer(base.path).encode('The robot stands before a red chair in 2 rooms, and')
        assert tokens == llama.tokenize(b'The robot stands before a red chair in 2 rooms, and', add_bos=False)
        llama.eval(tokens)
        expected = np.asarray(llama.scores[: len(tokens)])
        model = load_mobilevlm(base.config, base.tensors)
        with torch.inference_mode():
            found = model.language(torch.tensor([tokens])).logits[0].numpy()
        # llama.cpp multiplies with 8-bit activations, so not to the last digit.
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.995
        assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.8

    def test_the_tokenizer_knows_the_turns(self, base: Checkpoint) -> None:
        tokenizer = open_tokenizer(base.path)
        assert tokenizer.encode('<|im_start|>', special=True) == [tokenizer.bos_id]
        assert tokenizer.encode('<|im_end|>', special=True) == [tokenizer.eos_id]
        assert not tokenizer.adds_bos
