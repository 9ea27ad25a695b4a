"""Dialogues without images as records: ShareGPT's files, as Vicuna was trained on, and Alpaca's instructions.

ShareGPT/Vicuna: ``{"id", "conversations": [{"from", "value"}]}``. People are ``human`` or ``user``; the model is
``gpt``, or what else answered there. A last question that nobody answered is left off, because nothing of it would be
trained. A dialogue that cannot be used as a whole is a problem with a name.

Alpaca: ``{"instruction", "input", "output"}``, of which ``input`` may be empty or missing. The template ``alpaca`` has
a place of its own for it; for others it follows the instruction on a new line.

Files are JSON arrays or JSON lines. Sources: FastChat (data/split_long_conversation.py, which leaves off the unanswered
question, and train/train.py); Stanford Alpaca (train.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from mobilevlm_ros.errors import DatasetError, RecordError
from mobilevlm_ros.train.dialogue import IMAGE_MARK, Role, Turn, alternating
from mobilevlm_ros.train.json_stream import read_entries
from mobilevlm_ros.train.problems import Example, Problems, printable
from mobilevlm_ros.train.records import MAX_TURNS, OnBad, Record, Records, refusal

__all__ = ['DialogueFormat', 'read_dialogues']

DialogueFormat = Literal['vicuna', 'alpaca']

_ROLES: Mapping[str, Role] = {
    'human': 'human',
    'user': 'human',
    'gpt': 'gpt',
    'chatgpt': 'gpt',
    'bing': 'gpt',
    'bard': 'gpt',
}
_MAX_NAME = 80


def read_dialogues(path: Path, form: DialogueFormat, template: str, *, on_bad: OnBad = 'refuse') -> Records:
    """Read a file of dialogues without images.

    :param template: that the dialogues will be encoded with; decides where Alpaca's input goes.
    :param on_bad: ``skip`` leaves out records that cannot be used, ``refuse`` raises if there is one.
    :raise DatasetMissingError: if the file is not there.
    :raise DatasetSyntaxError: if it is malformed in a way that hides what follows; whatever ``on_bad`` says.
    :raise DatasetError: if records are refused, or none can be used.
    """
    read: Callable[[Mapping[str, Any]], tuple[Turn, ...]]
    read = _vicuna if form == 'vicuna' else lambda value: _alpaca(value, has_place=template == 'alpaca')
    problems, records = Problems(), []
    for number, entry in enumerate(read_entries(path), start=1):
        name, place = f'#{number}', f'{path.name}:{entry.line}'
        try:
            if entry.error:
                raise RecordError('no JSON', entry.error)
            if not isinstance(entry.value, dict):
                raise RecordError('no record', f'expected an object, found {_shown(entry.value)}')
            name = _name(entry.value.get('id'), name)
            if 'image' in entry.value:
                raise RecordError('has an image', 'records with an "image" are of the format llava')
            records.append(Record(name, None, read(entry.value), place))
        except RecordError as error:
            problems.add(error.kind, Example(name, place, error.detail))
    if on_bad == 'refuse' and len(problems):
        raise refusal(path, problems, len(records))
    if not records:
        raise DatasetError(f'{path} holds no dialogue that can be trained on: {problems.summary() or "it is empty"}')
    return Records(records, problems)


def _vicuna(value: Mapping[str, Any]) -> tuple[Turn, ...]:
    listed = value.get('conversations')
    if not isinstance(listed, list) or not listed:
        raise RecordError('no dialogue', f'"conversations" should be a list of turns, found {_shown(listed)}')
    if len(listed) > MAX_TURNS:
        raise RecordError('too long', f'{len(listed)} turns, at most {MAX_TURNS} are read')
    turns = []
    for index, turn in enumerate(listed, start=1):
        if not isinstance(turn, dict):
            raise RecordError('malformed turn', f'turn {index} should be {{"from", "value"}}, found {_shown(turn)}')
        said = turn.get('from')
        role = _ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            known = ', '.join(_ROLES)
            raise RecordError('unknown role', f'turn {index} is from {_shown(said)}, expected one of {known}')
        turns.append(Turn(role, _text(turn.get('value'), f'the "value" of turn {index}')))
    asked = tuple(alternating(turns))
    answered = asked if asked[-1].role == 'gpt' else asked[:-1]
    if not answered:
        raise RecordError('no answer', 'the only question has no answer')
    for index, turn in enumerate(answered, start=1):
        _check(turn.text, 'answer' if turn.role == 'gpt' else 'question', f'turn {index} from the first question on')
    return answered


def _alpaca(value: Mapping[str, Any], *, has_place: bool) -> tuple[Turn, ...]:
    instruction, answer = (_text(value.get(key), f'"{key}"') for key in ('instruction', 'output'))
    context = _text(value.get('input', ''), '"input"')
    _check(instruction, 'question', '"instruction"')
    _check(answer, 'answer', '"output"')
    if not context.strip():
        return Turn('human', instruction), Turn('gpt', answer)
    _check(context, 'question', '"input"')
    if has_place:
        return Turn('human', instruction, context), Turn('gpt', answer)
    return Turn('human', f'{instruction}\n{context}'), Turn('gpt', answer)


def _text(value: object, what: str) -> str:
    """A text that can be tokenised."""
    if not isinstance(value, str):
        raise RecordError('malformed turn', f'{what} should be a text, found {_shown(value)}')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError('no Unicode', f'{what} holds half a character: {error.reason}') from error
    return value


def _check(text: str, kind: str, what: str) -> None:
    """That a text is none of those that templates take for something else."""
    if not text.strip():
        raise RecordError(f'empty {kind}', f'{what} is empty')
    if IMAGE_MARK in text:
        raise RecordError('image mark without image', f'{what} holds {IMAGE_MARK}, where an image would be put in')


def _name(found: object, otherwise: str) -> str:
    if isinstance(found, str | int) and not isinstance(found, bool) and str(found):
        return printable(str(found)[:_MAX_NAME])
    return otherwise


def _shown(value: object) -> str:
    """A found value, for a message."""
    if value is None:
        return 'nothing'
    return repr(printable(value[:_MAX_NAME])) if isinstance(value, str) else type(value).__name__
