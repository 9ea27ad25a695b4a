"""nano in PyTorch, put together from its packages: the same model as the one that the bundle's engines run."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_nano
from tiny_nano import NanoWorkshop

from mobilevlm_ros import paths
from mobilevlm_ros.build import nano_reference
from mobilevlm_ros.build.llama_tensors import language_tensors, rope_order
from mobilevlm_ros.build.nano import NanoSource
from mobilevlm_ros.build.nano_language import read_language_weights
from mobilevlm_ros.build.reference import read_reference
from mobilevlm_ros.build.stages import SilentReporter
from mobilevlm_ros.runtime.language import LanguageOptions
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine
from mobilevlm_ros.runtime.prompt import TEMPLATES

TEXTS = [
    'user\n',
    '\nWhat is in the picture?',
    "I'll count 12 345 words  and\n\n\ttabs, 3.5 °C",
    'é 日本 🚗',
    ' ',
]


@pytest.fixture
def language(tmp_path: Path) -> Path:
    tiny_nano.write_language(tmp_path / 'language.gguf')
    return tmp_path / 'language.gguf'


def test_texts_are_tokenized_as_llama_cpp_does(language: Path) -> None:
    tokenizer = nano_reference._PromptTokenizer(gguf.GGUFReader(language))
    engine = LlamaCppEngine(language, LanguageOptions(n_ctx=64, n_threads=1, n_threads_batch=1))

    try:
        assert [tokenizer.tokenize(text) for text in TEXTS] == [engine.tokenize(text) for text in TEXTS]
        assert tokenizer.tokenize('<|im_start|>', special=True) == engine.tokenize('<|im_start|>', special=True) == [1]
        template = TEMPLATES['chatml']('')
        assert template.chunks('What is it?', tokenizer) == template.chunks('What is it?', engine)
    finally:
        engine.close()


def test_the_configuration_is_read_back(nano_workshop: NanoWorkshop, language: Path) -> None:
    source = NanoSource(nano_workshop.packages, SilentReporter())

    config = nano_reference._config(source, gguf.GGUFReader(language))

    assert config.vision == source.vision
    assert config.projector == source.projector
    # The file stores these two as float32.
    assert config.language.rope_base == pytest.approx(tiny_nano.LANGUAGE.rope_base)
    assert config.language.norm_eps == pytest.approx(tiny_nano.LANGUAGE.norm_eps)
    for name in ('n_vocab', 'n_embd', 'n_layers', 'n_heads', 'n_kv_heads', 'n_ff', 'n_ctx', 'tie_embeddings'):
        assert getattr(config.language, name) == getattr(tiny_nano.LANGUAGE, name), name


def test_weights_come_back_in_the_order_of_hugging_face_with_the_adapter_merged(
    nano_workshop: NanoWorkshop, language: Path
) -> None:
    adapter = nano_workshop.own / 'adapter.gguf'
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(language).tensors}
    lora = {tensor.name: tensor.data for tensor in gguf.GGUFReader(adapter).tensors}

    weights = read_language_weights(gguf.GGUFReader(language), tiny_nano.LANGUAGE, nano_reference._merged(adapter))

    tensors = language_tensors(tiny_nano.LANGUAGE)
    assert set(weights) == {tensor.source for tensor in tensors}
    n_adapted = 0
    for tensor in tensors:
        expected = stored[tensor.name]
        if f'{tensor.name}.lora_a' in lora:
            n_adapted += 1
            change = lora[f'{tensor.name}.lora_b'] @ lora[f'{tensor.name}.lora_a']
            expected = expected + 8.0 / tiny_nano.RANK * change
        found = weights[tensor.source]
        if tensor.n_rope_heads:
            found = rope_order(found, tensor.n_rope_heads)
        np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=tensor.name)
    assert n_adapted == 14


def test_the_command_writes_the_record(
    nano_workshop: NanoWorkshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = nano_workshop.own / 'reference.npz'
    before = read_reference(target)
    target.unlink()
    # What runs as a command is imported anew, and finds its files by the function that is there then.
    monkeypatch.setattr(paths, 'shared_file', lambda relative: nano_workshop.root / relative)
    monkeypatch.delitem(sys.modules, 'mobilevlm_ros.build.nano_reference')
    downloads = tmp_path / 'cache' / 'mobilevlm_ros' / 'downloads'
    downloads.parent.mkdir(parents=True)
    downloads.symlink_to(nano_workshop.packages)

    runpy.run_module('mobilevlm_ros.build.nano_reference', run_name='__main__')

    told = json.loads(capsys.readouterr().out)
    assert told['written'] == str(target)
    assert 'PyTorch' in told['made_by']
    after = read_reference(target)
    assert len(after.images) == len(before.images) == 3
    for a, b in zip(after.images, before.images, strict=True):
        np.testing.assert_array_equal(a.visual_tokens, b.visual_tokens)
        assert [answer.greedy_ids for answer in a.answers] == [answer.greedy_ids for answer in b.answers]
        assert [answer.logits.shape[0] for answer in a.answers] == [1, 1]
