"""The comparison with PyTorch: each stage catches its own kind of error, and the report says what to do about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from mobilevlm_ros.build.language_gguf import write_language_gguf
from mobilevlm_ros.build.llama_tensors import rope_order
from mobilevlm_ros.build.parity import (
    PLAN_TOKENS,
    VISUAL_TOKENS,
    ParityReport,
    StageParity,
    check_language,
    check_preprocess,
    check_tower,
    check_vision,
    read_report,
)
from mobilevlm_ros.build.reference import Reference, ReferenceAnswer, ReferenceImage
from mobilevlm_ros.build.tower_features import tower_features
from mobilevlm_ros.build.vision_graph import write_vision_graph
from mobilevlm_ros.build.vocabulary import Vocabulary
from mobilevlm_ros.errors import BuildError, ParityError
from mobilevlm_ros.model.config import VisionConfig
from mobilevlm_ros.runtime.bundle import Bundle
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.language import EmbeddingSegment, LanguageEngine, LanguageOptions, Segment, TokenSegment
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine
from mobilevlm_ros.runtime.preprocess import PreprocessSpec, preprocess
from mobilevlm_ros.runtime.prompt import TEMPLATES, PromptTemplate, Tokenizer

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]
SPEC = PreprocessSpec(32)
N_TOKENS, N_EMBD = 4, tiny_models.TinyLlama.n_embd
V1 = TEMPLATES['v1']()


class Vision:
    """Gives for each image of a reference its visual tokens, as ``change`` alters them."""

    image_size, n_tokens, n_embd, description = 32, N_TOKENS, N_EMBD, 'recorded'

    def __init__(self, reference: Reference, change: Callable[[Floats], Floats] = lambda tokens: tokens) -> None:
        self._known = [(preprocess(image.rgb_hwc, SPEC), change(image.visual_tokens)) for image in reference.images]

    def encode(self, pixels_nchw: Floats, cancel: CancelToken) -> Floats:
        return min(self._known, key=lambda pair: float(np.abs(pair[0] - pixels_nchw).max()))[1]

    def close(self) -> None:
        """Nothing."""


def answered(engine: LanguageEngine, question: str, rows: Floats, template: PromptTemplate = V1) -> ReferenceAnswer:
    """What an engine answers, in the form of a record."""
    before, after = template.chunks(question, engine)
    never = CancelToken()
    segments: list[Segment] = [TokenSegment(tuple(before)), EmbeddingSegment('image', len(rows), lambda: rows)]
    engine.forget()
    engine.prefill([*segments, TokenSegment(tuple(after))], never)
    logits, ids = [], []
    for _ in range(4):
        logits.append(engine.logits().copy())
        ids.append(int(logits[-1].argmax()))
        engine.append(ids[-1:], never)
    return ReferenceAnswer(question, tuple(before), tuple(after), tuple(ids), np.stack(logits[:2]))


def pictures() -> list[Pixels]:
    random = np.random.default_rng(1)
    coarse = random.integers(0, 255, (2, 6, 8, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(one).resize((64, 48), Image.Resampling.BICUBIC)) for one in coarse]


def resized(picture: Pixels) -> Pixels:
    """The published preprocessing before normalisation, uint8 ``[3, 32, 32]``."""
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (SPEC.mean, SPEC.std))
    levels = (preprocess(picture, SPEC)[0] * std + mean) * 255
    return np.rint(levels).astype(np.uint8)


@pytest.fixture(scope='module')
def weights() -> tiny_models.Weights:
    return tiny_models.llama_weights(tiny_models.TinyLlama(), len(tiny_models.vocabulary()[0]))


@pytest.fixture(scope='module')
def make_language(
    weights: tiny_models.Weights, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., LlamaCppEngine]]:
    """Makes language engines of the tiny model, some of its weights replaced."""
    vocabulary = Vocabulary('llama', *tiny_models.vocabulary())
    config = tiny_models.language_config(tiny_models.TinyLlama(), len(vocabulary.tokens))
    options = LanguageOptions(n_ctx=512, n_threads=1, n_threads_batch=1, kv_type='f32')
    with ExitStack() as stack:

        def make(changed: tiny_models.Weights | None = None) -> LlamaCppEngine:
            path = tmp_path_factory.mktemp('language') / 'language.gguf'
            write_language_gguf(weights | (changed or {}), config, vocabulary, path, dtype='f32', name='tiny')
            engine = LlamaCppEngine(path, options)
            stack.callback(engine.close)
            return engine

        yield make


@pytest.fixture(scope='module')
def language(make_language: Callable[..., LlamaCppEngine]) -> LlamaCppEngine:
    return make_language()


@pytest.fixture(scope='module')
def reference(language: LlamaCppEngine) -> Reference:
    """A record that the right engines equal."""
    random = np.random.default_rng(2)
    images = []
    for picture in pictures():
        rows = random.normal(size=(N_TOKENS, N_EMBD)).astype(np.float32)
        answers = tuple(answered(language, question, rows) for question in ('what is it', 'is the car red'))
        features = random.normal(size=(16, 32)).astype(np.float32) if not images else None
        images.append(ReferenceImage(picture, resized(picture), features, rows, answers))
    return Reference('PyTorch, float32', 'PyTorch, bfloat16', tuple(images))


def changed(reference: Reference, **changes: Callable[[ReferenceImage], Any]) -> Reference:
    """A record in which entries of each image are computed anew."""
    return replace(
        reference,
        images=tuple(
            replace(image, **{name: change(image) for name, change in changes.items()}) for image in reference.images
        ),
    )


def languages(reference: Reference, *arguments: Any, limit: float = 0.99999) -> dict[str, StageParity]:
    """The stages of ``check_language`` by name."""
    return {stage.stage: stage for stage in check_language(reference, SPEC, *arguments, limit)}


# -- preprocessing --------------------------------------------------------------------------------------------------


def test_the_right_preprocessing_passes(reference: Reference) -> None:
    stage = check_preprocess(reference, SPEC)

    assert stage.passed
    assert (stage.metric, stage.n) == ('levels', 2)


def shifted(image: ReferenceImage) -> Pixels:
    return np.roll(image.resized_chw, 1, axis=2)


def bilinear(image: ReferenceImage) -> Pixels:
    square = Image.new('RGB', (64, 64), tuple(int(value * 255) for value in SPEC.mean))
    square.paste(Image.fromarray(image.rgb_hwc), (0, 8))
    return np.asarray(square.resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1).copy()


def one_level(image: ReferenceImage) -> Pixels:
    pixels = image.resized_chw.copy()
    pixels[2, 5, 5] ^= 1
    return pixels


@pytest.mark.parametrize(
    'other', [shifted, bilinear, one_level, lambda image: image.resized_chw[::-1].copy()], ids=lambda f: f.__name__
)
def test_another_preprocessing_is_seen(reference: Reference, other: Callable[[ReferenceImage], Pixels]) -> None:
    """Shifted by a pixel, resized bilinearly, a single grey level off, blue for red."""
    assert not check_preprocess(changed(reference, resized_chw=other), SPEC).passed


@pytest.mark.parametrize('channel', [0, 1, 2])
def test_differences_are_told_in_grey_levels(reference: Reference, channel: int) -> None:
    def off_by_three(image: ReferenceImage) -> Pixels:
        pixels = image.resized_chw.copy()
        level = int(pixels[channel, 3, 4])
        pixels[channel, 3, 4] = level + 3 if level < 128 else level - 3
        return pixels

    stage = check_preprocess(changed(reference, resized_chw=off_by_three), SPEC)

    assert stage.worst == pytest.approx(3, abs=0.01)


def test_a_record_of_another_size_is_refused(reference: Reference) -> None:
    with pytest.raises(ParityError, match=r'shape \(3, 24, 24\), this model takes \(3, 32, 32\)'):
        check_preprocess(changed(reference, resized_chw=lambda image: image.resized_chw[:, :24, :24]), SPEC)


# -- the vision tower -----------------------------------------------------------------------------------------------


def write_tower(path: Path, weights: tiny_models.Weights, vision: VisionConfig = tiny_models.TINY_VISION) -> None:
    write_vision_graph(weights, vision, tiny_models.TINY_PROJECTOR, N_EMBD, path)


@pytest.fixture(scope='module')
def with_features(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The record with the features of a real tower for the first image."""
    path = tmp_path_factory.mktemp('tower') / 'vision.onnx'
    write_tower(path, tiny_models.vision_weights())
    first = reference.images[0]
    features = tower_features(path, preprocess(first.rgb_hwc, SPEC))
    return replace(reference, images=(replace(first, features=features), *reference.images[1:]))


def class_token_last(weights: tiny_models.Weights) -> tiny_models.Weights:
    """Every patch gets its neighbour's position, as in llama.cpp's own graph."""
    name = 'vision_model.embeddings.position_embedding.weight'
    return weights | {name: np.roll(weights[name], -1, axis=0)}


def tower_parity(reference: Reference, path: Path) -> StageParity:
    stage = check_tower(reference, SPEC, lambda pixels: tower_features(path, pixels))
    assert stage is not None
    return stage


def test_the_right_tower_passes_and_only_recorded_features_are_compared(
    with_features: Reference, tmp_path: Path
) -> None:
    write_tower(tmp_path / 'vision.onnx', tiny_models.vision_weights())

    stage = tower_parity(with_features, tmp_path / 'vision.onnx')

    assert stage.passed
    assert stage.worst == pytest.approx(1, abs=1e-6)
    assert stage.n == 1


def test_a_class_token_at_another_place_is_seen(with_features: Reference, tmp_path: Path) -> None:
    write_tower(tmp_path / 'vision.onnx', class_token_last(tiny_models.vision_weights()))

    assert not tower_parity(with_features, tmp_path / 'vision.onnx').passed


def test_a_block_too_few_is_seen(with_features: Reference, tmp_path: Path) -> None:
    short = replace(tiny_models.TINY_VISION, select_layer=-3)
    write_tower(tmp_path / 'vision.onnx', tiny_models.vision_weights(), short)

    assert not tower_parity(with_features, tmp_path / 'vision.onnx').passed


def test_without_recorded_features_there_is_no_such_stage(reference: Reference) -> None:
    def must_not_run(pixels_nchw: Floats) -> Floats:
        raise AssertionError

    assert check_tower(changed(reference, features=lambda image: None), SPEC, must_not_run) is None


# -- visual tokens --------------------------------------------------------------------------------------------------


def test_equal_tokens_pass(reference: Reference) -> None:
    stage = check_vision(reference, SPEC, Vision(reference), 0.99999)

    assert stage.passed
    assert (stage.n, stage.scale) == (2, 1.0)
    assert stage.worst == pytest.approx(1.0)


@pytest.mark.parametrize('factor', [2.0, 0.5, 1.01, 0.0])
def test_tokens_of_another_scale_fail_though_their_cosine_is_one(reference: Reference, factor: float) -> None:
    stage = check_vision(reference, SPEC, Vision(reference, lambda tokens: tokens * np.float32(factor)), 0.99999)

    assert not stage.passed
    assert stage.scale == pytest.approx(factor)
    if factor:
        assert stage.worst == pytest.approx(1.0)


def test_a_scale_within_the_limit_passes(reference: Reference) -> None:
    assert check_vision(reference, SPEC, Vision(reference, lambda tokens: tokens * np.float32(1.004)), 0.99999).passed
    assert check_vision(reference, SPEC, Vision(reference, lambda tokens: tokens * np.float32(1.1)), 0.99).passed


@pytest.mark.parametrize('row', [0, 1])
def test_what_is_no_number_fails_wherever_it_is(reference: Reference, row: int) -> None:
    """Python's ``min`` would keep or lose it, depending on its place."""
    count = iter(range(2))

    def broken(tokens: Floats) -> Floats:
        return np.full_like(tokens, np.nan) if next(count) == row else tokens

    assert not check_vision(reference, SPEC, Vision(reference, broken), 0.0).passed


def test_tokens_of_another_shape_are_another_model(reference: Reference) -> None:
    with pytest.raises(ParityError, match=r'shape \(3, 64\), expected \(4, 64\): another model'):
        check_vision(reference, SPEC, Vision(reference, lambda tokens: tokens[:3]), 0.9)


def test_tokens_in_another_order_fail(reference: Reference) -> None:
    assert not check_vision(reference, SPEC, Vision(reference, lambda tokens: tokens[::-1]), 0.9).passed


@given(
    direction=st.lists(st.floats(-1, 1), min_size=8, max_size=8),
    noise=st.floats(0, 2),
    factor=st.floats(0.1, 3),
    limit=st.sampled_from([0.99999, 0.999, 0.99, 0.95]),
)
def test_what_passes_is_near_in_its_largest_sense(
    direction: list[float], noise: float, factor: float, limit: float
) -> None:
    """Cosine and scale together bound the relative error; neither does alone."""
    expected = np.arange(1, 9, dtype=np.float64)
    found = factor * (expected + noise * np.asarray(direction))
    assume(np.linalg.norm(found) > 1e-6)
    one = ReferenceImage(np.zeros((8, 8, 3), np.uint8), np.zeros((3, 32, 32), np.uint8), None, expected[None], ())  # type: ignore[arg-type]
    reference = Reference('', '', (one,))

    stage = check_vision(reference, SPEC, Vision(reference, lambda tokens: found[None]), limit)  # type: ignore[arg-type, return-value]

    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    bound = np.sqrt(2 * (1 - limit))
    if stage.passed:
        assert error <= bound * np.sqrt(2 + bound) + 1e-6
    if error < bound / 2:
        assert stage.passed


# -- the language model ---------------------------------------------------------------------------------------------


def test_the_right_language_model_passes(reference: Reference, language: LlamaCppEngine) -> None:
    stages = languages(reference, Vision(reference), language, V1)

    assert all(stage.passed for stage in stages.values())
    assert {name: stage.n for name, stage in stages.items()} == {
        'prompt': 4,
        'logits': 8,
        'greedy tokens': 4,
        'image to tokens': 4,
    }
    assert stages['greedy tokens'].worst == stages['image to tokens'].worst == 1.0


@pytest.mark.parametrize('part', ['q_proj', 'k_proj'])
def test_rows_of_attention_in_another_order_are_seen_in_the_logits(
    reference: Reference,
    weights: tiny_models.Weights,
    make_language: Callable[..., LlamaCppEngine],
    part: str,
) -> None:
    """The order for llama.cpp's rope, applied once too often."""
    n_heads = tiny_models.TinyLlama.n_heads
    permuted = {name: rope_order(value, n_heads) for name, value in weights.items() if part in name}
    assert len(permuted) == 2

    stages = languages(reference, Vision(reference), make_language(permuted), V1)

    assert not stages['logits'].passed
    assert stages['prompt'].passed


def test_logits_of_another_scale_are_seen(
    reference: Reference, weights: tiny_models.Weights, make_language: Callable[..., LlamaCppEngine]
) -> None:
    """The greedy answer is the same, the confidence is not."""
    doubled = make_language({'lm_head.weight': 2 * weights['lm_head.weight']})

    stages = languages(reference, Vision(reference), doubled, V1, limit=0.95)

    assert not stages['logits'].passed
    assert stages['logits'].scale == pytest.approx(2, rel=1e-3)
    assert stages['greedy tokens'].worst == 1.0


def test_what_all_logits_have_in_common_counts_for_nothing(
    reference: Reference, weights: tiny_models.Weights, make_language: Callable[..., LlamaCppEngine]
) -> None:
    """It changes no probability. If it counted, a large one would bring every cosine near to 1."""

    def lifted(image: ReferenceImage) -> tuple[ReferenceAnswer, ...]:
        return tuple(replace(answer, logits=answer.logits + 1000) for answer in image.answers)

    other = make_language({'lm_head.weight': np.roll(weights['lm_head.weight'], 1, axis=0)})
    with_offset = changed(reference, answers=lifted)

    assert languages(with_offset, Vision(reference), make_language({}), V1)['logits'].passed
    assert languages(with_offset, Vision(reference), other, V1)['logits'].worst < 0.5


@pytest.mark.parametrize('other', [TEMPLATES['plain'](), TEMPLATES['v1']('Be brief.')], ids=['plain', 'system'])
def test_another_template_is_seen_in_the_prompt(
    reference: Reference, language: LlamaCppEngine, other: PromptTemplate
) -> None:
    stages = languages(reference, Vision(reference), language, other)

    assert not stages['prompt'].passed
    # The rest is fed what PyTorch was fed, so the error shows where it arises.
    assert stages['logits'].passed


def test_another_tokenizer_is_seen_in_the_prompt(reference: Reference, language: LlamaCppEngine) -> None:
    class NoSpaceInFront:
        """Tokenizes without the dummy prefix, all else as before."""

        def __init__(self, engine: Tokenizer) -> None:
            self._engine = engine

        def __getattr__(self, name: str) -> Any:
            return getattr(self._engine, name)

        def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
            return [token for token in self._engine.tokenize(text, bos=bos, special=special) if token != dummy]

    (dummy, *_) = language.tokenize('\n')

    assert not languages(reference, Vision(reference), NoSpaceInFront(language), V1)['prompt'].passed


def test_wrong_visual_tokens_show_in_the_whole_path_only(reference: Reference, language: LlamaCppEngine) -> None:
    stages = languages(reference, Vision(reference, lambda tokens: -tokens), language, V1)

    assert stages['logits'].passed
    assert stages['greedy tokens'].worst == 1.0
    assert stages['image to tokens'].worst < 1.0


def test_a_prompt_may_begin_with_the_image(language: LlamaCppEngine, reference: Reference) -> None:
    """As in ChatML's vocabularies, which have no start token."""
    rows = reference.images[0].visual_tokens
    never = CancelToken()
    language.forget()
    language.prefill([EmbeddingSegment('first', len(rows), lambda: rows), TokenSegment((300, 301))], never)
    logits = language.logits().copy()
    answer = ReferenceAnswer('x', (), (300, 301), (int(logits.argmax()),), logits[None])
    record = replace(reference, images=(replace(reference.images[0], answers=(answer,)),))

    stages = languages(record, Vision(reference), language, V1)

    assert stages['logits'].passed
    assert stages['greedy tokens'].worst == 1.0


# -- what is said ---------------------------------------------------------------------------------------------------


def failed(stage: str, **changes: Any) -> ParityReport:
    one = StageParity(stage, 'cosine', 0.9, 0.95, 3, 0.99, 1.0)
    return ParityReport('PyTorch 2', 'PyTorch 2', (replace(one, **changes), StageParity('other', 'equal', 0.5, 0.7, 2)))


@pytest.mark.parametrize(
    ('stage', 'precision', 'quantization', 'advice'),
    [
        ('preprocess', 'fp32', 'Q4_0', 'must be exact: check that the checkpoint and the manifest belong together'),
        ('vision tower', 'int8', 'Q4_0', 'must be exact'),
        ('prompt', 'fp32', 'Q4_0', 'must be exact'),
        (VISUAL_TOKENS, 'int8', 'Q4_0', 'int8 loses too much.*--images.*calibration, or take a profile with a higher'),
        (VISUAL_TOKENS, 'bf16', 'Q4_0', 'bf16 loses too much with these weights: take a profile with a higher'),
        (VISUAL_TOKENS, 'fp32', 'Q4_0', 'computes something else'),
        (PLAN_TOKENS, 'fp16', 'Q4_0', 'fp16 loses too much with these weights: take a profile'),
        ('logits', 'fp32', 'Q4_0', r'Q4_0 loses too much.*\(Q4_K_S, Q4_K_M, Q5_K_M, Q6_K, Q8_0, F16\)'),
        ('logits', 'fp32', 'Q8_0', r'larger quantization \(F16\)'),
        ('logits', 'fp32', 'F16', 'computes something else'),
        ('logits', 'fp32', 'Q4_1', 'computes something else'),
    ],
)
def test_the_error_says_what_to_try(stage: str, precision: str, quantization: str, advice: str) -> None:
    with pytest.raises(ParityError, match=rf'differs from PyTorch 2: {stage}: cosine 0\.9.*, expected 0\.99.*{advice}'):
        failed(stage).raise_if_failed(precision, quantization)


def test_the_error_names_every_failed_stage_and_no_other() -> None:
    report = failed('logits', worst=1.0, scale=2.0)
    stages = (*report.stages, StageParity('prompt', 'equal', 0.0, 0.5, 2, 1.0))

    with pytest.raises(ParityError) as raised:
        replace(report, stages=stages).raise_if_failed('fp32', 'Q4_0')

    text = str(raised.value)
    assert 'logits: cosine 1.000000, expected 0.99 (scale 2.0000, expected 1 ± 0.1414)' in text
    assert 'prompt: equal 0.000000, expected 1' in text
    assert 'other' not in text


def test_a_report_without_failures_raises_nothing() -> None:
    failed('logits', worst=0.999).raise_if_failed('fp32', 'Q4_0')


@pytest.mark.parametrize(
    ('stage', 'passes'),
    [
        (StageParity('a', 'levels', 0.01, 0, 1, 0.01), True),
        (StageParity('a', 'levels', 0.02, 0, 1, 0.01), False),
        (StageParity('a', 'equal', 0.5, 0.5, 1), True),
        (StageParity('a', 'equal', 0.5, 0.5, 1, 1.0), False),
        (StageParity('a', 'cosine', 0.99, 1, 1, 0.99, 1.0), True),
        (StageParity('a', 'cosine', 0.98, 1, 1, 0.99, 1.0), False),
        (StageParity('a', 'cosine', 1.0, 1, 1, 0.99, 1.15), False),
        (StageParity('a', 'cosine', 1.0, 1, 1, 0.99, 0.87), True),
        (StageParity('a', 'cosine', float('nan'), 1, 1, 0.0, 1.0), False),
        (StageParity('a', 'cosine', 1.0, 1, 1, 0.0, float('nan')), False),
    ],
)
def test_limits(stage: StageParity, passes: bool) -> None:
    assert stage.passed is passes
    assert ParityReport('', '', (stage,)).passed is passes


# -- the file -------------------------------------------------------------------------------------------------------


def bundle_with(folder: Path, text: str, name: str = 'parity.json') -> Bundle:
    (folder / name).write_text(text)
    return Bundle(folder, {'parity': name}, '')


@given(
    stages=st.lists(
        st.builds(
            StageParity,
            stage=st.text(max_size=9),
            metric=st.sampled_from(['cosine', 'levels', 'equal']),
            worst=st.floats(-1, 255),
            mean=st.floats(-1, 255),
            n=st.integers(0, 99),
            limit=st.none() | st.floats(0, 1),
            scale=st.none() | st.floats(0, 10),
        ),
        max_size=4,
    )
)
def test_a_report_is_read_as_it_was_written(
    stages: list[StageParity], tmp_path_factory: pytest.TempPathFactory
) -> None:
    report = ParityReport('PyTorch 2.13, float32', 'PyTorch 2.13, bfloat16', tuple(stages))

    assert read_report(bundle_with(tmp_path_factory.getbasetemp(), report.as_json(), 'p.json')) == report


def test_other_programs_find_in_the_file_whether_a_stage_passed() -> None:
    content = json.loads(failed('logits').as_json())

    assert [stage['passed'] for stage in content['stages']] == [False, True]


def test_a_report_without_scales_is_read(tmp_path: Path) -> None:
    content = json.loads(failed('logits').as_json())
    for stage in content['stages']:
        del stage['scale']

    assert read_report(bundle_with(tmp_path, json.dumps(content))).stages[0].scale is None


@pytest.mark.parametrize(
    'text',
    [
        '',
        '{',
        '[]',
        'null',
        '3',
        '{"reference": "a", "language_reference": "b"}',
        '{"reference": "a", "language_reference": "b", "stages": 3}',
        '{"reference": "a", "language_reference": "b", "stages": [3]}',
        '{"reference": "a", "language_reference": "b", "stages": [{"stage": "x"}]}',
        failed('logits').as_json().replace('0.9,', '"near",'),
        '[' * 100_000,
    ],
    ids=lambda text: text[:12] or 'empty',
)
def test_a_damaged_report_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(BuildError, match=r'parity\.json is no parity report .*build the bundle again'):
        read_report(bundle_with(tmp_path, text))


def test_a_missing_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r'parity\.json is no parity report'):
        read_report(Bundle(tmp_path, {}, ''))
