"""Bundles: each way to be none has its named error, and nothing else ever escapes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mobilevlm_ros.errors import (
    BundleError,
    BundleHashError,
    BundleIncompleteError,
    BundleMissingError,
    BundleVersionError,
)
from mobilevlm_ros.runtime.bundle import DESCRIPTION, file_entry, open_bundle, sha256_of, write_description
from mobilevlm_ros.runtime.language import LanguageOptions
from mobilevlm_ros.runtime.vision.plan_key import graph_sha256

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / 'bundle'))


def edit(bundle: Path, change: Edit) -> None:
    description = json.loads((bundle / DESCRIPTION).read_text())
    change(description)
    (bundle / DESCRIPTION).write_text(json.dumps(description))


def put(*keys: str, value: Any) -> Edit:
    """Sets the entry under ``keys``."""

    def change(description: dict[str, Any]) -> None:
        *path, last = keys
        for key in path:
            description = description[key]
        description[last] = value

    return change


def drop(*keys: str) -> Edit:
    """Removes the entry under ``keys``."""

    def change(description: dict[str, Any]) -> None:
        *path, last = keys
        for key in path:
            description = description[key]
        del description[last]

    return change


def test_a_whole_bundle_opens(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)

    assert (bundle.name, bundle.profile) == ('tiny', 'cpu')
    assert bundle.vision_path.is_file()
    assert bundle.language_path.is_file()
    assert bundle.adapter_path is None
    assert bundle.size_bytes == bundle.vision_path.stat().st_size + bundle.language_path.stat().st_size
    assert bundle.warning


def test_the_model_id_names_model_profile_and_content(tiny_bundle: Path, bundle_copy: Path) -> None:
    original = open_bundle(tiny_bundle).model_id
    assert original.startswith('tiny-cpu@')
    assert open_bundle(bundle_copy).model_id == original

    edit(bundle_copy, put('generator', value='another'))

    assert open_bundle(bundle_copy).model_id != original


def test_the_description_becomes_settings(bundle_copy: Path) -> None:
    edit(bundle_copy, put('language', 'kv_type', value='q8_0'))
    edit(bundle_copy, put('prompt', 'system', value='Be brief.'))
    edit(bundle_copy, put('vision', 'aspect', value='square'))

    bundle = open_bundle(bundle_copy)

    assert bundle.language_options() == LanguageOptions(n_ctx=2048, n_threads=1, n_threads_batch=1, kv_type='q8_0')
    assert bundle.template().render('x').startswith('Be brief. USER:')
    assert bundle.preprocess_spec().aspect == 'square'
    assert bundle.preprocess_spec().image_size == 32


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(BundleMissingError, match='mobilevlm build nano'):
        open_bundle(tmp_path / 'nothing')


def test_a_file_instead_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('x')

    with pytest.raises(BundleMissingError):
        open_bundle(tmp_path / 'file')


def test_no_description(bundle_copy: Path) -> None:
    (bundle_copy / DESCRIPTION).unlink()

    with pytest.raises(BundleIncompleteError, match=r'has no bundle\.json'):
        open_bundle(bundle_copy)


@pytest.mark.parametrize(
    'raw',
    [b'', b'{', b'\xff\xfe\0', b'{"a": NaN}', b'[' * 100_000, b'1' * 10_000, b'nothing'],
    ids=['empty', 'cut', 'not utf-8', 'not a number', 'deep', 'long number', 'a word'],
)
def test_a_description_that_is_not_json(bundle_copy: Path, raw: bytes) -> None:
    (bundle_copy / DESCRIPTION).write_bytes(raw)

    with pytest.raises(BundleIncompleteError, match=r'bundle\.json is not JSON'):
        open_bundle(bundle_copy)


def test_a_description_that_cannot_be_read(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, 'Permission denied', str(self))

    monkeypatch.setattr(Path, 'read_bytes', refuse)

    with pytest.raises(BundleIncompleteError, match=r'cannot be read .*Permission denied'):
        open_bundle(bundle_copy)


@pytest.mark.parametrize('version', [0, 2, 10**30, -1])
def test_another_version(bundle_copy: Path, version: int) -> None:
    edit(bundle_copy, put('format_version', value=version))

    with pytest.raises(BundleVersionError, match=f'format {version}; .*reads format 1'):
        open_bundle(bundle_copy)


def test_another_version_is_told_even_if_nothing_else_fits(bundle_copy: Path) -> None:
    (bundle_copy / DESCRIPTION).write_text('{"format_version": 7, "new": true}')

    with pytest.raises(BundleVersionError):
        open_bundle(bundle_copy)


@pytest.mark.parametrize(
    'change',
    [
        drop('format_version'),
        put('format_version', value='1'),
        put('format_version', value=True),
        drop('vision'),
        drop('language', 'file'),
        put('language', 'n_ctx', value=0),
        put('language', 'n_ctx', value='2048'),
        put('language', 'n_ctx', value=2048.0),
        put('language', 'n_ctx', value=10**9),
        put('language', 'kv_type', value='f8'),
        put('language', 'n_threads', value=10**30),
        put('language', 'n_gpu_layers', value=10**30),
        put('language', 'unknown', value=1),
        put('vision', 'backend', value='abacus'),
        put('vision', 'image_size', value=32.0),
        put('vision', 'mean', value=[0.5, 0.5]),
        put('vision', 'mean', value=[0.5, 0.5, 2.0]),
        put('vision', 'std', value=[0.5, 0.5, 0]),
        put('vision', 'std', value=[0.5, 0.5, 1e999]),
        put('vision', 'aspect', value='stretch'),
        put('prompt', 'template', value='v9'),
        put('name', value=''),
        put('files', value=[]),
        put('files', 'vision.onnx', 'sha256', value='xyz'),
        put('files', 'vision.onnx', 'bytes', value=-1),
    ],
)
def test_a_malformed_description_names_the_place(bundle_copy: Path, change: Edit) -> None:
    edit(bundle_copy, change)

    with pytest.raises(BundleIncompleteError, match=r'bundle\.json.* (at \$|is no number)'):
        open_bundle(bundle_copy)


@pytest.mark.parametrize('raw', ['null', '[]', '"x"', '3'])
def test_a_description_that_is_no_object(bundle_copy: Path, raw: str) -> None:
    (bundle_copy / DESCRIPTION).write_text(raw)

    with pytest.raises(BundleIncompleteError, match='object'):
        open_bundle(bundle_copy)


@pytest.mark.parametrize(
    'name',
    ['../secret', '/etc/passwd', 'a/b', 'a\\b', '..', '.hidden', '', 'a\nb', 'a\0b', 'vision.onnx\n', 'a' * 300],
)
def test_a_file_name_cannot_leave_the_directory(bundle_copy: Path, name: str) -> None:
    edit(bundle_copy, put('language', 'file', value=name))
    edit(bundle_copy, put('files', name, value={'bytes': 1, 'sha256': '0' * 64}))

    with pytest.raises(BundleIncompleteError, match=r'does not match|is too long'):
        open_bundle(bundle_copy)


@pytest.mark.parametrize('key', ['vision', 'language'])
def test_a_named_file_must_be_listed(bundle_copy: Path, key: str) -> None:
    edit(bundle_copy, put(key, 'file', value='other.bin'))

    with pytest.raises(BundleIncompleteError, match=r'names other\.bin but does not list it'):
        open_bundle(bundle_copy)


def test_an_adapter_must_be_listed(bundle_copy: Path) -> None:
    edit(bundle_copy, put('language', 'adapter', value='adapter.gguf'))

    with pytest.raises(BundleIncompleteError, match=r'names adapter\.gguf'):
        open_bundle(bundle_copy)


@pytest.mark.parametrize('place', [('vision', 'onnx'), ('parity',)])
def test_graph_and_report_must_be_listed(bundle_copy: Path, place: tuple[str, ...]) -> None:
    edit(bundle_copy, put(*place, value='other.file'))

    with pytest.raises(BundleIncompleteError, match=r'names other\.file but does not list it'):
        open_bundle(bundle_copy)


PLAN_KEY = {
    'flavour': 'tensorrt',
    'tensorrt': '10.3.0',
    'gpu': 'Orin',
    'compute_capability': '8.7',
    'onnx_sha256': 'a' * 64,
    'precision': 'fp16',
}


def test_a_plan_and_its_graph_are_described(bundle_copy: Path) -> None:
    for change in (
        put('vision', 'backend', value='tensorrt'),
        put('vision', 'onnx', value='vision.onnx'),
        put('vision', 'plan_key', value=PLAN_KEY),
    ):
        edit(bundle_copy, change)

    bundle = open_bundle(bundle_copy)

    assert bundle.vision['plan_key'] == PLAN_KEY
    assert bundle.graph_sha256 == sha256_of(bundle_copy / 'vision.onnx')


def test_a_graph_with_its_weights_beside_it_is_hashed_whole(bundle_copy: Path) -> None:
    """As the builder of plans hashes it."""
    (bundle_copy / 'vision.onnx.data').write_bytes(b'weights')
    edit(bundle_copy, put('vision', 'onnx', value='vision.onnx'))
    edit(bundle_copy, put('files', 'vision.onnx.data', value=file_entry(bundle_copy / 'vision.onnx.data')))

    found = open_bundle(bundle_copy).graph_sha256

    names = ('vision.onnx', 'vision.onnx.data')
    assert found == graph_sha256({name: sha256_of(bundle_copy / name) for name in names})
    assert found != sha256_of(bundle_copy / 'vision.onnx')


def test_a_bundle_without_a_plan_has_no_graph_to_compare(tiny_bundle: Path) -> None:
    assert open_bundle(tiny_bundle).graph_sha256 is None


@pytest.mark.parametrize('key', [{}, [], {**PLAN_KEY, 'gpu': ''}, {**PLAN_KEY, 'onnx_sha256': 'short'}])
def test_a_malformed_plan_key_names_the_place(bundle_copy: Path, key: object) -> None:
    edit(bundle_copy, put('vision', 'plan_key', value=key))

    with pytest.raises(BundleIncompleteError, match=r'at \$\.vision\.plan_key'):
        open_bundle(bundle_copy)


def test_a_missing_file(bundle_copy: Path) -> None:
    (bundle_copy / 'language.gguf').unlink()

    with pytest.raises(BundleIncompleteError, match=r'language\.gguf is missing'):
        open_bundle(bundle_copy)


def test_a_short_file(bundle_copy: Path) -> None:
    with (bundle_copy / 'vision.onnx').open('r+b') as file:
        file.truncate(100)

    with pytest.raises(BundleIncompleteError, match=r'vision\.onnx has 100 bytes, expected'):
        open_bundle(bundle_copy)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_changed_file(bundle_copy: Path) -> None:
    flip_a_byte(bundle_copy / 'language.gguf')

    with pytest.raises(BundleHashError, match=r'language\.gguf has SHA-256'):
        open_bundle(bundle_copy)


def test_hashes_are_left_alone_where_they_need_not_be_checked(bundle_copy: Path) -> None:
    flip_a_byte(bundle_copy / 'language.gguf')

    assert open_bundle(bundle_copy, verify_hashes=False).name == 'tiny'


@pytest.mark.parametrize('error', [BundleMissingError, BundleIncompleteError, BundleVersionError, BundleHashError])
def test_every_error_is_a_bundle_error(error: type[BundleError]) -> None:
    assert issubclass(error, BundleError)


def test_a_builder_cannot_write_a_malformed_description(tmp_path: Path) -> None:
    with pytest.raises(jsonschema.ValidationError):
        write_description(tmp_path, {'format_version': 1})

    assert list(tmp_path.iterdir()) == []


def test_a_description_appears_whole_or_not_at_all(
    bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    description = open_bundle(bundle_copy).description
    (bundle_copy / DESCRIPTION).unlink()

    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Path, 'replace', fail)
    with pytest.raises(OSError, match='No space'):
        write_description(bundle_copy, description)
    monkeypatch.undo()

    with pytest.raises(BundleIncompleteError, match='half-written'):
        open_bundle(bundle_copy)
    write_description(bundle_copy, description)
    assert open_bundle(bundle_copy).description == description


def test_a_file_entry_is_size_and_hash(tmp_path: Path) -> None:
    (tmp_path / 'f').write_bytes(b'abc')

    assert file_entry(tmp_path / 'f') == {
        'bytes': 3,
        'sha256': 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad',
    }


@pytest.fixture(scope='module')
def fuzzed(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp('fuzz') / 'bundle'))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_description_at_all_is_refused(fuzzed: Path, raw: bytes) -> None:
    (fuzzed / DESCRIPTION).write_bytes(raw)

    with pytest.raises(BundleError):
        open_bundle(fuzzed, verify_hashes=False)


PLACES = [
    ('format_version',), ('name',), ('sources',), ('vision',), ('vision', 'file'), ('vision', 'mean'),
    ('vision', 'image_size'), ('language',), ('language', 'n_ctx'), ('language', 'adapter'),
    ('language', 'frame_cache'), ('prompt',), ('prompt', 'system'), ('files',), ('files', 'vision.onnx'),
    ('files', 'vision.onnx', 'bytes'), ('vision', 'onnx'), ('vision', 'plan_key'), ('parity',),
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(place=st.sampled_from(PLACES), value=JSON)
def test_any_value_anywhere_opens_or_is_a_bundle_error(
    fuzzed: Path, tiny_bundle: Path, place: tuple[str, ...], value: Any
) -> None:
    shutil.copyfile(tiny_bundle / DESCRIPTION, fuzzed / DESCRIPTION)
    edit(fuzzed, put(*place, value=value))
    try:
        bundle = open_bundle(fuzzed, verify_hashes=False)
    except BundleError as error:
        assert str(error)
    else:
        # What opens can be used.
        bundle.language_options()
        bundle.template()
        assert max(bundle.preprocess_spec().pad_rgb) <= 255


def test_files_that_are_not_loaded_take_no_memory(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    loaded = bundle.loaded_bytes
    bundle.description['files'] |= {name: {'bytes': 1 << 40} for name in ('mmproj.gguf', 'reference.npz')}

    assert bundle.loaded_bytes == loaded == bundle.vision_path.stat().st_size + bundle.language_path.stat().st_size
    assert bundle.size_bytes > 1 << 40
