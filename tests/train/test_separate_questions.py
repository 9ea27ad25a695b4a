"""Several questions about one image, learned as if each were the only one asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import tiny_checkpoints
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from vocabularies import write_chatml

from mobilevlm_ros.errors import RecordError, SettingsError
from mobilevlm_ros.model.mobilevlm import MobileVLM
from mobilevlm_ros.train.config import DataConfig
from mobilevlm_ros.train.dataset import DialogueDataset
from mobilevlm_ros.train.records import Record
from mobilevlm_ros.train.templates import IGNORED, Turn, encode_dialogue
from mobilevlm_ros.train.tokens import Tokenizer, open_tokenizer
from mobilevlm_ros.train.trainee import Trainee, rounds_apart

ASKED = [('Is there a cup?', 'Yes'), ('How many?', '2'), ('What color is the cup?', 'dark red')]


@pytest.fixture(scope='module')
def smol(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return open_tokenizer(write_chatml(tmp_path_factory.mktemp('smol')))


class Features:
    """Features that differ with the image's name."""

    kind: Literal['features'] = 'features'

    def __call__(self, path: Path) -> Tensor:
        return torch.randn(N_PATCHES, WIDTH, generator=torch.Generator().manual_seed(len(path.name)))

    def blank(self) -> Tensor:
        return torch.zeros(N_PATCHES, WIDTH)


CONFIG = tiny_checkpoints.config()
assert CONFIG.vision is not None
N_PATCHES, WIDTH = CONFIG.vision.n_patches, CONFIG.vision.width


def turns(asked: list[tuple[str, str]], *, image: bool) -> tuple[Turn, ...]:
    found: list[Turn] = []
    for index, (question, answer) in enumerate(asked):
        text = f'<image>\n{question}' if image and index == 0 else question
        found += [Turn('human', text), Turn('gpt', answer)]
    return tuple(found)


def loss_of(model: MobileVLM, records: list[Record], tokenizer: Tokenizer, *, separate: bool) -> Tensor:
    dataset = DialogueDataset(records, tokenizer, 'chatml', read_image=Features(), separate=separate)
    batch = dataset.collate([dataset[index] for index in range(len(records))])
    loss: Tensor = Trainee(model, cached=True)(**batch)['loss']
    return loss


def test_loss_and_gradients_are_those_of_the_questions_asked_one_by_one(smol: Tokenizer) -> None:
    torch.manual_seed(0)
    model = MobileVLM(replace(CONFIG, language=replace(CONFIG.language, n_vocab=smol.n_vocab)))
    pictures = [(Path('a.png'), ASKED), (None, ASKED[:2]), (Path('abc.png'), ASKED[1:])]
    together = [
        Record(str(n), image, turns(asked, image=image is not None), f'{n}')
        for n, (image, asked) in enumerate(pictures)
    ]
    alone = [
        Record(f'{n}', image, turns([one], image=image is not None), f'{n}')
        for n, (image, asked) in enumerate(pictures)
        for one in asked
    ]
    gradients = []
    losses = []
    for records, separate in ((together, True), (alone, False), (together, False)):
        model.zero_grad()
        loss = loss_of(model, records, smol, separate=separate)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)
    assert any(name.startswith('projector') for name in gradients[0])
    assert abs(float(losses[2] - losses[1])) > 1e-3  # without it they do see each other


@given(asked=st.lists(st.tuples(st.text(max_size=9), st.text(min_size=1, max_size=5)), min_size=1, max_size=4))
def test_every_question_has_the_tokens_of_one_asked_alone(asked: list[tuple[str, str]], smol: Tokenizer) -> None:
    together = encode_dialogue(turns(asked, image=True), 'chatml', smol, 2048, separate=True)
    assert len(together.rounds) == len(together.input_ids)
    for number, one in enumerate(asked, start=1):
        alone = encode_dialogue(turns([one], image=True), 'chatml', smol, 2048)
        chosen = [index for index, round_ in enumerate(together.rounds) if round_ in (0, number)]
        # Asked alone, a line break ends the turn; nothing is learned of it.
        assert [together.input_ids[index] for index in chosen] == alone.input_ids[:-1]
        assert [together.labels[index] for index in chosen] == alone.labels[:-1]


def test_a_cut_sample_keeps_rounds_and_tokens_together(smol: Tokenizer) -> None:
    cut = encode_dialogue(turns(ASKED, image=True), 'chatml', smol, 60, separate=True)

    assert len(cut.input_ids) == len(cut.labels) == len(cut.rounds) == 60
    assert cut.n_cut > 0


def test_the_mask_lets_a_question_see_itself_and_what_is_shared() -> None:
    mask, positions = rounds_apart(torch.tensor([[0, 0, 1, 1, 2, 2, -1]]))

    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],  # padding sees itself: a row that sees nothing would be no number
    ]
    assert positions.tolist() == [[0, 1, 2, 3, 2, 3, 0]]


def test_a_sample_that_cannot_be_used_is_one_token_that_nothing_is_learned_of(smol: Tokenizer) -> None:
    bad = Record('bad', None, (Turn('human', 'a'), Turn('human', 'b')), 'data.json:1')
    dataset = DialogueDataset([bad], smol, 'chatml', on_bad='skip', separate=True)

    item = dataset[0]

    assert item['rounds'].tolist() == [0]
    assert item['labels'].tolist() == [IGNORED]


def test_a_second_image_is_refused(smol: Tokenizer) -> None:
    twice = [Turn('human', '<image>\na'), Turn('gpt', 'b'), Turn('human', '<image>\nc'), Turn('gpt', 'd')]

    with pytest.raises(RecordError, match='first turn'):
        encode_dialogue(twice, 'chatml', smol, 100, separate=True)


def test_other_templates_cannot_keep_questions_apart(smol: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match='chatml only, not in v1'):
        encode_dialogue(turns(ASKED, image=True), 'v1', smol, 100, separate=True)
    with pytest.raises(ValidationError, match=r'data\.separate_questions is for the template chatml, not for plain'):
        DataConfig(records=tmp_path, template='plain', separate_questions=True)
    with pytest.raises(ValidationError, match=r'data\.system is for the template chatml'):
        DataConfig(records=tmp_path, system='be brief')
