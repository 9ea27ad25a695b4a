"""Adapters: the published shares, and the folder that they leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_checkpoints
import torch

from mobilevlm_ros.errors import CheckpointError, CheckpointKindError, CheckpointMissingError, CheckpointShapeError
from mobilevlm_ros.model.checkpoint import open_checkpoint
from mobilevlm_ros.model.layout import PROJECTOR_PREFIX, projector_tensors
from mobilevlm_ros.model.manifest import read_manifest
from mobilevlm_ros.train.config import LoraConfig, read_config
from mobilevlm_ros.train.lora import NON_LORA, merge_adapter, save_adapter, trainable_share


@pytest.mark.parametrize(
    ('model', 'n_expected', 'per_cent', 'printed'),
    [('mobilellama-1.4b-chat', 121_110_528, 8.877, 8.87), ('mobilellama-2.7b-chat', 200_278_016, 7.413, 7.41)],
)
def test_published_shares(model: str, n_expected: int, per_cent: float, printed: float) -> None:
    """Of the language model's parameters, with the published rank; the paper prints two decimals, cut off."""
    published = read_config('mobilevlm-1.7b-lora').lora
    assert published is not None
    n_trained, share = trainable_share(read_manifest(model).language, published)

    assert n_trained == n_expected
    assert round(100 * share, 3) == per_cent
    assert int(10_000 * share) / 100 == printed


def adapter_of(folder: Path, *, others: dict[str, torch.Tensor] | None = None, width: int = 64) -> Path:
    """An adapter of one matrix."""
    settings = {'peft_type': 'LORA', 'r': 2, 'lora_alpha': 4, 'bias': 'none', 'target_modules': {'q_proj'}}
    name = 'base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight'
    random = torch.Generator().manual_seed(0)
    halves = {name.format('A'): torch.randn(2, width, generator=random)}
    halves[name.format('B')] = torch.randn(64, 2, generator=random)
    save_adapter(folder, settings, halves, others or {})
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny checkpoint."""
    tiny_checkpoints.write(tmp_path / 'base', dtype='fp32')
    return tmp_path / 'base'


@pytest.mark.parametrize('prefix', ['base_model.model.', 'base_model.model.model.', ''])
def test_what_was_trained_besides_is_merged_under_any_prefix(base: Path, tmp_path: Path, prefix: str) -> None:
    """Names of peft stand before those of upstream's model, once or twice."""
    shapes = dict(projector_tensors(*_projector()))
    others = {PROJECTOR_PREFIX + name: torch.full(shape, 0.25) for name, shape in shapes.items()}
    adapter = adapter_of(tmp_path / 'adapter', others=others)
    torch.save({prefix + name: value for name, value in others.items()}, adapter / NON_LORA)
    merged = merge_adapter(base, adapter, tmp_path / 'out', dtype='fp32')

    with open_checkpoint(merged) as opened, open_checkpoint(base) as before:
        for name in others:
            assert (opened.tensors[name] == 0.25).all()
        changed = [name for name in before.tensors if (opened.tensors[name] != before.tensors[name]).any()]
    assert set(changed) == {*others, 'model.layers.0.self_attn.q_proj.weight'}


def _projector() -> tuple:  # type: ignore[type-arg]
    model = tiny_checkpoints.config()
    assert model.projector and model.vision
    return model.projector, model.vision.width, model.language.n_embd


def test_merging_is_what_peft_defines(base: Path, tmp_path: Path) -> None:
    """W + alpha / r * B A."""
    adapter = adapter_of(tmp_path / 'adapter')
    merged = merge_adapter(base, adapter, tmp_path / 'out', dtype='fp32')
    from safetensors.torch import load_file

    a, b = (value for _, value in sorted(load_file(adapter / 'adapter_model.safetensors').items()))
    name = 'model.layers.0.self_attn.q_proj.weight'
    with open_checkpoint(merged) as opened, open_checkpoint(base) as before:
        expected = torch.from_numpy(before.tensors[name]) + 2.0 * b @ a
        torch.testing.assert_close(torch.from_numpy(opened.tensors[name]), expected)


def test_what_is_said_of_the_tokenizer_stays(base: Path, tmp_path: Path) -> None:
    """Special tokens of another vocabulary than LLaMA's."""
    (base / 'tokenizer_config.json').write_text('{"eos_token": "<|im_end|>"}')
    config = json.loads((base / 'config.json').read_text())
    (base / 'config.json').write_text(json.dumps(config | {'eos_token_id': 7}))
    merged = merge_adapter(base, adapter_of(tmp_path / 'adapter'), tmp_path / 'out')

    assert json.loads((merged / 'tokenizer_config.json').read_text()) == {'eos_token': '<|im_end|>'}
    assert json.loads((merged / 'config.json').read_text())['eos_token_id'] == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ['adapter', 'base', 'out']
    with pytest.raises(CheckpointError, match='exists already'):
        merge_adapter(base, tmp_path / 'adapter', tmp_path / 'out')


def test_settings_are_json(tmp_path: Path) -> None:
    """Sets become lists."""
    adapter = adapter_of(tmp_path / 'adapter')
    assert json.loads((adapter / 'adapter_config.json').read_text())['target_modules'] == ['q_proj']


def test_what_does_not_fit_is_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissingError, match=r'no folder .*expected an adapter'):
        merge_adapter(base, tmp_path / 'none', tmp_path / 'out')
    with pytest.raises(CheckpointShapeError, match=r'lora_A\.weight .* has shape \[2, 32\], but .*q_proj\.weight'):
        merge_adapter(base, adapter_of(tmp_path / 'narrow', width=32), tmp_path / 'out')
    strange = adapter_of(tmp_path / 'strange', others={'model.other.weight': torch.ones(2)})
    with pytest.raises(CheckpointKindError, match=r'holds model\.other\.weight, which .* does not have'):
        merge_adapter(base, strange, tmp_path / 'out')
    name = PROJECTOR_PREFIX + next(iter(dict(projector_tensors(*_projector()))))
    short = adapter_of(tmp_path / 'short', others={name: torch.ones(2)})
    with pytest.raises(CheckpointShapeError, match=r'has shape \[2\].*trained on another model'):
        merge_adapter(base, short, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_published_settings_are_the_defaults() -> None:
    assert LoraConfig() == LoraConfig(rank=128, alpha=256, dropout=0.05, bits=4)
