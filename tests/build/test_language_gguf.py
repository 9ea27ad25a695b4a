"""The language model in GGUF: transformers' logits, published metadata, one tensor in memory, whole or not there."""

from __future__ import annotations

import resource
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mobilevlm_ros.build.language_gguf import write_language_gguf
from mobilevlm_ros.build.llama_tensors import language_tensors, rope_order
from mobilevlm_ros.build.vocabulary import Vocabulary
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.model.config import LanguageConfig
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.language import LanguageOptions, TokenSegment
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine

VOCABULARY = Vocabulary('llama', *tiny_models.vocabulary(), padding=0)
N_VOCAB = len(VOCABULARY.tokens)
SHAPES = {'n_vocab': N_VOCAB, 'n_embd': 64, 'n_layers': 2, 'n_ff': 96, 'n_ctx': 512}
MODELS = {
    'all heads': LanguageConfig(**SHAPES, n_heads=4, n_kv_heads=4),
    'grouped heads': LanguageConfig(**SHAPES, n_heads=4, n_kv_heads=2, rope_base=500.0, norm_eps=1e-5),
    'tied embeddings': LanguageConfig(**SHAPES, n_heads=4, n_kv_heads=1, tie_embeddings=True),
    'heads of width 80': LanguageConfig(**{**SHAPES, 'n_embd': 160}, n_heads=2, n_kv_heads=2),
}
TINY = MODELS['all heads']


def random_weights(config: LanguageConfig) -> dict[str, NDArray[np.float32]]:
    """Seeded weights under Hugging Face's names."""
    random = np.random.default_rng(5)
    scale = 1.2 / config.n_embd**0.5
    return {
        tensor.source: random.normal(float(len(tensor.shape) == 1), scale, tensor.shape).astype(np.float32)
        for tensor in language_tensors(config)
    }


def write(out: Path, config: LanguageConfig = TINY, weights: Mapping[str, Any] | None = None, **options: Any) -> None:
    settings: dict[str, Any] = {'dtype': 'f32', 'name': 'tiny', **options}
    write_language_gguf(weights or random_weights(config), config, VOCABULARY, out, **settings)


def transformers_logits(config: LanguageConfig, tokens: list[int]) -> NDArray[np.float32]:
    torch = pytest.importorskip('torch', reason='needs torch and transformers as references: make venv-dev')
    transformers = pytest.importorskip('transformers')
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.n_vocab,
            hidden_size=config.n_embd,
            intermediate_size=config.n_ff,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            rms_norm_eps=config.norm_eps,
            rope_parameters={'rope_type': 'default', 'rope_theta': config.rope_base},
            tie_word_embeddings=config.tie_embeddings,
        )
    ).eval()
    weights = {name: torch.from_numpy(value) for name, value in random_weights(config).items()}
    if config.tie_embeddings:
        weights['lm_head.weight'] = weights['model.embed_tokens.weight']
    model.load_state_dict(weights)
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor([tokens])).logits[0, -1].numpy()
    return logits


@pytest.fixture(params=MODELS)
def config(request: pytest.FixtureRequest) -> LanguageConfig:
    return MODELS[request.param]


def llama_cpp_logits(path: Path, tokens: list[int]) -> NDArray[np.float32]:
    engine = LlamaCppEngine(path, LanguageOptions(n_ctx=128, n_threads=1, n_threads_batch=1, kv_type='f32'))
    engine.prefill([TokenSegment(tuple(tokens))], CancelToken())
    logits = engine.logits().copy()
    engine.close()
    return logits


# -- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('dtype', 'tolerance'), [('f32', 1e-4), ('f16', 0.03)])
def test_logits_are_those_of_transformers(config: LanguageConfig, dtype: str, tolerance: float, tmp_path: Path) -> None:
    tokens = [1, *np.random.default_rng(1).integers(3, N_VOCAB, 40).tolist()]
    write(tmp_path / 'tiny.gguf', config, dtype=dtype)

    ours = llama_cpp_logits(tmp_path / 'tiny.gguf', tokens)

    expected = transformers_logits(config, tokens)
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(ours, expected, atol=tolerance)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_rope_order_puts_the_halves_of_each_head_in_turns(n_heads: int, half: int, n_in: int) -> None:
    rows = np.arange(n_heads * 2 * half * n_in).reshape(n_heads * 2 * half, n_in)

    ordered = rope_order(rows, n_heads)

    for head in range(n_heads):
        before, after = rows[head * 2 * half :][: 2 * half], ordered[head * 2 * half :][: 2 * half]
        np.testing.assert_array_equal(after[0::2], before[:half])
        np.testing.assert_array_equal(after[1::2], before[half:])


# -- what stands in the file --------------------------------------------------------------------------------------


def test_the_metadata_are_those_of_published_files(tmp_path: Path) -> None:
    write(tmp_path / 'tiny.gguf', dtype='f16')

    fields = gguf.GGUFReader(tmp_path / 'tiny.gguf').fields
    found = {name: field.contents() for name, field in fields.items() if not name.startswith('GGUF.')}
    lists = {name: found.pop(f'tokenizer.ggml.{name}') for name in ('tokens', 'scores', 'token_type')}
    assert {name: len(value) for name, value in lists.items()} == dict.fromkeys(lists, N_VOCAB)
    assert found.pop('llama.attention.layer_norm_rms_epsilon') == pytest.approx(1e-6)
    assert found == {
        'general.architecture': 'llama',
        'general.name': 'tiny',
        'general.file_type': 1,
        'general.quantization_version': 2,
        'llama.vocab_size': N_VOCAB,
        'llama.context_length': 512,
        'llama.embedding_length': 64,
        'llama.block_count': 2,
        'llama.feed_forward_length': 96,
        'llama.rope.dimension_count': 16,
        'llama.attention.head_count': 4,
        'llama.attention.head_count_kv': 4,
        'llama.rope.freq_base': 10000.0,
        'tokenizer.ggml.model': 'llama',
        'tokenizer.ggml.bos_token_id': 1,
        'tokenizer.ggml.eos_token_id': 2,
        'tokenizer.ggml.padding_token_id': 0,
        'tokenizer.ggml.add_bos_token': True,
        'tokenizer.ggml.add_eos_token': False,
    }
    assert len(found) + len(lists) + 1 == 23


def test_matrices_are_f16_and_vectors_f32(tmp_path: Path) -> None:
    write(tmp_path / 'tiny.gguf', dtype='f16')

    tensors = gguf.GGUFReader(tmp_path / 'tiny.gguf').tensors
    assert {(len(tensor.shape), tensor.tensor_type.name) for tensor in tensors} == {(1, 'F32'), (2, 'F16')}
    assert len(tensors) == 9 * 2 + 3


def test_the_published_models_have_their_numbers_of_tensors_and_parameters() -> None:
    small = LanguageConfig()
    large = LanguageConfig(n_embd=2560, n_ff=6912, n_layers=32, n_heads=32, n_kv_heads=32)

    counted = [(len(t), sum(int(np.prod(one.shape)) for one in t)) for t in map(language_tensors, (small, large))]

    assert counted == [(219, 1_364_297_728), (291, 2_701_560_320)]


def test_rotary_tables_and_the_tied_output_are_ignored(tmp_path: Path) -> None:
    tied = MODELS['tied embeddings']
    extra = {
        'model.layers.0.self_attn.rotary_emb.inv_freq': np.zeros(8, np.float32),
        'lm_head.weight': np.zeros((N_VOCAB, 64), np.float32),
    }
    write(tmp_path / 'plain.gguf', tied)

    write(tmp_path / 'extra.gguf', tied, {**random_weights(tied), **extra})

    assert (tmp_path / 'extra.gguf').read_bytes() == (tmp_path / 'plain.gguf').read_bytes()


# -- memory, progress, interruption -------------------------------------------------------------------------------


class Lazy(Mapping[str, NDArray[np.float32]]):
    """Makes each tensor when it is asked for, and tells of it."""

    def __init__(self, config: LanguageConfig, on_read: Callable[[str], None] = lambda key: None) -> None:
        self._shapes = {tensor.source: tensor.shape for tensor in language_tensors(config)}
        self._on_read = on_read

    def __getitem__(self, key: str) -> NDArray[np.float32]:
        shape = self._shapes[key]
        self._on_read(key)
        return np.full(shape, 0.01, np.float32)

    def __contains__(self, key: object) -> bool:
        return key in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    wide = LanguageConfig(n_vocab=N_VOCAB, n_embd=512, n_layers=8, n_heads=4, n_kv_heads=4, n_ff=1024)
    read: list[str] = []
    tracemalloc.start()
    try:
        write(tmp_path / 'wide.gguf', wide, Lazy(wide, read.append))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    largest = 4 * 512 * 1024
    assert (tmp_path / 'wide.gguf').stat().st_size > 30 * largest
    assert peak < 5 * largest
    assert sorted(read) == sorted(Lazy(wide))


def test_progress_ends_with_all_of_it(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []

    write(tmp_path / 'tiny.gguf', on_progress=lambda done, total: seen.append((done, total)))

    assert len(seen) == 9 * 2 + 3
    assert sorted(seen) == seen
    assert seen[-1][0] == seen[-1][1] <= (tmp_path / 'tiny.gguf').stat().st_size


def test_an_interrupted_build_leaves_the_earlier_file(tmp_path: Path) -> None:
    def interrupt(key: str) -> None:
        if key.startswith('model.layers.1'):
            raise KeyboardInterrupt

    out = tmp_path / 'tiny.gguf'
    out.write_text('the earlier one')
    with pytest.raises(KeyboardInterrupt):
        write(out, weights=Lazy(TINY, interrupt))

    assert [path.name for path in tmp_path.iterdir()] == ['tiny.gguf']
    assert out.read_text() == 'the earlier one'


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(BuildError, match=r'cannot write .*tiny\.gguf'):
            write(tmp_path / 'tiny.gguf')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_said_before_a_tensor_is_read(tmp_path: Path) -> None:
    huge = LanguageConfig(n_vocab=N_VOCAB, n_embd=1 << 15, n_layers=4000, n_heads=4, n_kv_heads=4, n_ff=1 << 17)
    read: list[str] = []

    with pytest.raises(BuildError, match='MiB free'):
        write(tmp_path / 'huge.gguf', huge, Lazy(huge, read.append))

    assert read == []


# -- bad weights --------------------------------------------------------------------------------------------------


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in random_weights(TINY).items() if name != key}


Q = 'model.layers.1.self_attn.q_proj.weight'


@pytest.mark.parametrize(
    ('weights', 'message'),
    [
        (without(Q), f'lack 1 tensors of 21, {Q}'),
        (
            {**random_weights(TINY), Q: np.zeros((64, 32), np.float32)},
            rf'{Q} has shape \(64, 32\), expected \(64, 64\)',
        ),
        ({**random_weights(TINY), Q: np.full((64, 64), np.nan, np.float32)}, 'not finite'),
        ({**random_weights(TINY), Q.replace('weight', 'bias'): np.zeros(64, np.float32)}, 'q_proj.bias among them'),
        ({**random_weights(TINY), Q: np.full((64, 64), 7e4, np.float32)}, '70000, more than float16 can'),
    ],
)
def test_weights_that_do_not_fit_are_named(weights: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=message):
        write(tmp_path / 'tiny.gguf', weights=weights, dtype='f16')

    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    other = LanguageConfig(**{**SHAPES, 'n_vocab': N_VOCAB + 1}, n_heads=4, n_kv_heads=4)

    with pytest.raises(BuildError, match=f'{N_VOCAB} tokens, the model {N_VOCAB + 1}'):
        write(tmp_path / 'tiny.gguf', other)
