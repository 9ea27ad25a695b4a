"""Whether an answer is right: pure functions from the truth about a question and an answer's text.

====================  ===============================================================================================
``exact``             the answer, without outer spaces, is an accepted one, letter by letter
``normalised``        the same, but case, punctuation, articles and "it is" at the start do not matter
``number``            the answer names one number, in digits or words, that is within ``tolerance`` of an accepted one
``choice``            the answer is an accepted choice; as ``normalised``, but with its articles
``yes_no``            the answer begins with yes or no, or says only one of them, and that is accepted
``json_field``        the answer is JSON, and the value at ``field`` (``objects.0.name``) is accepted: numbers within
                      ``tolerance``, texts as ``normalised``, true and false as they are
====================  ===============================================================================================

What cannot be understood is wrong, never an error.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

__all__ = ['CHECKERS', 'Accepted', 'Checker', 'accepts', 'describe_truth', 'is_right', 'normalise', 'number_in']

Checker = Literal['exact', 'normalised', 'number', 'choice', 'yes_no', 'json_field']
CHECKERS: tuple[Checker, ...] = get_args(Checker)
Accepted = str | int | float | bool

_OPENINGS = re.compile(r"^(?:(?:it is|it's|this is|that is|they are|these are|there is|there are|a|an|the) )+")
# fmt: off
_WORDS = (
    'zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten', 'eleven', 'twelve',
    'thirteen', 'fourteen', 'fifteen', 'sixteen', 'seventeen', 'eighteen', 'nineteen', 'twenty',
)
# fmt: on
_NUMBERS = {word: float(number) for number, word in enumerate(_WORDS)} | {'no': 0.0, 'none': 0.0}
_DIGITS = re.compile(r'[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+')


def is_right(
    checker: Checker, answer: str, accepted: Sequence[Accepted], *, tolerance: float = 0.0, field: str = ''
) -> bool:
    """Whether ``answer`` is accepted by a checker; see the module.

    :param tolerance: largest distance of a number from an accepted one.
    :param field: of ``json_field``: keys and indices, with points between them; empty: the whole answer.
    """
    if checker == 'exact':
        return answer.strip() in {str(one).strip() for one in accepted}
    if checker == 'normalised':
        return normalise(answer) in {normalise(str(one)) for one in accepted}
    if checker == 'choice':
        return _plain(answer) in {_plain(str(one)) for one in accepted}
    if checker == 'yes_no':
        found = _yes_or_no(answer)
        return bool(found) and found in {_yes_or_no(str(one)) for one in accepted}
    if checker == 'number':
        return _is_near(number_in(answer), accepted, tolerance)
    return _is_right_value(_value_at(answer, field), accepted, tolerance)


def accepts(question: Mapping[str, Any], answer: str) -> bool:
    """The same for a question as a run's description has it; False if it has no truth."""
    truth = question.get('truth')
    if not truth:
        return False
    return is_right(
        truth['checker'], answer, truth['accepted'], tolerance=truth.get('tolerance', 0.0), field=truth.get('field', '')
    )


def describe_truth(accepted: Sequence[Accepted], *, tolerance: float = 0.0, field: str = '') -> str:
    """The truth for people: ``size: 3 | 4 (±1)``."""
    values = ' | '.join(json.dumps(one) if isinstance(one, bool) else str(one) for one in accepted)
    return f'{f"{field}: " if field else ""}{values}{f" (±{tolerance:g})" if tolerance else ""}'


def normalise(text: str) -> str:
    """Without what does not matter: case, punctuation, articles and "it is" at the start."""
    plain = _plain(text)
    return _OPENINGS.sub('', f'{plain} ').strip() or plain


def _plain(text: str) -> str:
    folded = unicodedata.normalize('NFKC', text).casefold().replace('_', ' ').replace('’', "'")
    kept = re.sub(r"(?<!\d)\.|\.(?!\d)|[^\w'. ]", ' ', folded)  # the point of a decimal number is no punctuation
    return ' '.join(kept.split()).strip("' ")


def number_in(text: str) -> float | None:
    """The number that a text names; None if it names none, or different ones."""
    plain = unicodedata.normalize('NFKC', text).casefold().replace('−', '-')
    found = {float(digits.replace(',', '')) for digits in _DIGITS.findall(plain)}
    if not found:
        found = {_NUMBERS[word] for word in re.findall('[a-z]+', plain) if word in _NUMBERS}
    return found.pop() if len(found) == 1 else None


def _yes_or_no(text: str) -> str:
    words = re.findall(r'\w+', text.casefold())
    if words and words[0] in ('yes', 'no'):
        return words[0]
    said = {'yes', 'no'} & set(words)
    return said.pop() if len(said) == 1 else ''


def _is_near(number: float | None, accepted: Sequence[Accepted], tolerance: float) -> bool:
    if number is None or not math.isfinite(number):
        return False
    wanted = [number_in(one) if isinstance(one, str) else float(one) for one in accepted]
    # Decimal fractions are no binary ones: 0.3 is within 0.1 of 0.2.
    return any(one is not None and abs(number - one) <= tolerance + 1e-9 * max(1.0, abs(one)) for one in wanted)


_NOTHING = object()


def _value_at(answer: str, field: str) -> Any:
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return _NOTHING
    for step in field.split('.') if field else ():
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return _NOTHING
    return value


def _is_right_value(value: Any, accepted: Sequence[Accepted], tolerance: float) -> bool:
    if isinstance(value, bool):
        return any(one is value for one in accepted)
    if isinstance(value, int | float):
        return _is_near(
            float(value) if abs(value) < 1e300 else None,
            [one for one in accepted if not isinstance(one, bool)],
            tolerance,
        )
    if isinstance(value, str):
        return normalise(value) in {normalise(one) for one in accepted if isinstance(one, str)}
    return False
