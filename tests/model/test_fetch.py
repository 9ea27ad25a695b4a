"""Fetching: huggingface_hub itself against a hub in small, interruptions, wrong files, and local folders."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hub_server
import huggingface_hub.constants
import pytest
import tiny_checkpoints

from mobilevlm_ros.errors import CheckpointError, DiskSpaceError, FetchError, SettingsError
from mobilevlm_ros.model import fetch as fetch_module
from mobilevlm_ros.model.checkpoint import open_checkpoint
from mobilevlm_ros.model.fetch import fetch, fetched_path
from mobilevlm_ros.model.manifest import Manifest, PublishedFile

REPO = 'owner/Tiny-VLM'
WEIGHTS = 'pytorch_model.bin'
CONFIG = replace(tiny_checkpoints.config(), name='tiny', repo=REPO, revision=hub_server.REVISION)


@pytest.fixture(scope='module')
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a repository: a checkpoint, and what repositories hold besides."""
    folder = tmp_path_factory.mktemp('published')
    tiny_checkpoints.write(folder, CONFIG)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {
        'README.md': b'# Tiny',
        '.gitattributes': b'*',
        'tokenizer_config.json': b'{}',
        'sub/config.json': b'[]',
        '../config.json': b'[]',
    }


@pytest.fixture
def hub(published: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setattr(huggingface_hub.constants, 'DOWNLOAD_CHUNK_SIZE', 8192)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_DISABLE_IMPLICIT_TOKEN', True)
    monkeypatch.setattr('huggingface_hub.file_download.time.sleep', lambda seconds: None)
    with hub_server.serve(REPO, published) as server:
        monkeypatch.setenv('HF_ENDPOINT', server.address)
        yield server


@pytest.fixture
def manifest(published: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The manifest of ``tiny``; a test may change its parts."""
    parts: dict[str, Any] = {
        'config': CONFIG,
        'files': {
            WEIGHTS: PublishedFile(len(published[WEIGHTS]), hashlib.sha256(published[WEIGHTS]).hexdigest()),
            'tokenizer.model': PublishedFile(),
        },
    }
    monkeypatch.setattr(fetch_module, 'open_manifest', lambda name: Manifest(n_parameters=1, licence='', **parts))
    return parts


def downloads(hub: hub_server.Hub, name: str = WEIGHTS) -> list[int]:
    """Where the downloads of a large file began."""
    return [start for method, path, start in hub.requests if (method, path) == ('GET', f'/elsewhere/{name}')]


# -- downloading --------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_downloaded_and_opens(
    tmp_path: Path, hub: hub_server.Hub, manifest: dict[str, Any], published: dict[str, bytes]
) -> None:
    told: list[tuple[int, int]] = []
    folder = fetch('tiny', tmp_path, on_progress=lambda *step: told.append(step))

    assert folder == fetched_path('tiny', tmp_path) == tmp_path / 'tiny'
    wanted = {'config.json', WEIGHTS, 'tokenizer.model', 'tokenizer_config.json'}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: published[name] for name in wanted}
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config.language == CONFIG.language
    total = sum(len(published[name]) for name in wanted)
    assert told[-1] == (total, total)
    assert told == sorted(told) and len(told) > 10
    assert [path.name for path in tmp_path.iterdir()] == ['tiny']


def test_what_is_there_is_not_downloaded_again(tmp_path: Path, hub: hub_server.Hub, manifest: dict[str, Any]) -> None:
    fetch('tiny', tmp_path)
    n_requests = len(hub.requests)

    assert fetch('tiny', tmp_path) == tmp_path / 'tiny'
    assert len(hub.requests) == n_requests


def test_an_interrupted_download_goes_on_where_it_ended(
    tmp_path: Path, hub: hub_server.Hub, manifest: dict[str, Any], published: dict[str, bytes]
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch('tiny', tmp_path, on_progress=interrupt)
    with pytest.raises(FetchError, match='is not here'):
        fetched_path('tiny', tmp_path)
    kept = (tmp_path / 'tiny.partial' / f'{WEIGHTS}.part').stat().st_size
    assert kept > 0
    folder = fetch('tiny', tmp_path)

    assert downloads(hub) == [0, kept]
    assert (folder / WEIGHTS).read_bytes() == published[WEIGHTS]
    assert not (tmp_path / 'tiny.partial').exists()


def test_a_connection_that_breaks_is_taken_up_again(
    tmp_path: Path, hub: hub_server.Hub, manifest: dict[str, Any], published: dict[str, bytes]
) -> None:
    hub.breaks_after = len(published[WEIGHTS]) // 2
    folder = fetch('tiny', tmp_path)

    assert (folder / WEIGHTS).read_bytes() == published[WEIGHTS]
    assert len(downloads(hub)) > 1 and downloads(hub)[-1] > 0


def test_a_connection_that_keeps_breaking_is_named_and_what_came_is_kept(
    tmp_path: Path, hub: hub_server.Hub, manifest: dict[str, Any]
) -> None:
    hub.breaks_after = 0

    with pytest.raises(FetchError, match=r'could not be downloaded .*run `mobilevlm fetch tiny` again .*--from DIR'):
        fetch('tiny', tmp_path)
    assert (tmp_path / 'tiny.partial' / 'config.json').is_file()
    hub.breaks_after = None
    assert fetch('tiny', tmp_path).is_dir()


def test_the_beginning_of_a_commit_will_do(tmp_path: Path, hub: hub_server.Hub, manifest: dict[str, Any]) -> None:
    manifest['config'] = replace(CONFIG, revision=hub_server.REVISION[:7])

    assert fetch('tiny', tmp_path).is_dir()
    assert all(hub_server.REVISION in path for _, path, _ in hub.requests if '/resolve/' in path)


def test_a_commit_that_is_gone_is_named(tmp_path: Path, hub: hub_server.Hub, manifest: dict[str, Any]) -> None:
    manifest['config'] = replace(CONFIG, revision='bbbbbbb')

    with pytest.raises(FetchError, match='has no commit bbbbbbb'):
        fetch('tiny', tmp_path)


# -- what is not as pinned ----------------------------------------------------------------------------------------


def test_a_changed_file_is_refused_and_removed(tmp_path: Path, hub: hub_server.Hub, manifest: dict[str, Any]) -> None:
    good = hub.files[WEIGHTS]
    hub.files[WEIGHTS] = good[:-1] + b'!'

    with pytest.raises(FetchError, match=rf'{WEIGHTS} came with SHA-256 .*expected .*do not use it'):
        fetch('tiny', tmp_path)
    assert not list(tmp_path.rglob(f'{WEIGHTS}*'))
    hub.files[WEIGHTS] = good
    assert (fetch('tiny', tmp_path) / WEIGHTS).read_bytes() == good


def test_a_file_without_a_pinned_hash_is_compared_with_the_hubs(
    tmp_path: Path, hub: hub_server.Hub, manifest: dict[str, Any]
) -> None:
    manifest['files'] = {WEIGHTS: PublishedFile()}
    hub.tree_lies[WEIGHTS] = b'other bytes'

    with pytest.raises(FetchError, match='came with SHA-256'):
        fetch('tiny', tmp_path)


def test_a_file_of_another_size_is_refused_before_it_comes(
    tmp_path: Path, hub: hub_server.Hub, manifest: dict[str, Any]
) -> None:
    hub.files[WEIGHTS] += b'more'

    with pytest.raises(FetchError, match=rf'{WEIGHTS} of {REPO} at a+ has \d+ bytes, expected \d+'):
        fetch('tiny', tmp_path)
    assert downloads(hub) == []


def test_a_pinned_file_that_is_not_published_is_named(
    tmp_path: Path, hub: hub_server.Hub, manifest: dict[str, Any]
) -> None:
    del hub.files['tokenizer.model']

    with pytest.raises(FetchError, match=r'has no tokenizer\.model'):
        fetch('tiny', tmp_path)


def test_a_model_of_other_shapes_is_refused_before_its_weights_come(
    tmp_path: Path, hub: hub_server.Hub, manifest: dict[str, Any]
) -> None:
    manifest['config'] = replace(CONFIG, language=replace(CONFIG.language, n_layers=3))

    with pytest.raises(CheckpointError, match=r'n_layers=2.*; tiny is .*n_layers=3'):
        fetch('tiny', tmp_path)
    assert downloads(hub) == []


def test_a_partial_file_that_is_too_long_is_begun_anew(
    tmp_path: Path, hub: hub_server.Hub, manifest: dict[str, Any], published: dict[str, bytes]
) -> None:
    (tmp_path / 'tiny.partial').mkdir()
    (tmp_path / 'tiny.partial' / f'{WEIGHTS}.part').write_bytes(b'x' * (len(published[WEIGHTS]) + 1))

    assert (fetch('tiny', tmp_path) / WEIGHTS).read_bytes() == published[WEIGHTS]
    assert downloads(hub) == [0]


def test_a_file_that_was_cut_since_is_named(tmp_path: Path, hub: hub_server.Hub, manifest: dict[str, Any]) -> None:
    folder = fetch('tiny', tmp_path)
    (folder / WEIGHTS).write_bytes(b'short')

    with pytest.raises(FetchError, match=rf'{WEIGHTS} has 5 bytes, expected \d+: remove'):
        fetch('tiny', tmp_path)


# -- no hub, no room ----------------------------------------------------------------------------------------------


def test_without_a_network_the_way_out_is_told(
    tmp_path: Path, hub: hub_server.Hub, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')

    with pytest.raises(FetchError, match=rf'{REPO} could not be downloaded \(ConnectError.*--from DIR'):
        fetch('tiny', tmp_path)


def test_a_repository_that_is_gone_is_named(tmp_path: Path, hub: hub_server.Hub, manifest: dict[str, Any]) -> None:
    manifest['config'] = replace(CONFIG, repo='owner/gone')

    with pytest.raises(FetchError, match=r'owner/gone could not be downloaded \(RepositoryNotFoundError'):
        fetch('tiny', tmp_path)


def test_room_is_checked_first(
    tmp_path: Path, hub: hub_server.Hub, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=1000))

    with pytest.raises(DiskSpaceError, match=r'takes 1 MiB more, but .* has 0 MiB free'):
        fetch('tiny', tmp_path)
    assert downloads(hub) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, hub: hub_server.Hub, manifest: dict[str, Any]) -> None:
    (tmp_path / 'file').write_text('')

    with pytest.raises(FetchError, match='NotADirectoryError'):
        fetch('tiny', tmp_path / 'file')


def test_what_nobody_published_is_said_so(tmp_path: Path, manifest: dict[str, Any]) -> None:
    manifest['config'] = replace(CONFIG, repo='', revision='')

    with pytest.raises(FetchError, match=r'not published anywhere: .*mobilevlm init tiny --random'):
        fetch('tiny', tmp_path)


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match='no model'):
        fetch('tinier', tmp_path)


# -- local folders ------------------------------------------------------------------------------------------------


def test_a_local_folder_is_linked(tmp_path: Path, manifest: dict[str, Any]) -> None:
    """Also one in another layout than the published."""
    tiny_checkpoints.write(tmp_path / 'mine', CONFIG, layout='safetensors-shards')
    tiny_checkpoints.write(tmp_path / 'other', CONFIG)

    assert fetch('tiny', tmp_path / 'cache', source=tmp_path / 'mine') == tmp_path / 'cache' / 'tiny'
    assert fetched_path('tiny', tmp_path / 'cache').resolve() == tmp_path / 'mine'
    assert fetch('tiny', tmp_path / 'cache') == tmp_path / 'cache' / 'tiny'
    fetch('tiny', tmp_path / 'cache', source=tmp_path / 'other')
    assert fetched_path('tiny', tmp_path / 'cache').resolve() == tmp_path / 'other'


def test_a_link_whose_folder_is_gone_is_named(tmp_path: Path, manifest: dict[str, Any]) -> None:
    tiny_checkpoints.write(tmp_path / 'mine', CONFIG)
    fetch('tiny', tmp_path / 'cache', source=tmp_path / 'mine')
    shutil.rmtree(tmp_path / 'mine')

    with pytest.raises(FetchError, match=r'was linked to .*mine, which is gone'):
        fetched_path('tiny', tmp_path / 'cache')


def test_a_download_is_not_replaced_by_a_link(tmp_path: Path, hub: hub_server.Hub, manifest: dict[str, Any]) -> None:
    folder = fetch('tiny', tmp_path / 'cache')
    tiny_checkpoints.write(tmp_path / 'mine', CONFIG)

    assert fetch('tiny', tmp_path / 'cache', source=folder) == folder
    with pytest.raises(FetchError, match='was downloaded before: remove it'):
        fetch('tiny', tmp_path / 'cache', source=tmp_path / 'mine')


@pytest.mark.parametrize(
    ('projector', 'expected'),
    [('ldpnet', 'has the projector ldpnet; tiny has ldpnetv2'), (None, 'has the projector none; tiny has ldpnetv2')],
)
def test_a_local_folder_of_another_model_is_refused(
    tmp_path: Path, manifest: dict[str, Any], projector: str | None, expected: str
) -> None:
    tiny_checkpoints.write(tmp_path / 'mine', tiny_checkpoints.config(projector))

    with pytest.raises(CheckpointError, match=expected):
        fetch('tiny', tmp_path / 'cache', source=tmp_path / 'mine')
    assert not (tmp_path / 'cache').exists()


@pytest.mark.parametrize('gone', ['config.json', 'tokenizer.model', WEIGHTS])
def test_a_local_folder_that_lacks_something_is_refused(tmp_path: Path, manifest: dict[str, Any], gone: str) -> None:
    tiny_checkpoints.write(tmp_path / 'mine', CONFIG)
    (tmp_path / 'mine' / gone).unlink()

    with pytest.raises(CheckpointError, match=str(tmp_path / 'mine')):
        fetch('tiny', tmp_path / 'cache', source=tmp_path / 'mine')
