"""How TextVQA makes answers comparable: the answer processor of EvalAI, as m4c_evaluator.py has it, quirks and all.

Source: mobilevlm/eval/m4c_evaluator.py (from facebookresearch/mmf). Kept are the figures that come out of it, not its
text: of its table of contractions only the entries that can be reached, as rules.
"""

from __future__ import annotations

import re

__all__ = ['normalise']

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Upstream means "not after a digit", but writes what is always true.
_FULL_STOP = re.compile(r'\.(?!\d)')
_MOST_FULL_STOPS = 32
"""Upstream gives the flag re.UNICODE, which is 32, where the number of replacements belongs."""
_THOUSANDS = re.compile(r'(?<=\d),+(?=\d)')
_NUMBERS = {'none': '0', 'zero': '0', 'one': '1', 'two': '2', 'three': '3', 'four': '4', 'five': '5', 'six': '6'}
_NUMBERS |= {'seven': '7', 'eight': '8', 'nine': '9', 'ten': '10'}
_ARTICLES = ('a', 'an', 'the')

# With one apostrophe, which may be missing.
_SINGLE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd how'd how'll isn't it'd it'll ma'am
mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll someone'd
someone'll something'd something'll there'd there're they'd they'll they're they've 'twas wasn't we've weren't what'll
what're what've where'd where've who'd who'll who've why'll why're won't would've wouldn't y'all you'd you'll you're
you've
"""
# Of these only what lacks the apostrophe can be reached: "'s" is torn off before.
_POSSESSIVE = "he's how's somebody's someone's that's there's what's when's where's who's why's"
# With two, of which one may be missing.
_DOUBLE = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've someone'd've something'd've there'd've they'd've
we'd've who'd've wouldn't've y'all'll you'd've
"""


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ''): word for word in f'{_SINGLE} {_POSSESSIVE}'.split()}
    for word in _DOUBLE.split():
        first, second, third = word.split("'")
        table |= {f"{first}{second}'{third}": word, f"{first}'{second}{third}": word}
    return table | {
        "'ow'sat": "'ow's'at",
        "'ows'at": "'ow's'at",
        "somebody'd": 'somebodyd',
        "somebodyd've": "somebody'd've",
        "somebody'dve": "somebody'd've",
        "yall'd've": "y'all'd've",
        "y'alld've": "y'all'd've",
        "y'all'dve": "y'all'd've",
    }


_CONTRACTIONS = _contractions()


def normalise(answer: str) -> str:
    """An answer as it is compared with others."""
    text = answer.lower().replace(',', '').replace('?', '').replace("'s", " 's").strip()
    text = _without_punctuation(text.replace('\n', ' ').replace('\t', ' ').strip())
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return ' '.join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """Each sign goes where it stands beside a space somewhere, and else becomes a space."""
    result = text
    for sign in _PUNCTUATION:
        goes = f'{sign} ' in text or f' {sign}' in text or _THOUSANDS.search(text) is not None
        result = result.replace(sign, '' if goes else ' ')
    return _FULL_STOP.sub('', result, count=_MOST_FULL_STOPS)
