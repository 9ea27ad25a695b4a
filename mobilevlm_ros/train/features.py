"""The frozen tower's features of every image, computed once and kept on disk, so that training never runs the tower.

A cache is a folder of three files: ``features.f16`` (float16 ``[n, n_patches, width]``, read by memory mapping),
``keys.txt`` (the SHA-256 of each image file, a line each, in the same order) and ``cache.json`` (the tower and how its
images are prepared). A row counts once its key is written, so an interrupted run goes on where it was; a cache of
another tower or another preparation is refused, never mixed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mobilevlm_ros.errors import BadImageError, DatasetError, DatasetMissingError, DiskSpaceError
from mobilevlm_ros.model.checkpoint import Checkpoint
from mobilevlm_ros.model.config import VisionConfig
from mobilevlm_ros.model.layout import PROJECTOR_PREFIX
from mobilevlm_ros.model.towers import build_tower
from mobilevlm_ros.runtime.bundle import sha256_of
from mobilevlm_ros.runtime.images import read_image
from mobilevlm_ros.runtime.preprocess import Aspect, PreprocessSpec, preprocess

__all__ = ['CacheIdentity', 'FeatureCache', 'FeatureReader', 'fill_cache', 'identity_of', 'load_tower']

FEATURES, KEYS, IDENTITY = 'features.f16', 'keys.txt', 'cache.json'
_KEY_CHARACTERS = 64
_ROOM_LEFT_BYTES = 1 << 30
_LARGEST_HALF = 65504.0

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class CacheIdentity:
    """What features are of.

    :ivar tower: SHA-256 of the tower's weights, and of the sizes that decide what they compute.
    """

    tower: str
    aspect: Aspect
    image_size: int
    n_patches: int
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one image's features."""
        return 2 * self.n_patches * self.width


def identity_of(vision: VisionConfig, weights: Mapping[str, NDArray[np.float32]], aspect: Aspect) -> CacheIdentity:
    """The identity of the features that a checkpoint's tower computes.

    :param weights: ``Checkpoint.vision_weights``; the projector among them is left out.
    """
    digest = hashlib.sha256(json.dumps(asdict(vision) | {'name': ''}, sort_keys=True).encode())
    for name in sorted(name for name in weights if not name.startswith(PROJECTOR_PREFIX)):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(weights[name]).tobytes())
    return CacheIdentity(digest.hexdigest(), aspect, vision.image_size, vision.n_patches, vision.feature_width)


def load_tower(checkpoint: Checkpoint) -> nn.Module:
    """The checkpoint's tower with its weights, in float32, to compute with only.

    :raise DatasetError: if the checkpoint is a language model alone.
    """
    vision = checkpoint.config.vision
    if vision is None:
        raise DatasetError(f'{checkpoint.path} holds a language model alone: it has no features')
    tower = build_tower(vision)
    weights = checkpoint.vision_weights
    names = [name for name in weights if not name.startswith(PROJECTOR_PREFIX)]
    # A buffer that counts positions is no weight; everything else has to be there.
    tower.load_state_dict({name: torch.from_numpy(weights[name]) for name in names}, strict=False)
    return tower.requires_grad_(False).eval()


class FeatureCache:
    """A cache to read; it can be pickled, for the loader's processes.

    :raise DatasetMissingError: if there is none in the folder.
    :raise DatasetError: if it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.identity = _read_identity(folder)
        self._rows = {key: row for row, key in enumerate(_read_keys(folder))}
        self._features: NDArray[np.float16] | None = None
        size = (folder / FEATURES).stat().st_size if (folder / FEATURES).is_file() else 0
        if size < len(self._rows) * self.identity.row_bytes:
            raise DatasetError(
                f'{folder / FEATURES} has {size} bytes, {len(self._rows)} images take '
                f'{len(self._rows) * self.identity.row_bytes}: it was cut off. Delete the folder and compute it again'
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {'_features': None}  # every process maps the file itself

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> NDArray[np.float16]:
        """Features of the image file with this SHA-256: float16 ``[n_patches, width]``, read-only.

        :raise KeyError: if they were not computed.
        """
        row = self._rows[key]
        if self._features is None:
            shape = (len(self._rows), self.identity.n_patches, self.identity.width)
            self._features = np.memmap(self.folder / FEATURES, np.float16, 'r', shape=shape)
        return self._features[row]

    def check(self, identity: CacheIdentity) -> None:
        """That the features are those of a model.

        :raise DatasetError: if they are of another tower, or of images that were prepared otherwise.
        """
        mine, wanted = asdict(self.identity), asdict(identity)
        for name, value in wanted.items():
            if mine[name] != value:
                raise DatasetError(
                    f'the features in {self.folder} have {name} {_short(mine[name])}, the model needs {_short(value)}: '
                    'compute them again, into another folder'
                )


class FeatureReader:
    """Features in place of pixels; implements ``dataset.ImageReader``."""

    kind: Literal['features'] = 'features'

    def __init__(self, cache: FeatureCache) -> None:
        self._cache = cache
        self._keys: dict[Path, str] = {}

    def __call__(self, path: Path) -> Tensor:
        """Float32 ``[n_patches, width]``.

        :raise BadImageError: if the image cannot be read or is not in the cache.
        """
        key = self._keys.get(path)
        if key is None:
            try:
                key = self._keys[path] = sha256_of(path)
            except OSError as error:
                raise BadImageError(f'{path} cannot be read: {error.strerror}') from error
        if key not in self._cache:
            raise BadImageError(
                f'{path} is not in the features of {self._cache.folder}: compute them with '
                '`mobilevlm train features`, which adds what is missing'
            )
        return torch.from_numpy(self._cache[key].astype(np.float32))

    def blank(self) -> Tensor:
        """Zeros, for a sample without an image."""
        return torch.zeros(self._cache.identity.n_patches, self._cache.identity.width)


def fill_cache(
    folder: Path,
    images: Iterable[Path],
    tower: nn.Module,
    identity: CacheIdentity,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    batch: int = 8,
    max_bytes: int = 64 << 30,
    on_progress: OnProgress = lambda done, total: None,
) -> FeatureCache:
    """Compute what is missing, and return the whole cache.

    :param images: files; the same picture twice is computed once.
    :param batch: images at once.
    :param max_bytes: the most that the features may take.
    :raise BadImageError: if an image cannot be read; those before it are kept.
    :raise DatasetError: if the folder holds features of something else, or one does not fit float16.
    :raise DiskSpaceError: if there is no room for them, or they would take more than ``max_bytes``.
    """
    paths = list(images)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / IDENTITY).is_file():
        FeatureCache(folder).check(identity)
    else:
        (folder / IDENTITY).write_text(json.dumps(asdict(identity), indent=2) + '\n', encoding='utf-8')
    keys = _read_keys(folder)
    known = set(keys)
    missing: dict[str, Path] = {}
    for path in paths:
        try:
            key = sha256_of(path)
        except OSError as error:
            raise BadImageError(f'{path} cannot be read: {error.strerror}') from error
        if key not in known:
            missing.setdefault(key, path)
    _check_room(folder, len(keys), len(missing), identity.row_bytes, max_bytes)
    spec = PreprocessSpec(identity.image_size, identity.aspect, mean, std)
    total = len(keys) + len(missing)
    todo = list(missing.items())
    on_progress(len(keys), total)
    try:
        with (folder / FEATURES).open('ab') as rows, (folder / KEYS).open('a', encoding='ascii') as listed:
            rows.truncate(len(keys) * identity.row_bytes)  # a row whose key was not written any more
            for start in range(0, len(todo), batch):
                chosen = todo[start : start + batch]
                rows.write(_features(tower, [path for _, path in chosen], spec, identity).tobytes())
                rows.flush()
                listed.writelines(f'{key}\n' for key, _ in chosen)
                listed.flush()
                on_progress(len(keys) + start + len(chosen), total)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskSpaceError(f'the disk is full; {folder} keeps what was computed: free some space') from error
        raise
    return FeatureCache(folder)


def _features(
    tower: nn.Module, paths: Sequence[Path], spec: PreprocessSpec, identity: CacheIdentity
) -> NDArray[np.float16]:
    """Float16 ``[len(paths), n_patches, width]``."""
    pixels = np.concatenate([preprocess(read_image(path), spec) for path in paths])
    with torch.inference_mode():
        found = tower(torch.from_numpy(pixels)).numpy()
    if found.shape[1:] != (identity.n_patches, identity.width):
        raise DatasetError(f'the tower gives {found.shape[1:]} features, expected {identity.n_patches, identity.width}')
    if not np.abs(found).max() <= _LARGEST_HALF:  # NaN, too
        raise DatasetError(f'the features of {paths[0]} or one of the {len(paths) - 1} after it do not fit float16')
    return np.asarray(found, np.float16)


def _read_identity(folder: Path) -> CacheIdentity:
    path = folder / IDENTITY
    try:
        return CacheIdentity(**json.loads(path.read_text(encoding='utf-8')))
    except FileNotFoundError as error:
        raise DatasetMissingError(
            f'there are no features in {folder}: compute them with `mobilevlm train features`'
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise DatasetError(f'{path} cannot be read ({error}): delete the folder and compute it again') from error


def _read_keys(folder: Path) -> list[str]:
    """The keys that were written whole."""
    path = folder / KEYS
    if not path.is_file():
        return []
    text = path.read_text(encoding='ascii', errors='replace')
    keys = text[: text.rfind('\n') + 1].splitlines()
    if text and not text.endswith('\n'):  # a line was cut off: write on after the last whole one
        path.write_text(''.join(f'{key}\n' for key in keys), encoding='ascii')
    if any(len(key) != _KEY_CHARACTERS for key in keys) or len(set(keys)) != len(keys):
        raise DatasetError(f'{path} is damaged: delete {folder} and compute it again')
    return keys


def _check_room(folder: Path, n_kept: int, n_new: int, row_bytes: int, max_bytes: int) -> None:
    needed = (n_kept + n_new) * row_bytes
    if needed > max_bytes:
        raise DiskSpaceError(
            f'features of {n_kept + n_new} images take {needed >> 20} MiB, more than the {max_bytes >> 20} MiB that '
            'were allowed: take fewer images or allow more'
        )
    free = shutil.disk_usage(folder).free
    if n_new and free < n_new * row_bytes + _ROOM_LEFT_BYTES:
        raise DiskSpaceError(
            f'features of {n_new} images take {n_new * row_bytes >> 20} MiB, but {folder} has {free >> 20} MiB free '
            f'(and {_ROOM_LEFT_BYTES >> 20} MiB are left alone)'
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < _KEY_CHARACTERS else f'{text[:12]}…'
