"""LoRA adapters in GGUF: what llama.cpp computes with one equals merged weights, and what it cannot take is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
from numpy.typing import NDArray

from mobilevlm_ros.build.adapter_gguf import AdaptedWeights, write_adapter_gguf
from mobilevlm_ros.build.language_gguf import write_language_gguf
from mobilevlm_ros.build.llama_tensors import language_tensors
from mobilevlm_ros.build.vocabulary import Vocabulary
from mobilevlm_ros.errors import BuildError, CheckpointError, EngineError
from mobilevlm_ros.model.config import LanguageConfig
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.language import LanguageOptions, TokenSegment
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine

torch = pytest.importorskip('torch', reason='adapters are read with torch: make venv-dev')
from safetensors.torch import save_file  # noqa: E402  it imports torch

VOCABULARY = Vocabulary('llama', *tiny_models.vocabulary(), padding=0)
# The shapes of a SmolLM2 in small: grouped heads, tied embeddings.
CONFIG = LanguageConfig(
    n_vocab=len(VOCABULARY.tokens), n_embd=96, n_layers=2, n_heads=6, n_kv_heads=2, n_ff=128, tie_embeddings=True
)
UNTIED = LanguageConfig(n_vocab=len(VOCABULARY.tokens), n_embd=64, n_layers=2, n_heads=4, n_kv_heads=4, n_ff=96)
TOKENS = (1, 300, 301, 302, 303, 310, 311)

Weights = dict[str, NDArray[np.float32]]


def random_weights(config: LanguageConfig) -> Weights:
    random = np.random.default_rng(11)
    scale = 1.2 / config.n_embd**0.5
    return {
        tensor.source: random.normal(float(len(tensor.shape) == 1), scale, tensor.shape).astype(np.float32)
        for tensor in language_tensors(config)
    }


def linear_modules(config: LanguageConfig) -> dict[str, tuple[int, ...]]:
    """What the published recipe adapts: every matrix of the layers."""
    return {
        tensor.source.removesuffix('.weight'): tensor.shape
        for tensor in language_tensors(config)
        if '.layers.' in tensor.source and len(tensor.shape) == 2
    }


def save_adapter(
    folder: Path, modules: dict[str, tuple[int, ...]], rank: int = 8, file: str = 'safetensors', **settings: Any
) -> Weights:
    """An adapter as peft writes it; returns its tensors by key."""
    random = np.random.default_rng(12)
    folder.mkdir(exist_ok=True)
    tensors: Weights = {}
    for module, (n_out, n_in) in modules.items():
        root = f'base_model.model.{module}.lora_'
        own = next((r for end, r in settings.get('rank_pattern', {}).items() if module.endswith(end)), rank)
        tensors[f'{root}A.weight'] = random.normal(0, n_in**-0.5, (own, n_in)).astype(np.float32)
        tensors[f'{root}B.weight'] = random.normal(0, 0.5 * own**-0.5, (n_out, own)).astype(np.float32)
    as_torch = {name: torch.from_numpy(value) for name, value in tensors.items()}
    if file == 'safetensors':
        save_file(as_torch, folder / 'adapter_model.safetensors')
    else:
        torch.save(as_torch, folder / 'adapter_model.bin')
    config = {
        'peft_type': 'LORA',
        'r': rank,
        'lora_alpha': 16,
        'bias': 'none',
        'target_modules': ['q_proj'],
        **settings,
    }
    (folder / 'adapter_config.json').write_text(json.dumps(config))
    return tensors


def merged(weights: Weights, adapter: Weights, scaling: dict[str, float]) -> Weights:
    """W + scaling * B A."""
    result = dict(weights)
    for key in adapter:
        if key.endswith('lora_A.weight'):
            module = key.removeprefix('base_model.model.').removesuffix('.lora_A.weight')
            change = adapter[key.replace('lora_A', 'lora_B')] @ adapter[key]
            result[f'{module}.weight'] = weights[f'{module}.weight'] + scaling[module] * change
    return result


def logits(folder: Path, weights: Weights, config: LanguageConfig, adapter: Path | None = None) -> NDArray[np.float32]:
    path = folder / 'language.gguf'
    write_language_gguf(weights, config, VOCABULARY, path, dtype='f32', name='tiny')
    options = LanguageOptions(n_ctx=64, n_threads=1, n_threads_batch=1, kv_type='f32')
    engine = LlamaCppEngine(path, options, adapter)
    engine.prefill([TokenSegment(TOKENS)], CancelToken())
    values = engine.logits().copy()
    engine.close()
    return values


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# -- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('config', [CONFIG, UNTIED], ids=['grouped heads, tied', 'as MobileLLaMA'])
@pytest.mark.parametrize('file', ['safetensors', 'bin'])
def test_an_adapter_equals_merged_weights(config: LanguageConfig, file: str, tmp_path: Path) -> None:
    weights, modules = random_weights(config), linear_modules(config)
    adapter = save_adapter(tmp_path / 'peft', modules, file=file)
    write_adapter_gguf(tmp_path / 'peft', tmp_path / 'adapter.gguf', config, storage='f32')

    with_adapter = logits(tmp_path, weights, config, tmp_path / 'adapter.gguf')

    expected = logits(tmp_path, merged(weights, adapter, dict.fromkeys(modules, 16 / 8)), config)
    np.testing.assert_allclose(with_adapter, expected, atol=1e-4)
    assert np.abs(with_adapter - logits(tmp_path, weights, config)).max() > 0.5


@pytest.mark.parametrize(
    'settings', [{}, {'use_rslora': True}, {'rank_pattern': {'q_proj': 4}, 'alpha_pattern': {'k_proj': 5}}]
)
def test_adapted_weights_equal_what_llama_cpp_applies(settings: dict[str, Any], tmp_path: Path) -> None:
    weights, modules = random_weights(UNTIED), linear_modules(UNTIED)
    save_adapter(tmp_path / 'peft', modules, **settings)
    write_adapter_gguf(tmp_path / 'peft', tmp_path / 'adapter.gguf', UNTIED, storage='f32')

    adapted = AdaptedWeights(weights, tmp_path / 'peft')

    assert set(adapted) == set(weights)
    with_adapter = logits(tmp_path, weights, UNTIED, tmp_path / 'adapter.gguf')
    np.testing.assert_allclose(logits(tmp_path, dict(adapted), UNTIED), with_adapter, atol=1e-4)


def test_merged_weights_in_transformers_give_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip('transformers', reason='needs transformers as a reference: make venv-dev')
    weights, modules = random_weights(UNTIED), linear_modules(UNTIED)
    adapter = save_adapter(tmp_path / 'peft', modules)
    write_adapter_gguf(tmp_path / 'peft', tmp_path / 'adapter.gguf', UNTIED, storage='f32')
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=UNTIED.n_vocab,
            hidden_size=UNTIED.n_embd,
            intermediate_size=UNTIED.n_ff,
            num_hidden_layers=UNTIED.n_layers,
            num_attention_heads=UNTIED.n_heads,
            rms_norm_eps=UNTIED.norm_eps,
        )
    ).eval()
    both = merged(weights, adapter, dict.fromkeys(modules, 16 / 8))
    model.load_state_dict({name: torch.from_numpy(value) for name, value in both.items()})

    ours = logits(tmp_path, weights, UNTIED, tmp_path / 'adapter.gguf')

    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0, -1].numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize(
    ('settings', 'scaling_of'),
    [
        ({'use_rslora': True}, lambda module: 16 / 8**0.5),
        ({'alpha_pattern': {'mlp.up_proj': 3}}, lambda module: (3 if module.endswith('up_proj') else 16) / 8),
        ({'rank_pattern': {'q_proj': 4}}, lambda module: 16 / (4 if module.endswith('q_proj') else 8)),
        ({'lora_alpha': 2.5}, lambda module: 2.5 / 8),
    ],
    ids=['rsLoRA', 'alpha pattern', 'rank pattern', 'another alpha'],
)
def test_every_scaling_of_peft_is_kept(settings: dict[str, Any], scaling_of: Any, tmp_path: Path) -> None:
    weights, modules = random_weights(UNTIED), linear_modules(UNTIED)
    adapter = save_adapter(tmp_path / 'peft', modules, **settings)
    write_adapter_gguf(tmp_path / 'peft', tmp_path / 'adapter.gguf', UNTIED, storage='f32')

    ours = logits(tmp_path, weights, UNTIED, tmp_path / 'adapter.gguf')

    expected = logits(tmp_path, merged(weights, adapter, {module: scaling_of(module) for module in modules}), UNTIED)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_the_output_matrix_may_be_adapted_where_it_is_one_of_its_own(tmp_path: Path) -> None:
    weights = random_weights(UNTIED)
    adapter = save_adapter(tmp_path / 'peft', {'lm_head': (UNTIED.n_vocab, UNTIED.n_embd)})
    write_adapter_gguf(tmp_path / 'peft', tmp_path / 'adapter.gguf', UNTIED, storage='f32')

    ours = logits(tmp_path, weights, UNTIED, tmp_path / 'adapter.gguf')

    np.testing.assert_allclose(ours, logits(tmp_path, merged(weights, adapter, {'lm_head': 2.0}), UNTIED), atol=1e-4)


@pytest.mark.parametrize(('storage', 'least'), [('f16', 0.99999), ('q8_0', 0.9995)])
def test_a_smaller_storage_stays_close(storage: Any, least: float, tmp_path: Path) -> None:
    weights, modules = random_weights(UNTIED), linear_modules(UNTIED)
    adapter = save_adapter(tmp_path / 'peft', modules, rank=32)
    write_adapter_gguf(tmp_path / 'peft', tmp_path / 'adapter.gguf', UNTIED, storage=storage)

    ours = logits(tmp_path, weights, UNTIED, tmp_path / 'adapter.gguf')

    expected = logits(tmp_path, merged(weights, adapter, dict.fromkeys(modules, 16 / 32)), UNTIED)
    assert least < cosine(ours, expected) < 1.0 - 1e-9
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / 'adapter.gguf').tensors}
    assert kinds == {storage.upper()}


def test_a_rank_that_q8_0_has_no_blocks_for_is_stored_in_f16_there(tmp_path: Path) -> None:
    weights, modules = random_weights(UNTIED), linear_modules(UNTIED)
    adapter = save_adapter(tmp_path / 'peft', modules, rank=16)
    write_adapter_gguf(tmp_path / 'peft', tmp_path / 'adapter.gguf', UNTIED, storage='q8_0')

    ours = logits(tmp_path, weights, UNTIED, tmp_path / 'adapter.gguf')

    assert cosine(ours, logits(tmp_path, merged(weights, adapter, dict.fromkeys(modules, 1.0)), UNTIED)) > 0.9995
    kinds = {(t.name[-6:], t.tensor_type.name) for t in gguf.GGUFReader(tmp_path / 'adapter.gguf').tensors}
    assert kinds == {('lora_a', 'Q8_0'), ('lora_b', 'F16')}


def test_the_metadata_are_those_of_nanos_adapter(tmp_path: Path) -> None:
    save_adapter(tmp_path / 'peft', linear_modules(CONFIG))

    write_adapter_gguf(tmp_path / 'peft', tmp_path / 'adapter.gguf', CONFIG, name='a name')

    reader = gguf.GGUFReader(tmp_path / 'adapter.gguf')
    assert {key: field.contents() for key, field in reader.fields.items() if not key.startswith('GGUF.')} == {
        'general.architecture': 'llama',
        'general.type': 'adapter',
        'general.name': 'a name',
        'adapter.type': 'lora',
        'adapter.lora.alpha': 16.0,
    }
    assert len(reader.tensors) == 2 * 2 * 7
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes['blk.0.attn_k.weight.lora_a'] == [96, 8]
    assert shapes['blk.0.attn_k.weight.lora_b'] == [8, 32]


# -- what is refused ----------------------------------------------------------------------------------------------

Q = 'model.layers.0.self_attn.q_proj'


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'peft_type': 'IA3'}, "type 'IA3', expected LORA"),
        ({'use_dora': True}, 'use_dora True, which llama.cpp cannot take'),
        ({'bias': 'all'}, "bias 'all'"),
        ({'modules_to_save': ['lm_head']}, 'modules_to_save'),
        ({'lora_alpha': 'many'}, "lora_alpha 'many'"),
        ({'lora_alpha': float('nan')}, 'lora_alpha nan'),
        ({'r': 0}, 'r 0'),
        ({'r': 4}, r'matrices of \(8, 64\) and \(64, 8\).* expected \(4, 64\) and \(64, 4\)'),
        ({'alpha_pattern': {'(a+)+$': 3}}, 'patterns that are no names of modules'),
        ({'rank_pattern': [1]}, 'patterns that are no names'),
    ],
)
def test_settings_that_llama_cpp_cannot_take_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_adapter(tmp_path / 'peft', {Q: (64, 64)})
    config = json.loads((tmp_path / 'peft' / 'adapter_config.json').read_text())
    (tmp_path / 'peft' / 'adapter_config.json').write_text(json.dumps({**config, **settings}))

    with pytest.raises(BuildError, match=message):
        write_adapter_gguf(tmp_path / 'peft', tmp_path / 'adapter.gguf', UNTIED)

    assert not list(tmp_path.glob('*adapter.gguf*'))


@pytest.mark.parametrize(
    ('modules', 'message'),
    [
        ({Q: (64, 32)}, 'made for a model of other shapes'),
        ({'model.layers.7.self_attn.q_proj': (64, 64)}, r'changes model\.layers\.7'),
        ({'model.embed_tokens': (UNTIED.n_vocab, 64)}, 'changes model.embed_tokens'),
        ({'model.vision_tower.encoder.layers.0.self_attn.q_proj': (64, 64)}, 'changes model.vision_tower'),
        ({}, 'no tensors'),
    ],
)
def test_targets_that_the_model_does_not_have_are_refused(
    modules: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    save_adapter(tmp_path / 'peft', modules)

    with pytest.raises(BuildError, match=message):
        write_adapter_gguf(tmp_path / 'peft', tmp_path / 'adapter.gguf', UNTIED)


def test_the_output_of_tied_embeddings_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path / 'peft', {'lm_head': (CONFIG.n_vocab, CONFIG.n_embd)})

    with pytest.raises(BuildError, match='changes lm_head'):
        write_adapter_gguf(tmp_path / 'peft', tmp_path / 'adapter.gguf', CONFIG)


@pytest.mark.parametrize(
    ('key', 'message'),
    [
        (f'base_model.model.{Q}.lora_magnitude_vector', 'no matrix of a LoRA'),
        ('base_model.model.lm_head.weight', 'no matrix of a LoRA'),
        ('base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight', 'lora_B of .* and not the other half'),
    ],
)
def test_tensors_that_have_no_place_are_refused(key: str, message: str, tmp_path: Path) -> None:
    tensors = save_adapter(tmp_path / 'peft', {Q: (64, 64)})
    more = {name: torch.from_numpy(value) for name, value in tensors.items()} | {key: torch.zeros(64, 8)}
    save_file(more, tmp_path / 'peft' / 'adapter_model.safetensors')

    with pytest.raises(BuildError, match=message):
        write_adapter_gguf(tmp_path / 'peft', tmp_path / 'adapter.gguf', UNTIED)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r'adapter_config\.json is missing'):
        write_adapter_gguf(tmp_path, tmp_path / 'adapter.gguf', UNTIED)


def test_weights_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    save_adapter(tmp_path / 'peft', {Q: (64, 64)})
    weights = tmp_path / 'peft' / 'adapter_model.safetensors'
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r'adapter_model\.safetensors'):
        write_adapter_gguf(tmp_path / 'peft', tmp_path / 'adapter.gguf', UNTIED)

    weights.unlink()
    with pytest.raises(CheckpointError, match=r'adapter_model\.safetensors'):
        write_adapter_gguf(tmp_path / 'peft', tmp_path / 'adapter.gguf', UNTIED)


def test_llama_cpp_refuses_an_adapter_for_another_model(tmp_path: Path) -> None:
    """The check behind ours: the same shapes were promised, another file was given."""
    save_adapter(tmp_path / 'peft', linear_modules(CONFIG))
    write_adapter_gguf(tmp_path / 'peft', tmp_path / 'adapter.gguf', CONFIG)

    with pytest.raises(EngineError):
        logits(tmp_path, random_weights(UNTIED), UNTIED, tmp_path / 'adapter.gguf')
