"""Writes nano's data: JPEG pictures, dialogues in LLaVA's format, the terms of what they are made of, and a summary.

Picture ``i`` is a function of the seed, the split and ``i`` alone. Each is noted in a journal when it is whole on the
disk, so that a run that was interrupted goes on after the last one. ``train.json`` has two dialogues a picture: several
questions of all kinds, and as many that one thing of it answers (``binding.py``);
``held_out.json`` has questions about objects, backgrounds and photos that training never sees;
``regions.json`` and ``held_out_regions.json`` say where in the picture the things are. Paths in them are relative to
``images/`` and ``regions/``.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mobilevlm_ros.errors import DatasetError
from mobilevlm_ros.train.nano_data.binding import binding_questions
from mobilevlm_ros.train.nano_data.cutouts import Materials
from mobilevlm_ros.train.nano_data.photos import Photo, photo_view
from mobilevlm_ros.train.nano_data.questions import Asked, caption_of, describe, questions_about
from mobilevlm_ros.train.nano_data.scenes import draw_scene
from mobilevlm_ros.train.pixel_colours import clear_colour
from mobilevlm_ros.train.regions import save_map

__all__ = ['Plan', 'generate', 'summary']

_JOURNAL = 'journal.jsonl'
_FORMAT = 2
"""Of the journal's entries."""
_QUALITY = 92
_PHOTO_SHARE = 0.5
"""Of the pictures of a split, how many are views of real photos."""
_RARITY_OF_NOTHING = 0.1
_FEWEST_PIXELS = 10_000
_DESCRIBED_SHARE = 0.15
"""Of the pictures, how many are also to be described."""
_PERSON_WEIGHT = 6
"""How much more often than another noun a person is asked about where there is none."""

_DIALOGUES = {'train': ('asked', 'bound'), 'held_out': ('asked',)}
_REGIONS = {'train': 'regions.json', 'held_out': 'held_out_regions.json'}

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """What to write.

    :ivar images: pictures for training. :ivar held_out: pictures of what is held out.
    :ivar side: longest side of a picture in pixels.
    :ivar questions: the most about one picture.
    """

    images: int = 6000
    held_out: int = 300
    side: int = 448
    questions: int = 9
    seed: int = 0

    def identity(self, content: str) -> str:
        """What must be the same for a run to be gone on with."""
        described = json.dumps([_FORMAT, self.side, self.questions, self.seed, content])
        return hashlib.sha256(described.encode()).hexdigest()


def generate(
    out: Path,
    materials: tuple[Materials, Materials],
    photos: Sequence[Photo],
    plan: Plan,
    licence: str,
    *,
    on_progress: OnProgress = lambda done, total: None,
) -> dict[str, Any]:
    """Write the data, or what is missing of it, and return the summary.

    :param materials: for training, and held out.
    :raise DatasetError: if the folder holds data of another plan.
    """
    training, apart = materials
    content = f'{sorted(one.source for one in training.cutouts)}{len(training.backgrounds)}'
    content += str([(photo.source, photo.things, photo.unsure, photo.place) for photo in photos])
    identity = plan.identity(hashlib.sha256(content.encode()).hexdigest())
    for folder in ('images', 'regions'):
        (out / folder).mkdir(parents=True, exist_ok=True)
    (out / 'LICENCES.txt').write_text(licence, encoding='utf-8')
    done = _journal(out, identity)
    vocabulary = sorted({*training.by_noun, *(thing.noun for photo in photos for thing in photo.things)} - {'person'})
    vocabulary += ['person'] * _PERSON_WEIGHT
    jobs = [('train', i) for i in range(plan.images)] + [('held_out', i) for i in range(plan.held_out)]
    splits = {
        'train': (training, [photo for photo in photos if not photo.held_out]),
        'held_out': (apart, [photo for photo in photos if photo.held_out]),
    }
    entries: list[dict[str, Any]] = []
    with (out / _JOURNAL).open('a', encoding='utf-8') as journal:
        for number, (split, index) in enumerate(jobs):
            key = f'{split}_{index:06d}'
            entry = done.get(key)
            if entry is None:
                entry = _make(out, key, *splits[split], vocabulary, plan)
                journal.write(json.dumps({'split': split, **entry}) + '\n')
                journal.flush()
            entries.append({'split': split, **entry})
            on_progress(number + 1, len(jobs))
    return _write(out, entries)


def _make(
    out: Path, key: str, materials: Materials, photos: Sequence[Photo], vocabulary: Sequence[str], plan: Plan
) -> dict[str, Any]:
    """Draw one picture, ask about it, and store it."""
    rng = random.Random(f'{plan.seed} {key}')
    if photos and rng.random() < _PHOTO_SHARE:
        (photo,) = rng.choices(photos, weights=_rarities(photos))
        view = photo_view(photo, rng)
        image, things, regions, background = view.image, view.things, view.regions, None
        place, source, complete = photo.place, photo.source, False
        asked = questions_about(
            things, vocabulary, rng, place=place, unsure=view.unsure, counted=False, most=plan.questions
        )
    else:
        scene = draw_scene(materials, rng)
        image, things, regions, place, source = scene.image, scene.things, scene.regions, scene.place, 'composed'
        complete = True
        background = clear_colour(np.asarray(image)[regions == 0], _FEWEST_PIXELS)
        asked = questions_about(things, vocabulary, rng, place=place, background=background, most=plan.questions)
    own = random.Random(f'{plan.seed} {key} binding')
    bound = binding_questions(things, own, complete=complete, background=background, most=plan.questions)
    caption, request = caption_of(things, place, complete=complete), describe(rng)
    if caption and rng.random() < _DESCRIBED_SHARE:
        asked.append(Asked('caption', request, caption))
    image.thumbnail((plan.side, plan.side), Image.Resampling.LANCZOS)
    name, where = f'images/{key}.jpg', f'regions/{key}.png'
    partial = out / f'{name}.partial'
    image.save(partial, 'JPEG', quality=_QUALITY)
    partial.replace(out / name)
    save_map(regions, out / where)
    return {
        'id': key,
        'image': name,
        'source': source,
        'asked': [[one.kind, one.question, one.answer] for one in asked],
        'bound': [[one.kind, one.question, one.answer] for one in bound],
        'regions': where,
        'things': [[thing.noun, thing.colour] for thing in things],
        'place': place,
    }


def _rarities(photos: Sequence[Photo]) -> list[float]:
    """How often to take each photo, so that what is in many of them is not most of what is learned."""
    counts = Counter(thing.noun for photo in photos for thing in photo.things)
    return [max((counts[thing.noun] ** -0.5 for thing in photo.things), default=_RARITY_OF_NOTHING) for photo in photos]


def _journal(out: Path, identity: str) -> dict[str, dict[str, Any]]:
    """What is done, by its key; begins a journal where there is none."""
    path = out / _JOURNAL
    if not path.is_file():
        path.write_text(json.dumps({'plan': identity}) + '\n', encoding='utf-8')
        return {}
    text = path.read_text(encoding='utf-8')
    lines = text[: text.rfind('\n') + 1].splitlines()
    try:
        begun, *entries = [json.loads(line) for line in lines]
        found = {entry['id']: entry for entry in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f'{path} is damaged ({error}): delete {out} and run again') from error
    if begun != {'plan': identity}:
        raise DatasetError(
            f'{out} holds data that was made with other options or packages: choose another folder, or delete it'
        )
    if not text.endswith('\n'):  # a line was cut off
        path.write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')
    return found


def _write(out: Path, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def store(name: str, records: list[dict[str, Any]]) -> None:
        partial = out / f'{name}.partial'
        partial.write_text(json.dumps(records, indent=0) + '\n', encoding='utf-8')
        partial.replace(out / name)

    for split in ('train', 'held_out'):
        chosen = [entry for entry in entries if entry['split'] == split]
        dialogues = _DIALOGUES[split]
        store(f'{split}.json', [_record(entry, which) for which in dialogues for entry in chosen if entry[which]])
        grounded = ('id', 'image', 'regions', 'things', 'place')
        places = [{key: entry[key] for key in grounded} for entry in chosen]
        for one in places:
            one |= {key: Path(one[key]).name for key in ('image', 'regions')}
        store(_REGIONS[split], places)
    found = summary(entries)
    (out / 'summary.json').write_text(json.dumps(found, indent=2) + '\n', encoding='utf-8')
    return found


def _record(entry: dict[str, Any], which: str) -> dict[str, Any]:
    """One dialogue; ``kinds`` names the kind of each question, in order."""
    asked = [Asked(*one) for one in entry[which]]
    turns = _turns([(one.question, one.answer) for one in asked])
    return {
        'id': entry['id'] if which == 'asked' else f'{entry["id"]}-{which}',
        'image': Path(entry['image']).name,
        'conversations': turns,
        'kinds': [one.kind for one in asked],
        'source': entry['source'],
    }


def _turns(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    def both() -> Iterator[dict[str, str]]:
        for index, (question, answer) in enumerate(pairs):
            yield {'from': 'human', 'value': f'<image>\n{question}' if index == 0 else question}
            yield {'from': 'gpt', 'value': answer}

    return list(both())


def summary(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts by split: pictures, photos among them, questions by kind, and the answers to yes/no."""
    found: dict[str, Any] = {}
    for split in ('train', 'held_out'):
        chosen = [entry for entry in entries if entry['split'] == split]
        asked = [one for entry in chosen for which in _DIALOGUES[split] for one in entry[which]]
        found[split] = {
            'images': len(chosen),
            'photos': sum(entry['source'] != 'composed' for entry in chosen),
            'questions': len(asked),
            'kinds': dict(sorted(Counter(kind for kind, _, _ in asked).items())),
            'yesno': dict(Counter(answer for kind, _, answer in asked if kind == 'yesno')),
        }
    return found
