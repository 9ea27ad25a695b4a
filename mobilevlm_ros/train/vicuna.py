"""The template ``v1`` with the published loss masks, counted in tokens as the published code counts them.

The rendered dialogue is tokenised as a whole, ``</s>`` read as the end token. Then each round (a question and its
answer) is tokenised again on its own to see how long it is, and so is its part up to ``ASSISTANT: ``: that many tokens,
less the start token and the space before the answer, are masked. The count only comes out right for a LLaMA vocabulary
in its legacy form. Where it does not (an answer that spells ``</s>`` or `` ASSISTANT: ``, an empty answer at the end, a
last question without an answer), the published rule trains on nothing of the dialogue; so does this module, and says
why.

Source: mobilevlm/train/train.py (``preprocess_v1``), mobilevlm/conversation.py (``v1``).
"""

from __future__ import annotations

from collections.abc import Sequence

from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.runtime.prompt import V1_SYSTEM
from mobilevlm_ros.train.dialogue import IGNORED, IMAGE, Encoded, Turn, encode_around_images, mark_first
from mobilevlm_ros.train.tokens import Tokenizer

__all__ = ['encode_v1']

_END = '</s>'
_ANSWER = ' ASSISTANT: '


def encode_v1(turns: Sequence[Turn], tokenizer: Tokenizer, max_tokens: int) -> Encoded:
    """Token ids and labels.

    :param turns: people and model in turns, from a question on.
    :raise SettingsError: if the tokenizer is none of LLaMA's form.
    """
    _check(tokenizer)
    text = _render(turns)
    ids = encode_around_images(text, tokenizer)
    labels = list(ids)
    labels[0] = IGNORED
    counted = 1
    for part in text.split(_END):
        halves = part.split(_ANSWER)
        if len(halves) != 2:  # also the nothing after the last end
            break
        n_prompt = len(encode_around_images(halves[0] + _ANSWER, tokenizer)) - 2
        labels[counted : counted + n_prompt] = [IGNORED] * len(labels[counted : counted + n_prompt])
        # The start token, which the round itself lacks, stands for the end token.
        counted += len(encode_around_images(part, tokenizer))
    labels[counted:] = [IGNORED] * len(labels[counted:])

    # As published, a dialogue without an image is cut before its tokens are counted, one with an image afterwards.
    n_tokens = sum(token != tokenizer.pad_id for token in (ids if IMAGE in ids else ids[:max_tokens]))
    if counted < max_tokens and counted != n_tokens:
        reason = f'its rounds count {counted} tokens, but it has {n_tokens}'
        return Encoded(ids, [IGNORED] * len(ids), reason).cut(max_tokens)
    return Encoded(ids, labels).cut(max_tokens)


def _render(turns: Sequence[Turn]) -> str:
    """The dialogue as text; an empty turn leaves only its role, as published."""
    text = V1_SYSTEM + ' '
    for index, turn in enumerate(turns):
        role, separator = (('USER', ' '), ('ASSISTANT', _END))[index % 2]
        said = mark_first(turn.text)
        text += f'{role}: {said}{separator}' if said else f'{role}:'
    return text


def _check(tokenizer: Tokenizer) -> None:
    """That the offsets of the published mask hold."""
    if not tokenizer.adds_bos or tokenizer.encode(_END, special=True) != [tokenizer.eos_id]:
        raise SettingsError(
            "the template v1 needs a vocabulary of LLaMA's form, whose texts start with <s> and end with </s>: "
            'use chatml for others'
        )
