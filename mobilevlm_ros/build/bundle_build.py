"""A model times a device profile makes a bundle, and the bundle proves that it is that model.

Stages run in a work folder beside the result and are kept there, so that an interrupted build goes on where it stopped;
the result appears in one step, complete and checked, or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import mobilevlm_ros
from mobilevlm_ros.build.parity import (
    REPORT,
    ParityReport,
    check_language,
    check_preprocess,
    check_tower,
    check_vision,
)
from mobilevlm_ros.build.profile import Profile
from mobilevlm_ros.build.reference import read_reference
from mobilevlm_ros.build.stages import Reporter, Workshop, check_memory, check_room
from mobilevlm_ros.build.tower_features import tower_features
from mobilevlm_ros.build.vision_engine import VisionFiles, build_vision
from mobilevlm_ros.errors import BuildError, BundleError
from mobilevlm_ros.model.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from mobilevlm_ros.paths import shared_file
from mobilevlm_ros.runtime.bundle import DESCRIPTION, FORMAT_VERSION, Bundle, file_entry, open_bundle, write_description
from mobilevlm_ros.runtime.images import read_image
from mobilevlm_ros.runtime.language import LanguageOptions
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine
from mobilevlm_ros.runtime.preprocess import Aspect, PreprocessSpec, preprocess
from mobilevlm_ros.runtime.prompt import described_template
from mobilevlm_ros.runtime.vision.opening import open_engine

__all__ = ['Source', 'build_bundle', 'read_images']

_RECIPE = 4
"""Part of a bundle's sources: raised when the way of building changes, so that old bundles are built again."""
_IMAGES = ('.png', '.jpg', '.jpeg', '.webp')
_MAX_IMAGES = 64
_MMPROJ = 'mmproj.gguf'
_WORKING_BYTES = 512 << 20
_QUESTION_TOKENS = 64
REFERENCE = 'reference.npz'


class Source(Protocol):
    """Where a model comes from: a published checkpoint, or nano's packages.

    :ivar answers: what was measured of its answers, as in a bundle's description; empty if nothing was.
    """

    name: str
    warning: str
    vision: VisionConfig
    projector: ProjectorConfig
    n_embd: int
    n_ctx: int
    aspect: Aspect
    prompt: dict[str, str]
    answers: dict[str, Any]

    def identity(self) -> list[str]:
        """Names and hashes of all that goes in."""
        ...

    def room_bytes(self, profile: Profile) -> int:
        """What its language model takes on disk while it is made."""
        ...

    def memory_bytes(self) -> int:
        """What building it takes of memory."""
        ...

    def kv_bytes(self, n_ctx: int) -> int:
        """What keys and values of a context take in float16."""
        ...

    def vision_weights(self) -> Mapping[str, NDArray[np.float32]]:
        """Tensors of tower and projector, named as ``vision_graph`` wants them."""
        ...

    def build_language(self, workshop: Workshop, profile: Profile, inputs: Sequence[object]) -> dict[str, Any]:
        """Make the GGUF files; returns file, quantization and perhaps adapter for the description."""
        ...

    def build_reference(
        self, workshop: Workshop, images: Sequence[NDArray[np.uint8]], inputs: Sequence[object]
    ) -> None:
        """Make ``reference.npz``."""
        ...


def build_bundle(
    source: Source,
    profile: Profile,
    out: Path,
    reporter: Reporter,
    images: Sequence[NDArray[np.uint8]] = (),
    *,
    mmproj: bool = False,
) -> Bundle:
    """Build a bundle, or find it finished.

    :param images: uint8 ``[height, width, 3]``: to compare with PyTorch, and to calibrate int8; none: those shipped.
    :param mmproj: also write ``mmproj.gguf``, which llama.cpp's own tools read (and compute wrongly).
    :raise BuildError: if an ingredient is missing, damaged or does not fit, or disk or memory do not suffice.
    :raise ParityError: if the engines compute something else than the model; finished stages are kept.
    :raise DependencyError: if a library that only building needs is missing.
    """
    reporter.step('ingredients')
    inputs = [f'recipe {_RECIPE}', *source.identity()]
    sources = [*inputs, f'profile {profile}']
    if images:
        sources.append(f'images {hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()[:16]}')
    if mmproj:
        sources.append(_MMPROJ)
    finished = _finished(out, sources)
    if finished is not None:
        reporter.step(f'{source.name} is built already: {out}')
        return finished
    _check_context(source, profile)
    images = images or read_images(shared_file('models/calibration'))
    spec = PreprocessSpec(source.vision.image_size, source.aspect, source.vision.mean, source.vision.std)
    vision_bytes = 8 * _n_parameters(source)
    check_room(out.parent, source.room_bytes(profile) + vision_bytes + (256 << 20), f'building {source.name}')
    check_memory(source.memory_bytes(), f'building {source.name}')
    with closing(Workshop(out, reporter)) as workshop:
        # First, since it refuses some models, and takes seconds.
        extra = [_build_mmproj(workshop, source, inputs)] if mmproj else []
        language = source.build_language(workshop, profile, inputs)
        vision = build_vision(
            workshop,
            source.vision_weights,
            source.vision,
            source.projector,
            source.n_embd,
            profile,
            [preprocess(image, spec) for image in images],
            inputs,
        )
        source.build_reference(workshop, images[:3], inputs)
        try:
            description = _description(source, profile, language, vision, spec, sources)
            reporter.step('comparing the engines with PyTorch')
            report = _check(workshop.folder, description, profile, spec, vision, reporter)
            report.raise_if_failed(profile.vision.precision, language['quantization'])
            workshop.path(REPORT).write_text(report.as_json())
            if vision.temporary_stage:
                workshop.discard(vision.temporary_stage)
            engines = [*vision.names, language['file'], *([language['adapter']] if 'adapter' in language else [])]
            names = [*engines, REFERENCE, REPORT, *extra]
            description['files'] = {name: file_entry(workshop.path(name)) for name in sorted(names)}
            _check_budget(source, profile, description, engines)
            write_description(workshop.folder, description)
        except OSError as error:
            raise BuildError(
                f'{error.filename or workshop.folder}: {error.strerror or error}. Free some space, or choose another '
                'place with --out; finished stages are kept.'
            ) from error
        workshop.finish([DESCRIPTION, *names])
    return open_bundle(out, verify_hashes=False)


def _check_context(source: Source, profile: Profile) -> None:
    n_ctx = profile.language.get('n_ctx', source.n_ctx)
    needed = source.projector.grid_out(source.vision.grid) ** 2 + _QUESTION_TOKENS
    if n_ctx > source.n_ctx:
        raise BuildError(
            f'the profile {profile.name} asks for a context of {n_ctx} positions; {source.name} was trained with '
            f'{source.n_ctx}: lower n_ctx'
        )
    if n_ctx < needed:
        raise BuildError(
            f'a context of {n_ctx} positions has no room for an image of {source.name} and a question, which take '
            f'{needed}: raise n_ctx in the profile {profile.name}'
        )


def _description(
    source: Source,
    profile: Profile,
    language: dict[str, Any],
    vision: VisionFiles,
    spec: PreprocessSpec,
    sources: list[str],
) -> dict[str, Any]:
    settings = dict(profile.language)
    n_ctx = settings.pop('n_ctx', source.n_ctx)
    threads = {'n_threads': profile.vision.n_threads} if profile.vision.n_threads else {}
    return {
        'format_version': FORMAT_VERSION,
        'name': source.name,
        'profile': profile.name,
        'warning': source.warning,
        'generator': f'mobilevlm_ros {mobilevlm_ros.__version__}',
        'sources': sources,
        'vision': {
            'backend': profile.vision.backend,
            'precision': profile.vision.precision,
            'file': vision.names[0],
            'image_size': spec.image_size,
            'n_tokens': source.projector.grid_out(source.vision.grid) ** 2,
            'aspect': spec.aspect,
            'mean': list(spec.mean),
            'std': list(spec.std),
            **threads,
        },
        'language': {**settings, **language, 'n_ctx': n_ctx},
        'prompt': source.prompt,
        'parity': REPORT,
        **({'answers': source.answers} if source.answers else {}),
    }


def _check(
    folder: Path,
    description: dict[str, Any],
    profile: Profile,
    spec: PreprocessSpec,
    vision: VisionFiles,
    reporter: Reporter,
) -> ParityReport:
    reference = read_reference(folder / REFERENCE)
    stages = [check_preprocess(reference, spec)]
    reporter.progress(1, 4)
    limit = 0.999 if profile.vision.precision == 'fp16' else 0.99999
    tower = check_tower(reference, spec, lambda pixels: tower_features(vision.graph, pixels), limit)
    stages += [tower] if tower is not None else []
    reporter.progress(2, 4)
    template = described_template(description['prompt'])
    settings = {k: v for k, v in description['language'].items() if k not in ('file', 'adapter', 'quantization')}
    with ExitStack() as stack:
        # A plan is built and checked on the device; here its graph stands for it.
        backend = 'onnxruntime' if profile.vision.backend == 'tensorrt' else profile.vision.backend
        engine = open_engine(backend, folder / description['vision']['file'], profile.vision.precision)
        stack.callback(engine.close)
        stages.append(check_vision(reference, spec, engine, profile.parity.vision_cosine))
        reporter.progress(3, 4)
        adapter = folder / description['language']['adapter'] if 'adapter' in description['language'] else None
        language = LlamaCppEngine(folder / description['language']['file'], LanguageOptions(**settings), adapter)
        stack.callback(language.close)
        stages += check_language(reference, spec, engine, language, template, profile.parity.logits_cosine)
    reporter.progress(4, 4)
    return ParityReport(reference.made_by, reference.language_made_by, tuple(stages))


def _build_mmproj(workshop: Workshop, source: Source, inputs: Sequence[object]) -> str:
    from mobilevlm_ros.build.mmproj_gguf import DEFECTS, write_mmproj_gguf

    config = ModelConfig(source.name, replace(LanguageConfig(), n_embd=source.n_embd), source.vision, source.projector)
    workshop.stage(
        'mmproj',
        'mmproj for llama.cpp',
        inputs,
        [_MMPROJ],
        lambda folder: write_mmproj_gguf(source.vision_weights(), config, folder / _MMPROJ),
    )
    workshop.reporter.step(f'note on {_MMPROJ}: {DEFECTS}')
    return _MMPROJ


def _check_budget(source: Source, profile: Profile, description: dict[str, Any], engines: Sequence[str]) -> None:
    """Refuse a bundle that takes more memory than its profile allows."""
    if not profile.memory_mib:
        return
    n_bytes = sum(description['files'][name]['bytes'] for name in engines)
    n_ctx, n_frames = description['language']['n_ctx'], description['language'].get('frame_cache', 0)
    n_prompt = description['vision']['n_tokens'] + _QUESTION_TOKENS
    n_bytes += source.kv_bytes(n_ctx) + n_frames * source.kv_bytes(n_prompt) + _WORKING_BYTES
    if n_bytes > profile.memory_mib << 20:
        raise BuildError(
            f'{source.name} for {profile.name} would take about {n_bytes >> 20} MiB when loaded; the profile allows '
            f'{profile.memory_mib}. Take a smaller model, or a smaller quantization, n_ctx or frame_cache.'
        )


def _n_parameters(source: Source) -> int:
    """Of tower and projector, roughly."""
    v, d = source.vision, source.n_embd
    return v.n_blocks * (4 * v.width**2 + 2 * v.width * v.mlp_width) + v.width * d + 4 * d * d


def _finished(out: Path, sources: list[str]) -> Bundle | None:
    try:
        bundle = open_bundle(out, verify_hashes=False)
    except BundleError:
        return None
    return bundle if bundle.description['sources'] == sources else None


def read_images(folder: Path) -> list[NDArray[np.uint8]]:
    """All pictures of a folder, in the order of their names.

    :raise BuildError: if there is none, or more than is sensible.
    :raise BadImageError: if one cannot be decoded.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGES)
    except OSError as error:
        raise BuildError(f'the pictures in {folder} cannot be read: {error.strerror}') from error
    if not 0 < len(paths) <= _MAX_IMAGES:
        raise BuildError(f'{folder} holds {len(paths)} pictures ({" ".join(_IMAGES)}); expected 1 to {_MAX_IMAGES}')
    return [read_image(path) for path in paths]
