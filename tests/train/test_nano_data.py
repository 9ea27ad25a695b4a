"""nano's data: what is said of a picture is true, nothing is shared by training and what is held out, runs go on."""

from __future__ import annotations

import io
import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nano_sources import BLUE, cutout_png, some_things, write_sources
from PIL import Image

from mobilevlm_ros.errors import DatasetError
from mobilevlm_ros.runtime.prompt import SHORT_SUFFIX
from mobilevlm_ros.train.nano_data.colours import main_colour, tinted
from mobilevlm_ros.train.nano_data.cutouts import Materials, load_materials
from mobilevlm_ros.train.nano_data.generate import Plan, generate
from mobilevlm_ros.train.nano_data.kinds import GENERIC, WHICH
from mobilevlm_ros.train.nano_data.photos import Photo, load_photos, photo_view
from mobilevlm_ros.train.nano_data.questions import caption_of, questions_about
from mobilevlm_ros.train.nano_data.scenes import Thing, draw_scene
from mobilevlm_ros.train.nano_data.sources import photo_packages
from mobilevlm_ros.train.nano_data.words import HEIGHTS_M, clash, noun_of, plural
from mobilevlm_ros.train.pixel_colours import COLOURS
from mobilevlm_ros.train.records import read_records
from mobilevlm_ros.train.regions import UNKNOWN, cells_of, read_grounded

VOCABULARY = ['chair', 'sofa', 'table', 'car', 'bus', 'dog', 'cat', 'apple', 'lemon', 'cup', 'laptop', 'person']
PLAN = Plan(images=12, held_out=6, side=128, questions=8, seed=3)


@pytest.fixture(scope='module')
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_sources(tmp_path_factory.mktemp('sources'))


@pytest.fixture(scope='module')
def materials(sources: dict[str, Path]) -> tuple[Materials, Materials]:
    return load_materials(sources['stamps'], sources['furniture'], [sources['backgrounds']])


@pytest.fixture(scope='module')
def photos(sources: dict[str, Path]) -> list[Photo]:
    return load_photos({'some photos': sources['photos']}, sources['labels'])


def thing(noun: str = 'cup', colour: str | None = None, x: float = 0.2, y: float = 0.5, area: float = 0.1) -> Thing:
    return Thing(noun, colour, x, y, area)


# -- words and colours --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'noun'),
    [
        ('A red apple.', 'apple'),
        ('A pineapple.', 'pineapple'),
        ('Sofa BZ', None),
        ('Office chair', 'chair'),
        ('Female sitting', 'woman'),
        ('Nonsense', None),
        ('Flat TV', 'television'),
    ],
)
def test_names_become_nouns(name: str, noun: str | None) -> None:
    assert noun_of(name) == noun


@pytest.mark.parametrize('colour', COLOURS)
def test_a_tinted_cutout_has_the_colour_that_it_is_said_to_have(colour: str) -> None:
    image = Image.open(io.BytesIO(cutout_png(BLUE))).convert('RGBA')
    assert main_colour(tinted(image, colour, random.Random(1))) == colour


# -- questions ----------------------------------------------------------------------------------------------------


@given(things=some_things(4), seed=st.integers(0, 1000))
def test_existence_is_answered_as_it_is(things: list[Thing], seed: int) -> None:
    present = {one.noun for one in things} | ({'person'} if any(one.noun == 'man' for one in things) else set())
    for one in questions_about(things, VOCABULARY, random.Random(seed), most=99):
        if one.kind == 'yesno':
            words = f' {one.question} '.replace('?', ' ').replace('\n', ' ')
            named = [
                noun
                for noun in [*VOCABULARY, 'man', 'scissors']
                if f' {noun} ' in words or f' {plural(noun)} ' in words
            ]
            if 'anyone' in one.question:
                named = ['person']
            named += [noun for kind in GENERIC if f' {kind} ' in words for noun in WHICH[kind]]
            assert (one.answer == 'Yes') == bool(present & set(named))


@given(things=some_things(4), seed=st.integers(0, 1000))
def test_absent_things_could_not_be_called_what_is_there(things: list[Thing], seed: int) -> None:
    for one in questions_about(things, VOCABULARY, random.Random(seed), unsure=['table'], most=99):
        if one.kind == 'yesno' and one.answer == 'No':
            asked = one.question.removesuffix(SHORT_SUFFIX)
            assert ' table' not in asked
            for noun in VOCABULARY:
                if any(f' {word}{end}' in asked for word in (noun, plural(noun)) for end in '? '):
                    assert not any(clash(noun, other.noun) for other in things)
            for kind in GENERIC:
                if f' {kind}' in asked:
                    assert not WHICH[kind] & {other.noun for other in things}


def test_existence_is_balanced() -> None:
    rng, answers = random.Random(0), Counter[str]()
    for _ in range(300):
        chosen = [thing(noun) for noun in rng.sample(['chair', 'car', 'dog'], rng.randint(1, 3))]
        answers.update(one.answer for one in questions_about(chosen, VOCABULARY, rng) if one.kind == 'yesno')
    assert 0.45 < answers['Yes'] / answers.total() < 0.55


def test_a_third_of_what_is_absent_is_of_the_same_family() -> None:
    rng = random.Random(0)
    asked = [one.question for _ in range(600) for one in questions_about([thing('car')], VOCABULARY, rng)]
    n_buses, n_apples = (sum(f' {noun}' in question for question in asked) for noun in ('bus', 'apple'))
    # Of ten nouns that could be asked about one is near: a third of the time it, else each as often.
    assert 2 * n_apples < n_buses < 12 * n_apples


@given(things=some_things(4), seed=st.integers(0, 1000))
def test_counts_and_sides_are_those_of_the_things(things: list[Thing], seed: int) -> None:
    for one in questions_about(things, VOCABULARY, random.Random(seed), most=99):
        if one.kind == 'count' and one.question.startswith('How many chairs'):
            assert one.answer == str(sum(other.noun == 'chair' for other in things))
        if one.kind == 'place' and one.answer in ('left', 'right'):
            first, *second = [
                other
                for word in re.findall(r'\w+', one.question)
                for other in things
                if other.noun == word or (word in GENERIC and other.noun in WHICH[word])
            ]
            assert (first.x < (second[0].x if second else 0.5)) == (one.answer == 'left')


def test_a_place_is_indoors_or_outdoors_and_what_it_is() -> None:
    rng = random.Random(0)
    asked = [one for _ in range(50) for one in questions_about([], VOCABULARY, rng, place='kitchen', most=99)]
    answers = {one.answer for one in asked if one.kind == 'scene'}
    assert answers == {'kitchen', 'indoors'}
    for one in asked:
        if one.kind == 'scene_yesno':
            assert (one.answer == 'Yes') == ('kitchen' in one.question)


def test_the_kind_is_named_where_there_is_one_of_it() -> None:
    rng = random.Random(0)
    asked = [one for _ in range(50) for one in questions_about([thing('dog'), thing('cup')], VOCABULARY, rng)]
    assert {one.answer for one in asked if 'animal' in one.question and one.kind == 'naming'} == {'dog'}
    both = [thing('dog'), thing('cat')]
    asked = [one for _ in range(50) for one in questions_about(both, VOCABULARY, rng)]
    assert {one.kind for one in asked if 'animal' in one.question} == {'yesno'}


def test_several_of_a_kind_are_named_in_the_plural() -> None:
    rng = random.Random(0)
    asked = [one for _ in range(50) for one in questions_about([thing('dog'), thing('dog')], VOCABULARY, rng)]
    assert {one.answer for one in asked if 'animals' in one.question and one.kind == 'naming'} == {'dogs'}


def test_a_kind_is_there_if_one_of_it_is() -> None:
    rng = random.Random(0)
    asked = [one for _ in range(50) for one in questions_about([thing('dog')], VOCABULARY, rng, unsure=['car'])]
    answers = {(kind, one.answer) for one in asked if one.kind == 'yesno' for kind in GENERIC if kind in one.question}
    # A car may be there, so nothing is said of vehicles.
    assert answers == {('animal', 'Yes'), ('insect', 'No'), ('fruit', 'No'), ('vegetable', 'No')}


def test_the_background_has_a_colour_where_one_is_known() -> None:
    rng = random.Random(0)
    asked = [one for _ in range(9) for one in questions_about([], VOCABULARY, rng, background='blue', most=99)]
    assert {one.answer for one in asked if 'background' in one.question} == {'blue'}


def test_nothing_is_counted_where_not_everything_is_known() -> None:
    rng = random.Random(0)
    kinds = {one.kind for _ in range(50) for one in questions_about([thing()], VOCABULARY, rng, counted=False)}
    assert 'yesno' in kinds
    assert not kinds & {'count', 'json'}


def test_a_caption_names_colour_and_side() -> None:
    found = caption_of([thing('chair', 'red', 0.2), thing('dog', None, 0.8)], 'room')
    assert found == 'A red chair on the left and a dog on the right in a room.'


def test_a_caption_counts() -> None:
    assert caption_of([thing('bus'), thing('bus', 'red')]) == 'Two buses.'


# -- pictures -----------------------------------------------------------------------------------------------------


def test_things_are_where_they_are_said_to_be(materials: tuple[Materials, Materials]) -> None:
    red = [one for one in materials[0].cutouts if one.noun == 'apple']
    plain = Materials(red, [Image.new('RGB', (300, 200), (90, 200, 90))])
    seen = 0
    for seed in range(40):
        scene = draw_scene(plain, random.Random(seed))
        if len(scene.things) == 1 and scene.things[0].colour == 'red' and scene.things[0].area > 0.03:
            pixels = np.asarray(scene.image).astype(int)
            xs = np.nonzero((pixels[..., 0] > 110) & (pixels[..., 1] < 90) & (pixels[..., 2] < 90))[1]
            if len(xs) > 500:
                seen += 1
                assert abs(np.median(xs) / scene.image.width - scene.things[0].x) < 0.1
    assert seen > 3


def test_the_regions_are_those_of_the_things(materials: tuple[Materials, Materials]) -> None:
    for seed in range(30):
        scene = draw_scene(materials[0], random.Random(seed))
        assert scene.regions.shape == scene.image.size[::-1]
        for number, one in enumerate(scene.things, start=1):
            _, xs = np.nonzero(scene.regions == number)
            assert len(xs) <= one.area * scene.regions.size + 1
            assert abs((xs.min() + xs.max()) / 2 / scene.image.width - one.x) < 0.25
        assert set(np.unique(scene.regions).tolist()) <= set(range(len(scene.things) + 1))


def test_a_picture_is_a_function_of_its_seed(materials: tuple[Materials, Materials]) -> None:
    one, same = (draw_scene(materials[0], random.Random(5)) for _ in range(2))
    assert one.things == same.things
    assert one.image.tobytes() == same.image.tobytes()


def test_training_and_held_out_share_nothing_and_training_has_every_noun(
    materials: tuple[Materials, Materials],
) -> None:
    training, apart = materials
    assert not {one.source for one in training.cutouts} & {one.source for one in apart.cutouts}
    assert not {one.tobytes() for one in training.backgrounds} & {one.tobytes() for one in apart.backgrounds}
    assert set(apart.by_noun) == {'apple', 'lemon', 'chair', 'sofa'}
    assert set(training.by_noun) == {'apple', 'lemon', 'chair', 'sofa', 'man', 'lamp'}


def test_a_room_holds_things_that_stand_on_a_floor(materials: tuple[Materials, Materials]) -> None:
    for seed in range(60):
        scene = draw_scene(materials[0], random.Random(seed))
        if scene.place:
            assert {one.noun for one in scene.things} <= set(HEIGHTS_M)


# -- real photos --------------------------------------------------------------------------------------------------


def test_the_mirrored_photo_has_its_things_on_the_other_side(photos: list[Photo]) -> None:
    whole = replace(photos[0], things=photos[0].things[:1])
    sides = {photo_view(whole, random.Random(seed)).things[0].x for seed in range(30) if views_all(whole, seed)}
    assert {round(x, 3) for x in sides} == {0.25, 0.75}


def views_all(photo: Photo, seed: int) -> bool:
    """Whether a view of the photo leaves nothing out."""
    things = photo_view(photo, random.Random(seed)).things
    return len(things) == len(photo.things) and abs(things[0].area - 0.35) < 1e-9


@given(seed=st.integers(0, 500))
def test_a_view_says_where_its_things_are(photos: list[Photo], seed: int) -> None:
    view = photo_view(photos[0], random.Random(seed))
    assert view.regions.shape == view.image.size[::-1]
    assert set(np.unique(view.regions).tolist()) <= {UNKNOWN, *range(1, len(view.things) + 1)}
    for one in view.things:
        assert 0 < one.area <= 1 + 1e-9
        assert one.area / 2 - 1e-9 <= one.x <= 1 - one.area / 2 + 1e-9


@given(seed=st.integers(0, 500))
def test_what_is_cut_off_may_be_there(photos: list[Photo], seed: int) -> None:
    view = photo_view(photos[0], random.Random(seed))
    shown = {one.noun for one in view.things}
    assert shown | set(view.unsure) == {'cup', 'table', 'plate'}
    assert not shown & set(view.unsure)


def test_every_label_of_this_project_is_of_known_words() -> None:
    path = Path(__file__).parents[2] / 'models' / 'nano' / 'training_photos.txt'
    lines, package = [], ''
    for line in path.read_text().splitlines():
        if line.startswith('['):
            package = line
            assert package.strip('[]') in photo_packages()
        elif line and not line.startswith('#'):
            lines.append(package + line)
    assert len(lines) > 330
    assert all(line.count('|') == 3 for line in lines)
    assert len({line.split('|')[0] for line in lines}) == len(lines)


@pytest.mark.parametrize(
    'line', ['a | cup', 'a | cup@up | | ', 'a | cup | | ', 'a | cup@5040 | | ', 'a | cup:mauve@0099 | | ']
)
def test_malformed_labels_are_refused(sources: dict[str, Path], tmp_path: Path, line: str) -> None:
    labels = tmp_path / 'labels.txt'
    labels.write_text(f'[some photos]\n{line}\n')
    with pytest.raises(DatasetError, match=r'a \| cup|the label'):
        load_photos({'some photos': sources['photos']}, labels)


def test_a_missing_photo_is_named(sources: dict[str, Path], tmp_path: Path) -> None:
    labels = tmp_path / 'labels.txt'
    labels.write_text('[some photos]\nnowhere | cup@0099 | | \n')
    with pytest.raises(DatasetError, match=r'nowhere\.jpg is missing'):
        load_photos({'some photos': sources['photos']}, labels)


def test_a_package_that_is_not_there_is_named(sources: dict[str, Path]) -> None:
    with pytest.raises(DatasetError, match=r'section \[some photos\], which is none of others'):
        load_photos({'others': sources['photos']}, sources['labels'])


# -- files --------------------------------------------------------------------------------------------------------


def test_the_files_are_data_that_training_reads(
    tmp_path: Path, materials: tuple[Materials, Materials], photos: list[Photo]
) -> None:
    made = generate(tmp_path, materials, photos, PLAN, 'terms')

    for name in ('train.json', 'held_out.json'):
        assert not read_records(tmp_path / name, tmp_path / 'images').problems.total
    assert made['train']['images'] == 12
    assert (tmp_path / 'LICENCES.txt').read_text() == 'terms'
    assert made['train']['photos'] > 0
    for name, n in (('regions.json', 12), ('held_out_regions.json', 6)):
        pictures = read_grounded(tmp_path / name, tmp_path / 'images')
        assert len(pictures) == n
        assert all(one.image.is_file() for one in pictures)
        assert any(cells_of(one, 4, 'pad').shares.any() for one in pictures)


def test_each_picture_to_learn_from_has_a_second_dialogue_about_single_things(
    tmp_path: Path, materials: tuple[Materials, Materials], photos: list[Photo]
) -> None:
    made = generate(tmp_path, materials, photos, PLAN, 'terms')

    train, held_out = (json.loads((tmp_path / f'{split}.json').read_text()) for split in ('train', 'held_out'))
    bound = {one['id']: one for one in train if one['id'].endswith('-bound')}
    assert bound
    assert not any(one['id'].endswith('-bound') for one in held_out)
    assert {one['id'] for one in train} >= {name.removesuffix('-bound') for name in bound}
    kinds = {kind for one in bound.values() for kind in one['kinds']}
    assert kinds <= {'colour', 'colour_yesno', 'choice', 'place', 'place_yesno', 'naming'}
    assert made['train']['questions'] == sum(len(one['kinds']) for one in train)


def test_an_interrupted_run_goes_on_to_the_same_files(
    tmp_path: Path, materials: tuple[Materials, Materials], photos: list[Photo]
) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 7:
            raise Stopped

    generate(tmp_path / 'whole', materials, photos, PLAN, '')
    with pytest.raises(Stopped):
        generate(tmp_path / 'cut', materials, photos, PLAN, '', on_progress=stop)
    with (tmp_path / 'cut' / 'journal.jsonl').open('a') as journal:
        journal.write('{"half": ')
    generate(tmp_path / 'cut', materials, photos, PLAN, '')

    for path in sorted((tmp_path / 'whole').rglob('*')):
        if path.is_file():
            assert (tmp_path / 'cut' / path.relative_to(tmp_path / 'whole')).read_bytes() == path.read_bytes()


def test_data_of_another_plan_is_not_mixed_in(
    tmp_path: Path, materials: tuple[Materials, Materials], photos: list[Photo]
) -> None:
    small = Plan(images=1, held_out=0, side=64)
    generate(tmp_path, materials, photos, small, '')
    with pytest.raises(DatasetError, match='other options or packages'):
        generate(tmp_path, materials, photos, Plan(images=1, held_out=0, side=64, seed=1), '')
    assert len(json.loads((tmp_path / 'train.json').read_text())) == 1
