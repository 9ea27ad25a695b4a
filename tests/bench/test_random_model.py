"""Models of random bytes cost what quantised ones cost: the same tensors, types and keys, and finite values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models

from mobilevlm_ros.bench.random_model import LANGUAGE, RandomModels, language_bytes, vision_bytes
from mobilevlm_ros.build.language_gguf import write_language_gguf
from mobilevlm_ros.build.quantize import QUANTIZATIONS, quantize_gguf
from mobilevlm_ros.errors import BuildError, EngineError
from mobilevlm_ros.model.config import LanguageConfig, ModelConfig, ProjectorConfig
from mobilevlm_ros.model.random_weights import RandomWeights
from mobilevlm_ros.model.tokenizer_files import write_made_up_tokenizer
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.language import LanguageOptions, TokenSegment
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine
from mobilevlm_ros.runtime.loading import load_assistant_from
from mobilevlm_ros.types import Frame, Question, ResultCode

N_VOCAB = 512
# As many layers as it takes until llama.cpp gives some of them more bits.
SHAPES = {
    'wide': LanguageConfig(n_vocab=N_VOCAB, n_embd=256, n_layers=8, n_heads=4, n_kv_heads=4, n_ff=512, n_ctx=512),
    # As OpenLLaMA 3B's, whose rows are no multiple of 256.
    'odd': LanguageConfig(n_vocab=N_VOCAB, n_embd=160, n_layers=8, n_heads=4, n_kv_heads=2, n_ff=288, n_ctx=512),
}


def model(language: LanguageConfig, **parts: Any) -> ModelConfig:
    return ModelConfig('tiny', language, **parts)


def written(path: Path) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    fields = {name: value for name, value in fields.items() if not name.startswith('GGUF')}
    tensors = {tensor.name: (tuple(tensor.shape), tensor.tensor_type.name) for tensor in reader.tensors}
    return fields, tensors


@pytest.mark.parametrize('quantization', QUANTIZATIONS)
@pytest.mark.parametrize('shape', SHAPES)
def test_the_file_is_what_the_quantiser_would_have_made_of_random_weights(
    shape: str, quantization: str, tmp_path: Path
) -> None:
    config, tokenizer, exact = model(SHAPES[shape]), tmp_path / 'tokenizer.model', tmp_path / 'f16.gguf'
    write_made_up_tokenizer(tokenizer, N_VOCAB)
    path = Path(RandomModels().write_language(config, quantization, str(tokenizer), str(tmp_path)))
    write_language_gguf(RandomWeights(config, 0), config.language, tokenizer, exact, name='tiny-random')
    quantize_gguf(exact, tmp_path / 'quantized.gguf', quantization, n_threads=1)
    assert written(path) == written(tmp_path / 'quantized.gguf')
    assert path.stat().st_size == pytest.approx(language_bytes(config.language, quantization), abs=4096)


@pytest.mark.parametrize('quantization', QUANTIZATIONS)
@pytest.mark.parametrize('shape', SHAPES)
def test_weights_are_finite_and_of_usual_size(shape: str, quantization: str, tmp_path: Path) -> None:
    path = Path(RandomModels().write_language(model(SHAPES[shape]), quantization, '', str(tmp_path)))
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim > 1:
            assert values.std() == pytest.approx(0.02, rel=0.1), tensor.name
            assert abs(values.mean()) < 0.004, tensor.name
        else:
            assert (values == 1).all()


@pytest.mark.parametrize('quantization', ['Q4_0', 'Q4_K_S', 'Q8_0'])
def test_llama_cpp_computes_finite_logits(quantization: str, tmp_path: Path) -> None:
    path = Path(RandomModels().write_language(model(SHAPES['wide']), quantization, '', str(tmp_path)))
    engine = LlamaCppEngine(path, LanguageOptions(n_ctx=128, n_threads=1, n_threads_batch=1))
    engine.prefill([TokenSegment(tuple(range(3, 40)))], CancelToken())
    logits = engine.logits().copy()
    engine.close()
    assert np.isfinite(logits).all()
    assert logits.std() > 0


def test_a_bundle_answers(tmp_path: Path) -> None:
    language = LanguageConfig(n_vocab=N_VOCAB, n_embd=64, n_layers=2, n_heads=4, n_kv_heads=4, n_ff=128)
    config = model(language, vision=tiny_models.TINY_VISION, projector=ProjectorConfig('mlp2x_gelu'))
    models = RandomModels()
    models.write_language(config, 'Q8_0', '', str(tmp_path))
    models.write_bundle(config, 'Q8_0', str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['bundle.json', LANGUAGE, 'vision.onnx']
    assert (tmp_path / 'vision.onnx').stat().st_size < 1.5 * vision_bytes(config)
    assistant = load_assistant_from(tmp_path)
    answer = assistant.ask(Question('What?', max_tokens=2), Frame(np.zeros((40, 56, 3), np.uint8)))
    assistant.close()
    assert answer.result_code in (ResultCode.OK, ResultCode.UNKNOWN)
    assert answer.timing.prompt_tokens > 16


def test_a_language_model_alone_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match='language model alone'):
        RandomModels().write_bundle(model(SHAPES['wide']), 'Q8_0', str(tmp_path))
    assert vision_bytes(model(SHAPES['wide'])) == 0


def test_the_vocabulary_of_a_gguf_is_taken(tmp_path: Path) -> None:
    tiny_models.write_gguf(tmp_path / 'words.gguf')
    n_vocab = len(tiny_models.vocabulary()[0])
    language = LanguageConfig(n_vocab=n_vocab, n_embd=64, n_layers=1, n_heads=2, n_kv_heads=2, n_ff=64)
    path = RandomModels().write_language(model(language), 'Q8_0', str(tmp_path / 'words.gguf'), str(tmp_path))
    engines = [LlamaCppEngine(Path(one), LanguageOptions(n_ctx=64)) for one in (path, tmp_path / 'words.gguf')]
    first, second = (engine.tokenize('the table is red', bos=True) for engine in engines)
    for engine in engines:
        engine.close()
    assert first == second


def test_a_vocabulary_that_does_not_fit_or_is_none_is_refused(tmp_path: Path) -> None:
    tiny_models.write_gguf(tmp_path / 'words.gguf')
    with pytest.raises(BuildError, match=f'the model {N_VOCAB}'):
        RandomModels().write_language(model(SHAPES['wide']), 'Q8_0', str(tmp_path / 'words.gguf'), str(tmp_path))
    (tmp_path / 'bad.gguf').write_bytes(b'GGUF')
    with pytest.raises(EngineError, match=r'bad\.gguf is no GGUF'):
        RandomModels().write_language(model(SHAPES['wide']), 'Q8_0', str(tmp_path / 'bad.gguf'), str(tmp_path))
