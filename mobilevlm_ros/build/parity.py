"""Is this bundle the model that it claims to be? Its engines against what PyTorch computed, stage by stage.

Every stage is fed what PyTorch fed it, so that an error shows where it arises; the last stages then run from the image
file to the answer. A stage below its limit fails the build. What is compared: the preprocessed pixels, the tower's
features (of the exported graph), the visual tokens of the engine as deployed, the language model's logits (less their
mean, which no probability depends on) under PyTorch's visual tokens and answers, and the greedy answer of the whole
path.

A cosine does not see a wrong scale (tokens that were normalised twice, a forgotten division), which a language model
does see. So wherever a cosine has a limit, the ratio of the lengths has one, too: it may be off by as much as the limit
of the cosine lets the direction be off, ``sqrt(2 (1 - limit))``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.build.reference import Reference, ReferenceAnswer, ReferenceImage
from mobilevlm_ros.errors import BuildError, ParityError
from mobilevlm_ros.runtime.bundle import Bundle
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.language import EmbeddingSegment, LanguageEngine, Segment, TokenSegment
from mobilevlm_ros.runtime.preprocess import PreprocessSpec, preprocess
from mobilevlm_ros.runtime.prompt import PromptTemplate
from mobilevlm_ros.runtime.vision import VisionEngine

__all__ = [
    'PLAN_TOKENS',
    'REPORT',
    'VISUAL_TOKENS',
    'ParityReport',
    'StageParity',
    'check_language',
    'check_preprocess',
    'check_tower',
    'check_vision',
    'read_report',
]

REPORT = 'parity.json'
VISUAL_TOKENS, PLAN_TOKENS = 'visual tokens', 'visual tokens of the plan'
_Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]
_PIXEL = 1 / 255
_GRAPH_COSINE = 0.99999
_BY_SIZE = ('Q4_0', 'Q4_K_S', 'Q4_K_M', 'Q5_K_M', 'Q6_K', 'Q8_0', 'F16')


@dataclass(frozen=True)
class StageParity:
    """How near one stage is.

    :ivar metric: ``cosine`` (larger is nearer), ``levels`` (largest difference in grey levels of 255), or ``equal``
        (share of equal token ids).
    :ivar worst: over all images and questions.
    :ivar limit: ``worst`` must not be beyond it; None: reported only.
    :ivar scale: for a cosine, the length of what was found over that of what was expected, where it is furthest off 1.
    """

    stage: str
    metric: str
    worst: float
    mean: float
    n: int
    limit: float | None = None
    scale: float | None = None

    @property
    def passed(self) -> bool:
        """Whether it is near enough."""
        if self.limit is None:
            return True
        if self.metric == 'levels':
            return self.worst <= self.limit
        return self.worst >= self.limit and (self.scale is None or abs(self.scale - 1) <= self.scale_limit)

    @property
    def scale_limit(self) -> float:
        """How far ``scale`` may be off 1; see the module."""
        return math.sqrt(2 * (1 - (self.limit or 0.0)))

    def __str__(self) -> str:
        """For people."""
        text = f'{self.stage}: {self.metric} {self.worst:.6f}'
        if self.limit is not None:
            text += f', expected {self.limit:g}'
        if self.scale is None:
            return text
        allowed = '' if self.limit is None else f', expected 1 ± {self.scale_limit:.4f}'
        return f'{text} (scale {self.scale:.4f}{allowed})'


@dataclass(frozen=True)
class ParityReport:
    """All stages of one bundle."""

    reference: str
    language_reference: str
    stages: tuple[StageParity, ...]

    @property
    def passed(self) -> bool:
        """Whether every stage is near enough."""
        return all(stage.passed for stage in self.stages)

    def as_json(self) -> str:
        """As JSON text."""
        stages = [{**asdict(stage), 'passed': stage.passed} for stage in self.stages]
        content = {'reference': self.reference, 'language_reference': self.language_reference, 'stages': stages}
        return json.dumps(content, indent=2) + '\n'

    def raise_if_failed(self, precision: str, quantization: str) -> None:
        """Refuse a bundle that is too far off.

        :param precision: of its vision engine, for the advice, as is the quantization of its language model.
        :raise ParityError: if a stage is not near enough; says what to try.
        """
        failed = [stage for stage in self.stages if not stage.passed]
        if not failed:
            return
        raise ParityError(
            f'the bundle differs from {self.reference}: {"; ".join(map(str, failed))}. '
            f'{_advice(failed, precision, quantization)}'
        )


def read_report(bundle: Bundle) -> ParityReport:
    """The report of a bundle.

    :raise BuildError: if it has none, or a damaged one.
    """
    path = bundle.path / bundle.description.get('parity', REPORT)
    try:
        content = json.loads(path.read_text())
        stages = tuple(
            StageParity(
                stage=str(stage['stage']),
                metric=str(stage['metric']),
                worst=float(stage['worst']),
                mean=float(stage['mean']),
                n=int(stage['n']),
                limit=_optional(stage['limit']),
                scale=_optional(stage.get('scale')),
            )
            for stage in content['stages']
        )
        return ParityReport(str(content['reference']), str(content['language_reference']), stages)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BuildError(f'{path} is no parity report ({error}): build the bundle again') from error


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


def _advice(failed: Sequence[StageParity], precision: str, quantization: str) -> str:
    names = {stage.stage for stage in failed}
    if names & {'preprocess', 'prompt', 'vision tower'}:
        return 'This stage must be exact: check that the checkpoint and the manifest belong together.'
    if names & {VISUAL_TOKENS, PLAN_TOKENS} and precision != 'fp32':
        calibrate = "give more --images like the robot's own for calibration, or " if precision == 'int8' else ''
        return f'{precision} loses too much with these weights: {calibrate}take a profile with a higher precision.'
    larger = _BY_SIZE[_BY_SIZE.index(quantization) + 1 :] if quantization in _BY_SIZE else ()
    if 'logits' in names and larger:
        return (
            f'{quantization} loses too much with these weights: take a profile with a larger quantization '
            f'({", ".join(larger)}).'
        )
    return 'The engine computes something else: build again, and report it if it stays so.'


def check_preprocess(reference: Reference, spec: PreprocessSpec) -> StageParity:
    """Our pixels against the published preprocessing."""
    levels = np.asarray(spec.std, np.float32)[:, None, None] / _PIXEL
    differences = [
        float(np.abs((preprocess(image.rgb_hwc, spec)[0] - _normalised(image, spec)) * levels).max())
        for image in reference.images
    ]
    return StageParity(
        'preprocess', 'levels', max(differences), float(np.mean(differences)), len(differences), limit=0.01
    )


def _normalised(image: ReferenceImage, spec: PreprocessSpec) -> NDArray[np.float32]:
    """What the published preprocessing gives, float32 ``[3, S, S]``."""
    expected = (3, spec.image_size, spec.image_size)
    if image.resized_chw.shape != expected:
        raise ParityError(
            f'PyTorch took pixels of shape {image.resized_chw.shape}, this model takes {expected}: the record is of '
            'another model, build the bundle again'
        )
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (spec.mean, spec.std))
    normalised: NDArray[np.float32] = (image.resized_chw.astype(np.float32) * np.float32(_PIXEL) - mean) / std
    return normalised


def check_tower(
    reference: Reference, spec: PreprocessSpec, run: _Run, limit: float = _GRAPH_COSINE
) -> StageParity | None:
    """The tower's features; ``run`` maps pixels_nchw to those of the exported graph, ``[n_patches, width]``."""
    pairs = [(run(_normalised(i, spec)[None]), i.features) for i in reference.images if i.features is not None]
    return _cosines('vision tower', pairs, limit) if pairs else None


def check_vision(reference: Reference, spec: PreprocessSpec, vision: VisionEngine, limit: float) -> StageParity:
    """Visual tokens of the engine as deployed."""
    never = CancelToken()
    pairs = [(vision.encode(_normalised(i, spec)[None], never), i.visual_tokens) for i in reference.images]
    return _cosines(VISUAL_TOKENS, pairs, limit)


def check_language(
    reference: Reference,
    spec: PreprocessSpec,
    vision: VisionEngine,
    language: LanguageEngine,
    template: PromptTemplate,
    limit: float,
) -> list[StageParity]:
    """Prompt ids, logits and greedy tokens of the language engine, and the greedy tokens of the whole path."""
    prompts, pairs, agreed, whole = [], [], [], []
    for image in reference.images:
        rows = vision.encode(preprocess(image.rgb_hwc, spec), CancelToken())
        for answer in image.answers:
            prompts.append(float(template.chunks(answer.question, language) == _ids(answer)))
            logits, tokens = _teacher_forced(language, answer, image.visual_tokens)
            pairs += [(_centred(ours), _centred(theirs)) for ours, theirs in zip(logits, answer.logits, strict=False)]
            agreed.append(_share_equal(tokens, answer.greedy_ids))
            whole.append(_share_equal(_teacher_forced(language, answer, rows)[1], answer.greedy_ids))
    return [
        StageParity('prompt', 'equal', min(prompts), float(np.mean(prompts)), len(prompts), limit=1.0),
        _cosines('logits', pairs, limit),
        StageParity('greedy tokens', 'equal', min(agreed), float(np.mean(agreed)), len(agreed)),
        StageParity('image to tokens', 'equal', min(whole), float(np.mean(whole)), len(whole)),
    ]


def _ids(answer: ReferenceAnswer) -> tuple[list[int], list[int]]:
    return list(answer.before_ids), list(answer.after_ids)


def _teacher_forced(
    language: LanguageEngine, answer: ReferenceAnswer, rows: NDArray[np.float32]
) -> tuple[list[NDArray[np.float32]], list[int]]:
    """Logits and choices before each token of the reference's answer, which is what is fed."""
    never = CancelToken()
    segments: list[Segment] = [TokenSegment(answer.before_ids)] if answer.before_ids else []
    segments += [EmbeddingSegment('parity', len(rows), lambda: rows), TokenSegment(answer.after_ids)]
    language.forget()
    language.prefill(segments, never)
    logits = [language.logits().copy()]
    for token in answer.greedy_ids[:-1]:
        language.append([token], never)
        logits.append(language.logits().copy())
    language.forget()
    return logits, [int(row.argmax()) for row in logits]


def _centred(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Less their mean: it changes no probability, and a large one would hide what does in every cosine."""
    return logits - logits.mean(dtype=np.float64).astype(np.float32)


def _share_equal(tokens: Sequence[int], expected: Sequence[int]) -> float:
    return float(np.mean([a == b for a, b in zip(tokens, expected, strict=True)]))


def _cosines(stage: str, pairs: Sequence[tuple[Any, Any]], limit: float) -> StageParity:
    # With numpy, whose min and max keep what is not a number: that is beyond every limit, too.
    cosines, scales = np.array([_compare(found, expected) for found, expected in pairs]).T
    scale = float(scales[np.abs(scales - 1).argmax()])
    return StageParity(stage, 'cosine', float(cosines.min()), float(cosines.mean()), len(cosines), limit, scale)


def _compare(found: NDArray[np.float32], expected: NDArray[np.float32]) -> tuple[float, float]:
    """Cosine, and length over length."""
    if found.shape != expected.shape:
        raise ParityError(f'found an output of shape {found.shape}, expected {expected.shape}: another model was built')
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    lengths = float(np.linalg.norm(a)), max(float(np.linalg.norm(b)), 1e-30)
    return float(a @ b) / max(lengths[0] * lengths[1], 1e-30), lengths[0] / lengths[1]
