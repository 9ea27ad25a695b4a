"""Downloads a published checkpoint by its name, or takes a local folder in its place, and checks what came.

Every name has one folder in the cache. Files arrive in ``NAME.partial`` beside it, where an interrupted download is
taken up again, and the folder is renamed when all of them have the pinned sizes and hashes. Answers from the network
are not trusted: the revision is pinned in the manifest, and so are the hashes that are known.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mobilevlm_ros.errors import CheckpointError, DiskSpaceError, FetchError, MobileVLMError
from mobilevlm_ros.model.config import ModelConfig
from mobilevlm_ros.model.hub import Hub
from mobilevlm_ros.model.manifest import PublishedFile, open_manifest
from mobilevlm_ros.model.published_config import CONFIG, read_model_config
from mobilevlm_ros.model.tokenizer_files import find_tokenizer
from mobilevlm_ros.paths import cache_dir
from mobilevlm_ros.runtime.bundle import sha256_of

__all__ = ['check_folder', 'fetch', 'fetched_path']

_SMALL_FILES = (CONFIG, '*.index.json', 'generation_config.json', 'special_tokens_map.json', 'tokenizer*')
_WEIGHTS = ('pytorch_model*.bin', 'model*.safetensors')

OnProgress = Callable[[int, int], None]
"""Told bytes that are there, and bytes in all."""


def fetch(
    name: str,
    cache: Path | None = None,
    *,
    source: Path | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Path:
    """The folder of a published checkpoint, downloaded if it is not there yet.

    The hub's address can be changed with ``HF_ENDPOINT``, as everywhere else.

    :param cache: where checkpoints are kept; by default in the cache folder of this project.
    :param source: a local folder with the checkpoint, which is linked into the cache instead; it may hold other
        files than the published ones (safetensors, one's own fine-tuning), as long as the shapes are the model's.
    :raise SettingsError: if there is no model of that name.
    :raise FetchError: if nobody published it, it cannot be downloaded, or what came is not what was pinned.
    :raise CheckpointError: if the local folder does not hold this model.
    :raise DiskSpaceError: if there is no room for it.
    """
    manifest = open_manifest(name)
    folder = _place(name, cache)
    if source is not None:
        check_folder(source, manifest.config)
        return _link(source, folder)
    if folder.is_dir():
        if not folder.is_symlink():
            _check_sizes(folder, manifest.files, name)
        return folder
    config = manifest.config
    if not config.repo:
        raise FetchError(
            f'{config.name} is not published anywhere: train it, make one with `mobilevlm init {name} --random`, or '
            f'give a folder with `mobilevlm fetch {name} --from DIR`'
        )
    partial = folder.with_name(f'{folder.name}.partial')
    _download(name, config, manifest.files, partial, on_progress)
    check_folder(partial, config)
    partial.replace(folder)
    return folder


def fetched_path(name: str, cache: Path | None = None) -> Path:
    """The folder of a checkpoint that was fetched before.

    :raise FetchError: if it was not.
    """
    folder = _place(name, cache)
    if folder.is_dir():
        return folder
    if folder.is_symlink():
        raise FetchError(
            f'{name} was linked to {os.readlink(folder)}, which is gone: run `mobilevlm fetch {name} --from DIR` again'
        )
    raise FetchError(
        f'{name} is not here: run `mobilevlm fetch {name}`, or `mobilevlm fetch {name} --from DIR` with a local folder'
    )


def check_folder(folder: Path, config: ModelConfig) -> None:
    """That a folder describes a model of these shapes, and has weights and a tokenizer; reads no weights.

    :raise CheckpointError: if it does not.
    """
    _check_shapes(folder, config)
    find_tokenizer(folder)
    if not any(_matches(path.name, _WEIGHTS) for path in folder.iterdir()):
        raise CheckpointError(f'there are no weights in {folder}; expected {" or ".join(_WEIGHTS)}')


def _check_shapes(folder: Path, config: ModelConfig) -> None:
    found = read_model_config(folder)
    # How long a context may be does not change what the weights are.
    if replace(found.language, n_ctx=config.language.n_ctx) != config.language:
        raise CheckpointError(f'{folder} holds {found.language}; {config.name} is {config.language}')
    if found.projector != config.projector:
        kinds = [part.type if part else 'none' for part in (found.projector, config.projector)]
        raise CheckpointError(f'{folder} has the projector {kinds[0]}; {config.name} has {kinds[1]}')
    if found.vision and config.vision and replace(found.vision, name=config.vision.name) != config.vision:
        raise CheckpointError(f'{folder} has {found.vision}; {config.name} has {config.vision}')


def _place(name: str, cache: Path | None) -> Path:
    return (cache or cache_dir() / 'checkpoints') / name


def _link(source: Path, folder: Path) -> Path:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            if folder.samefile(source):
                return folder
            raise FetchError(f'{folder} was downloaded before: remove it, or use {source} where a checkpoint is asked')
        folder.symlink_to(source.resolve(), target_is_directory=True)
    except OSError as error:
        raise FetchError(f'{source} cannot be linked to {folder}: {error.strerror}') from error
    return folder


def _download(
    name: str, config: ModelConfig, pinned: Mapping[str, PublishedFile], partial: Path, on_progress: OnProgress
) -> None:
    """Bring every file that is wanted, taking up what is there.

    :raise FetchError: if one cannot be had, or is not what was pinned.
    :raise DiskSpaceError: if there is no room.
    """
    with _explained(name, config.repo, partial):
        partial.mkdir(parents=True, exist_ok=True)
        hub = Hub(config.repo)
        commit = hub.commit(config.revision)
        files = _wanted(hub.files(commit), pinned, f'{config.repo} at {commit[:7]}')
        total = sum(file.n_bytes or 0 for file in files.values())
        _check_room(partial, total)
        done = 0

        def on_bytes(size: int) -> None:
            on_progress(done + size, total)

        for file_name, file in files.items():
            if not (partial / file_name).is_file():
                _bring(hub, commit, file_name, file, partial, on_bytes)
            if file_name == CONFIG:
                _check_shapes(partial, config)  # before gigabytes of something else come
            done += file.n_bytes or 0
            on_progress(done, total)


def _bring(
    hub: Hub, commit: str, name: str, file: PublishedFile, partial: Path, on_bytes: Callable[[int], None]
) -> None:
    """Bring one file under another name, which it loses when it was found right."""
    part, n_bytes = partial / f'{name}.part', file.n_bytes or 0
    if part.is_file() and part.stat().st_size > n_bytes:
        part.unlink()
    hub.download(commit, name, part, n_bytes, on_bytes)
    if file.sha256 and (digest := sha256_of(part)) != file.sha256:
        part.unlink()
        raise FetchError(
            f'{name} came with SHA-256 {digest[:12]}…, expected {file.sha256[:12]}…: the download is damaged, or the '
            'file was changed. It was removed: run again; if it stays so, do not use it.'
        )
    part.replace(partial / name)


def _wanted(
    found: Mapping[str, PublishedFile], pinned: Mapping[str, PublishedFile], where: str
) -> dict[str, PublishedFile]:
    """What to download, with the pinned size and hash, or else those that the hub tells; small files first.

    :raise FetchError: if a pinned file is not there, or not of the pinned size.
    """
    has_weights = any(_matches(name, _WEIGHTS) for name in pinned)
    patterns = _SMALL_FILES if has_weights else _SMALL_FILES + _WEIGHTS
    for name, pin in pinned.items():
        if name not in found:
            raise FetchError(f'{where} has no {name}: what is published there is not what the manifest says')
        if pin.n_bytes not in (None, found[name].n_bytes):
            raise FetchError(f'{name} of {where} has {found[name].n_bytes} bytes, expected {pin.n_bytes}')
    wanted = {name: file for name, file in found.items() if name in pinned or _matches(name, patterns)}
    return {
        name: PublishedFile(file.n_bytes, (pinned.get(name) or file).sha256 or file.sha256)
        for name, file in sorted(wanted.items(), key=lambda item: item[1].n_bytes or 0)
    }


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


@contextmanager
def _explained(name: str, repo: str, partial: Path) -> Iterator[None]:
    """Turn whatever the hub, its HTTP library and the system raise into an error that says what to do.

    :raise FetchError: for all of them, but
    :raise DiskSpaceError: where the disk is full.
    """
    try:
        yield
    except MobileVLMError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskSpaceError(f'the disk is full; {partial} keeps what came: free some space, run again') from error
        lines = str(error).strip().splitlines()
        reason = f'{type(error).__name__}: {lines[0]}' if lines else type(error).__name__
        raise FetchError(
            f'{repo} could not be downloaded ({reason[:300]}). What came is kept: run `mobilevlm fetch {name}` again '
            f'to go on. Without a network, download https://huggingface.co/{repo} elsewhere and run '
            f'`mobilevlm fetch {name} --from DIR`.'
        ) from error


def _check_room(partial: Path, total: int) -> None:
    needed = total - sum(path.stat().st_size for path in partial.iterdir())
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise DiskSpaceError(
            f'the download takes {-(-needed >> 20)} MiB more, but {partial.parent} has {free >> 20} MiB free: free '
            'some space, or choose another cache folder (XDG_CACHE_HOME)'
        )


def _check_sizes(folder: Path, pinned: Mapping[str, PublishedFile], name: str) -> None:
    """That a folder that was fetched before was not damaged since.

    :raise FetchError: if a file is missing or has another size.
    """
    for file_name, known in pinned.items():
        path = folder / file_name
        size = path.stat().st_size if path.is_file() else None
        if size is None or known.n_bytes not in (None, size):
            problem = 'is missing' if size is None else f'has {size} bytes, expected {known.n_bytes}'
            raise FetchError(f'{path} {problem}: remove {folder} and run `mobilevlm fetch {name}` again')
