"""Questions with exact answers about a picture whose things are known, worded as the runtime words them.

Existence is balanced: as many absent things are asked about as present ones, a third of them from the family of
something that is there. Colours are asked about where a thing has one clear colour, places where it is clearly on one
side.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mobilevlm_ros.runtime.prompt import CHOICE_SUFFIX, SHORT_SUFFIX
from mobilevlm_ros.train.nano_data.kinds import GENERIC, GROUNDS, INDOORS, OUTDOORS, WHICH
from mobilevlm_ros.train.nano_data.scenes import Thing
from mobilevlm_ros.train.nano_data.words import (
    MASS,
    PEOPLE,
    PLURAL_ONLY,
    article,
    clash,
    family,
    joined,
    plural,
)
from mobilevlm_ros.train.pixel_colours import COLOURS

__all__ = [
    'Asked',
    'caption_of',
    'describe',
    'far_apart',
    'left_or_right_of',
    'on_the_sides',
    'questions_about',
    'which_colour',
    'which_side',
]

_NUMBERS = ('no', 'one', 'two', 'three', 'four', 'five', 'six')
_EXISTS = (
    'Is there {} in the image?',
    'Is there {}?',
    'Is there {} here?',
    'Do you see {}?',
    'Can you see {}?',
    'Is there {} in the picture?',
)
_SOMEONE = ('Is there a person?', 'Is there a person in the image?', 'Do you see anyone?', 'Is anyone there?')
_EXIST = ('Are there {} in the image?', 'Are there any {}?', 'Do you see {}?', 'Are there {} in the picture?')
_NAMING = ('What is in the image?', 'What object is this?', 'What is this?', 'What do you see?', 'Name the object.')
_MAIN = ('What is the main object in the image?', 'What is the largest object?', 'What stands out in the image?')
_DESCRIBE = ('Describe the image.', 'Describe what you see.', 'What does the picture show?', 'Give a short caption.')
_CLEAR_SIDE, _MIDDLE = 0.12, 0.07
_NEAR_SHARE = 1 / 3


@dataclass(frozen=True)
class Asked:
    """One question, with the format suffix that the runtime would add, and its answer."""

    kind: str
    question: str
    answer: str


def questions_about(
    things: Sequence[Thing],
    vocabulary: Sequence[str],
    rng: random.Random,
    *,
    place: str = '',
    unsure: Collection[str] = (),
    counted: bool = True,
    background: str | None = None,
    most: int = 10,
) -> list[Asked]:
    """Up to ``most`` questions, in random order.

    :param vocabulary: nouns that may be asked about.
    :param unsure: nouns that may be there: never asked about as absent.
    :param counted: whether ``things`` lists every thing of its kinds; if not, nothing is counted.
    :param background: the one colour of all that is not a thing.
    """
    counts = Counter(thing.noun for thing in things)
    present = {*counts, *(('person',) if PEOPLE & set(counts) else ())}
    absent = _absent(present | set(unsure), vocabulary, max(2, len(present)), rng)
    asked = _existence(present, absent, rng) + _kind_existence(present, unsure, rng)
    asked += _naming(things, counts, absent, rng)
    for thing in things:
        if counts[thing.noun] == 1:
            called = _called(thing.noun, counts, rng)
            asked += which_colour(called, thing.colour, rng) + which_side(called, thing, rng)
    if background:
        asked += which_colour('background', background, rng)[:1]
    asked += _beside([thing for thing in things if counts[thing.noun] == 1], rng)
    if counted:
        asked += _counting(counts, absent, rng)
    if place:
        asked += _scene(place, rng)
    if counted and rng.random() < 0.2:
        asked.append(Asked('json', 'List the objects. Reply in JSON.', json.dumps({'objects': sorted(counts)})))
    kept = sorted(asked, key=lambda one: rng.random() ** (1 / _WEIGHTS.get(one.kind, 1.0)), reverse=True)[:most]
    rng.shuffle(kept)
    return kept


_WEIGHTS = {'yesno': 1.6, 'naming': 2.0, 'colour': 3.0, 'scene_yesno': 0.7, 'place_yesno': 0.7, 'colour_yesno': 0.8}
"""How likely a question of a kind is kept where there are too many."""


def caption_of(things: Sequence[Thing], place: str = '', *, complete: bool = True) -> str:
    """What alignment learns to say: every thing, its colour, and on which side it is.

    :param complete: whether there is nothing but ``things``; if not and there are none, there is nothing to be said.
    """
    if not things:
        return f'{article(place).capitalize()}.' if place else 'There is no object.' if complete else ''
    where = f' {_WHERE.get(place, f"in {article(place)}")}' if place else ''
    counts = Counter(thing.noun for thing in things)
    parts = []
    for noun in dict.fromkeys(thing.noun for thing in sorted(things, key=lambda thing: thing.x)):
        if counts[noun] > 1:
            parts.append(_several(noun, counts[noun]))
            continue
        thing = next(one for one in things if one.noun == noun)
        phrase = article(f'{thing.colour} {noun}' if thing.colour else noun)
        parts.append(f'{phrase} {_SIDES[_column(thing)]}' if len(things) <= 3 and _column(thing) else phrase)
    text = f'{joined(parts)}{where}.'
    return text[:1].upper() + text[1:]


def describe(rng: random.Random) -> str:
    """A request for a caption."""
    return rng.choice(_DESCRIBE)


_WHERE = {
    'beach': 'on a beach',
    'city': 'in the city',
    'home': 'at home',
    'lake': 'by a lake',
    'mountains': 'in the mountains',
    'sea': 'by the sea',
    'street': 'on a street',
}
_SIDES = {'left': 'on the left', 'right': 'on the right', 'middle': 'in the middle'}


def _column(thing: Thing) -> str:
    """``left``, ``middle``, ``right``, or nothing where it is neither clearly."""
    away = thing.x - 0.5
    if abs(away) < _MIDDLE:
        return 'middle'
    return '' if abs(away) < _CLEAR_SIDE else 'left' if away < 0 else 'right'


def _short(kind: str, question: str, answer: str) -> Asked:
    return Asked(kind, question + SHORT_SUFFIX, answer)


def _choice(kind: str, question: str, options: list[str], answer: str, rng: random.Random) -> Asked:
    rng.shuffle(options)
    return Asked(kind, question + CHOICE_SUFFIX.format(options=', '.join(options)), answer)


def _several(noun: str, n: int) -> str:
    return f'{_NUMBERS[n] if n < len(_NUMBERS) else n} {plural(noun)}' if n > 1 else article(noun)


def _absent(present: set[str], vocabulary: Sequence[str], n: int, rng: random.Random) -> list[str]:
    """Nouns of nothing that is there; with more of the same families, what was trained said no too often."""
    fitting = [noun for noun in vocabulary if not any(clash(noun, other) for other in present)]
    near = [noun for noun in fitting if any(noun in family(other) for other in present)]
    chosen: list[str] = []
    for _ in range(n):
        pool = [noun for noun in (near if near and rng.random() < _NEAR_SHARE else fitting) if noun not in chosen]
        if pool:
            chosen.append(rng.choice(pool))
    return chosen


def _existence(present: set[str], absent: list[str], rng: random.Random) -> list[Asked]:
    def ask(noun: str, answer: str) -> Asked:
        question = rng.choice(_SOMEONE) if noun == 'person' else rng.choice(_EXISTS).format(article(noun))
        if noun in PLURAL_ONLY:
            question = question.replace('Is there', 'Are there')
        elif noun not in MASS and rng.random() < 0.15:
            question = rng.choice(_EXIST).format(plural(noun))
        return _short('yesno', question, answer)

    there = sorted(present)
    rng.shuffle(there)
    n = min(len(there), len(absent), 3) if there else 1
    # A picture without anything has only absent ones.
    return [ask(noun, 'Yes') for noun in there[:n]] + [ask(noun, 'No') for noun in absent[:n]]


def _kind_existence(present: set[str], unsure: Collection[str], rng: random.Random) -> list[Asked]:
    """Whether there is anything of a kind; one that is, and one that surely is not."""
    there = [kind for kind in GENERIC if WHICH[kind] & present]
    gone = [
        kind for kind in GENERIC if not any(clash(noun, other) for noun in WHICH[kind] for other in (*present, *unsure))
    ]
    asked = []
    for kinds, answer in ((there, 'Yes'), (gone, 'No')):
        if kinds and there and rng.random() < 0.4:
            asked.append(_short('yesno', rng.choice(_EXISTS).format(article(rng.choice(kinds))), answer))
    return asked


def _called(noun: str, counts: Collection[str], rng: random.Random) -> str:
    """The noun, or sometimes the kind that it alone is of."""
    kinds = [kind for kind in GENERIC if WHICH[kind] & set(counts) == {noun}]
    return rng.choice(kinds) if kinds and rng.random() < 0.2 else noun


def _naming(things: Sequence[Thing], counts: Counter[str], absent: list[str], rng: random.Random) -> list[Asked]:
    if not things:
        return []
    things = [thing for thing in things if thing.noun not in GROUNDS] or things
    nouns = {thing.noun for thing in things}
    if len(nouns) == 1:
        noun = things[0].noun
        return [
            *_which(counts, rng),
            _short('naming', rng.choice(_NAMING), noun),
            _choice('choice', rng.choice(_NAMING[:4]), [noun, *absent[: rng.randint(1, 3)]], noun, rng),
        ]
    asked = _which(counts, rng)
    by_area = sorted(things, key=lambda thing: thing.area, reverse=True)
    if by_area[0].area > 1.8 * by_area[1].area and by_area[0].noun != by_area[1].noun:
        asked.append(_short('naming', rng.choice(_MAIN), by_area[0].noun))
    asked += on_the_sides(things)
    answer = rng.choice(sorted(counts))
    asked.append(_choice('choice', 'Which one do you see?', [answer, *absent[: rng.randint(1, 3)]], answer, rng))
    return asked


def on_the_sides(things: Sequence[Thing]) -> list[Asked]:
    """What is on a side, where nothing else is."""
    asked = []
    for side in ('left', 'right'):
        there = {thing.noun for thing in things if (thing.x < 0.5) == (side == 'left')}
        if len(there) == 1 and all(_column(thing) == side for thing in things if thing.noun in there):
            asked.append(_short('naming', f'What is on the {side}?', there.pop()))
    return asked


def _which(counts: Mapping[str, int], rng: random.Random) -> list[Asked]:
    """The kind is named in the question, and there is one of it, or several of one noun."""
    asked = []
    for kind, nouns in WHICH.items():
        there = nouns & set(counts)
        if len(there) != 1 or rng.random() >= 0.6:
            continue
        noun = there.pop()
        if counts[noun] > 1 and kind in GENERIC:
            wording = rng.choice(('Which {} are these?', 'What {} do you see?', 'What {} are in the picture?'))
            asked.append(_short('naming', wording.format(plural(kind)), plural(noun)))
        else:
            wording = rng.choice(('Which {} is this?', 'Which {} is in the picture?', 'What {} do you see?'))
            asked.append(_short('naming', wording.format(kind), noun))
    return asked


def _scene(place: str, rng: random.Random) -> list[Asked]:
    wording = rng.choice(('What place is this?', 'Where is this?', 'What kind of place is it?'))
    if 'room' in place or place in ('kitchen', 'office'):
        wording = rng.choice((wording, 'What kind of room is this?', 'Which room is this?'))
    asked = [_short('scene', wording, place)]
    places = sorted((INDOORS | OUTDOORS) - {place, 'room', 'home'})
    others = rng.sample(places, 3)
    if place not in ('home', 'room'):
        asked.append(_choice('scene', wording, [place, *others], place, rng))
        named, answer = (place, 'Yes') if rng.random() < 0.5 else (others[0], 'No')
        if answer == 'Yes' or (place in INDOORS) != (others[0] in INDOORS):
            verb = 'Are these' if named == 'mountains' else 'Is this'
            asked.append(_short('scene_yesno', f'{verb} {article(named)}?', answer))
    if place in INDOORS | OUTDOORS:
        answer = 'indoors' if place in INDOORS else 'outdoors'
        wording = rng.choice(('Was this picture taken indoors or outdoors?', 'Is this indoors or outdoors?'))
        asked.append(_choice('scene', wording, ['indoors', 'outdoors'], answer, rng))
    return asked


def far_apart(things: Sequence[Thing]) -> list[tuple[Thing, Thing]]:
    """Pairs, in both orders, of which one is clearly on the left of the other."""
    return [(one, other) for one in things for other in things if abs(one.x - other.x) > 2 * _CLEAR_SIDE]


def _beside(things: Sequence[Thing], rng: random.Random) -> list[Asked]:
    pairs = far_apart(things)
    if not pairs or rng.random() < 0.4:
        return []
    return [left_or_right_of(*rng.choice(pairs), rng)]


def left_or_right_of(one: Thing, other: Thing, rng: random.Random) -> Asked:
    """On which side of the other it is."""
    verb = 'Are' if one.noun in PLURAL_ONLY else 'Is'
    question = f'{verb} the {one.noun} to the left or to the right of the {other.noun}?'
    return _choice('place', question, ['left', 'right'], 'left' if one.x < other.x else 'right', rng)


def which_colour(noun: str, colour: str | None, rng: random.Random) -> list[Asked]:
    """Its colour, and whether it is one, or which of two; nothing if it has no clear one."""
    if colour is None:
        return []
    verb = 'are' if noun in PLURAL_ONLY else 'is'
    spelt = rng.choice(('color', 'colour'))
    other = rng.choice([one for one in COLOURS if one != colour])
    first = rng.choice((f'What {spelt} {verb} the {noun}?', f'What is the {spelt} of the {noun}?'))
    roll = rng.random()
    if roll < 0.6:
        named, answer = (colour, 'Yes') if roll < 0.3 else (other, 'No')
        second = _short('colour_yesno', f'{verb.capitalize()} the {noun} {named}?', answer)
    else:
        second = _choice('choice', f'What {spelt} {verb} the {noun}?', [colour, other], colour, rng)
    return [_short('colour', first, colour), second]


def which_side(noun: str, thing: Thing, rng: random.Random) -> list[Asked]:
    """Where in the picture it is, as far as that is clear."""
    verb = 'are' if noun in PLURAL_ONLY else 'is'
    column, asked = _column(thing), []
    if column in ('left', 'right'):
        wrong = 'right' if column == 'left' else 'left'
        roll = rng.random()
        if roll < 0.4:
            asked.append(_short('place', f'{verb.capitalize()} the {noun} on the left or the right?', column))
        elif roll < 0.6:
            question = f'On which side of the picture {verb} the {noun}?'
            asked.append(_choice('place', question, ['left', 'right'], column, rng))
        else:
            named = rng.choice((column, wrong))
            question = f'{verb.capitalize()} the {noun} on the {named}?'
            asked.append(_short('place_yesno', question, 'Yes' if named == column else 'No'))
    if column and rng.random() < 0.6:
        question = f'Where {verb} the {noun}?'
        asked.append(_choice('place', question, ['left', 'middle', 'right'], column, rng))
    if abs(thing.y - 0.5) > 0.16 and rng.random() < 0.5:
        answer = 'top' if thing.y < 0.5 else 'bottom'
        asked.append(_short('place', f'{verb.capitalize()} the {noun} at the top or the bottom?', answer))
    return asked


def _counting(counts: Counter[str], absent: list[str], rng: random.Random) -> list[Asked]:
    asked = []
    people = sum(counts[noun] for noun in PEOPLE)
    for noun, n in counts.items():
        if noun not in MASS and (n > 1 or rng.random() < 0.35):
            asked.append(_short('count', f'How many {plural(noun)} are there?', str(n)))
    if people:
        asked.append(
            _short('count', rng.choice(('How many people are there?', 'How many people do you see?')), str(people))
        )
    if absent and rng.random() < 0.15:
        asked.append(_short('count', f'How many {plural(absent[0])} are there?', '0'))
    return asked
