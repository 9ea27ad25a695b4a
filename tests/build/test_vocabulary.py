"""Vocabularies out of a checkpoint's files: llama.cpp tokenizes as the original does, and damaged files are named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as pb

from mobilevlm_ros.build.language_gguf import write_language_gguf
from mobilevlm_ros.build.tokenizer_parts import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from mobilevlm_ros.build.vocabulary import Vocabulary, read_vocabulary
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.paths import cache_dir
from mobilevlm_ros.runtime.language import LanguageOptions
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine
from mobilevlm_ros.runtime.prompt import TEMPLATES

LLAMA = cache_dir() / 'vocab' / 'ggml-vocab-llama-spm.gguf'
SEPARATOR = '\n__ggml_vocab_test__\n'
GOLDEN_PREFIX = [
    1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076, 8444, 29892, 13173,
    29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889, 3148, 1001, 29901, 29871,
]  # fmt: skip
TINY_LLAMA = tiny_models.TinyLlama(n_embd=32, n_layers=1, n_heads=1, n_ff=32)

Tokenizer = Callable[[Vocabulary], LlamaCppEngine]


def sentencepiece_model(words: tiny_models.Words) -> Any:
    """A ``tokenizer.model`` as LLaMA's is made: BPE, byte fallback, no normalization, a space in front."""
    model = pb.ModelProto()
    for text, score, kind in zip(*words, strict=True):
        model.pieces.add(piece=text.decode(), score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, True, len(model.pieces)
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer = model.normalizer_spec
    normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = 'identity', True, False
    return model


@pytest.fixture(scope='module')
def llama_words() -> tiny_models.Words:
    """LLaMA-2's tokens, scores and types."""
    if not LLAMA.is_file():
        pytest.skip(f"LLaMA's vocabulary is not at {LLAMA}; `make venv-dev` puts it there")
    fields = gguf.GGUFReader(LLAMA).fields
    tokens, scores, types = (fields[f'tokenizer.ggml.{name}'] for name in ('tokens', 'scores', 'token_type'))
    return (
        [bytes(tokens.parts[i]) for i in tokens.data],
        [float(scores.parts[i][0]) for i in scores.data],
        [int(types.parts[i][0]) for i in types.data],
    )


@pytest.fixture(scope='module')
def llama_model(llama_words: tiny_models.Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaMA-2's ``tokenizer.model``, made again."""
    path = tmp_path_factory.mktemp('llama') / 'tokenizer.model'
    path.write_bytes(sentencepiece_model(llama_words).SerializeToString())
    return path


@pytest.fixture(scope='module')
def llama_json(llama_words: tiny_models.Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaMA-2's ``tokenizer.json`` as transformers 4 converted it: all splits of all pieces, by their scores."""
    tokens, scores, types = llama_words
    vocab = {text.decode(): token for token, text in enumerate(tokens)}
    pieces = [token for token, kind in enumerate(types) if kind == NORMAL]
    merges = [
        f'{text[:end]} {text[end:]}'
        for text in (tokens[token].decode() for token in sorted(pieces, key=lambda token: -scores[token]))
        for end in range(1, len(text))
        if text[:end] in vocab and text[end:] in vocab
    ]
    replace = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}
    added = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False, 'special': True}
    path = tmp_path_factory.mktemp('json') / 'tokenizer.json'
    content = {
        'version': '1.0',
        'added_tokens': [{'id': i, 'content': tokens[i].decode(), **added} for i in range(3)],
        'normalizer': {'type': 'Sequence', 'normalizers': [{'type': 'Prepend', 'prepend': '▁'}, replace]},
        'pre_tokenizer': None,
        'model': {
            'type': 'BPE',
            'unk_token': '<unk>',
            'fuse_unk': True,
            'byte_fallback': True,
            'vocab': vocab,
            'merges': merges,
        },
    }
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope='module')
def in_llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    """Makes engines with a vocabulary and hardly any weights."""
    with ExitStack() as stack:

        def make(vocabulary: Vocabulary) -> LlamaCppEngine:
            path = tmp_path_factory.mktemp('engines') / 'tiny.gguf'
            n_vocab = len(vocabulary.tokens)
            weights = tiny_models.llama_weights(TINY_LLAMA, n_vocab)
            config = tiny_models.language_config(TINY_LLAMA, n_vocab)
            write_language_gguf(weights, config, vocabulary, path, dtype='f16', name='tiny')
            engine = LlamaCppEngine(path, LanguageOptions(n_ctx=64, n_threads=1, n_threads_batch=1))
            path.unlink()
            stack.callback(engine.close)
            return engine

        yield make


@pytest.fixture(scope='module', params=['tokenizer.model', 'tokenizer.json'])
def llama_engine(request: pytest.FixtureRequest, in_llama_cpp: Tokenizer) -> LlamaCppEngine:
    """LLaMA-2's vocabulary, read from either file."""
    path = request.getfixturevalue('llama_model' if request.param == 'tokenizer.model' else 'llama_json')
    return in_llama_cpp(read_vocabulary(path, 32000))


# -- the real vocabulary ------------------------------------------------------------------------------------------


def test_llama_cpp_tokenizes_its_own_vectors_the_same(llama_engine: LlamaCppEngine) -> None:
    inputs, outputs = Path(f'{LLAMA}.inp'), Path(f'{LLAMA}.out')
    if not inputs.is_file() or not outputs.is_file():
        pytest.skip(f'{inputs.name} and .out are not beside the vocabulary; `make venv-dev` puts them there')
    texts = inputs.read_text(encoding='utf-8').split(SEPARATOR)
    expected = [[int(number) for number in line.split()] for line in outputs.read_text().split('\n')]

    found = [llama_engine.tokenize(text) for text in texts]

    assert len(found) == 47
    assert found == expected[: len(found)]


def test_the_prompt_has_the_published_ids(llama_engine: LlamaCppEngine) -> None:
    before, after = TEMPLATES['v1']().chunks('What is this?', llama_engine)

    assert before == GOLDEN_PREFIX
    assert after[:2] == [29871, 13]
    assert after[-5:] == [319, 1799, 9047, 13566, 29901]


def test_tokenizer_model_gives_the_published_tokens_scores_and_types(
    llama_model: Path, llama_words: tiny_models.Words
) -> None:
    vocabulary = read_vocabulary(llama_model, 32000)

    assert (vocabulary.tokens, vocabulary.scores, vocabulary.types) == llama_words
    assert (vocabulary.bos, vocabulary.eos, vocabulary.padding, vocabulary.unknown) == (1, 2, 0, 0)
    assert vocabulary.add_bos
    assert not vocabulary.add_eos


def test_tokenizer_json_gives_the_same_tokens_and_types(llama_json: Path, llama_words: tiny_models.Words) -> None:
    vocabulary = read_vocabulary(llama_json, 32000)

    assert (vocabulary.tokens, vocabulary.types) == (llama_words[0], llama_words[2])
    assert (vocabulary.bos, vocabulary.eos, vocabulary.padding, vocabulary.unknown) == (1, 2, 0, 0)


def test_tokenizer_json_is_tokenized_as_by_its_own_library(llama_json: Path, in_llama_cpp: Tokenizer) -> None:
    tokenizers = pytest.importorskip('tokenizers', reason='needs tokenizers as a reference: make venv-dev')
    reference = tokenizers.Tokenizer.from_file(str(llama_json))
    engine = in_llama_cpp(read_vocabulary(llama_json, 32000))
    texts = ['What is   on the table?', ' a', '\n\tÉtude 日本語 🚗', 'x=3.14159; y  -= 2', '▁']

    assert [engine.tokenize(text) for text in texts] == [reference.encode(text).ids for text in texts]


# -- additions and gaps -------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """A small ``tokenizer.model`` of 400-odd tokens."""
    path = tmp_path / 'tokenizer.model'
    path.write_bytes(sentencepiece_model(tiny_models.vocabulary()).SerializeToString())
    return path


N_TINY = len(tiny_models.vocabulary()[0])


def test_ids_without_a_token_are_padded(tiny_model: Path) -> None:
    vocabulary = read_vocabulary(tiny_model, N_TINY + 2)

    assert vocabulary.tokens[N_TINY:] == [f'[PAD{N_TINY}]'.encode(), f'[PAD{N_TINY + 1}]'.encode()]
    assert vocabulary.types[N_TINY:] == [UNUSED, UNUSED]


def test_added_tokens_are_user_defined(tiny_model: Path) -> None:
    (tiny_model.parent / 'added_tokens.json').write_text(json.dumps({'<im_patch>': N_TINY}))

    vocabulary = read_vocabulary(tiny_model, N_TINY + 1)

    assert (vocabulary.tokens[-1], vocabulary.scores[-1], vocabulary.types[-1]) == (
        b'<im_patch>',
        -1000.0,
        USER_DEFINED,
    )


def test_an_added_control_token_is_one_and_the_trained_ones_stay(tiny_model: Path) -> None:
    decoder = {
        '0': {'content': '<unk>', 'special': True},
        '1': {'content': '<s>', 'special': True},
        str(N_TINY): {'content': '<im_start>', 'special': True},
    }
    (tiny_model.parent / 'tokenizer_config.json').write_text(json.dumps({'added_tokens_decoder': decoder}))

    vocabulary = read_vocabulary(tiny_model, N_TINY + 1)

    assert vocabulary.types[:3] == [UNKNOWN, CONTROL, CONTROL]
    assert vocabulary.scores[:3] == [0.0, 0.0, 0.0]
    assert vocabulary.types[-1] == CONTROL


def test_tokenizer_config_says_whether_texts_get_start_and_end(tiny_model: Path) -> None:
    (tiny_model.parent / 'tokenizer_config.json').write_text('{"add_bos_token": false, "add_eos_token": true}')

    vocabulary = read_vocabulary(tiny_model, N_TINY)

    assert not vocabulary.add_bos
    assert vocabulary.add_eos


def test_a_vocabulary_without_a_space_in_front_is_tokenized_so(tiny_model: Path, in_llama_cpp: Tokenizer) -> None:
    model = pb.ModelProto.FromString(tiny_model.read_bytes())
    model.normalizer_spec.add_dummy_prefix = False
    tiny_model.write_bytes(model.SerializeToString())
    vocabulary = read_vocabulary(tiny_model, N_TINY)

    assert in_llama_cpp(vocabulary).tokenize('car') == [vocabulary.tokens.index(b'car')]


# -- byte-level BPE -----------------------------------------------------------------------------------------------


def train_byte_level(folder: Path, pre_tokenizers: Sequence[Any]) -> Any:
    """A small tokenizer of GPT-2's kind in ``folder``; returns the library's tokenizer."""
    tokenizers = pytest.importorskip('tokenizers', reason='needs tokenizers to train one: make venv-dev')
    from tokenizers import models, trainers
    from tokenizers import pre_tokenizers as steps

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = steps.Sequence(pre_tokenizers) if len(pre_tokenizers) > 1 else pre_tokenizers[0]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
        initial_alphabet=steps.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding='utf-8')] * 2, trainer)
    tokenizer.save(str(folder / 'tokenizer.json'))
    (folder / 'tokenizer_config.json').write_text(
        '{"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}'
    )
    return tokenizer


@pytest.mark.parametrize('kind', ['gpt-2', 'smollm'])
def test_byte_level_bpe_is_tokenized_as_by_its_own_library(kind: str, tmp_path: Path, in_llama_cpp: Tokenizer) -> None:
    steps = pytest.importorskip('tokenizers', reason='needs tokenizers to train one: make venv-dev').pre_tokenizers
    byte_level = steps.ByteLevel(add_prefix_space=False, use_regex=True)
    chain = [byte_level] if kind == 'gpt-2' else [steps.Digits(individual_digits=True), byte_level]
    tokenizer = train_byte_level(tmp_path, chain)
    texts = ["What's the red car's  number: 1234?\n\n\tdef é ▁ 日本", 'assert  vocabulary.tokens', ' ', "I'll go 12 34"]

    vocabulary = read_vocabulary(tmp_path / 'tokenizer.json', 500)
    engine = in_llama_cpp(vocabulary)

    assert vocabulary.splitter == kind
    assert (vocabulary.bos, vocabulary.eos, vocabulary.padding) == (1, 2, None)
    assert [engine.tokenize(text) for text in texts] == [tokenizer.encode(text).ids for text in texts]
    assert engine.tokenize('<|im_start|>', special=True) == [1]


# -- what is refused ----------------------------------------------------------------------------------------------


def test_more_tokens_than_the_model_has_are_refused(tiny_model: Path) -> None:
    with pytest.raises(BuildError, match=f'the model has {N_TINY - 1} tokens'):
        read_vocabulary(tiny_model, N_TINY - 1)


@pytest.mark.parametrize('name', ['tokenizer.model', 'tokenizer.json'])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=name):
        read_vocabulary(tmp_path / name, 10)


def changed(path: Path, change: Callable[[Any], None]) -> Path:
    model = pb.ModelProto.FromString(path.read_bytes())
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda model: setattr(model.trainer_spec, 'model_type', model.trainer_spec.UNIGRAM), 'type UNIGRAM'),
        (lambda model: setattr(model.normalizer_spec, 'precompiled_charsmap', b'nfkc'), 'normalizes texts'),
        (lambda model: setattr(model.normalizer_spec, 'remove_extra_whitespaces', True), 'normalizes texts'),
        (lambda model: model.pieces.pop(3 + 10), r'lacks 1 of the 256 byte tokens \(<0x0A>\)'),
        (lambda model: setattr(model.pieces[300], 'piece', model.pieces[301].piece), 'twice'),
        (lambda model: model.ClearField('pieces'), 'no tokens'),
    ],
)
def test_what_llama_cpp_would_not_tokenize_the_same_is_refused(
    change: Callable[[Any], None], message: str, tiny_model: Path
) -> None:
    with pytest.raises(BuildError, match=message):
        read_vocabulary(changed(tiny_model, change), N_TINY)


def json_tokenizer(**changes: Any) -> dict[str, Any]:
    """A small ``tokenizer.json`` with byte fallback."""
    vocab = {'<unk>': 0, '<s>': 1, '</s>': 2, **{f'<0x{i:02X}>': 3 + i for i in range(256)}}
    for text in ('ab', 'abc', 'bc', '▁', 'a', 'b', 'c'):
        vocab[text] = len(vocab)
    model = {
        'type': 'BPE',
        'unk_token': '<unk>',
        'byte_fallback': True,
        'vocab': vocab,
        'merges': [['a', 'b'], ['ab', 'c'], ['a', 'bc'], ['b', 'c']],
    }
    normalizer = {'type': 'Sequence', 'normalizers': [{'type': 'Prepend'}, {'type': 'Replace'}]}
    specials = [{'id': i, 'content': text, 'special': True} for i, text in enumerate(('<unk>', '<s>', '</s>'))]
    return {'model': {**model, **changes}, 'normalizer': normalizer, 'added_tokens': specials}


def test_merges_of_tokenizer_json_become_scores(tmp_path: Path) -> None:
    (tmp_path / 'tokenizer.json').write_text(json.dumps(json_tokenizer()))

    vocabulary = read_vocabulary(tmp_path / 'tokenizer.json', 266)

    scores = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    assert scores[b'ab'] > scores[b'abc'] > scores[b'bc'] > scores['▁'.encode()] > scores[b'a']
    assert vocabulary.types[:5] == [UNKNOWN, CONTROL, CONTROL, BYTE, BYTE]
    assert vocabulary.types[-1] == NORMAL


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('{', 'no JSON'),
        ('[]', 'should hold a mapping'),
        ('[' * 100_000, 'no JSON'),
        ('{}', 'describes no tokenizer'),
        (json.dumps(json_tokenizer(type='Unigram')), "type 'Unigram'"),
        (json.dumps(json_tokenizer(vocab=['a'])), 'expected BPE with a vocabulary'),
        (json.dumps(json_tokenizer(merges=['a b c'])), "the merge 'a b c'"),
        (json.dumps(json_tokenizer(merges=[['a', 1]])), 'expected a pair'),
        (json.dumps(json_tokenizer(vocab={'a': '0'})), "id '0'"),
        (json.dumps(json_tokenizer(vocab={'a': -1})), 'id -1'),
        (json.dumps(json_tokenizer(merges=[['a', 'b'], ['ab', 'c']])), "never merges 'a' and 'bc'"),
        (json.dumps({**json_tokenizer(), 'normalizer': {'type': 'NFKC'}}), 'normalizes texts'),
        (json.dumps(json_tokenizer(byte_fallback=False)), 'cuts texts into words'),
        (json.dumps({**json_tokenizer(), 'added_tokens': [{'id': 9999, 'content': 'x'}]}), 'id 9999'),
        (json.dumps({**json_tokenizer(), 'added_tokens': [{'id': 260}]}), 'expected a text'),
    ],
)
def test_a_malformed_tokenizer_json_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / 'tokenizer.json').write_text(content)

    with pytest.raises(BuildError, match=message):
        read_vocabulary(tmp_path / 'tokenizer.json', 266)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_tokenizer_model_is_a_build_error_or_a_vocabulary(data: st.DataObject, tmp_path: Path) -> None:
    whole = sentencepiece_model(tiny_models.vocabulary()).SerializeToString()
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 8))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / 'tokenizer.model').write_bytes(damaged)

    try:
        vocabulary = read_vocabulary(tmp_path / 'tokenizer.model', N_TINY)
    except BuildError:
        return
    assert len(vocabulary.tokens) == N_TINY
