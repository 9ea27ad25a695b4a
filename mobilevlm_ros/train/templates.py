"""Dialogues to token ids and labels: which tokens the loss is taken of, by the published rules.

Labels are ``IGNORED`` or the token itself; the shift by one is the model's. Only answers are trained, each with the
token that ends it. The template ``v1`` is Vicuna's, with the published masks to the token, in vicuna.py; ``plain`` is
that of stage 1. ``alpaca`` masks as Stanford Alpaca does. ``chatml`` puts exactly the pieces that the runtime's
template puts around a question; there, the questions of a dialogue can be kept apart, so that many are learned from one
image without the wording of one giving away the answer to another.

Sources: mobilevlm/train/train.py (``preprocess_multimodal``, ``preprocess_plain``), Stanford Alpaca's train.py,
runtime/prompt.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from mobilevlm_ros.errors import RecordError, SettingsError
from mobilevlm_ros.runtime.prompt import Piece, chatml
from mobilevlm_ros.train.dialogue import (
    IGNORED,
    IMAGE,
    IMAGE_MARK,
    Encoded,
    Turn,
    alternating,
    encode_around_images,
    mark_first,
    start,
)
from mobilevlm_ros.train.tokens import Tokenizer
from mobilevlm_ros.train.vicuna import encode_v1

__all__ = ['IGNORED', 'IMAGE', 'IMAGE_MARK', 'TEMPLATES', 'Encoded', 'Turn', 'encode_dialogue']

TEMPLATES = ('plain', 'v1', 'alpaca', 'chatml')

_ALPACA = (
    'Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n'
)
_ALPACA_CONTEXT = (
    'Below is an instruction that describes a task, paired with an input that provides further context. '
    'Write a response that appropriately completes the request.\n\n'
)


def encode_dialogue(
    turns: Sequence[Turn],
    template: str,
    tokenizer: Tokenizer,
    max_tokens: int,
    *,
    system: str = '',
    separate: bool = False,
) -> Encoded:
    """Token ids and labels of a dialogue, cut to ``max_tokens`` before an image takes its place.

    :param turns: a leading turn of the model is dropped, then people and model take turns. A turn that holds
        ``<image>`` gets it at its front, with a line break after it.
    :param template: one of ``TEMPLATES``.
    :param system: for ``chatml`` only: its system turn; without one if empty.
    :param separate: for ``chatml`` only: each question follows what stands before the first one, as if it were the
        only one asked; ``Encoded.rounds`` says which tokens belong together.
    :raise RecordError: if the dialogue does not fit the template.
    :raise SettingsError: if there is no such template, or the tokenizer is not made for it.
    """
    if separate and template != 'chatml':
        raise SettingsError(f'questions are kept apart in the template chatml only, not in {template}')
    if max_tokens < 1:
        raise SettingsError(f'at most {max_tokens} tokens leave nothing to train on: expected 1 or more')
    if template == 'v1':
        return encode_v1(alternating(turns), tokenizer, max_tokens)
    if template == 'plain':
        return _plain(turns, tokenizer).cut(max_tokens)
    if template == 'alpaca':
        return _alpaca(alternating(turns), tokenizer).cut(max_tokens)
    if template == 'chatml':
        encode = _chatml_apart if separate else _chatml
        return encode(alternating(turns), tokenizer, system).cut(max_tokens)
    raise SettingsError(f'there is no template {template!r}: expected one of {", ".join(TEMPLATES)}')


def _plain(turns: Sequence[Turn], tokenizer: Tokenizer) -> Encoded:
    """``<image>``, the caption and a line break; what was asked is left out. The first two ids are not trained."""
    if len(turns) != 2 or IMAGE_MARK not in turns[0].text:
        raise RecordError(
            'not a caption',
            f'the template plain takes two turns, the first with {IMAGE_MARK}; found {len(turns)} turns',
        )
    prompt = encode_around_images(IMAGE_MARK, tokenizer)
    ids = encode_around_images(IMAGE_MARK + turns[1].text + '\n', tokenizer)
    return Encoded(ids, [IGNORED] * len(prompt) + ids[len(prompt) :])


def _alpaca(turns: Sequence[Turn], tokenizer: Tokenizer) -> Encoded:
    """Instruction and response; further rounds repeat their headings without the preamble."""
    encoded = Encoded(start(tokenizer), [IGNORED] * len(start(tokenizer)))
    for index in range(0, len(turns), 2):
        asked = turns[index]
        preamble = _ALPACA_CONTEXT if asked.context else _ALPACA
        context = f'### Input:\n{asked.context}\n\n' if asked.context else ''
        prompt = f'{preamble if index == 0 else ""}### Instruction:\n{mark_first(asked.text)}\n\n{context}### Response:'
        *before, last = prompt.split(IMAGE_MARK)
        for chunk in before:
            encoded.add([*tokenizer.encode(chunk), IMAGE], trained=False)
        n_prompt = len(tokenizer.encode(last))
        if index + 1 == len(turns):
            encoded.add(tokenizer.encode(last), trained=False)
            break
        # Prompt and answer are tokenised together, as published: there is no space or line break between them.
        both = tokenizer.encode(last + turns[index + 1].text)
        encoded.add(both[:n_prompt], trained=False)
        encoded.add([*both[n_prompt:], tokenizer.eos_id], trained=True)
    return encoded


def _chatml(turns: Sequence[Turn], tokenizer: Tokenizer, system: str) -> Encoded:
    """The runtime's pieces around each question; an answer is trained with the token that ends it."""
    template = chatml(system)
    opening = template.before
    ending = _chatml_ending(tokenizer)
    encoded = Encoded(start(tokenizer), [IGNORED] * len(start(tokenizer)))
    for index in range(0, len(turns), 2):
        question = mark_first(turns[index].text)
        encoded.add(_pieces(opening, tokenizer), trained=False)
        asked = template.after
        if question.startswith(IMAGE_MARK):
            encoded.add([IMAGE], trained=False)
            question = question[len(IMAGE_MARK) :].removeprefix('\n')
        else:
            asked = _WITHOUT_IMAGE
        encoded.add(_pieces(asked, tokenizer, question), trained=False)
        if index + 1 < len(turns):
            encoded.add(tokenizer.encode(turns[index + 1].text) + ending, trained=True)
            encoded.add(tokenizer.encode('\n'), trained=False)
        opening = chatml().before
    return encoded


def _chatml_apart(turns: Sequence[Turn], tokenizer: Tokenizer, system: str) -> Encoded:
    """What stands before the first question, the image if there is one, and then every question with its answer."""
    ending = _chatml_ending(tokenizer)
    encoded = Encoded(start(tokenizer), [IGNORED] * len(start(tokenizer)))
    encoded.add(_pieces(chatml(system).before, tokenizer), trained=False)
    has_image = IMAGE_MARK in turns[0].text
    if has_image:
        encoded.add([IMAGE], trained=False)
    asked = chatml().after if has_image else _WITHOUT_IMAGE
    encoded.rounds = [0] * len(encoded.input_ids)
    for index in range(0, len(turns) - 1, 2):
        question = turns[index].text
        if index and IMAGE_MARK in question:
            raise RecordError('several images', 'questions are kept apart after one image, in the first turn')
        if has_image:  # as ``mark_first`` leaves a question that has the image itself
            question = question.replace(IMAGE_MARK, '').strip()
        encoded.add(_pieces(asked, tokenizer, question), trained=False)
        encoded.add(tokenizer.encode(turns[index + 1].text) + ending, trained=True)
        encoded.rounds += [index // 2 + 1] * (len(encoded.input_ids) - len(encoded.rounds))
    return encoded


_WITHOUT_IMAGE = (Piece('{question}'), *chatml().after[1:])
"""Without an image there is no line break before the question."""


def _pieces(pieces: Sequence[Piece], tokenizer: Tokenizer, question: str = '') -> list[int]:
    ids: list[int] = []
    for piece in pieces:
        text = piece.text if piece.special else piece.text.replace('{question}', question)
        ids += tokenizer.encode(text, special=piece.special)
    return ids


def _chatml_ending(tokenizer: Tokenizer) -> list[int]:
    ending = tokenizer.encode('<|im_end|>', special=True)
    if len(ending) != 1:
        raise SettingsError(
            'the template chatml needs a vocabulary with the token <|im_end|>, which this tokenizer lacks: '
            'use v1 with a LLaMA vocabulary'
        )
    return ending
