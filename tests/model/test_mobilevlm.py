"""The whole model: images in place of their token by the published rules, greedy answers, weights in one at a time."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from mobilevlm_ros.errors import CheckpointShapeError, SettingsError
from mobilevlm_ros.model.layout import expected_tensors
from mobilevlm_ros.model.mobilevlm import IGNORED_LABEL, IMAGE_TOKEN, MobileVLM, load_mobilevlm, published_name

CONFIG = tiny_checkpoints.config('ldpnetv2')
TENSORS = tiny_checkpoints.random_tensors(CONFIG)
N_ROWS = 4  # visual tokens of one image


@pytest.fixture(scope='module')
def model() -> MobileVLM:
    return load_mobilevlm(CONFIG, TENSORS)


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def embed(model: MobileVLM, *ids: int) -> Tensor:
    return model.language.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))


def equal(found: Tensor, *expected: Tensor) -> None:
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-6)


# -- splicing -----------------------------------------------------------------------------------------------------


def test_an_image_takes_the_place_of_its_token(model: MobileVLM) -> None:
    (image,) = model.encode_images(images(1))

    spliced = model.splice(
        torch.tensor([[1, 5, IMAGE_TOKEN, 7]]), images(1), labels=torch.tensor([[-100, 5, IMAGE_TOKEN, 7]])
    )

    equal(spliced.embeddings[0], embed(model, 1, 5), image, embed(model, 7))
    assert spliced.attention_mask.tolist() == [[1] * 7]
    assert spliced.labels is not None
    assert spliced.labels.tolist() == [[-100, 5, -100, -100, -100, -100, 7]]


def test_several_images_come_in_order(model: MobileVLM) -> None:
    first, second, third = model.encode_images(images(3))

    spliced = model.splice(torch.tensor([[IMAGE_TOKEN, 5, IMAGE_TOKEN], [6, IMAGE_TOKEN, 7]]), images(3), labels=None)

    equal(spliced.embeddings[0], first, embed(model, 5), second)
    equal(spliced.embeddings[1, :6], embed(model, 6), third, embed(model, 7))
    assert spliced.labels is None


def test_shorter_samples_are_padded_with_nothing_on_the_right(model: MobileVLM) -> None:
    ids = torch.tensor([[1, IMAGE_TOKEN, 5, 6], [1, 5, 6, 0]])

    spliced = model.splice(ids, images(2), attention_mask=ids != 0, labels=ids)

    assert spliced.attention_mask.tolist() == [[1] * 7, [1, 1, 1, 0, 0, 0, 0]]
    assert spliced.labels is not None
    assert spliced.labels[1].tolist() == [1, 5, 6, 0, -100, -100, -100]
    equal(spliced.embeddings[1], embed(model, 1, 5, 6, 0), torch.zeros(3, CONFIG.language.n_embd))


def test_a_text_in_a_mixed_batch_uses_up_an_image_unseen(model: MobileVLM) -> None:
    _, second, third = model.encode_images(images(3))

    spliced = model.splice(torch.tensor([[5, 6, 7], [IMAGE_TOKEN, 6, 7], [5, IMAGE_TOKEN, 7]]), images(3))

    equal(spliced.embeddings[0, :3], embed(model, 5, 6, 7))
    equal(spliced.embeddings[1], second, embed(model, 6, 7))
    equal(spliced.embeddings[2], embed(model, 5), third, embed(model, 7))


@pytest.mark.parametrize('as_list', [False, True])
def test_images_of_one_slot_follow_each_other(model: MobileVLM, as_list: bool) -> None:
    rows = model.encode_images(images(4))
    slots: Any = [images(4)[:2], images(4)[2:]]

    spliced = model.splice(torch.tensor([[5, IMAGE_TOKEN], [IMAGE_TOKEN, 6]]), slots if as_list else torch.stack(slots))

    equal(spliced.embeddings[0], embed(model, 5), rows[0], rows[1])
    equal(spliced.embeddings[1], rows[2], rows[3], embed(model, 6))


def test_slots_may_have_different_numbers_of_images(model: MobileVLM) -> None:
    rows = model.encode_images(images(3))

    spliced = model.splice(torch.tensor([[5, IMAGE_TOKEN], [IMAGE_TOKEN, 6]]), [images(3)[:1], images(3)[1:]])

    equal(spliced.embeddings[0, :5], embed(model, 5), rows[0])
    equal(spliced.embeddings[1], rows[1], rows[2], embed(model, 6))


@pytest.mark.parametrize(
    ('ids', 'n_images', 'message'),
    [
        ([[IMAGE_TOKEN, 5]], 0, 'room for 1 images .*, found 0'),
        ([[IMAGE_TOKEN, 5]], 2, 'room for 1 images .*, found 2'),
        ([[5, 6], [IMAGE_TOKEN, 6]], 1, 'room for 2 images .*, found 1'),
    ],
)
def test_images_and_slots_must_be_as_many(model: MobileVLM, ids: list[list[int]], n_images: int, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        model.splice(torch.tensor(ids), images(n_images) if n_images else None)


SAMPLES = st.lists(st.lists(st.sampled_from([IMAGE_TOKEN, 5, 6, 7, 8]), min_size=1, max_size=6), min_size=1, max_size=4)


@cache
def same_model() -> MobileVLM:
    """For tests of hypothesis, which take no fixtures."""
    return load_mobilevlm(CONFIG, TENSORS).requires_grad_(False)


@settings(max_examples=25, deadline=None)
@given(samples=SAMPLES)
def test_any_batch_is_spliced_as_the_published_code_does(samples: list[list[int]]) -> None:
    model = same_model()
    longest = max(map(len, samples))
    ids = torch.tensor([sample + [0] * (longest - len(sample)) for sample in samples])
    n_slots = sum(max(1, sample.count(IMAGE_TOKEN)) for sample in samples)
    rows = model.encode_images(images(n_slots))

    spliced = model.splice(ids, images(n_slots), attention_mask=ids != 0, labels=ids)

    # In lists, one position after the other; the mask as the published code lengthens it: ones on the left.
    expected, slot = [], 0
    for sample in ids.tolist():
        line: list[tuple[Tensor, int]] = []
        for token in sample:
            if token == IMAGE_TOKEN:
                line += [(row, IGNORED_LABEL) for row in rows[slot]]
                slot += 1
            else:
                line.append((embed(model, token)[0], token))
        slot += IMAGE_TOKEN not in sample
        mask = [1] * (len(line) - longest) + [int(token != 0) for token in sample]
        expected.append((line, mask))
    length = max(len(line) for line, _ in expected)
    assert spliced.labels is not None and spliced.embeddings.shape[:2] == (len(samples), length)
    for index, (line, mask) in enumerate(expected):
        n_padding = length - len(line)
        assert spliced.attention_mask[index].tolist() == mask + [0] * n_padding
        assert spliced.labels[index].tolist() == [label for _, label in line] + [IGNORED_LABEL] * n_padding
        equal(spliced.embeddings[index, : len(line)], torch.stack([row for row, _ in line]))
        assert not spliced.embeddings[index, len(line) :].any()


# -- forward ------------------------------------------------------------------------------------------------------


def test_loss_is_the_next_tokens_cross_entropy_over_what_counts(model: MobileVLM) -> None:
    ids = torch.tensor([[1, IMAGE_TOKEN, 5, 6, 7]])
    labels = torch.tensor([[-100, -100, -100, 6, 7]])

    output = model(ids, images(1), labels=labels)

    assert output.logits.shape == (1, 8, CONFIG.language.n_vocab)
    expected = F.cross_entropy(output.logits[0, 5:7], torch.tensor([6, 7]))
    torch.testing.assert_close(output.loss, expected)


def test_padding_changes_no_logits(model: MobileVLM) -> None:
    ids = torch.tensor([[1, IMAGE_TOKEN, 5, 6, 7], [1, 5, 6, 0, 0]])

    together = model(ids, images(2), attention_mask=ids != 0).logits
    alone = model(ids[1:, :3], images(2)[1:]).logits

    torch.testing.assert_close(together[1, :3], alone[0], rtol=1e-4, atol=1e-5)


def test_the_answer_depends_on_the_image(model: MobileVLM) -> None:
    ids = torch.tensor([[1, IMAGE_TOKEN, 5]])

    first, second = (model(ids, image[None]).logits[0, -1] for image in images(2))

    assert (first - second).abs().max() > 1e-3


def test_gradients_reach_projector_and_language_but_not_the_tower() -> None:
    model = load_mobilevlm(CONFIG, TENSORS).train()
    ids = torch.tensor([[1, IMAGE_TOKEN, 5, 6]])

    model(ids, images(1), labels=ids.where(ids > 0, IGNORED_LABEL)).loss.backward()

    without = {name.split('.')[0] for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {'vision_tower'}
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.projector.parameters())


def test_a_batch_of_texts_gives_the_projector_a_gradient_of_nothing() -> None:
    model = load_mobilevlm(CONFIG, TENSORS).train()
    ids = torch.tensor([[1, 5, 6]])

    model(ids, images(1), labels=ids).loss.backward()

    assert all(parameter.grad.abs().sum() == 0 for parameter in model.projector.parameters())


def test_a_language_model_alone_reads_text_and_refuses_images() -> None:
    config = tiny_checkpoints.config(None)
    model = load_mobilevlm(config, tiny_checkpoints.random_tensors(config))

    assert model(torch.tensor([[1, 5]])).logits.shape == (1, 2, config.language.n_vocab)
    with pytest.raises(SettingsError, match='tiny is a language model alone and takes no images'):
        model(torch.tensor([[1, IMAGE_TOKEN]]), images(1))


# -- generate -----------------------------------------------------------------------------------------------------


def greedy_without_cache(model: MobileVLM, ids: list[int], pixels: Tensor, n: int) -> list[int]:
    answer: list[int] = []
    for _ in range(n):
        answer.append(int(model(torch.tensor([ids + answer]), pixels).logits[0, -1].argmax()))
    return answer


@pytest.mark.parametrize('projector', ['ldpnet', 'ldpnetv2', 'mlp2x_gelu'])
def test_greedy_answers_are_those_of_the_whole_sequence_each_time(projector: str) -> None:
    config = tiny_checkpoints.config(projector)
    model = load_mobilevlm(config, tiny_checkpoints.random_tensors(config))
    ids = [1, 5, IMAGE_TOKEN, 9, 10]

    answer = model.generate(torch.tensor([ids]), images(1), max_new_tokens=8, stop_tokens=())

    assert answer == greedy_without_cache(model, ids, images(1), 8)


def test_an_answer_ends_before_a_stop_token(model: MobileVLM) -> None:
    ids = torch.tensor([[1, IMAGE_TOKEN, 5]])
    whole = model.generate(ids, images(1), max_new_tokens=8, stop_tokens=())

    stop = whole[3]
    assert model.generate(ids, images(1), max_new_tokens=8, stop_tokens=(stop,)) == whole[: whole.index(stop)]


def test_an_answer_ends_where_the_context_is_full() -> None:
    config = replace(CONFIG, language=replace(CONFIG.language, n_ctx=10))
    model = load_mobilevlm(config, TENSORS)

    assert len(model.generate(torch.tensor([[1, IMAGE_TOKEN, 5]]), images(1), stop_tokens=())) == 10 - 3 - N_ROWS + 1


def test_one_prompt_is_answered_at_a_time(model: MobileVLM) -> None:
    with pytest.raises(SettingsError, match='one prompt can be answered at a time, found 2'):
        model.generate(torch.tensor([[1, 5], [1, 6]]))


# -- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'projector', [None, 'linear', 'mlp2x_gelu', 'ldpnet', 'ldpnetv2', 'pw0_dw1_dws1', 'pw2_dws1_dw1']
)
@pytest.mark.parametrize('tied', [False, True])
def test_parameters_have_their_published_names_and_shapes(projector: str | None, tied: bool) -> None:
    config = tiny_checkpoints.config(projector, replace(CONFIG.language, tie_embeddings=tied))

    with torch.device('meta'):
        parameters = MobileVLM(config).named_parameters()

    found = {published_name(name): tuple(parameter.shape) for name, parameter in parameters}
    assert found == expected_tensors(config)


@pytest.mark.parametrize('tied', [False, True])
def test_loading_gives_the_model_that_the_weights_came_from(tied: bool) -> None:
    torch.manual_seed(3)
    config = replace(CONFIG, language=replace(CONFIG.language, tie_embeddings=tied))
    original = MobileVLM(config).eval()
    tensors = {published_name(name): value.detach().numpy() for name, value in original.named_parameters()}

    loaded = load_mobilevlm(config, tensors)

    ids = torch.tensor([[1, IMAGE_TOKEN, 5, 6, 7]])
    torch.testing.assert_close(loaded(ids, images(1)).logits, original(ids, images(1)).logits, rtol=0, atol=0)
    assert not loaded.training
    assert dict(loaded.named_buffers()).keys() == dict(original.named_buffers()).keys()
    for name, buffer in original.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer)


def test_weights_are_kept_in_the_wanted_type() -> None:
    model = load_mobilevlm(CONFIG, TENSORS, torch.bfloat16)

    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(torch.tensor([[1, IMAGE_TOKEN, 5]]), images(1)).logits.dtype == torch.bfloat16


def test_the_model_does_not_share_memory_with_what_it_was_loaded_from() -> None:
    tensors = {name: value.copy() for name, value in TENSORS.items()}
    model = load_mobilevlm(CONFIG, tensors)
    before = model.language.lm_head.weight.clone()

    tensors['lm_head.weight'][:] = 0

    assert torch.equal(model.language.lm_head.weight, before)


class Lazy(Mapping[str, NDArray[np.float32]]):
    """Makes each tensor when it is asked for, and watches how many live at once."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.n_alive = 0
        self.most_alive = 0

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        tensor = TENSORS[name].copy()
        self.asked.append(name)
        self.n_alive += 1
        self.most_alive = max(self.most_alive, self.n_alive)
        weakref.finalize(tensor, self.gone)
        return tensor

    def gone(self) -> None:
        self.n_alive -= 1

    def __iter__(self) -> Iterator[str]:
        return iter(TENSORS)

    def __len__(self) -> int:
        return len(TENSORS)


def test_each_tensor_is_read_once_and_let_go_before_the_next() -> None:
    lazy = Lazy()

    load_mobilevlm(CONFIG, lazy)

    assert sorted(lazy.asked) == sorted(TENSORS)
    assert lazy.most_alive == 1


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            {'model.norm.weight': None},
            r'lack 1 of the \d+ tensors of tiny, .*model.norm.weight of shape \(64,\)',
        ),
        (
            {'model.mm_projector.0.weight': np.zeros(3)},
            'have 1 tensors that tiny does not.*mm_projector.0.weight',
        ),
        ({'model.norm.weight': np.zeros((64, 1))}, r'model.norm.weight has shape \(64, 1\), tiny has \(64,\)'),
    ],
)
def test_weights_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    tensors = {name: value for name, value in (TENSORS | change).items() if value is not None}

    with pytest.raises(CheckpointShapeError, match=message):
        load_mobilevlm(CONFIG, tensors)
