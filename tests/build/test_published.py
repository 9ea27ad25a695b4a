"""A published checkpoint as a source of bundles: what goes in, what it takes, its tokenizer, its language model."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_checkpoints
import tiny_models
from safetensors.numpy import save_file

from mobilevlm_ros.build.language_gguf import write_language_gguf
from mobilevlm_ros.build.making import make_bundle
from mobilevlm_ros.build.parity import read_report
from mobilevlm_ros.build.profile import ParityLimits, Profile, VisionTarget
from mobilevlm_ros.build.published import CheckpointSource, CheckpointTokenizer, load_source
from mobilevlm_ros.build.reference import read_reference
from mobilevlm_ros.build.stages import SilentReporter, Workshop
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.model.checkpoint import open_checkpoint
from mobilevlm_ros.model.manifest import read_manifest
from mobilevlm_ros.runtime.language import LanguageOptions
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine
from mobilevlm_ros.runtime.prompt import TEMPLATES

CONFIG = tiny_checkpoints.config()
EXACT = """
name: exact
device: tests
vision: {backend: onnxruntime, precision: fp32, n_threads: 1}
language: {quantization: F32, kv_type: f32, n_threads: 1, n_threads_batch: 1}
parity: {logits_cosine: 0.99999}
"""
TEXTS = ['What is the red car', '\nWhat is it? ASSISTANT:', 'x  y', 'é 日本 🚗', ' ', '']


class Steps(SilentReporter):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def step(self, text: str) -> None:
        self.steps.append(text)


def profile(quantization: str) -> Profile:
    return Profile('tests', 'tests', VisionTarget('onnxruntime', 'fp32'), quantization, ParityLimits(0.9, 0.9))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_checkpoints.write(tmp_path / 'tiny', CONFIG)
    return tmp_path / 'tiny'


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA on the queries and the MLP, as peft saves it, strong enough to change the answers."""
    path = tmp_path / 'adapter'
    path.mkdir()
    random = np.random.default_rng(8)
    tensors = {}
    for layer in range(CONFIG.language.n_layers):
        for part, n_out in (('self_attn.q_proj', 64), ('mlp.up_proj', 128)):
            root = f'base_model.model.model.layers.{layer}.{part}.lora_'
            tensors[f'{root}A.weight'] = random.normal(0, 0.2, (4, 64)).astype(np.float32)
            tensors[f'{root}B.weight'] = random.normal(0, 0.5, (n_out, 4)).astype(np.float32)
    save_file(tensors, path / 'adapter_model.safetensors')
    (path / 'adapter_config.json').write_text(json.dumps({'peft_type': 'LORA', 'r': 4, 'lora_alpha': 8}))
    return path


def source(folder: Path, adapter: Path | None = None) -> CheckpointSource:
    return CheckpointSource(open_checkpoint(folder), adapter)


# -- what goes in ---------------------------------------------------------------------------------------------------


def test_it_is_what_the_checkpoint_says(folder: Path) -> None:
    found = source(folder)

    assert (found.vision, found.projector) == (CONFIG.vision, CONFIG.projector)
    assert (found.n_embd, found.n_ctx, found.aspect) == (64, CONFIG.language.n_ctx, 'pad')
    assert found.prompt == {'template': 'v1'}
    assert {name.split('.')[0] for name in found.vision_weights()} == {'vision_model', 'model'}


@pytest.mark.parametrize('changed', ['config.json', 'pytorch_model.bin', 'tokenizer.model'])
def test_every_file_is_part_of_its_identity(folder: Path, changed: str) -> None:
    before = source(folder).identity()
    path = folder / changed
    path.write_bytes(path.read_bytes() + b'\n')

    found = CheckpointSource.identity(_Opened(folder))  # type: ignore[arg-type]

    assert len(found) == len(before) == 3
    assert len(set(found) - set(before)) == 1
    assert next(iter(set(found) - set(before))).startswith(f'{changed} ')


class _Opened:
    """A source whose folder may be damaged: a hash needs no more than it."""

    def __init__(self, folder: Path) -> None:
        self._checkpoint = self
        self._adapter = None
        self.path = folder


def test_other_files_are_not(folder: Path) -> None:
    before = source(folder).identity()
    (folder / 'README.md').write_text('new')

    assert source(folder).identity() == before


def test_the_adapter_is_part_of_it(folder: Path, adapter: Path) -> None:
    names = {entry.split()[0] for entry in source(folder, adapter).identity()}

    assert {'adapter_config.json', 'adapter_model.safetensors'} <= names


def test_a_missing_adapter_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r'no folder .*nothing: expected one that peft saved'):
        source(folder, tmp_path / 'nothing').identity()


def test_a_language_model_alone_is_refused(tmp_path: Path) -> None:
    tiny_checkpoints.write(tmp_path / 'llm', tiny_checkpoints.config(None))

    with pytest.raises(BuildError, match=r'llm holds a language model alone; .*Give the folder of a MobileVLM'):
        source(tmp_path / 'llm')


# -- what it takes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('quantization', ['F32', 'F16', 'Q8_0', 'Q4_0'])
def test_the_room_is_that_of_what_is_made(folder: Path, tmp_path: Path, quantization: str) -> None:
    """The quantised file, and the one in float16 that it is made from; within the length of the vocabulary."""
    with closing(Workshop(tmp_path / 'out', SilentReporter())) as workshop:
        source(folder).build_language(workshop, profile(quantization), [])
        made = workshop.path('language.gguf').stat().st_size

    needed = source(folder).room_bytes(profile(quantization))

    half = source(folder).room_bytes(profile('F16')) // 2
    assert needed == pytest.approx(made if quantization == 'F32' else half + made, rel=0.05)


def test_an_unknown_quantisation_is_named(folder: Path) -> None:
    with pytest.raises(BuildError, match='Q9_X'):
        source(folder).room_bytes(profile('Q9_X'))


def test_memory_and_keys_of_a_published_model(folder: Path) -> None:
    """MobileVLM V2 1.7B: 1.36 billion parameters in bfloat16, and 24 layers of 2048 for keys and for values."""
    large = source(folder)
    large._config = read_manifest('mobilevlm_v2-1.7b')

    assert large.memory_bytes() == pytest.approx(2 * 1.36e9 + (1 << 30), rel=0.02)
    assert large.kv_bytes(2048) == 24 * 2 * 2048 * 2 * 2048


# -- the language model ---------------------------------------------------------------------------------------------


def build_language(folder: Path, out: Path, quantization: str, adapter: Path | None = None) -> tuple[Any, set[str]]:
    """What the source says of it, and the files that are left."""
    with closing(Workshop(out, SilentReporter())) as workshop:
        part = source(folder, adapter).build_language(workshop, profile(quantization), ['x'])
        return part, {path.name for path in workshop.folder.iterdir()} - {'stages.json'}


@pytest.mark.parametrize(('quantization', 'kind'), [('F32', 'F32'), ('F16', 'F16'), ('Q8_0', 'Q8_0'), ('Q4_0', 'Q4_0')])
def test_the_language_model_is_quantised_and_nothing_else_is_left(
    folder: Path, tmp_path: Path, quantization: str, kind: str
) -> None:
    part, files = build_language(folder, tmp_path / 'out', quantization)

    assert part == {'file': 'language.gguf', 'quantization': quantization}
    assert files == {'language.gguf'}
    reader = gguf.GGUFReader(tmp_path / 'out.partial' / 'language.gguf')
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds['blk.0.ffn_up.weight'] == kind
    assert kinds['blk.0.attn_norm.weight'] == 'F32'


def test_the_adapter_becomes_a_file_of_its_own(folder: Path, tmp_path: Path, adapter: Path) -> None:
    part, files = build_language(folder, tmp_path / 'out', 'F16', adapter)

    assert part['adapter'] == 'adapter.gguf'
    assert files == {'language.gguf', 'adapter.gguf'}


def test_interrupted_while_quantising_the_float16_file_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    reporter = Steps()
    with closing(Workshop(tmp_path / 'out', reporter)) as workshop, monkeypatch.context() as patch:
        patch.setattr(importlib.import_module('mobilevlm_ros.build.quantize'), 'quantize_gguf', interrupt)
        with pytest.raises(KeyboardInterrupt):
            source(folder).build_language(workshop, profile('Q8_0'), [])
        assert {path.name for path in workshop.folder.iterdir()} == {'language-f16.gguf', 'stages.json'}
    with closing(Workshop(tmp_path / 'out', reporter)) as workshop:
        source(folder).build_language(workshop, profile('Q8_0'), [])
    assert 'language model in float16: finished earlier' in reporter.steps


def test_a_bundle_with_an_adapter_is_the_model_with_the_adapter(folder: Path, tmp_path: Path, adapter: Path) -> None:
    """PyTorch merges it, llama.cpp applies it; without it the answers would be others."""
    (tmp_path / 'exact.yaml').write_text(EXACT)
    bundles = [
        make_bundle(str(folder), str(tmp_path / 'exact.yaml'), tmp_path / name, SilentReporter(), adapter=given)
        for name, given in (('with', adapter), ('without', None))
    ]

    assert bundles[0].adapter_path == tmp_path / 'with' / 'adapter.gguf'
    for bundle in bundles:
        stages = {stage.stage: stage.worst for stage in read_report(bundle).stages}
        assert stages['logits'] >= 0.99999
        assert stages['image to tokens'] == 1.0
    logits = [read_reference(bundle.path / 'reference.npz').images[0].answers[0].logits[0] for bundle in bundles]
    assert np.corrcoef(*logits)[0, 1] < 0.99


# -- the tokenizer --------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCppEngine]:
    """llama.cpp with the vocabulary of a tiny checkpoint."""
    folder = tmp_path_factory.mktemp('vocabulary')
    tiny_checkpoints.write_tokenizer(folder / 'tokenizer.model')
    sizes = tiny_models.TinyLlama(n_embd=32, n_layers=1, n_heads=1, n_ff=32)
    n_vocab = len(tiny_checkpoints.VOCABULARY[0])
    weights = tiny_models.llama_weights(sizes, n_vocab)
    config = tiny_models.language_config(sizes, n_vocab)
    write_language_gguf(weights, config, folder / 'tokenizer.model', folder / 'm.gguf', name='tiny')
    engine = LlamaCppEngine(folder / 'm.gguf', LanguageOptions(n_ctx=64, n_threads=1, n_threads_batch=1))
    yield engine
    engine.close()


def as_json(model: Path, path: Path) -> Path:
    """The same vocabulary as ``tokenizer.json``, converted as transformers does it."""
    import tokenizers
    from sentencepiece import SentencePieceProcessor
    from tokenizers import decoders, models, normalizers

    pieces = SentencePieceProcessor(model_file=str(model))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    ranked = sorted((i for i in vocab.values() if i >= 259), key=lambda i: -pieces.get_score(i))
    merges = []
    for text in (pieces.id_to_piece(i) for i in ranked):
        merges += [(text[:end], text[end:]) for end in range(1, len(text)) if {text[:end], text[end:]} <= vocab.keys()]
    fast = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token='<unk>', fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    fast.decoder = decoders.Replace('▁', ' ')
    fast.add_special_tokens(['<unk>', '<s>', '</s>'])
    fast.save(str(path))
    return path


@pytest.mark.parametrize('suffix', ['.model', '.json'])
def test_prompts_are_tokenized_as_llama_cpp_does(folder: Path, tmp_path: Path, engine: Any, suffix: str) -> None:
    path = folder / 'tokenizer.model'
    if suffix == '.json':
        path = as_json(path, tmp_path / 'tokenizer.json')
    tokenizer = CheckpointTokenizer(path)

    template = TEMPLATES['v1']()
    assert template.chunks('Is the car red?', tokenizer) == template.chunks('Is the car red?', engine)
    for text in TEXTS:
        assert tokenizer.tokenize(text) == engine.tokenize(text), text
        assert tokenizer.tokenize(text, bos=True) == engine.tokenize(text, bos=True), text


@pytest.mark.parametrize(('name', 'kind'), [('tokenizer.model', 'SentencePiece model'), ('tokenizer.json', 'json')])
@pytest.mark.parametrize('content', [b'', b'{"model": 3}', b'\xff\xfe\x00'])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, name: str, kind: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(BuildError, match=rf'{name} is no .*{kind}'):
        CheckpointTokenizer(tmp_path / name).tokenize('x')


# -- finding it -----------------------------------------------------------------------------------------------------


def test_a_fetched_checkpoint_is_found_by_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)
    place = tmp_path / 'cache' / 'mobilevlm_ros' / 'checkpoints' / 'mobilevlm_v2-1.7b'
    place.parent.mkdir(parents=True)
    place.symlink_to(folder)
    reporter = Steps()

    assert load_source('mobilevlm_v2-1.7b', reporter).vision == CONFIG.vision
    assert reporter.steps == [f'checkpoint {place}']


def test_a_folder_comes_before_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    folder.rename('mobilevlm-3b')

    assert load_source('mobilevlm-3b', SilentReporter()).vision == CONFIG.vision


def test_what_is_checked_beforehand_follows_the_checkpoint(tmp_path: Path) -> None:
    wide = replace(CONFIG, language=replace(CONFIG.language, n_ff=256))
    for name, config in (('a', CONFIG), ('b', wide)):
        tiny_checkpoints.write(tmp_path / name, config)

    assert source(tmp_path / 'b').room_bytes(profile('F16')) > source(tmp_path / 'a').room_bytes(profile('F16'))
    assert source(tmp_path / 'b').memory_bytes() > source(tmp_path / 'a').memory_bytes()
