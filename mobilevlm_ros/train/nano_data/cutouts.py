"""Objects with transparency around them, each with a noun and, if it has one, a colour; and pictures to put them on.

From Tux Paint's photo stamps (named by their captions) and Sweet Home 3D's furniture (named by its catalogues).
Whole instances are held out, and only of nouns that have another one to learn from.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from mobilevlm_ros.errors import DatasetError
from mobilevlm_ros.train.nano_data.colours import main_colour
from mobilevlm_ros.train.nano_data.words import PEOPLE, noun_of

__all__ = ['Cutout', 'Materials', 'load_materials']

_SIDE = 420
_BACKGROUND_SIDE = 900
_LEAST_BYTES = 60_000
_UNFIT_STAMPS = re.compile(r'cartoon|symbols|seasonal|flags|_mirror')
_TINTABLE_STAMPS = re.compile(r'clothes|household|vehicles/auto|sports')
_OWN_COLOURS = frozenset(('man', 'woman', 'boy', 'girl', 'plant', 'tree', 'flower', 'dog', 'cat', 'fireplace'))
# Wallpapers that show something with a name, and drawings.
_UNFIT_BACKGROUNDS = re.compile(
    'ColorfulCups|LadyBird|Kite|BytheWater|Konqui|Elephants|Butterfly|TwoWings|Flower|logo|images_dark|1080x1920|'
    '720x1440|1622x|screenshot|Wine_|friends_|Dragonfly|Picture_|greentock|free_by|umang|seeding|Bridge_by',
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Cutout:
    """One object.

    :ivar image: RGBA, cropped to what is opaque.
    :ivar source: names the instance.
    :ivar tintable: whether it may come in any colour.
    """

    noun: str
    image: Image.Image
    source: str
    colour: str | None
    tintable: bool


@dataclass(frozen=True)
class Materials:
    """What pictures of one split are made of."""

    cutouts: list[Cutout]
    backgrounds: list[Image.Image]
    by_noun: dict[str, list[Cutout]] = field(init=False)

    def __post_init__(self) -> None:
        grouped: dict[str, list[Cutout]] = {}
        for cutout in self.cutouts:
            grouped.setdefault(cutout.noun, []).append(cutout)
        object.__setattr__(self, 'by_noun', dict(sorted(grouped.items())))


def load_materials(
    stamps: Path, furniture: Path, backgrounds: Sequence[Path], *, held_out_share: float = 0.15
) -> tuple[Materials, Materials]:
    """Everything for training, and what is held out of it.

    :param stamps: pictures with a ``.txt`` beside each. :param furniture: folder of ``.sh3f`` catalogues.
    :param backgrounds: folders of photos.
    :raise DatasetError: if nothing usable is found in one of the places.
    """
    cutouts = [*_stamps(stamps), *_furniture(furniture)]
    places = [path for folder in backgrounds for path in sorted(folder.rglob('*'))]
    photos = [path for path in places if _is_background(path)]
    if not cutouts or len(photos) < 2:
        raise DatasetError(f'found {len(cutouts)} cut-outs in {stamps} and {furniture}, and {len(photos)} backgrounds')
    kept, held = _split_cutouts(cutouts, held_out_share)
    # Sizes of one wallpaper lie in one folder: they are one background.
    groups = sorted({_group(path) for path in photos})
    apart = set(groups[:: max(2, round(1 / held_out_share))])
    pictures = [(_group(path) in apart, _small(path)) for path in photos]
    return (
        Materials(kept, [picture for is_apart, picture in pictures if not is_apart]),
        Materials(held, [picture for is_apart, picture in pictures if is_apart]),
    )


def _split_cutouts(cutouts: Sequence[Cutout], share: float) -> tuple[list[Cutout], list[Cutout]]:
    total, held_of = Counter(one.noun for one in cutouts), Counter[str]()
    kept, held = [], []
    for one in sorted(cutouts, key=lambda one: hashlib.sha256(one.source.encode()).hexdigest()):
        if held_of[one.noun] + 1 <= max(1, round(share * total[one.noun])) and total[one.noun] > 1:
            held_of[one.noun] += 1
            held.append(one)
        else:
            kept.append(one)
    return kept, held


def _stamps(folder: Path) -> Iterator[Cutout]:
    for path in sorted(folder.rglob('*.png')):
        name, caption = path.relative_to(folder).as_posix(), path.with_suffix('.txt')
        if _UNFIT_STAMPS.search(name) or not caption.is_file():
            continue
        text = (caption.read_text(encoding='utf-8', errors='replace').splitlines() or [''])[0]
        if '/trees/' in name and 'cone' not in name:
            text += ' tree'
        elif '/flowers/' in name:
            text += ' flower'
        yield from _cutout(path.read_bytes(), text, f'stamp:{name}', tintable=bool(_TINTABLE_STAMPS.match(name)))


def _furniture(folder: Path) -> Iterator[Cutout]:
    for path in sorted(folder.glob('*.sh3f')):
        with zipfile.ZipFile(path) as catalogue:
            lines = catalogue.read('PluginFurnitureCatalog.properties').decode('latin-1').splitlines()
            entries = dict(line.split('=', 1) for line in lines if '=' in line and not line.startswith('#'))
            for key, name in entries.items():
                icon = entries.get(f'icon#{key[5:]}')
                if key.startswith('name#') and icon:
                    data = catalogue.read(icon.strip().lstrip('/'))
                    yield from _cutout(data, name.strip(), f'{path.stem}:{key[5:]}:{name.strip()}', tintable=True)


def _cutout(data: bytes, name: str, source: str, *, tintable: bool) -> Iterator[Cutout]:
    noun = noun_of(name)
    if noun is None:
        return
    image = Image.open(io.BytesIO(data)).convert('RGBA')
    alpha = image.getchannel('A')
    box = alpha.point(lambda value: 255 * (value > 40)).getbbox()
    if box is None or np.asarray(alpha).min() > 200:  # nothing, or no transparency
        return
    image = image.crop(box)
    image.thumbnail((_SIDE, _SIDE))
    colour = None if noun in PEOPLE else main_colour(image)  # clothes have colours, people are not asked for theirs
    yield Cutout(noun, image, source, colour, tintable and noun not in _OWN_COLOURS)


def _is_background(path: Path) -> bool:
    fits = path.suffix in ('.jpg', '.png') and not _UNFIT_BACKGROUNDS.search(str(path))
    return fits and path.is_file() and path.stat().st_size > _LEAST_BYTES


def _group(path: Path) -> str:
    parent = path.parent
    return str(parent.parent if parent.name == 'images' else path)


def _small(path: Path) -> Image.Image:
    file = Image.open(path)
    file.draft('RGB', (_BACKGROUND_SIDE, _BACKGROUND_SIDE))
    image = file.convert('RGB')
    image.thumbnail((_BACKGROUND_SIDE, _BACKGROUND_SIDE), reducing_gap=2.0)
    return image
