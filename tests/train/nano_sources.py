"""Made-up sources of nano's data: things, and packages of stamps, furniture icons, wallpapers and photos."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from mobilevlm_ros.train.nano_data.scenes import Thing
from mobilevlm_ros.train.pixel_colours import COLOURS

RED, BLUE = (205, 25, 25), (35, 80, 205)


def some_things(most: int) -> st.SearchStrategy[list[Thing]]:
    """What may be in a picture, several of a kind among it."""
    nouns = st.sampled_from(['chair', 'car', 'dog', 'cup', 'man', 'scissors'])
    share = st.floats(0, 1)
    thing = st.builds(Thing, nouns, st.sampled_from([None, *COLOURS]), share, share, st.floats(0.01, 0.9))
    return st.lists(thing, max_size=most)


def cutout_png(colour: tuple[int, int, int] = RED, side: int = 40) -> bytes:
    """A disc with nothing around it."""
    image = Image.new('RGBA', (side, side), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((4, 4, side - 4, side - 4), fill=(*colour, 255))
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    return buffer.getvalue()


def write_sources(folder: Path) -> dict[str, Path]:
    """Folders ``stamps``, ``furniture``, ``backgrounds`` and ``photos``, and the labels of the photos."""
    stamps = folder / 'stamps' / 'food'
    stamps.mkdir(parents=True)
    for i, (name, caption) in enumerate([('a', 'A red apple.'), ('b', 'An apple.'), ('c', 'A lemon.'), ('d', 'Lemon')]):
        (stamps / f'{name}.png').write_bytes(cutout_png(RED if i < 2 else (240, 215, 30)))
        (stamps / f'{name}.txt').write_text(caption)
    furniture = folder / 'furniture'
    furniture.mkdir()
    names = {1: 'Chair', 2: 'Blue chair', 3: 'Sofa', 4: 'Old sofa', 5: 'Unknown thing', 6: 'Male', 7: 'Desk lamp'}
    with zipfile.ZipFile(furniture / 'Some.sh3f', 'w') as catalogue:
        lines = [f'name#{i}={name}\nicon#{i}=/icons/{i}.png' for i, name in names.items()]
        catalogue.writestr('PluginFurnitureCatalog.properties', '\n'.join(lines))
        for i in names:
            catalogue.writestr(f'icons/{i}.png', cutout_png(BLUE))
    backgrounds = folder / 'backgrounds'
    backgrounds.mkdir()
    for i in range(4):  # noise, so that the files are as large as photos
        pixels = np.random.default_rng(i).integers(0, 256, (220, 300, 3), np.uint8)
        Image.fromarray(pixels).save(backgrounds / f'{i}.png')
    photos = folder / 'photos'
    photos.mkdir()
    for i in range(8):
        Image.new('RGB', (300, 200), (20 * i, 90, 120)).save(photos / f'{"abcdefgh"[i]}.jpg')
    labels = folder / 'labels.txt'
    labels.write_text(
        '# a comment\n\n[some photos]\n'
        + ''.join(f'{name} | cup:white@0349, table@0099 | plate | cafe\n' for name in 'abcdefgh')
    )
    return {
        'stamps': stamps.parent,
        'furniture': furniture,
        'backgrounds': backgrounds,
        'photos': photos,
        'labels': labels,
    }


def tar_bytes(files: dict[str, bytes], mode: str) -> bytes:
    """A tar archive, compressed as ``mode`` says (``gz``, ``xz``)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f'w:{mode}') as tar:  # type: ignore[call-overload]  # one of its literals
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def deb_bytes(files: dict[str, bytes]) -> bytes:
    """A Debian package with these files."""
    members = {'debian-binary': b'2.0\n', 'control.tar.xz': b'odd', 'data.tar.xz': tar_bytes(files, 'xz')}
    parts = [b'!<arch>\n']
    for name, content in members.items():
        header = f'{name:<16}{0:<12}{0:<6}{0:<6}{"100644":<8}{len(content):<10}`\n'
        parts += [header.encode(), content, b'\n' * (len(content) % 2)]
    return b''.join(parts)
