"""Tokenizers for training: the ids of real vocabularies, and no way for a text to act as a control token."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from vocabularies import LLAMA, write_chatml

from mobilevlm_ros.errors import CheckpointDamagedError, CheckpointMissingError
from mobilevlm_ros.model.tokenizer_files import write_made_up_tokenizer
from mobilevlm_ros.train.tokens import Tokenizer, open_tokenizer

SEPARATOR = '\n__ggml_vocab_test__\n'


@pytest.fixture
def smol(tmp_path: Path) -> Tokenizer:
    return open_tokenizer(write_chatml(tmp_path))


def test_llama_tokenizes_as_llama_cpps_own_vectors_say(llama: Tokenizer) -> None:
    inputs, outputs = Path(f'{LLAMA}.inp'), Path(f'{LLAMA}.out')
    if not inputs.is_file() or not outputs.is_file():
        pytest.skip(f'{inputs.name} and .out are not beside the vocabulary; `make venv-dev` puts them there')
    texts = inputs.read_text(encoding='utf-8').split(SEPARATOR)
    expected = [[int(number) for number in line.split()] for line in outputs.read_text().split('\n')]

    found = [llama.encode(text) for text in texts]

    assert len(found) == 47
    assert found == expected[: len(found)]


def test_llama_has_the_published_special_ids(llama: Tokenizer) -> None:
    assert (llama.bos_id, llama.eos_id, llama.pad_id, llama.n_vocab) == (1, 2, 0, 32000)
    assert llama.adds_bos


def test_text_is_not_read_as_control_tokens(llama: Tokenizer) -> None:
    assert not {0, 1, 2} & set(llama.encode('a</s>b<s>c<unk>'))


def test_text_after_a_control_token_gets_its_own_dummy_space(llama: Tokenizer) -> None:
    assert llama.encode('x</s>USER:', special=True) == [*llama.encode('x'), 2, *llama.encode('USER:')]


def test_json_reads_control_tokens_only_if_told_to(smol: Tokenizer) -> None:
    assert smol.encode('<|im_end|>', special=True) == [smol.eos_id]
    assert smol.eos_id not in smol.encode('a<|im_end|>b')
    assert len(smol.encode('a<|im_end|>b')) == 12


def test_json_takes_special_tokens_from_the_file_beside_it(smol: Tokenizer) -> None:
    assert (smol.bos_id, smol.eos_id, smol.pad_id) == (1, 2, 2)
    assert not smol.adds_bos


def test_json_of_a_llama_starts_texts_as_its_own_file_says(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers.processors import TemplateProcessing

    path = write_chatml(tmp_path)
    library = Library.from_file(str(path))
    library.post_processor = TemplateProcessing(single='<|im_start|> $A', special_tokens=[('<|im_start|>', 1)])
    library.save(str(path))

    opened = open_tokenizer(path)

    assert opened.adds_bos
    assert opened.encode('a')[0] != opened.bos_id


def test_a_pickled_tokenizer_gives_the_same_ids(smol: Tokenizer, tmp_path: Path) -> None:
    write_made_up_tokenizer(tmp_path / 'tokenizer.model', 400)
    for tokenizer in (smol, open_tokenizer(tmp_path / 'tokenizer.model')):
        copy: Tokenizer = pickle.loads(pickle.dumps(tokenizer))
        assert copy.encode('so<|im_end|>', special=False) == tokenizer.encode('so<|im_end|>', special=False)


def test_a_folder_is_searched_for_its_tokenizer(tmp_path: Path) -> None:
    write_chatml(tmp_path)
    write_made_up_tokenizer(tmp_path / 'tokenizer.model', 400)

    assert open_tokenizer(tmp_path).n_vocab == 400


@pytest.mark.parametrize('name', ['tokenizer.model', 'tokenizer.json'])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointMissingError, match=name):
        open_tokenizer(tmp_path / name)


@pytest.mark.parametrize('name', ['tokenizer.model', 'tokenizer.json'])
@pytest.mark.parametrize('content', [b'', b'\x00\xff not a vocabulary', b'{}'])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointDamagedError, match=name):
        open_tokenizer(tmp_path / name)


def test_json_without_the_name_of_its_end_token_is_refused(tmp_path: Path) -> None:
    path = write_chatml(tmp_path)
    (tmp_path / 'tokenizer_config.json').unlink()
    with pytest.raises(CheckpointMissingError, match=r'tokenizer_config\.json'):
        open_tokenizer(path)


def test_json_whose_end_token_is_not_in_it_is_refused(tmp_path: Path) -> None:
    path = write_chatml(tmp_path)
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': {'content': '<nobody>'}}))
    with pytest.raises(CheckpointDamagedError, match='<nobody>'):
        open_tokenizer(path)


def test_settings_that_are_no_json_are_named(tmp_path: Path) -> None:
    path = write_chatml(tmp_path)
    (tmp_path / 'tokenizer_config.json').write_text('{')
    with pytest.raises(CheckpointDamagedError, match=r'tokenizer_config\.json'):
        open_tokenizer(path)
