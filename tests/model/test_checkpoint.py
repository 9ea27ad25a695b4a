"""Reading published checkpoints: every layout and type, where the tower comes from, and what is wrong is named."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mobilevlm_ros.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointKindError,
    CheckpointMissingError,
    CheckpointShapeError,
)
from mobilevlm_ros.model.checkpoint import Checkpoint, open_checkpoint, open_parts
from mobilevlm_ros.model.config import LanguageConfig, ModelConfig, ProjectorConfig
from mobilevlm_ros.model.layout import PROJECTOR_PREFIX, TOWER_PREFIX, expected_tensors
from mobilevlm_ros.model.mobilevlm import load_mobilevlm

EMBEDDING = 'model.embed_tokens.weight'
CLASS_TOKEN = 'vision_model.embeddings.class_embedding'


def rewrite(folder: Path, change: Any) -> None:
    """Load the single ``.bin`` of a folder, change the dictionary, and write it again."""
    path = folder / 'pytorch_model.bin'
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


def read_all(checkpoint: Checkpoint) -> dict[str, np.ndarray[Any, Any]]:
    with checkpoint:
        return {name: checkpoint.tensors[name] for name in checkpoint.tensors}


# -- what is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('layout', tiny_checkpoints.LAYOUTS)
@pytest.mark.parametrize('dtype', ['fp16', 'bf16', 'fp32'])
def test_every_layout_and_type_is_read_to_the_bit(tmp_path: Path, layout: str, dtype: str) -> None:
    written = tiny_checkpoints.write(tmp_path, layout=layout, dtype=dtype)

    checkpoint = open_checkpoint(tmp_path)
    found = read_all(checkpoint)

    assert list(found) == list(expected_tensors(tiny_checkpoints.config()))
    for name, values in written.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], values)
    assert (checkpoint.kind, checkpoint.dtype, checkpoint.warnings) == ('vlm', dtype, ())
    assert checkpoint.tokenizer == tmp_path / 'tokenizer.model'
    assert checkpoint.config == replace(tiny_checkpoints.config(), name=tmp_path.name)


@pytest.mark.parametrize('projector', ['linear', 'mlp2x_gelu', 'mlp3x_gelu', 'ldpnet', 'ldpnetv2', 'pw2_dw3_dws1'])
def test_every_projector_is_read(tmp_path: Path, projector: str) -> None:
    model = tiny_checkpoints.config(projector)
    written = tiny_checkpoints.write(tmp_path, model)

    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config.projector == model.projector
        assert set(checkpoint.tensors) == set(written)
        assert {name for name in checkpoint.vision_weights if name.startswith(PROJECTOR_PREFIX)} == {
            name for name in written if name.startswith(PROJECTOR_PREFIX)
        }


def test_the_parts_have_the_names_that_their_engines_know(tmp_path: Path) -> None:
    written = tiny_checkpoints.write(tmp_path)

    with open_checkpoint(tmp_path) as checkpoint:
        vision, language = checkpoint.vision_weights, checkpoint.language_weights
        assert set(vision) | set(language) == {name.removeprefix(TOWER_PREFIX) for name in written}
        assert all(name.startswith(('vision_model.', PROJECTOR_PREFIX)) for name in vision)
        assert language.shape(EMBEDDING) == written[EMBEDDING].shape
        np.testing.assert_array_equal(vision[CLASS_TOKEN], written[TOWER_PREFIX + CLASS_TOKEN])
        np.testing.assert_array_equal(language[EMBEDDING], written[EMBEDDING])


def test_a_language_model_alone_has_no_vision(tmp_path: Path) -> None:
    tiny_checkpoints.write(tmp_path, tiny_checkpoints.config(None))

    with open_checkpoint(tmp_path, kind='llm') as checkpoint:
        assert checkpoint.kind == 'llm'
        assert len(checkpoint.vision_weights) == 0
        assert set(checkpoint.language_weights) == set(checkpoint.tensors)


def test_types_may_be_mixed(tmp_path: Path) -> None:
    tiny_checkpoints.write(tmp_path, dtype='fp16')
    rewrite(tmp_path, lambda tensors: tensors.update({'model.norm.weight': torch.full((64,), 1.0 + 2.0**-20)}))

    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.dtype == 'fp16'
        assert checkpoint.tensors['model.norm.weight'][0] == np.float32(1.0 + 2.0**-20)


def test_tensors_that_carry_attributes_are_read(tmp_path: Path) -> None:
    """MobileLLaMA-Chat's pickle names torch.Tensor and _rebuild_from_type_v2, as parameters with attributes do."""
    written = tiny_checkpoints.write(tmp_path, tiny_checkpoints.config(None), dtype='fp32')

    def decorate(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EMBEDDING].origin = 'trained'  # type: ignore[attr-defined]
        tensors['lm_head.weight'] = torch.nn.Parameter(tensors['lm_head.weight'])
        tensors['model.norm.weight'] = torch.nn.Parameter(tensors['model.norm.weight'])
        tensors['model.norm.weight'].origin = ['a', 1]  # type: ignore[attr-defined]

    rewrite(tmp_path, decorate)
    with zipfile.ZipFile(tmp_path / 'pytorch_model.bin') as archive:
        assert b'_rebuild_from_type_v2' in archive.read('pytorch_model/data.pkl')
    found = read_all(open_checkpoint(tmp_path))

    for name in (EMBEDDING, 'lm_head.weight', 'model.norm.weight'):
        np.testing.assert_array_equal(found[name], written[name])


def test_views_into_one_storage_are_read(tmp_path: Path) -> None:
    written = tiny_checkpoints.write(tmp_path, dtype='fp32')
    name = 'model.layers.0.self_attn.q_proj.weight'
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.from_numpy(written[name].T.copy()).t()}))

    np.testing.assert_array_equal(read_all(open_checkpoint(tmp_path))[name], written[name])


def test_buffers_of_old_versions_are_ignored(tmp_path: Path) -> None:
    tiny_checkpoints.write(tmp_path)
    old = {
        'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(8),
        f'{TOWER_PREFIX}vision_model.embeddings.position_ids': torch.arange(17)[None],
    }
    rewrite(tmp_path, lambda tensors: tensors.update(old))

    with open_checkpoint(tmp_path) as checkpoint:
        assert not set(old) & set(checkpoint.tensors)
        assert checkpoint.warnings == ()


def test_unknown_tensors_are_mentioned(tmp_path: Path) -> None:
    tiny_checkpoints.write(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({f'extra.{i}': torch.ones(1) for i in range(5)}))

    with open_checkpoint(tmp_path) as checkpoint:
        assert 'extra.0' not in checkpoint.tensors
        (warning,) = checkpoint.warnings
        assert 'extra.0, extra.1, extra.2 and 2 more' in warning


def test_tied_embeddings_need_no_output_matrix(tmp_path: Path) -> None:
    model = tiny_checkpoints.config(None, replace(tiny_checkpoints.LANGUAGE, tie_embeddings=True))
    tiny_checkpoints.write(tmp_path, model)
    rewrite(tmp_path, lambda tensors: tensors.update({'lm_head.weight': tensors[EMBEDDING]}))

    with open_checkpoint(tmp_path) as checkpoint:
        assert 'lm_head.weight' not in checkpoint.language_weights
        assert checkpoint.config.language.tie_embeddings
        assert checkpoint.warnings == ()


def test_files_may_be_links(tmp_path: Path) -> None:
    written = tiny_checkpoints.write(tmp_path / 'blobs', layout='bin-shards')
    (tmp_path / 'linked').mkdir()
    for path in (tmp_path / 'blobs').iterdir():
        (tmp_path / 'linked' / path.name).symlink_to(Path('..') / 'blobs' / path.name)

    assert set(read_all(open_checkpoint(tmp_path / 'linked'))) == set(written)


def test_a_tokenizer_of_the_newer_kind_will_do(tmp_path: Path) -> None:
    tiny_checkpoints.write(tmp_path)
    (tmp_path / 'tokenizer.model').rename(tmp_path / 'tokenizer.json')

    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tokenizer.name == 'tokenizer.json'


def test_what_was_read_is_the_readers_own(tmp_path: Path) -> None:
    tiny_checkpoints.write(tmp_path, dtype='fp32')

    with open_checkpoint(tmp_path) as checkpoint:
        first = checkpoint.tensors[EMBEDDING]
        first += 1
        assert (checkpoint.tensors[EMBEDDING] != first).all()


def test_a_closed_checkpoint_says_so(tmp_path: Path) -> None:
    tiny_checkpoints.write(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        weights = checkpoint.language_weights

    with pytest.raises(CheckpointError, match='closed'):
        _ = weights[EMBEDDING]


def _anonymous_kib() -> int:
    status = Path('/proc/self/status').read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith('RssAnon'))


@pytest.mark.parametrize('layout', ['bin', 'safetensors'])
def test_memory_holds_one_tensor(tmp_path: Path, layout: str) -> None:
    """40 MiB in fp16; the largest tensor takes 8 MiB as float32."""
    sizes = LanguageConfig(n_vocab=2048, n_embd=1024, n_layers=3, n_heads=8, n_kv_heads=8, n_ff=512)
    model = tiny_checkpoints.config(None, sizes)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in expected_tensors(model).items()}
    tiny_checkpoints.write(tmp_path, model, tensors=zeros, dtype='fp16', layout=layout)
    size_kib = sum(values.nbytes for values in zeros.values()) >> 10
    del zeros
    before = _anonymous_kib()

    with open_checkpoint(tmp_path) as checkpoint:
        opened = _anonymous_kib()
        largest = 0
        for name in checkpoint.tensors:
            values = checkpoint.tensors[name]
            values.sum()
            largest = max(largest, _anonymous_kib())

    assert size_kib > 80_000
    assert opened - before < 4_000
    assert largest - before < 30_000


@pytest.mark.parametrize('projector', ['ldpnet', 'ldpnetv2'])
@pytest.mark.parametrize('layout', ['bin', 'safetensors-shards'])
def test_the_model_in_pytorch_takes_a_checkpoint_as_it_is(tmp_path: Path, projector: str, layout: str) -> None:
    written = tiny_checkpoints.write(tmp_path, tiny_checkpoints.config(projector), layout=layout)
    with open_checkpoint(tmp_path) as checkpoint:
        model = load_mobilevlm(checkpoint.config, checkpoint.tensors)

    assert sum(p.numel() for p in model.parameters()) == sum(values.size for values in written.values())
    with torch.no_grad():
        features = model.encode_images(torch.zeros(1, 3, 32, 32))
    assert features.shape == (1, 4, 64) and bool(features.isfinite().all())


# -- where the tower comes from -----------------------------------------------------------------------------------


@pytest.mark.parametrize('projector', ['ldpnet', 'mlp2x_gelu', 'linear'])
def test_a_first_version_takes_the_tower_from_a_given_clip(tmp_path: Path, projector: str) -> None:
    tiny_checkpoints.write(tmp_path / 'vlm', tiny_checkpoints.config(projector), dtype='fp32')
    tower = tiny_checkpoints.write_clip(tmp_path / 'clip')

    with open_checkpoint(tmp_path / 'vlm', vision_tower=tmp_path / 'clip') as checkpoint:
        np.testing.assert_array_equal(checkpoint.vision_weights[CLASS_TOKEN], tower[CLASS_TOKEN])
        assert checkpoint.config.vision == tiny_checkpoints.VISION
        assert checkpoint.warnings == ()


def test_a_second_version_keeps_its_own_tower(tmp_path: Path) -> None:
    written = tiny_checkpoints.write(tmp_path / 'vlm', dtype='fp32')
    tiny_checkpoints.write_clip(tmp_path / 'clip')

    with open_checkpoint(tmp_path / 'vlm', vision_tower=tmp_path / 'clip') as checkpoint:
        own = written[TOWER_PREFIX + CLASS_TOKEN]
        np.testing.assert_array_equal(checkpoint.vision_weights[CLASS_TOKEN], own)
        assert 'is not used' in checkpoint.warnings[0]


def _without_tower(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.startswith(TOWER_PREFIX)]:
        del tensors[name]


@pytest.mark.parametrize('projector', ['mlp2x_gelu', 'ldpnetv2'])
def test_weights_without_a_tower_need_a_clip(tmp_path: Path, projector: str) -> None:
    tiny_checkpoints.write(tmp_path / 'vlm', tiny_checkpoints.config(projector), model_type='llava')
    tower = tiny_checkpoints.write_clip(tmp_path / 'clip')
    rewrite(tmp_path / 'vlm', _without_tower)

    with pytest.raises(CheckpointMissingError, match='no vision tower: give the folder of tiny/clip'):
        open_checkpoint(tmp_path / 'vlm')
    with open_checkpoint(tmp_path / 'vlm', vision_tower=tmp_path / 'clip') as checkpoint:
        np.testing.assert_array_equal(checkpoint.vision_weights[CLASS_TOKEN], tower[CLASS_TOKEN])


def test_a_clip_of_other_shapes_is_followed(tmp_path: Path) -> None:
    """The folder says what the tower is, so the name in config.json need not be known."""
    tiny_checkpoints.write(tmp_path / 'vlm', tiny_checkpoints.config('linear'), mm_vision_config=None)
    tiny_checkpoints.write_clip(tmp_path / 'clip')

    with pytest.raises(CheckpointError, match="'tiny/clip', whose shapes are not known"):
        open_checkpoint(tmp_path / 'vlm')
    with open_checkpoint(tmp_path / 'vlm', vision_tower=tmp_path / 'clip') as checkpoint:
        assert checkpoint.config.vision is not None
        assert checkpoint.config.vision.width == 32


@pytest.mark.parametrize('name', ['mm_projector.bin', 'mm_projector.safetensors'])
def test_parts_are_put_together(tmp_path: Path, name: str) -> None:
    model = tiny_checkpoints.config('ldpnet')
    language = tiny_checkpoints.write(tmp_path / 'llm', tiny_checkpoints.config(None), dtype='fp32')
    tower = tiny_checkpoints.write_clip(tmp_path / 'clip')
    projector = tiny_checkpoints.write_projector(tmp_path / name, model)

    with open_parts(tmp_path / 'llm', tmp_path / 'clip', tmp_path / name, model) as checkpoint:
        expected = language | {TOWER_PREFIX + key: value for key, value in tower.items()} | projector
        assert checkpoint.kind == 'vlm'
        assert set(checkpoint.tensors) == set(expected)
        for key, values in expected.items():
            np.testing.assert_array_equal(checkpoint.tensors[key], values)


def test_a_projector_may_carry_a_trainers_prefix(tmp_path: Path) -> None:
    model = tiny_checkpoints.config('linear')
    tiny_checkpoints.write(tmp_path / 'llm', tiny_checkpoints.config(None))
    tiny_checkpoints.write_clip(tmp_path / 'clip')
    names = {'base_model.model.mm_projector.weight': (64, 32), 'base_model.model.mm_projector.bias': (64,)}
    tiny_checkpoints.write_file(tmp_path / 'p.bin', {name: torch.ones(shape) for name, shape in names.items()})

    with open_parts(tmp_path / 'llm', tmp_path / 'clip', tmp_path / 'p.bin', model) as checkpoint:
        assert (checkpoint.vision_weights['model.mm_projector.weight'] == 1).all()


def test_parts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = tiny_checkpoints.config('ldpnet')
    llm, clip, projector = tmp_path / 'llm', tmp_path / 'clip', tmp_path / 'p.bin'
    tiny_checkpoints.write(llm, tiny_checkpoints.config(None))
    tiny_checkpoints.write(tmp_path / 'vlm')
    tiny_checkpoints.write_clip(clip)
    tiny_checkpoints.write_projector(projector, tiny_checkpoints.config('linear'))

    with pytest.raises(CheckpointShapeError, match=r'mlp\.1\.weight \[64, 32\] is missing'):
        open_parts(llm, clip, projector, model)
    with pytest.raises(CheckpointKindError, match='is a vision-language model'):
        open_parts(tmp_path / 'vlm', clip, projector, model)
    with pytest.raises(CheckpointKindError, match='expected a CLIP'):
        open_parts(llm, llm, projector, model)
    with pytest.raises(CheckpointKindError, match=r'no tensors called \*mm_projector'):
        open_parts(llm, clip, llm / 'pytorch_model.bin', model)
    with pytest.raises(CheckpointMissingError, match=r'nothing.bin'):
        open_parts(llm, clip, tmp_path / 'nothing.bin', model)
    with pytest.raises(CheckpointKindError, match='has no parts'):
        open_parts(llm, clip, projector, tiny_checkpoints.config(None))
    other = ModelConfig('m', replace(model.language, n_layers=3), model.vision, model.projector)
    with pytest.raises(CheckpointShapeError, match='n_layers=2'):
        open_parts(llm, clip, projector, other)
    assert model.vision is not None
    other = ModelConfig('m', model.language, replace(model.vision, n_blocks=4), model.projector)
    with pytest.raises(CheckpointShapeError, match='n_blocks=3'):
        open_parts(llm, clip, projector, other)


# -- the wrong thing ----------------------------------------------------------------------------------------------


def test_the_wrong_kind_is_named(tmp_path: Path) -> None:
    tiny_checkpoints.write(tmp_path / 'llm', tiny_checkpoints.config(None))
    tiny_checkpoints.write(tmp_path / 'vlm')

    with pytest.raises(CheckpointKindError, match=r'language model alone .*expected a vision-language model'):
        open_checkpoint(tmp_path / 'llm', kind='vlm')
    with pytest.raises(CheckpointKindError, match='vision-language model; expected a language model alone'):
        open_checkpoint(tmp_path / 'vlm', kind='llm')


def test_weights_of_a_language_model_under_a_vlms_config_are_named(tmp_path: Path) -> None:
    language = tiny_checkpoints.random_tensors(tiny_checkpoints.config(None))
    tiny_checkpoints.write(tmp_path, tensors=language)

    with pytest.raises(CheckpointKindError, match='have no projector'):
        open_checkpoint(tmp_path)


def test_an_adapter_is_named(tmp_path: Path) -> None:
    (tmp_path / 'adapter_config.json').write_text('{}')

    with pytest.raises(CheckpointKindError, match='LoRA adapter'):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ('gone', 'expected'),
    [
        ('config.json', 'there is no .*config.json'),
        ('pytorch_model.bin', 'no weights in .*model.safetensors, model.safetensors.index.json'),
        ('tokenizer.model', 'neither tokenizer.model nor tokenizer.json'),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, gone: str, expected: str) -> None:
    tiny_checkpoints.write(tmp_path)
    (tmp_path / gone).unlink()

    with pytest.raises(CheckpointMissingError, match=expected):
        open_checkpoint(tmp_path)


def test_a_folder_is_wanted(tmp_path: Path) -> None:
    tiny_checkpoints.write(tmp_path)

    with pytest.raises(CheckpointMissingError, match=r'no folder .*mobilevlm fetch'):
        open_checkpoint(tmp_path / 'nowhere')
    with pytest.raises(CheckpointMissingError, match='is a file: give the folder'):
        open_checkpoint(tmp_path / 'pytorch_model.bin')


@pytest.mark.parametrize('layout', tiny_checkpoints.LAYOUTS)
def test_missing_and_misshapen_tensors_are_named_with_their_file(tmp_path: Path, layout: str) -> None:
    tensors = tiny_checkpoints.random_tensors(tiny_checkpoints.config())
    del tensors['model.norm.weight']
    tiny_checkpoints.write(tmp_path / 'missing', tensors=tensors, layout=layout)
    tensors = tiny_checkpoints.random_tensors(tiny_checkpoints.config())
    tensors['lm_head.weight'] = tensors['lm_head.weight'][:-1]
    tiny_checkpoints.write(tmp_path / 'misshapen', tensors=tensors, layout=layout)
    n_vocab = tiny_checkpoints.LANGUAGE.n_vocab

    with pytest.raises(CheckpointShapeError, match=rf'model.norm.weight \[64\] is missing from {tmp_path}/missing/'):
        open_checkpoint(tmp_path / 'missing')
    with pytest.raises(
        CheckpointShapeError,
        match=rf'lm_head.weight in {tmp_path}/misshapen/.* has shape \[{n_vocab - 1}, 64\], expected \[{n_vocab}, 64\]',
    ):
        open_checkpoint(tmp_path / 'misshapen')


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.safetensors'])
def test_a_tensor_of_another_type_is_named(tmp_path: Path, name: str) -> None:
    tiny_checkpoints.write(tmp_path)
    tensors = torch.load(tmp_path / 'pytorch_model.bin', weights_only=True)
    tensors[EMBEDDING] = tensors[EMBEDDING].to(torch.int8)
    (tmp_path / 'pytorch_model.bin').unlink()
    tiny_checkpoints.write_file(tmp_path / name, tensors)

    with pytest.raises(CheckpointShapeError, match=rf'{EMBEDDING} in .*{name} is of type \w+, expected fp16'):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize('layout', ['bin', 'safetensors'])
@pytest.mark.parametrize('kept', [0, 1, 7, 100, 0.3, 0.9, -1])
def test_a_truncated_file_is_named(tmp_path: Path, layout: str, kept: float) -> None:
    tiny_checkpoints.write(tmp_path, layout=layout)
    (path,) = [*tmp_path.glob('*.bin'), *tmp_path.glob('*.safetensors')]
    size = path.stat().st_size
    os.truncate(path, int(kept * size) if isinstance(kept, float) else kept % size)

    with pytest.raises(CheckpointDamagedError, match=path.name):
        open_checkpoint(tmp_path)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    tiny_checkpoints.write(tmp_path, layout='bin-shards')
    path = tmp_path / 'pytorch_model-00002-of-00002.bin'
    os.truncate(path, path.stat().st_size // 2)

    with pytest.raises(CheckpointDamagedError, match=r'pytorch_model-00002-of-00002.bin is truncated'):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize('layout', ['bin', 'safetensors'])
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, layout: str) -> None:
    tiny_checkpoints.write(tmp_path, layout=layout)
    (path,) = [*tmp_path.glob('*.bin'), *tmp_path.glob('*.safetensors')]
    path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:cd16\nsize 3348457261\n')

    with pytest.raises(CheckpointDamagedError, match='git lfs pull'):
        open_checkpoint(tmp_path)


def test_torchs_old_format_is_named_with_the_way_out(tmp_path: Path) -> None:
    tiny_checkpoints.write(tmp_path)
    path = tmp_path / 'pytorch_model.bin'
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)

    with pytest.raises(CheckpointDamagedError, match='rewrite it: python3 -c'):
        open_checkpoint(tmp_path)


class _Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    tiny_checkpoints.write(tmp_path)
    victim = tmp_path / 'touched'
    rewrite(tmp_path, lambda tensors: tensors.update({EMBEDDING: _Attack(victim)}))

    with pytest.raises(CheckpointDamagedError, match='holds more than tensors'):
        open_checkpoint(tmp_path)
    assert not victim.exists()
    assert pickle.loads(pickle.dumps(_Attack(victim))) is None  # the attack is one: unpickling it runs it
    assert victim.exists()


@pytest.mark.parametrize('value', [[torch.ones(2)], {'a': 'text'}, {3: torch.ones(2)}, {'a': {'b': torch.ones(1)}}])
def test_a_file_of_something_else_is_refused(tmp_path: Path, value: Any) -> None:
    tiny_checkpoints.write(tmp_path)
    torch.save(value, tmp_path / 'pytorch_model.bin')

    with pytest.raises(CheckpointDamagedError, match='holds'):
        open_checkpoint(tmp_path)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    """Mapped into memory its tensors would be read as they lie there: compressed."""
    tiny_checkpoints.write(tmp_path)
    path = tmp_path / 'pytorch_model.bin'
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)

    with pytest.raises(CheckpointDamagedError, match='is compressed'):
        open_checkpoint(tmp_path)


# -- the index of shards ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('elsewhere', ['../outside.bin', '/etc/passwd', 'sub/shard.bin', '..', '', 'x.txt', 3, None])
def test_an_index_cannot_leave_its_folder(tmp_path: Path, elsewhere: Any) -> None:
    tiny_checkpoints.write(tmp_path / 'in', layout='bin-shards')
    shutil.copy(tmp_path / 'in' / 'pytorch_model-00001-of-00002.bin', tmp_path / 'outside.bin')
    index = tmp_path / 'in' / 'pytorch_model.bin.index.json'
    described = json.loads(index.read_text())
    described['weight_map'][EMBEDDING] = elsewhere
    index.write_text(json.dumps(described))

    with pytest.raises(CheckpointDamagedError, match=r'expected the plain name of a .bin or .safetensors file'):
        open_checkpoint(tmp_path / 'in')


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map', '\xff'])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    tiny_checkpoints.write(tmp_path, layout='safetensors-shards')
    index = tmp_path / 'model.safetensors.index.json'
    index.write_bytes(text.encode('latin-1'))

    with pytest.raises(CheckpointDamagedError, match=r'model.safetensors.index.json'):
        open_checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tiny_checkpoints.write(tmp_path, layout='bin-shards')
    (tmp_path / 'pytorch_model-00002-of-00002.bin').unlink()

    with pytest.raises(CheckpointMissingError, match=r'pytorch_model-00002-of-00002.bin is missing'):
        open_checkpoint(tmp_path)


def test_a_shard_that_lacks_what_the_index_says_is_named(tmp_path: Path) -> None:
    tiny_checkpoints.write(tmp_path, layout='bin-shards')
    path = tmp_path / 'pytorch_model-00002-of-00002.bin'
    tensors = torch.load(path, weights_only=True)
    del tensors['lm_head.weight']
    torch.save(tensors, path)

    with pytest.raises(CheckpointShapeError, match=rf'{path.name} lacks lm_head.weight, which'):
        open_checkpoint(tmp_path)


# -- the configuration --------------------------------------------------------------------------------------------


def test_the_stray_fields_of_the_3b_models_are_not_believed(tmp_path: Path) -> None:
    stray = {
        '_mlp_class': 'LLaMAMLP',
        'block_size': 1024,
        'n_embd': 32,
        'n_head': 2,
        'n_layer': 1,
        'n_query_groups': 2,
        'norm_eps': 1e-3,
        'padded_vocab_size': 7,
        'rope_base': 5,
    }
    tiny_checkpoints.write(tmp_path, **stray)

    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config.language == tiny_checkpoints.LANGUAGE


def test_a_config_without_a_projector_type_means_a_linear_one(tmp_path: Path) -> None:
    tiny_checkpoints.write(tmp_path, tiny_checkpoints.config('linear'), mm_projector_type=None)

    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config.projector == ProjectorConfig('linear')


@pytest.mark.parametrize(
    ('name', 'size', 'width', 'blocks'),
    [
        ('openai/clip-vit-large-patch14-336', 336, 1024, 24),
        ('/data/models/clip-vit-large-patch14-336/', 336, 1024, 24),
        ('openai/clip-vit-large-patch14', 224, 1024, 24),
        ('openai/clip-vit-base-patch16', 224, 768, 12),
    ],
)
def test_towers_are_known_by_their_names(tmp_path: Path, name: str, size: int, width: int, blocks: int) -> None:
    from mobilevlm_ros.model.published_config import read_model_config

    model = tiny_checkpoints.config()
    fields = tiny_checkpoints.config_json(model) | {'mm_vision_tower': name, 'mm_vision_config': None}
    tiny_checkpoints.write_json(tmp_path / 'config.json', fields)
    tower = read_model_config(tmp_path).vision

    assert tower is not None
    assert (tower.image_size, tower.width, tower.n_blocks, tower.select_layer) == (size, width, blocks, -2)


@pytest.mark.parametrize(
    ('changed', 'error', 'expected'),
    [
        ({'hidden_size': '64'}, CheckpointDamagedError, "hidden_size must be an integer .* found '64'"),
        ({'hidden_size': 64.0}, CheckpointDamagedError, 'hidden_size must be an integer'),
        ({'hidden_size': True}, CheckpointDamagedError, 'hidden_size must be an integer'),
        ({'hidden_size': 10**400}, CheckpointDamagedError, 'hidden_size must be an integer'),
        ({'hidden_size': None}, CheckpointDamagedError, 'lacks hidden_size'),
        ({'hidden_size': 63}, CheckpointDamagedError, 'do not divide a width of 63'),
        ({'num_attention_heads': 0}, CheckpointDamagedError, 'num_attention_heads must be an integer between 1'),
        ({'num_hidden_layers': 10**9}, CheckpointDamagedError, 'num_hidden_layers must be'),
        ({'rms_norm_eps': 0}, CheckpointDamagedError, 'rms_norm_eps must be a number above'),
        ({'rms_norm_eps': float('nan')}, CheckpointDamagedError, 'NaN is no number'),
        ({'tie_word_embeddings': 'no'}, CheckpointDamagedError, 'tie_word_embeddings must be true or false'),
        ({'hidden_act': 'gelu'}, CheckpointError, "hidden_act is 'gelu'; .* 'silu' only"),
        ({'attention_bias': True}, CheckpointError, 'attention_bias is True'),
        ({'rope_scaling': {'type': 'linear', 'factor': 4}}, CheckpointError, 'rope_scaling is'),
        ({'rope_parameters': {'rope_type': 'yarn'}}, CheckpointError, 'rope_type'),
        ({'head_dim': 32}, CheckpointError, 'head_dim is 32'),
        ({'quantization_config': {'bits': 4}}, CheckpointKindError, 'quantised'),
        ({'model_type': 'qwen2'}, CheckpointKindError, "type 'qwen2'; expected mobilevlm, llava or llama"),
        ({'model_type': ['llama']}, CheckpointDamagedError, 'model_type must be a text'),
        ({'text_config': {}, 'vision_config': {}}, CheckpointKindError, 'text_config'),
        ({'mm_vision_tower': None, 'mm_projector_type': None}, CheckpointDamagedError, 'has no mm_vision_tower'),
        ({'mm_projector_type': 'resampler'}, CheckpointError, "unknown projector 'resampler'"),
        ({'mm_projector_type': 'mlp999999999x_gelu'}, CheckpointError, 'unknown projector'),
        ({'mm_vision_select_feature': 'cls_patch'}, CheckpointError, 'cls_patch'),
        ({'mm_vision_select_layer': -9}, CheckpointDamagedError, 'select_layer must be between -4 and -1'),
        ({'mm_vision_select_layer': [-2, -3]}, CheckpointDamagedError, r'ascending.*found \[-2\]'),
        ({'mm_vision_select_layer': []}, CheckpointDamagedError, 'one or more integers between -1025 and 1025'),
        ({'mm_vision_select_layer': [-3, True]}, CheckpointDamagedError, 'one or more integers between'),
        ({'mm_vision_select_layer': [-3, '-2']}, CheckpointDamagedError, 'one or more integers between'),
        ({'mm_vision_select_layer': [-9999, -2]}, CheckpointDamagedError, 'one or more integers between'),
        ({'mm_use_im_start_end': True}, CheckpointError, 'mm_use_im_start_end is True'),
        ({'mm_vision_config': []}, CheckpointDamagedError, 'lacks image_size'),
        ({'mm_vision_config': None, 'vision_tower_type': 'sam'}, CheckpointError, 'vision_tower_type'),
    ],
)
def test_a_config_that_cannot_be_followed_is_named(
    tmp_path: Path, changed: dict[str, Any], error: type[CheckpointError], expected: str
) -> None:
    fields = tiny_checkpoints.config_json(tiny_checkpoints.config()) | changed
    tiny_checkpoints.write(tmp_path)
    tiny_checkpoints.write_json(tmp_path / 'config.json', fields)

    with pytest.raises(CheckpointError, match=expected) as caught:
        open_checkpoint(tmp_path)
    assert type(caught.value) is error
    assert 'config.json' in str(caught.value)


def test_newer_spellings_of_transformers_are_read(tmp_path: Path) -> None:
    """Transformers 5 writes rope_parameters and dtype."""
    newer = {'rope_parameters': {'rope_type': 'default', 'rope_theta': 500.0}, 'dtype': 'bfloat16', 'head_dim': 16}
    model = tiny_checkpoints.config(None)
    tiny_checkpoints.write(tmp_path, model)
    tiny_checkpoints.write_json(tmp_path / 'config.json', tiny_checkpoints.config_json(model) | newer)

    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config.language.rope_base == 500.0


# -- anything at all ----------------------------------------------------------------------------------------------


@pytest.fixture(scope='module', params=tiny_checkpoints.LAYOUTS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('whole') / request.param
    tiny_checkpoints.write(folder, layout=request.param)
    return folder


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_give_named_errors_only(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    """A few bytes of one file change, or its end is cut; structure lies at both ends of a file."""
    name = data.draw(st.sampled_from(sorted(path.name for path in whole.iterdir() if 'tokenizer' not in path.name)))
    raw = bytearray((whole / name).read_bytes())
    near_an_end = st.integers(0, min(len(raw), 4096) - 1)
    anywhere = st.integers(0, len(raw) - 1)
    places = st.one_of(near_an_end, near_an_end.map(lambda i: len(raw) - 1 - i), anywhere)
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=8)):
        raw[place] = value
    del raw[len(raw) - data.draw(st.one_of(st.just(0), near_an_end)) :]
    folder = tmp_path / 'damaged'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in whole.iterdir():
        if path.name == name:
            (folder / name).write_bytes(raw)
        else:
            (folder / path.name).symlink_to(path)

    try:
        read_all(open_checkpoint(folder))
    except CheckpointError as error:
        assert len(str(error)) < 4000


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_json_as_config_gives_named_errors_only(tmp_path: Path, data: st.DataObject) -> None:
    fields = tiny_checkpoints.config_json(tiny_checkpoints.config())
    scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
    values = st.recursive(
        scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner))
    )
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(fields)), values, min_size=1, max_size=4))
    if not (tmp_path / 'tokenizer.model').exists():
        tiny_checkpoints.write(tmp_path)
    tiny_checkpoints.write_json(tmp_path / 'config.json', fields | changed)

    try:
        open_checkpoint(tmp_path).close()
    except CheckpointError as error:
        assert 'config.json' in str(error)
