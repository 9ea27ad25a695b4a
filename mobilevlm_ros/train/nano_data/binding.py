"""Questions that one thing of a picture answers: what colour it is, where it is, what it is that is there.

To answer them a language model has to find the thing's visual token and read the rest of it. Among the questions of all
kinds they are too few to be learned.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from mobilevlm_ros.runtime.prompt import SHORT_SUFFIX
from mobilevlm_ros.train.nano_data.questions import (
    Asked,
    far_apart,
    left_or_right_of,
    on_the_sides,
    which_colour,
    which_side,
)
from mobilevlm_ros.train.nano_data.scenes import Thing

__all__ = ['binding_questions']

_ROUNDS = 3
"""How often a thing is asked about, before what was asked twice is left out."""


def binding_questions(
    things: Sequence[Thing],
    rng: random.Random,
    *,
    complete: bool = True,
    background: str | None = None,
    most: int = 10,
) -> list[Asked]:
    """Up to ``most``, in random order; of colours, sides, and what has a colour or is on a side.

    :param complete: whether there is nothing but ``things``; if not, another may have the same colour.
    :param background: the one colour of all that is not a thing.
    """
    counts = Counter(thing.noun for thing in things)
    alone = [thing for thing in things if counts[thing.noun] == 1]
    asked = on_the_sides(things) if len(counts) > 1 else []
    pairs = far_apart(alone)
    asked += [left_or_right_of(*pair, rng) for pair in rng.sample(pairs, min(2, len(pairs)))]
    for _ in range(_ROUNDS):
        for thing in alone:
            asked += which_colour(thing.noun, thing.colour, rng) + which_side(thing.noun, thing, rng)
    if alone and background:
        asked += which_colour('background', background, rng)[:1]
    if complete and len(things) > 1:
        asked += _of_a_colour(things)
    kept = list({one.question: one for one in asked}.values())
    rng.shuffle(kept)
    return kept[:most]


def _of_a_colour(things: Sequence[Thing]) -> list[Asked]:
    """What is of a colour that no other thing has; nothing where the colour of one is not clear."""
    colours = Counter(thing.colour for thing in things)
    if None in colours:
        return []
    return [
        Asked('naming', f'Which object is {thing.colour}?{SHORT_SUFFIX}', thing.noun)
        for thing in things
        if colours[thing.colour] == 1
    ]
