"""What is recorded is what the whole model in PyTorch computes, and what does not fit is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
import tiny_checkpoints
import torch
from numpy.typing import NDArray
from transformers import CLIPVisionModel

from mobilevlm_ros.build.record import n_language_parameters, record_reference
from mobilevlm_ros.build.reference import QUESTIONS, Reference
from mobilevlm_ros.build.stages import SilentReporter
from mobilevlm_ros.errors import BuildError, DependencyError
from mobilevlm_ros.model.config import ModelConfig, VisionConfig
from mobilevlm_ros.model.layout import language_tensors
from mobilevlm_ros.model.manifest import known_models, read_manifest
from mobilevlm_ros.model.mobilevlm import IMAGE_TOKEN, MobileVLM, load_mobilevlm
from mobilevlm_ros.model.towers import clip_config
from mobilevlm_ros.runtime.preprocess import PreprocessSpec, preprocess
from mobilevlm_ros.runtime.prompt import TEMPLATES

Weights = dict[str, NDArray[np.float32]]
CONFIG = tiny_checkpoints.config()
TENSORS = tiny_checkpoints.random_tensors(CONFIG)
ROOT = 'model.vision_tower.vision_tower.'
SHAPES = [(48, 64), (64, 48), (40, 40), (33, 97), (7, 5), (32, 32)]


class ByteTokenizer:
    """One token a byte, so that prompts are easy to predict."""

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        return ([1] if bos else []) + [3 + byte for byte in text.encode()]


def pictures(shapes: list[tuple[int, int]]) -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(4)
    return [random.integers(0, 255, (*shape, 3), dtype=np.uint8) for shape in shapes]


def vision_weights(tensors: Weights) -> Weights:
    return {name.removeprefix(ROOT): value for name, value in tensors.items() if not is_language(name)}


def is_language(name: str) -> bool:
    return not name.startswith((ROOT, 'model.mm_projector.'))


def record(
    config: ModelConfig = CONFIG, tensors: Weights = TENSORS, shapes: list[tuple[int, int]] = SHAPES[:2], **options: Any
) -> Reference:
    language = {name: value for name, value in tensors.items() if is_language(name)}
    template = TEMPLATES['v1']('Be brief.')
    return record_reference(
        config,
        vision_weights(tensors),
        language,
        ByteTokenizer(),
        template,
        pictures(shapes),
        SilentReporter(),
        **options,
    )


@pytest.fixture(scope='module', params=['ldpnet', 'ldpnetv2', 'mlp2x_gelu'])
def kind(request: pytest.FixtureRequest) -> ModelConfig:
    return tiny_checkpoints.config(request.param)


@pytest.fixture(scope='module')
def whole(kind: ModelConfig) -> MobileVLM:
    """The model as training and evaluation know it; put together by other code than the record's."""
    return load_mobilevlm(kind, tiny_checkpoints.random_tensors(kind)).requires_grad_(False)


@pytest.fixture(scope='module')
def recorded(kind: ModelConfig) -> Reference:
    return record(kind, tiny_checkpoints.random_tensors(kind))


# -- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('aspect', ['pad', 'square'])
@pytest.mark.parametrize('shape', SHAPES)
def test_pixels_are_those_of_the_published_preprocessing(shape: tuple[int, int], aspect: Any) -> None:
    """And of the runtime's, to the bit: both were written from the same source by different hands."""
    (image,) = record(replace(CONFIG, aspect=aspect), shapes=[shape], n_tokens=1).images

    spec = PreprocessSpec(32, aspect)
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (spec.mean, spec.std))
    levels = (preprocess(image.rgb_hwc, spec)[0] * std + mean) * 255
    np.testing.assert_allclose(levels, image.resized_chw, atol=1e-3)


def test_visual_tokens_are_those_of_the_whole_model(recorded: Reference, whole: MobileVLM) -> None:
    for image in recorded.images:
        pixels = torch.from_numpy(preprocess(image.rgb_hwc, PreprocessSpec(32)))
        np.testing.assert_allclose(image.visual_tokens, whole.encode_images(pixels)[0].numpy(), atol=2e-5)


def test_logits_and_answers_are_those_of_the_whole_model(recorded: Reference, whole: MobileVLM) -> None:
    """The prompt spliced by the model itself, and each token computed without keys and values of earlier ones."""
    for image in recorded.images:
        pixels = torch.from_numpy(preprocess(image.rgb_hwc, PreprocessSpec(32)))
        for answer in image.answers:
            ids = [*answer.before_ids, IMAGE_TOKEN, *answer.after_ids]
            assert whole.generate(torch.tensor([ids]), pixels, max_new_tokens=12, stop_tokens=()) == list(
                answer.greedy_ids
            )
            logits = whole(torch.tensor([[*ids, *answer.greedy_ids]]), pixels).logits[0].numpy()
            first = len(answer.before_ids) + len(image.visual_tokens) + len(answer.after_ids) - 1
            np.testing.assert_allclose(answer.logits, logits[first : first + 4], atol=1e-3)


def test_features_are_those_of_transformers_without_the_class_token() -> None:
    (image, _) = record().images
    vision = CONFIG.vision
    assert vision is not None
    tower = CLIPVisionModel(clip_config(vision)).eval()
    own = {name: value for name, value in vision_weights(TENSORS).items() if name.startswith('vision_model.')}
    named = {name.removeprefix('vision_model.'): torch.from_numpy(value) for name, value in own.items()}
    (getattr(tower, 'vision_model', None) or tower).load_state_dict(named, strict=False)
    pixels = torch.from_numpy(preprocess(image.rgb_hwc, PreprocessSpec(32)))

    with torch.inference_mode():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]

    assert image.features is not None
    np.testing.assert_allclose(image.features, hidden[0, 1:].numpy(), atol=1e-5)


def test_prompts_are_those_of_the_template() -> None:
    (image, _) = record().images

    assert [answer.question for answer in image.answers] == list(QUESTIONS)
    for answer in image.answers:
        assert bytes(token - 3 for token in answer.before_ids[1:]).decode() == 'Be brief. USER: '
        assert answer.before_ids[0] == 1
        assert bytes(token - 3 for token in answer.after_ids).decode() == f'\n{answer.question} ASSISTANT:'


def test_how_much_is_kept() -> None:
    first, second = record(n_tokens=5, n_kept=2, n_features=1).images

    assert first.features is not None
    assert second.features is None
    for answer in (*first.answers, *second.answers):
        assert len(answer.greedy_ids) == 5
        assert answer.logits.shape == (2, CONFIG.language.n_vocab)
        assert [int(row.argmax()) for row in answer.logits] == list(answer.greedy_ids[:2])


def test_blocks_that_never_run_need_no_weights() -> None:
    vision = CONFIG.vision
    assert vision is not None
    last = f'{ROOT}vision_model.encoder.layers.{vision.n_blocks - 1}.'
    dead = {name for name in TENSORS if name.startswith(last) or 'post_layernorm' in name}
    assert len(dead) == 18

    with_all, without = record(), record(tensors={name: value for name, value in TENSORS.items() if name not in dead})

    np.testing.assert_array_equal(with_all.images[0].visual_tokens, without.images[0].visual_tokens)


# -- memory ---------------------------------------------------------------------------------------------------------


def with_free(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    memory = psutil.virtual_memory()._replace(available=n_bytes)
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: memory)


WORKING = 2 << 30


def test_who_computed_it_and_in_which_precision_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = record()
    with_free(monkeypatch, WORKING + 3 * n_language_parameters(CONFIG.language))
    halved = record()

    assert exact.made_by == exact.language_made_by == halved.made_by
    assert exact.made_by.startswith(f'PyTorch {torch.__version__.split("+")[0]}, transformers ')
    assert exact.made_by.endswith(', float32')
    assert halved.language_made_by.endswith(', bfloat16')
    # The tower is computed exactly in any case.
    np.testing.assert_array_equal(exact.images[0].visual_tokens, halved.images[0].visual_tokens)
    a, b = exact.images[0].answers[0].logits[0], halved.images[0].answers[0].logits[0]
    assert 0.99 < float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) < 0.9999999


def test_too_little_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, WORKING)

    with pytest.raises(BuildError, match=r'takes 2048 MiB of memory, 2048 MiB are free: .*copy the bundle'):
        record()


@pytest.mark.parametrize('name', [name for name in known_models() if not name.startswith('ablations/')])
def test_parameters_of_the_matrices_are_counted(name: str) -> None:
    config = read_manifest(name).language
    matrices = [shape for _, shape in language_tensors(config) if len(shape) == 2]

    assert n_language_parameters(config) == sum(a * b for a, b in matrices)


# -- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'shown'),
    [
        (f'{ROOT}vision_model.encoder.layers.0.mlp.fc1.weight', r'vision_model\.encoder\.layers\.0\.mlp\.fc1\.weight'),
        ('model.mm_projector.mlp.mlp.0.weight', r'model\.mm_projector\.mlp\.mlp\.0\.weight'),
    ],
)
def test_a_missing_or_misshapen_tensor_is_named(name: str, shown: str) -> None:
    missing = {other: value for other, value in TENSORS.items() if other != name}

    with pytest.raises(BuildError, match=rf'expected the tensor {shown} of shape .*, found none'):
        record(tensors=missing)
    with pytest.raises(BuildError, match=rf'expected the tensor {shown} of shape .*, found one of shape \(3, 4\)'):
        record(tensors=missing | {name: np.zeros((3, 4), np.float32)})


@pytest.mark.parametrize('library', ['torch', 'transformers'])
def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)

    with pytest.raises(DependencyError, match=rf'import of {library} halted.*pip install torch transformers'):
        record()


def test_another_patch_size_gives_another_grid() -> None:
    vision = CONFIG.vision
    assert isinstance(vision, VisionConfig)
    fine = replace(CONFIG, vision=replace(vision, patch_size=4))

    (image,) = record(fine, tiny_checkpoints.random_tensors(fine), [(32, 32)]).images

    assert image.features is not None
    assert image.features.shape == (64, 32)
    assert image.visual_tokens.shape == (16, 64)
