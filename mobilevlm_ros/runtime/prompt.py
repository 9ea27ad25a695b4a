"""Conversation templates: a question becomes the token chunks before and after the image.

Chunks are tokenised separately, as the published code does at its ``<image>`` mark: only the first chunk gets the
start token, and with LLaMA's tokenizer the chunk after the image begins with the dummy-prefix token 29871. Text of the
asker is never read as control tokens: a question that spells ``</s>`` stays text.

Sources: mobilevlm/conversation.py (``v1``, ``plain``), mobilevlm/utils.py (tokenizer_image_token); ChatML.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mobilevlm_ros.errors import BadQuestionError

__all__ = [
    'CHOICE_SUFFIX',
    'SHORT_SUFFIX',
    'TEMPLATES',
    'Piece',
    'PromptTemplate',
    'Tokenizer',
    'check_question',
    'described_template',
]

V1_SYSTEM = (
    'A chat between a curious user and an artificial intelligence assistant. '
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SHORT_SUFFIX = '\nAnswer the question using a single word or phrase.'
"""The published wording for short answers; models were trained on it."""
CHOICE_SUFFIX = '\nOptions: {options}.' + SHORT_SUFFIX
MAX_QUESTION_CHARACTERS = 16384
_ALLOWED_CONTROLS = '\n\t'


class Tokenizer(Protocol):
    """The part of a language engine that a template needs."""

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Token ids of ``text``."""
        ...


@dataclass(frozen=True)
class Piece:
    """A stretch of a chunk: control tokens of the template, or plain text."""

    text: str
    special: bool = False


@dataclass(frozen=True)
class PromptTemplate:
    """How a model was taught to read a conversation.

    :ivar before: pieces before the image; the first one gets the start token if the vocabulary asks for one.
    :ivar after: pieces after the image; ``{question}`` in a plain piece is the question.
    :ivar stop_texts: texts that end an answer, besides the vocabulary's end tokens.
    """

    name: str
    before: tuple[Piece, ...]
    after: tuple[Piece, ...]
    stop_texts: tuple[str, ...] = ()

    def chunks(self, question: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """Token ids before and after the image.

        :param question: checked text, with its format suffix if it has one.
        """
        before = self.tokens_before(tokenizer)
        after = _tokenize([_filled(piece, question) for piece in self.after], tokenizer, bos=False)
        return before, after

    def tokens_before(self, tokenizer: Tokenizer) -> list[int]:
        """Token ids before the image; no question is needed for them."""
        return _tokenize(self.before, tokenizer, bos=True)

    def render(self, question: str) -> str:
        """The prompt as text, the image as ``<image>``; for people and for the prompt's hash."""
        before = ''.join(piece.text for piece in self.before)
        return before + '<image>' + ''.join(_filled(piece, question).text for piece in self.after)


def _filled(piece: Piece, question: str) -> Piece:
    return piece if piece.special else Piece(piece.text.replace('{question}', question))


def _tokenize(pieces: Sequence[Piece], tokenizer: Tokenizer, *, bos: bool) -> list[int]:
    tokens: list[int] = []
    for index, piece in enumerate(pieces):
        tokens += tokenizer.tokenize(piece.text, bos=bos and index == 0, special=piece.special)
    return tokens


def v1(system: str = V1_SYSTEM) -> PromptTemplate:
    """Vicuna's v1 conversation; every published MobileVLM uses it."""
    return PromptTemplate(
        name='v1',
        before=(Piece(f'{system} USER: '),),
        after=(Piece('\n{question} ASSISTANT:'),),
        stop_texts=('</s>', 'USER:'),
    )


def plain(system: str = '') -> PromptTemplate:
    """No roles: image, then text; what stage-1 alignment trains on."""
    return PromptTemplate(name='plain', before=(Piece(system),), after=(Piece('{question}'),), stop_texts=('\n',))


def chatml(system: str = '') -> PromptTemplate:
    """ChatML, as SmolLM2 and Qwen use it; without a system turn if ``system`` is empty."""
    opening = (Piece('<|im_start|>', special=True),)
    closing = (Piece('<|im_end|>', special=True), Piece('\n'))
    system_turn = (*opening, Piece(f'system\n{system}'), *closing) if system else ()
    return PromptTemplate(
        name='chatml',
        before=(*system_turn, *opening, Piece('user\n')),
        after=(Piece('\n{question}'), *closing, *opening, Piece('assistant\n')),
        stop_texts=('<|im_end|>',),
    )


TEMPLATES = {'v1': v1, 'plain': plain, 'chatml': chatml}


def described_template(prompt: Mapping[str, str]) -> PromptTemplate:
    """The template that a bundle's section ``prompt`` describes: ``template``, and perhaps ``system``."""
    make = TEMPLATES[prompt['template']]
    return make(prompt['system']) if 'system' in prompt else make()


def check_question(text: str) -> str:
    """The question without surrounding white space.

    :raise BadQuestionError: if it is empty, absurdly long, or holds control characters other than newline and tab.
    """
    stripped = text.strip()
    if not stripped:
        raise BadQuestionError('the question is empty: send some text, for example "What is on the table?"')
    if len(stripped) > MAX_QUESTION_CHARACTERS:
        raise BadQuestionError(
            f'the question has {len(stripped)} characters; at most {MAX_QUESTION_CHARACTERS} are read'
        )
    for index, character in enumerate(stripped):
        bad_control = (ord(character) < 32 or 0x7F <= ord(character) < 0xA0) and character not in _ALLOWED_CONTROLS
        if bad_control or 0xD800 <= ord(character) < 0xE000:
            raise BadQuestionError(
                f'the question has the control character U+{ord(character):04X} at position {index}: send plain text'
            )
    return stripped


def prompt_hash(rendered: str, settings: str) -> str:
    """Sixteen hex digits that are equal for equal prompts under equal settings."""
    return hashlib.blake2b(f'{settings}\n{rendered}'.encode(), digest_size=8).hexdigest()
