"""Writing checkpoints: what torch, safetensors and transformers read back, published texts, and interruptions."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, LlamaTokenizer

from mobilevlm_ros.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMissingError,
    CheckpointShapeError,
    DiskSpaceError,
    SettingsError,
)
from mobilevlm_ros.model import publish
from mobilevlm_ros.model.checkpoint import open_checkpoint
from mobilevlm_ros.model.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from mobilevlm_ros.model.layout import expected_tensors
from mobilevlm_ros.model.manifest import read_manifest
from mobilevlm_ros.model.publish import init_random, write_checkpoint
from mobilevlm_ros.model.random_weights import RandomWeights
from mobilevlm_ros.model.side_files import side_files
from mobilevlm_ros.model.tokenizer_files import write_made_up_tokenizer

EMBEDDING = 'model.embed_tokens.weight'
MODEL = tiny_checkpoints.config()


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.model'
    tiny_checkpoints.write_tokenizer(path)
    return path


@pytest.fixture(scope='module')
def tensors() -> dict[str, NDArray[np.float32]]:
    return tiny_checkpoints.random_tensors(MODEL)


# -- what is written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', ['fp16', 'bf16', 'fp32'])
@pytest.mark.parametrize('file_format', ['bin', 'safetensors'])
@pytest.mark.parametrize('max_shard_bytes', [10**10, 100_000])
def test_what_was_written_is_read_back(
    tmp_path: Path, tokenizer: Path, tensors: Any, dtype: Any, file_format: Any, max_shard_bytes: int
) -> None:
    out = write_checkpoint(
        tmp_path / 'out',
        MODEL,
        tensors,
        tokenizer,
        dtype=dtype,
        file_format=file_format,
        max_shard_bytes=max_shard_bytes,
    )

    with open_checkpoint(out) as checkpoint:
        assert checkpoint.config == replace(MODEL, name='out')
        assert (checkpoint.dtype, checkpoint.warnings) == (dtype, ())
        assert checkpoint.tokenizer.read_bytes() == tokenizer.read_bytes()
        for name, values in tensors.items():
            rounded = torch.from_numpy(values).to(tiny_checkpoints.DTYPES[dtype]).float().numpy()
            np.testing.assert_array_equal(checkpoint.tensors[name], rounded)
    shards = [*out.glob('*.bin'), *out.glob('*.safetensors')]
    assert (len(shards) > 1) is (max_shard_bytes == 100_000)
    assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_a_model_with_features_of_several_blocks_is_read_back(tmp_path: Path, tokenizer: Path) -> None:
    assert MODEL.vision is not None
    model = replace(MODEL, vision=replace(MODEL.vision, also_layers=(-4, -3)))
    values = tiny_checkpoints.random_tensors(model)

    out = write_checkpoint(tmp_path / 'out', model, values, tokenizer)

    fields = json.loads((out / 'config.json').read_text())
    assert fields['mm_vision_select_layer'] == [-4, -3, -2]
    assert fields['mm_hidden_size'] == 3 * model.vision.width
    with open_checkpoint(out) as checkpoint:
        assert checkpoint.config == replace(model, name='out')


def test_torch_reads_the_archive_in_each_of_its_ways(tmp_path: Path, tokenizer: Path, tensors: Any) -> None:
    path = write_checkpoint(tmp_path / 'out', MODEL, tensors, tokenizer, dtype='fp32') / 'pytorch_model.bin'

    for options in ({'weights_only': True}, {'weights_only': True, 'mmap': True}, {'weights_only': False}):
        found = torch.load(path, **options)  # type: ignore[arg-type]
        assert list(found) == list(expected_tensors(MODEL))
        assert all(np.array_equal(found[name].numpy(), values) for name, values in tensors.items())
        assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in found.values())
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert {tensor.data_ptr() % 64 for tensor in mapped.values()} == {0}
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # checksums are right, which torch does not look at


def test_the_archive_holds_what_torch_saves(tmp_path: Path, tokenizer: Path, tensors: Any) -> None:
    """The pickle names the same functions and storages as one that torch wrote."""
    import pickletools

    ours = write_checkpoint(tmp_path / 'out', MODEL, tensors, tokenizer) / 'pytorch_model.bin'
    theirs = tmp_path / 'pytorch_model.bin'
    torch.save(torch.load(ours, weights_only=True), theirs)
    named = []
    for path in (ours, theirs):
        with zipfile.ZipFile(path) as archive:
            operations = pickletools.genops(archive.read('pytorch_model/data.pkl'))
            named.append({argument for operation, argument, _ in operations if operation.name == 'GLOBAL'})

    assert named[0] == named[1]


def test_safetensors_reads_the_file(tmp_path: Path, tokenizer: Path, tensors: Any) -> None:
    out = write_checkpoint(tmp_path / 'out', MODEL, tensors, tokenizer, dtype='fp32', file_format='safetensors')
    found = load_file(out / 'model.safetensors')

    assert set(found) == set(tensors)
    assert all(np.array_equal(found[name].numpy(), values) for name, values in tensors.items())


@pytest.mark.parametrize('file_format', ['bin', 'safetensors'])
def test_transformers_reads_a_language_model_alone(tmp_path: Path, tokenizer: Path, file_format: Any) -> None:
    model = tiny_checkpoints.config(None)
    values = tiny_checkpoints.random_tensors(model)
    out = write_checkpoint(
        tmp_path / 'out', model, values, tokenizer, dtype='fp32', file_format=file_format, max_shard_bytes=200_000
    )

    found, report = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    state = found.state_dict()

    assert not report['missing_keys'] and not report['unexpected_keys']
    assert all(np.array_equal(state[name].numpy(), value) for name, value in values.items())
    assert found.config.max_position_embeddings == model.language.n_ctx


def test_a_tower_of_timm_keeps_its_tensors(tmp_path: Path, tokenizer: Path) -> None:
    tower = VisionConfig('tiny/swin', kind='timm', image_size=32, patch_size=4, width=32, stride=16, select_layer=-1)
    model = ModelConfig('m', tiny_checkpoints.LANGUAGE, tower, ProjectorConfig('linear'))
    values = tiny_checkpoints.random_tensors(model)
    own = 'model.vision_tower.vision_tower.stages.0.weight'
    values[own] = np.ones((3, 4), np.float32)

    with open_checkpoint(write_checkpoint(tmp_path / 'out', model, values, tokenizer)) as checkpoint:
        assert checkpoint.config.vision == tower
        np.testing.assert_array_equal(checkpoint.tensors[own], values[own])
        assert 'stages.0.weight' in checkpoint.vision_weights


def test_buffers_are_left_out(tmp_path: Path, tokenizer: Path, tensors: Any) -> None:
    extra = {'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(8, np.float32)}

    with open_checkpoint(write_checkpoint(tmp_path / 'out', MODEL, tensors | extra, tokenizer)) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)


def test_a_tokenizer_json_keeps_its_name(tmp_path: Path, tensors: Any) -> None:
    (tmp_path / 'any.json').write_text('{}')
    out = write_checkpoint(tmp_path / 'out', MODEL, tensors, tmp_path / 'any.json')

    with open_checkpoint(out) as checkpoint:
        assert checkpoint.tokenizer == out / 'tokenizer.json'


class Counting(Mapping[str, NDArray[np.float32]]):
    """Weights that count how often each is asked for."""

    def __init__(self, values: Mapping[str, NDArray[np.float32]]) -> None:
        self.values_ = values
        self.asked: list[str] = []

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        self.asked.append(name)
        return self.values_[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


def test_each_tensor_is_asked_for_once_and_progress_is_told(tmp_path: Path, tokenizer: Path, tensors: Any) -> None:
    counting = Counting(tensors)
    told: list[tuple[int, int]] = []
    write_checkpoint(tmp_path / 'out', MODEL, counting, tokenizer, on_progress=lambda *step: told.append(step))

    assert counting.asked == list(expected_tensors(MODEL))
    total = sum(values.size * 2 for values in tensors.values())
    assert told[0] == (0, total) and told[-1] == (total, total)
    assert told == sorted(told)


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30), limit=st.integers(1, 100))
def test_shards_hold_everything_in_order_below_the_limit(sizes: list[int], limit: int) -> None:
    n_bytes = {str(i): n for i, n in enumerate(sizes)}
    shards = publish._shards(n_bytes, limit)

    assert [name for shard in shards for name in shard] == list(n_bytes)
    assert all(len(shard) == 1 or sum(n_bytes[name] for name in shard) <= limit for shard in shards)
    for first, second in itertools.pairwise(shards):
        assert sum(n_bytes[name] for name in [*first, second[0]]) > limit


# -- published texts and sizes ------------------------------------------------------------------------------------


def test_small_files_are_the_published_ones() -> None:
    """Lengths of the published files of V2-1.7B."""
    files = side_files(read_manifest('mobilevlm_v2-1.7b'), 'bf16')

    assert {name: len(text) for name, text in files.items()} == {
        'config.json': 1155,
        'generation_config.json': 132,
        'special_tokens_map.json': 435,
        'tokenizer_config.json': 824,
    }
    assert hashlib.sha256(files['config.json'].encode()).hexdigest().startswith('0b397a9a0b365958')


@pytest.mark.parametrize(
    ('name', 'dtype', 'length'),
    [('mobilevlm-1.7b', 'bf16', 1123), ('mobilellama-1.4b-base', 'fp16', 633), ('mobilellama-1.4b-chat', 'fp32', 633)],
)
def test_other_configurations_have_the_published_length(name: str, dtype: str, length: int) -> None:
    assert len(side_files(read_manifest(name), dtype)['config.json']) == length


def test_a_first_version_has_no_learning_rate_of_its_projector() -> None:
    configs = [json.loads(side_files(read_manifest(f'mobilevlm{v}-1.7b'), 'bf16')['config.json']) for v in ('', '_v2')]

    assert set(configs[1]) - set(configs[0]) == {'mm_projector_lr'}


@pytest.mark.parametrize(
    ('name', 'dtype', 'gigabytes', 'index_kilobytes'),
    [
        ('mobilevlm-1.7b', 'bf16', [3.37], None),
        ('mobilevlm-3b', 'bf16', [6.07], None),
        ('mobilevlm_v2-1.7b', 'bf16', [3.35], None),
        ('mobilevlm_v2-7b', 'bf16', [9.98, 4.15], 76.2),
        ('mobilellama-2.7b-chat', 'fp32', [9.95, 0.857], 26.8),
    ],
)
def test_files_are_split_as_published(
    name: str, dtype: str, gigabytes: list[float], index_kilobytes: float | None
) -> None:
    config = read_manifest(name)
    shapes = expected_tensors(config)
    n_bytes = {key: int(np.prod(shape)) * publish.BYTES[dtype] for key, shape in shapes.items()}
    shards = publish._shards(n_bytes, publish.MAX_SHARD_BYTES)
    sizes = [sum(n_bytes[key] for key in shard) / 1e9 for shard in shards]

    assert sizes == pytest.approx(gigabytes, abs=0.006)
    if index_kilobytes is not None:
        files = publish._shard_names('bin', len(shards))
        placed = {key: file for file, shard in zip(files, shards, strict=True) for key in shard}
        # The published indices have these sizes with the buffers of old versions of transformers in them.
        buffers = [f'model.layers.{i}.self_attn.rotary_emb.inv_freq' for i in range(config.language.n_layers)]
        text = publish._index(placed | dict.fromkeys(buffers, files[0]), sum(n_bytes.values()))
        assert len(text) / 1000 == pytest.approx(index_kilobytes, abs=0.05)


# -- random checkpoints -------------------------------------------------------------------------------------------


def test_a_random_checkpoint_is_whole(tmp_path: Path) -> None:
    out = init_random(MODEL, tmp_path / 'out', dtype='fp32')

    with open_checkpoint(out, kind='vlm') as checkpoint:
        weights = checkpoint.tensors
        assert (weights['model.norm.weight'] == 1).all()
        assert (weights['model.mm_projector.mlp.mlp.0.bias'] == 0).all()
        assert weights[EMBEDDING].std() == pytest.approx(0.02, rel=0.05)
        assert abs(weights[EMBEDDING].mean()) < 0.001
    assert json.loads((out / 'config.json').read_text())['_name_or_path'] == 'tiny-random'
    assert LlamaTokenizer.from_pretrained(out).bos_token_id == 1


def test_a_published_name_stands_for_its_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, 'read_manifest', lambda name: {'mobilevlm_v2-1.7b': MODEL}[name])

    with open_checkpoint(init_random('mobilevlm_v2-1.7b', tmp_path / 'out')) as checkpoint:
        assert (checkpoint.config.language, checkpoint.dtype) == (MODEL.language, 'bf16')


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match='mobilevlm-9b'):
        init_random('mobilevlm-9b', tmp_path / 'out')


def test_random_weights_follow_the_seed() -> None:
    first, again, other = (RandomWeights(MODEL, seed)[EMBEDDING] for seed in (1, 1, 2))

    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
    assert (RandomWeights(MODEL, 1)['lm_head.weight'] != first).all()


def test_random_weights_of_a_timm_tower_are_refused(tmp_path: Path) -> None:
    tower = VisionConfig('swin', kind='timm', select_layer=-1)

    with pytest.raises(CheckpointError, match='tower of timm'):
        init_random(ModelConfig('m', LanguageConfig(), tower, ProjectorConfig('linear')), tmp_path / 'out')


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=['Cs', 'Cc'], exclude_characters='▁'), max_size=60))
def test_text_comes_back_from_a_made_up_tokenizer(made_up: Any, text: str) -> None:
    ids = made_up.encode(text)

    assert made_up.decode(ids) == text
    assert all(0 <= i < 32000 for i in ids)


@pytest.fixture(scope='module')
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from sentencepiece import SentencePieceProcessor

    path = tmp_path_factory.mktemp('made-up') / 'tokenizer.model'
    write_made_up_tokenizer(path, 32000)
    return SentencePieceProcessor(model_file=str(path))


def test_a_made_up_tokenizer_has_llamas_form(made_up: Any) -> None:
    assert made_up.vocab_size() == 32000
    assert [made_up.id_to_piece(i) for i in (0, 1, 2, 3, 13)] == ['<unk>', '<s>', '</s>', '<0x00>', '<0x0A>']
    assert len({made_up.id_to_piece(i) for i in range(32000)}) == 32000
    assert made_up.encode('\n')[-1] == 13
    assert len(made_up.encode('the quick brown fox')) < 12


@pytest.mark.parametrize('n_vocab', [260, 355, 400])
def test_a_made_up_tokenizer_may_be_small(tmp_path: Path, n_vocab: int) -> None:
    from sentencepiece import SentencePieceProcessor

    write_made_up_tokenizer(tmp_path / 't.model', n_vocab)
    tokenizer = SentencePieceProcessor(model_file=str(tmp_path / 't.model'))

    assert tokenizer.vocab_size() == n_vocab
    assert tokenizer.decode(tokenizer.encode('Is it ü?')) == 'Is it ü?'


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match='at least 260 pieces, found 259'):
        write_made_up_tokenizer(tmp_path / 't.model', 259)


# -- what goes wrong ----------------------------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_named(tmp_path: Path, tokenizer: Path, tensors: Any) -> None:
    out = tmp_path / 'out'
    missing = {name: values for name, values in tensors.items() if name != EMBEDDING}
    with pytest.raises(CheckpointShapeError, match=rf'{EMBEDDING} .* is missing'):
        write_checkpoint(out, MODEL, missing, tokenizer)
    with pytest.raises(CheckpointShapeError, match='surplus is no tensor of tiny'):
        write_checkpoint(out, MODEL, {**tensors, 'surplus': np.ones(1, np.float32)}, tokenizer)
    with pytest.raises(CheckpointShapeError, match=rf'{EMBEDDING} has shape \[1\], expected'):
        write_checkpoint(out, MODEL, {**tensors, EMBEDDING: np.ones(1, np.float32)}, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_values_too_large_for_fp16_are_named(tmp_path: Path, tokenizer: Path, tensors: Any) -> None:
    large = {**tensors, 'model.norm.weight': np.full(64, 1e5, np.float32)}

    with pytest.raises(CheckpointError, match=r'model.norm.weight has values up to 1e\+05, too large for fp16'):
        write_checkpoint(tmp_path / 'out', MODEL, large, tokenizer, dtype='fp16')
    write_checkpoint(tmp_path / 'out', MODEL, large, tokenizer, dtype='bf16')


def test_a_place_that_is_taken_is_left_alone(tmp_path: Path, tokenizer: Path, tensors: Any) -> None:
    (tmp_path / 'out').mkdir()
    write_checkpoint(tmp_path / 'out', MODEL, tensors, tokenizer)  # an empty folder is no loss
    before = (tmp_path / 'out' / 'pytorch_model.bin').stat()

    with pytest.raises(CheckpointError, match='exists already'):
        write_checkpoint(tmp_path / 'out', MODEL, tensors, tokenizer)
    with pytest.raises(CheckpointError, match='exists already'):
        write_checkpoint(tokenizer, MODEL, tensors, tokenizer)
    assert (tmp_path / 'out' / 'pytorch_model.bin').stat() == before


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, tokenizer: Path, tensors: Any) -> None:
    (tmp_path / 'file').write_text('')

    with pytest.raises(CheckpointError, match=r'file/out cannot be written'):
        write_checkpoint(tmp_path / 'file' / 'out', MODEL, tensors, tokenizer)


def test_room_is_checked_before_anything_is_made(
    tmp_path: Path, tensors: Any, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=5 << 20))
    counting = Counting(tensors)

    with pytest.raises(DiskSpaceError, match=r'takes \d+ MiB, but .* has 5 MiB free'):
        write_checkpoint(tmp_path / 'out', MODEL, counting, tokenizer)
    assert counting.asked == []
    assert list(tmp_path.iterdir()) == []


class Failing(Counting):
    """Weights that raise after a few."""

    def __init__(self, values: Mapping[str, NDArray[np.float32]], error: BaseException) -> None:
        super().__init__(values)
        self.error = error

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if len(self.asked) == 5:
            raise self.error
        return super().__getitem__(name)


@pytest.mark.parametrize('file_format', ['bin', 'safetensors'])
@pytest.mark.parametrize(
    ('error', 'seen'),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (CheckpointDamagedError('damaged'), CheckpointDamagedError),
        (OSError(errno.ENOSPC, 'No space left on device'), DiskSpaceError),
        (OSError(errno.EIO, 'Input/output error'), CheckpointError),
    ],
)
def test_an_interruption_leaves_nothing(
    tmp_path: Path, tokenizer: Path, tensors: Any, file_format: Any, error: BaseException, seen: type[BaseException]
) -> None:
    with pytest.raises(seen):
        write_checkpoint(tmp_path / 'out', MODEL, Failing(tensors, error), tokenizer, file_format=file_format)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_no_hindrance(tmp_path: Path, tokenizer: Path, tensors: Any) -> None:
    (tmp_path / 'out.partial').mkdir()
    (tmp_path / 'out.partial' / 'pytorch_model.bin').write_bytes(b'half')
    write_checkpoint(tmp_path / 'out', MODEL, tensors, tokenizer, file_format='safetensors')

    assert not (tmp_path / 'out' / 'pytorch_model.bin').exists()
    assert not (tmp_path / 'out.partial').exists()


def test_a_tokenizer_that_does_not_fit_is_named(tmp_path: Path, tensors: Any) -> None:
    (tmp_path / 'bad.model').write_bytes(b'no model')
    write_made_up_tokenizer(tmp_path / 'large.model', 32000)

    with pytest.raises(CheckpointMissingError, match='no tokenizer'):
        write_checkpoint(tmp_path / 'out', MODEL, tensors, tmp_path / 'nowhere.model')
    with pytest.raises(CheckpointDamagedError, match='no SentencePiece model'):
        write_checkpoint(tmp_path / 'out', MODEL, tensors, tmp_path / 'bad.model')
    with pytest.raises(CheckpointError, match=f'32000 pieces, but the model has {MODEL.language.n_vocab} embeddings'):
        write_checkpoint(tmp_path / 'out', MODEL, tensors, tmp_path / 'large.model')
