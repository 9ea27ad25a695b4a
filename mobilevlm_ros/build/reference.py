"""What PyTorch makes of a few real images: the recorded truth that a bundle's engines are held against.

One ``.npz`` file without pickles: each image, its preprocessed pixels, the tower's features, the visual tokens, and for
each question the prompt's token ids, the greedy answer's ids, and the logits before each of them. It travels inside the
bundle, so that an engine can be checked on the device where it is built, without PyTorch.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import BuildError

__all__ = ['QUESTIONS', 'Reference', 'ReferenceAnswer', 'ReferenceImage', 'read_reference', 'write_reference']

QUESTIONS = (
    'What is in the picture?',
    'Is there a person in the picture?\nAnswer the question using a single word or phrase.',
)
"""One open and one closed question, the second with the suffix that the benchmarks use."""
_VERSION = 1
_MAX_BYTES = 1 << 30
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ReferenceAnswer:
    """One question about one image.

    :ivar before_ids: prompt before the image.
    :ivar after_ids: prompt after it.
    :ivar greedy_ids: the most probable tokens, one after another.
    :ivar logits: before each of the first greedy tokens, float32 ``[n_kept, n_vocab]``.
    """

    question: str
    before_ids: tuple[int, ...]
    after_ids: tuple[int, ...]
    greedy_ids: tuple[int, ...]
    logits: Floats


@dataclass(frozen=True)
class ReferenceImage:
    """One image, and what becomes of it stage by stage.

    :ivar rgb_hwc: uint8 ``[height, width, 3]``.
    :ivar resized_chw: what the published preprocessing makes of it before it normalises, uint8 ``[3, S, S]``.
    :ivar features: of the vision tower without the class token, float32 ``[n_patches, width]``; None if not recorded.
    :ivar visual_tokens: float32 ``[n_tokens, n_embd]``.
    """

    rgb_hwc: NDArray[np.uint8]
    resized_chw: NDArray[np.uint8]
    features: Floats | None
    visual_tokens: Floats
    answers: tuple[ReferenceAnswer, ...]


@dataclass(frozen=True)
class Reference:
    """All of it.

    :ivar made_by: library, version and precision that computed it.
    :ivar language_made_by: the same of the language model, which may have been computed in a lower precision.
    """

    made_by: str
    language_made_by: str
    images: tuple[ReferenceImage, ...]


def write_reference(path: Path, reference: Reference) -> None:
    """Write the file; numbers are kept in float16, whose rounding is far below every limit held against them."""
    arrays: dict[str, NDArray[Any]] = {}
    described: list[list[dict[str, Any]]] = []
    for i, image in enumerate(reference.images):
        arrays[f'{i}.rgb_hwc'], arrays[f'{i}.resized_chw'] = image.rgb_hwc, image.resized_chw
        arrays[f'{i}.visual_tokens'] = image.visual_tokens.astype(np.float16)
        if image.features is not None:
            arrays[f'{i}.features'] = image.features.astype(np.float16)
        for j, answer in enumerate(image.answers):
            arrays[f'{i}.{j}.logits'] = answer.logits.astype(np.float16)
            for name in ('before_ids', 'after_ids', 'greedy_ids'):
                arrays[f'{i}.{j}.{name}'] = np.asarray(getattr(answer, name), np.int32)
        described.append([{'question': answer.question} for answer in image.answers])
    meta = {
        'version': _VERSION,
        'made_by': reference.made_by,
        'language_made_by': reference.language_made_by,
        'images': described,
    }
    arrays['meta'] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    path.write_bytes(buffer.getvalue())


def read_reference(path: Path) -> Reference:
    """Read what ``write_reference`` wrote; the file is not trusted.

    :raise BuildError: if it is no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MAX_BYTES:
                raise BuildError(f'{path} would unpack to more than {_MAX_BYTES >> 20} MiB: it is no reference')
        with np.load(path, allow_pickle=False) as arrays:
            meta = json.loads(arrays['meta'].tobytes())
            if meta['version'] != _VERSION:
                raise BuildError(f'{path} has version {meta["version"]}, expected {_VERSION}: build the bundle again')
            images = tuple(_image(arrays, i, answers) for i, answers in enumerate(meta['images']))
            if not any(image.answers for image in images):
                raise ValueError('it has no image with an answer')
            return Reference(str(meta['made_by']), str(meta['language_made_by']), images)
    except BuildError:
        raise
    except Exception as error:  # whatever zipfile, its decompressors, numpy and json have for damage; too many to list
        raise BuildError(f'{path} is no record of what PyTorch computes ({error}): build the bundle again') from error


def _image(arrays: Any, i: int, answers: list[dict[str, Any]]) -> ReferenceImage:
    features = _shaped(arrays[f'{i}.features'], 2) if f'{i}.features' in arrays else None
    rgb_hwc, resized_chw = arrays[f'{i}.rgb_hwc'], arrays[f'{i}.resized_chw']
    if rgb_hwc.dtype != np.uint8 or resized_chw.dtype != np.uint8 or rgb_hwc.ndim != 3 or resized_chw.ndim != 3:
        raise ValueError(f'image {i} is not uint8 [height, width, 3]')
    return ReferenceImage(
        rgb_hwc=rgb_hwc,
        resized_chw=resized_chw,
        features=features,
        visual_tokens=_shaped(arrays[f'{i}.visual_tokens'], 2),
        answers=tuple(_answer(arrays, f'{i}.{j}', answer) for j, answer in enumerate(answers)),
    )


def _answer(arrays: Any, root: str, described: dict[str, Any]) -> ReferenceAnswer:
    before, after, greedy = (
        tuple(int(token) for token in arrays[f'{root}.{name}']) for name in ('before_ids', 'after_ids', 'greedy_ids')
    )
    logits = _shaped(arrays[f'{root}.logits'], 2)
    return ReferenceAnswer(str(described['question']), before, after, greedy, logits)


def _shaped(array: NDArray[Any], n_dimensions: int) -> Floats:
    if array.ndim != n_dimensions or array.dtype != np.float16:
        raise ValueError(f'found {array.dtype} {array.shape}, expected {n_dimensions} dimensions of float16')
    return array.astype(np.float32)
