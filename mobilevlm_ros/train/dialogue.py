"""What dialogues are made of, and how the place of an image is written into token ids.

Source: mobilevlm/constants.py, mobilevlm/utils.py (``tokenizer_image_token``), mobilevlm/train/train.py
(``preprocess_multimodal``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mobilevlm_ros.errors import RecordError
from mobilevlm_ros.train.tokens import Tokenizer

__all__ = [
    'IGNORED',
    'IMAGE',
    'IMAGE_MARK',
    'Encoded',
    'Role',
    'Turn',
    'alternating',
    'encode_around_images',
    'mark_first',
    'start',
]

IGNORED = -100
"""The label that the loss leaves out."""
IMAGE = -200
"""Stands in token ids where the rows of an image go."""
IMAGE_MARK = '<image>'
"""Stands in texts where an image goes."""

Role = Literal['human', 'gpt']


@dataclass(frozen=True, slots=True)
class Turn:
    """What a person (``human``) or the model (``gpt``) said.

    :ivar context: what Alpaca calls the input of an instruction; other templates do not read it.
    """

    role: Role
    text: str
    context: str = ''


@dataclass(slots=True)
class Encoded:
    """Token ids and labels of one dialogue, of the same length.

    :ivar labels: ``IGNORED``, or equal to the id.
    :ivar masked: why the published rules train on nothing of it; empty if they do.
    :ivar n_cut: tokens that were left out at the end.
    :ivar rounds: for each token the number of the question that it belongs to, 0 for what all of them follow; empty
        if every token sees all before it.
    """

    input_ids: list[int]
    labels: list[int]
    masked: str = ''
    n_cut: int = 0
    rounds: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], *, trained: bool) -> None:
        """Append tokens."""
        self.input_ids += ids
        self.labels += ids if trained else [IGNORED] * len(ids)

    def cut(self, max_tokens: int) -> Encoded:
        """The first ``max_tokens``; says so in ``masked`` if no answer is among them."""
        labels = self.labels[:max_tokens]
        masked = self.masked
        if not masked and all(label == IGNORED for label in labels):
            masked = f'no token of an answer is among the first {max_tokens} of {len(self.labels)}'
        n_cut = max(0, len(self.labels) - max_tokens)
        return Encoded(self.input_ids[:max_tokens], labels, masked, n_cut, self.rounds[:max_tokens])

    @property
    def n_trained(self) -> int:
        """Number of tokens that the loss is taken of."""
        return sum(label != IGNORED for label in self.labels)


def alternating(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The dialogue from the first question on.

    :raise RecordError: if nothing is left, or people and model do not take turns.
    """
    if turns and turns[0].role == 'gpt':
        turns = turns[1:]
    if not turns:
        raise RecordError('no question', 'nobody asks anything')
    for index, turn in enumerate(turns):
        expected = ('human', 'gpt')[index % 2]
        if turn.role != expected:
            raise RecordError(
                'roles do not alternate', f'turn {index + 1} from the first question on is {turn.role}, not {expected}'
            )
    return turns


def mark_first(text: str) -> str:
    """A text with its image mark, if it has one, at the front and on a line of its own."""
    if IMAGE_MARK not in text:
        return text
    return f'{IMAGE_MARK}\n{text.replace(IMAGE_MARK, "").strip()}'.strip()


def start(tokenizer: Tokenizer) -> list[int]:
    """The token that a text starts with, if the vocabulary has one."""
    return [tokenizer.bos_id] if tokenizer.adds_bos else []


def encode_around_images(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids with ``IMAGE`` at each mark: the stretches between the marks are tokenised one by one.

    The text starts with the start token if the vocabulary has one; names of control tokens are read as such.
    """
    first, *others = text.split(IMAGE_MARK)
    ids = start(tokenizer) + tokenizer.encode(first, special=True)
    for stretch in others:
        ids += [IMAGE, *tokenizer.encode(stretch, special=True)]
    return ids
