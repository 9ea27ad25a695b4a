"""Quantising: the types and sizes that were predicted, a child that can be stopped, and errors that say what to do."""

from __future__ import annotations

import logging
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest
import tiny_models

from mobilevlm_ros.build.language_gguf import write_language_gguf
from mobilevlm_ros.build.llama_tensors import language_tensors
from mobilevlm_ros.build.quantize import QUANTIZATIONS, predicted_bytes, quantize_gguf, tensor_types
from mobilevlm_ros.build.vocabulary import Vocabulary
from mobilevlm_ros.errors import BuildError, DependencyError
from mobilevlm_ros.model.config import LanguageConfig
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.language import LanguageOptions, TokenSegment
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine
from mobilevlm_ros.runtime.language.llamacpp_library import load_library

VOCABULARY = Vocabulary('llama', *tiny_models.vocabulary(), padding=0)
N_TEXT_BYTES = sum(map(len, VOCABULARY.tokens))
SMALL = {'n_vocab': len(VOCABULARY.tokens), 'n_heads': 4, 'n_ctx': 128}
SHAPES = {
    'k-quants fit': LanguageConfig(**SMALL, n_embd=256, n_ff=512, n_layers=9, n_kv_heads=4),
    'grouped heads': LanguageConfig(**SMALL, n_embd=256, n_ff=256, n_layers=3, n_kv_heads=1),
    'tied embeddings': LanguageConfig(**SMALL, n_embd=256, n_ff=256, n_layers=1, n_kv_heads=2, tie_embeddings=True),
    'k-quants fall back': LanguageConfig(**SMALL, n_embd=288, n_ff=544, n_layers=8, n_kv_heads=4),
}


def write(out: Path, config: LanguageConfig) -> Path:
    """A random model in f16, under a name of 16 characters, for which sizes are exact."""
    random = np.random.default_rng(3)
    weights = {
        tensor.source: random.normal(float(len(tensor.shape) == 1), 0.06, tensor.shape).astype(np.float32)
        for tensor in language_tensors(config)
    }
    write_language_gguf(weights, config, VOCABULARY, out, name='a model of tests')
    return out


@pytest.fixture(scope='module')
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp('models')
    return {name: write(folder / f'{i}.gguf', config) for i, (name, config) in enumerate(SHAPES.items())}


@pytest.fixture(scope='module')
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose k-quants take seconds: long enough to be interrupted."""
    config = LanguageConfig(**SMALL, n_embd=1024, n_ff=4096, n_layers=2, n_kv_heads=4)
    return write(tmp_path_factory.mktemp('slow') / 'slow.gguf', config)


# -- what comes out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('shape', 'quantization'),
    [
        *(('k-quants fit', name) for name in QUANTIZATIONS),
        ('k-quants fall back', 'Q4_K_M'),
        ('tied embeddings', 'Q4_0'),
    ],
)
def test_types_and_size_are_the_predicted_ones(
    shape: str, quantization: str, models: dict[str, Path], tmp_path: Path
) -> None:
    config = SHAPES[shape]

    result = quantize_gguf(models[shape], tmp_path / 'out.gguf', quantization, n_threads=1)

    found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / 'out.gguf').tensors}
    assert found == tensor_types(config, quantization)
    assert result.n_bytes == (tmp_path / 'out.gguf').stat().st_size
    assert result.n_bytes == predicted_bytes(config, quantization, N_TEXT_BYTES)
    assert sum(result.types.values()) == len(found)


def test_the_published_file_has_the_predicted_size() -> None:
    """MobileVLM_V2-1.7B in Q4_K_S, as published."""
    assert predicted_bytes(LanguageConfig(), 'Q4_K_S') == 791_817_856


@pytest.mark.parametrize(
    ('quantization', 'gigabytes'), [('Q4_0', 0.785), ('Q4_K_M', 0.834), ('Q5_K_M', 0.973), ('Q6_K', 1.12)]
)
def test_other_published_files_have_the_predicted_size(quantization: str, gigabytes: float) -> None:
    assert predicted_bytes(LanguageConfig(), quantization) / 1e9 == pytest.approx(gigabytes, abs=6e-4)


def write_hollow(path: Path, config: LanguageConfig) -> None:
    """A file of full size that is all hole behind its header."""
    writer = gguf.GGUFWriter(path, 'llama')
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.n_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.n_vocab)
    for tensor in language_tensors(config):
        dtype = np.dtype(np.float16 if len(tensor.shape) > 1 else np.float32)
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, int(np.prod(tensor.shape)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, predicted_bytes(config, 'F16'))


PLANNED = {
    **SHAPES,
    '1.4B': LanguageConfig(),
    '2.7B': LanguageConfig(n_embd=2560, n_ff=6912, n_layers=32, n_heads=32, n_kv_heads=32),
    'as deep as 70B': LanguageConfig(n_vocab=512, n_embd=256, n_ff=256, n_layers=80, n_heads=8, n_kv_heads=1),
    'width of no block': LanguageConfig(n_vocab=512, n_embd=256, n_ff=272, n_layers=2, n_heads=8, n_kv_heads=8),
}
PLAN = re.compile(r'^\[ *\d+/ *\d+\] (\S+) .*type = +(\w+),\nsize = .*?(?:\((\w+)\))?$', re.M)


@pytest.mark.parametrize('quantization', QUANTIZATIONS)
@pytest.mark.parametrize('shape', PLANNED)
def test_llama_cpp_plans_the_predicted_types(
    shape: str, quantization: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_hollow(tmp_path / 'hollow.gguf', PLANNED[shape])
    lib = load_library()
    settings = lib.llama_model_quantize_default_params()
    settings.dry_run = True
    settings.ftype = getattr(lib, f'LLAMA_FTYPE_MOSTLY_{quantization}')

    with caplog.at_level(logging.DEBUG, 'mobilevlm_ros.llama_cpp'):
        assert lib.llama_model_quantize(os.fsencode(tmp_path / 'hollow.gguf'), b'', settings) == 0

    log = '\n'.join(record.getMessage() for record in caplog.records)
    found = {name: (new or old).upper() for name, old, new in PLAN.findall(log)}
    assert found == tensor_types(PLANNED[shape], quantization)


def logits(path: Path) -> Any:
    engine = LlamaCppEngine(path, LanguageOptions(n_ctx=64, n_threads=1, n_threads_batch=1))
    engine.prefill([TokenSegment((1, 300, 301, 302))], CancelToken())
    values = engine.logits().copy()
    engine.close()
    return values


@pytest.mark.parametrize(('quantization', 'least'), [('Q8_0', 0.999), ('Q6_K', 0.99), ('Q4_K_M', 0.95), ('Q4_0', 0.9)])
def test_a_quantised_model_answers_nearly_the_same(
    quantization: str, least: float, models: dict[str, Path], tmp_path: Path
) -> None:
    source = models['grouped heads']
    quantize_gguf(source, tmp_path / 'out.gguf', quantization, n_threads=1)

    whole, quantised = logits(source), logits(tmp_path / 'out.gguf')

    cosine = float(whole @ quantised / np.linalg.norm(whole) / np.linalg.norm(quantised))
    assert least < cosine < 0.99999999


def test_f16_of_f16_is_a_copy(models: dict[str, Path], tmp_path: Path) -> None:
    quantize_gguf(models['grouped heads'], tmp_path / 'out.gguf', 'F16')

    before, after = (gguf.GGUFReader(path) for path in (models['grouped heads'], tmp_path / 'out.gguf'))
    assert {t.name: t.data.tobytes() for t in after.tensors} == {t.name: t.data.tobytes() for t in before.tensors}
    assert {n: f.contents() for n, f in after.fields.items()} == {n: f.contents() for n, f in before.fields.items()}


def test_f16_of_f32_is_narrowed(tmp_path: Path) -> None:
    tiny_models.write_gguf(tmp_path / 'f32.gguf')

    result = quantize_gguf(tmp_path / 'f32.gguf', tmp_path / 'f16.gguf', 'F16')

    assert result.types == {'F16': 16, 'F32': 5}


def test_rows_that_do_not_fit_are_told_of(models: dict[str, Path], tmp_path: Path) -> None:
    result = quantize_gguf(models['k-quants fall back'], tmp_path / 'out.gguf', 'Q4_K_M')

    assert len(result.fallbacks) == 8 * 7 + 1
    assert result.fallbacks['blk.0.attn_q.weight'] == 'rows of 288 are no multiple of 256, which q4_K needs'
    assert re.match(r'57 of 75 tensors got another type than asked for', result.warning)


def test_rows_that_fit_need_no_warning(models: dict[str, Path], tmp_path: Path) -> None:
    assert quantize_gguf(models['grouped heads'], tmp_path / 'out.gguf', 'Q4_K_M').warning == ''


def test_progress_counts_tensors(models: dict[str, Path], tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []

    quantize_gguf(
        models['grouped heads'], tmp_path / 'o.gguf', 'Q4_0', on_progress=lambda done, total: seen.append((done, total))
    )

    assert seen == [(i, 30) for i in range(1, 31)]


# -- what is refused ----------------------------------------------------------------------------------------------


def test_an_unknown_quantisation_is_refused_with_those_that_there_are(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"'Q3_X'; known are F16, Q4_0, Q4_K_S, Q4_K_M, Q5_K_M, Q6_K, Q8_0"):
        quantize_gguf(models['grouped heads'], tmp_path / 'out.gguf', 'Q3_X')


def test_a_quantised_source_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    quantize_gguf(models['grouped heads'], tmp_path / 'q8.gguf', 'Q8_0')

    with pytest.raises(BuildError, match=r'requantizing from type q8_0 is disabled\. The source must be'):
        quantize_gguf(tmp_path / 'q8.gguf', tmp_path / 'q4.gguf', 'Q4_0')


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r'none\.gguf: No such file'):
        quantize_gguf(tmp_path / 'none.gguf', tmp_path / 'out.gguf', 'Q4_0')


@pytest.mark.parametrize('n_bytes', [0, 3, 100, 20_000, 300_000])
def test_a_truncated_source_is_an_error_and_leaves_nothing(
    n_bytes: int, models: dict[str, Path], tmp_path: Path
) -> None:
    source = tmp_path / 'short.gguf'
    source.write_bytes(models['grouped heads'].read_bytes()[:n_bytes])

    with pytest.raises(BuildError, match=r'quantising .*short\.gguf to Q4_0 failed'):
        quantize_gguf(source, tmp_path / 'out.gguf', 'Q4_0')

    assert [path.name for path in tmp_path.iterdir()] == ['short.gguf']


def test_a_full_disk_is_an_error_and_leaves_nothing(models: dict[str, Path]) -> None:
    out = models['grouped heads'].with_name('out.gguf')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(BuildError, match='quantising'):
            quantize_gguf(models['grouped heads'], out, 'Q8_0')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert not [path for path in out.parent.iterdir() if 'out' in path.name]


def test_a_missing_library_is_named(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'llama_cpp.py').write_text('raise ImportError("no llama here")')
    monkeypatch.setenv('PYTHONPATH', f'{tmp_path}:{os.environ.get("PYTHONPATH", "")}')

    with pytest.raises(DependencyError, match=r'no llama here.*pip install llama-cpp-python'):
        quantize_gguf(models['grouped heads'], tmp_path / 'out.gguf', 'Q8_0')


# -- stopping -----------------------------------------------------------------------------------------------------


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if 'mobilevlm_ros.build.quantize' in child.cmdline()]


def test_an_interrupt_ends_the_child_and_leaves_nothing(slow_model: Path, tmp_path: Path) -> None:
    def interrupt(done: float, total: float) -> None:
        assert children()
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        quantize_gguf(slow_model, tmp_path / 'out.gguf', 'Q4_K_M', n_threads=1, on_progress=interrupt)

    assert not children()
    assert list(tmp_path.iterdir()) == []
    assert time.monotonic() - started < 60


def test_a_child_that_crashes_is_an_error(slow_model: Path, tmp_path: Path) -> None:
    def crash(done: float, total: float) -> None:
        for child in children():
            child.send_signal(signal.SIGSEGV)

    with pytest.raises(BuildError, match='was ended by SIGSEGV'):
        quantize_gguf(slow_model, tmp_path / 'out.gguf', 'Q4_K_M', n_threads=1, on_progress=crash)

    assert list(tmp_path.iterdir()) == []


def start_child(source: Path, out: Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, '-m', 'mobilevlm_ros.build.quantize', str(source), str(out), 'Q4_K_M', '1']
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


def test_the_child_ends_when_the_terminal_interrupts_it(slow_model: Path, tmp_path: Path) -> None:
    with start_child(slow_model, tmp_path / 'out.gguf', stdin=subprocess.PIPE) as child:
        assert child.stdout is not None
        next(line for line in child.stdout if 'converting' in line)
        child.send_signal(signal.SIGINT)

        assert child.wait(timeout=30) == -signal.SIGINT


def test_the_child_ends_when_its_builder_is_gone(slow_model: Path, tmp_path: Path) -> None:
    with start_child(slow_model, tmp_path / 'out.gguf', stdin=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        next(line for line in child.stdout if 'converting' in line)
        child.stdin.close()

        assert child.wait(timeout=30) == 1
