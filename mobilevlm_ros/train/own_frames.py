"""From recorded bags to a folder that a person labels: frames as JPEG files, ``labels.jsonl`` and ``sheet.html``.

The same bags give the same folder. ``frames.json`` says where every frame comes from, and what became of the others. A
folder that has labels is never written to, since the work of a person is in it.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevlm_ros.bags import open_bag
from mobilevlm_ros.errors import BadImageError, DatasetError, SettingsError
from mobilevlm_ros.train.own_asked import NOTHING_ASKED, Asked
from mobilevlm_ros.train.own_labels import LABELS, line_of
from mobilevlm_ros.train.own_looks import Limits, Look, choose, look_at
from mobilevlm_ros.train.own_sheet import Card, sheet

__all__ = ['FRAMES', 'NOTES', 'SHEET', 'Picked', 'empty_entries', 'pick_frames', 'write_labels']

FRAMES, NOTES, SHEET = 'frames', 'frames.json', 'sheet.html'
_QUALITY = 92


@dataclass(frozen=True)
class Picked:
    """The frames of a folder.

    :ivar images: as labels name them, by time, with their moments in seconds since the first frame of all bags.
    :ivar left_out: how many were not taken, by reason.
    """

    images: list[tuple[str, float]]
    left_out: dict[str, int]


@dataclass
class _Candidate:
    """A frame that was read: where from, when, and what it looks like."""

    bag: str
    topic: str
    index: int
    stamp_ns: int
    received_ns: int
    file: Path
    look: Look = field(repr=False)


def pick_frames(
    bags: Sequence[Path],
    out: Path,
    *,
    topic: str | None = None,
    every_s: float = 2.0,
    n_most: int = 200,
    max_side: int = 1280,
    limits: Limits | None = None,
    on_progress: Callable[[float, float], None] = lambda done, total: None,
) -> Picked:
    """Choose frames and write them as JPEG files into ``out/frames``.

    :param topic: with images; None: the only one there is.
    :param every_s: the first frame in every such interval is looked at, by the recorder's clock.
    :param n_most: as many are taken at most.
    :param max_side: larger pictures are made smaller, in pixels.
    :param on_progress: called with the number of bags done, and of all.
    :raise BagError: if a bag cannot be read, or has no such topic.
    :raise DatasetError: if no frame is left, or the folder cannot be written.
    :raise SettingsError: if a number makes no sense, or the folder holds frames or labels already.
    """
    if n_most < 1 or max_side < 1:
        raise SettingsError(f'at most {n_most} frames of at most {max_side} pixels: expected 1 or more of both')
    begun = (out / NOTES).exists() and not (out / LABELS).exists()  # by a run that ended before there were labels
    taken = next((name for name in (LABELS, FRAMES) if (out / name).exists() and not begun), None)
    if taken is not None:
        raise SettingsError(f'{out} has {taken} already, which may be the work of hours: choose another --out')
    if begun:
        shutil.rmtree(out / FRAMES, ignore_errors=True)
    making = out / f'{FRAMES}.partial'
    shutil.rmtree(making, ignore_errors=True)
    try:
        making.mkdir(parents=True)
        found: list[_Candidate] = []
        broken: Counter[str] = Counter()
        for number, path in enumerate(bags):

            def on_share(share: float, number: int = number) -> None:
                on_progress(number + share, len(bags))

            found += _look_through(path, topic, every_s, making, max_side, broken, len(found), on_share)
        picked = _keep(sorted(found, key=lambda one: one.received_ns), n_most, limits, making, broken, out)
        making.rename(out / FRAMES)
    except OSError as error:
        raise DatasetError(f'{error.filename or out} cannot be written: {error.strerror or error}') from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return picked


def write_labels(
    out: Path, images: Sequence[tuple[str, float]], entries: Sequence[Sequence[dict[str, Any]]], *, checked: bool
) -> None:
    """Write ``labels.jsonl`` and the page beside it.

    :param entries: the questions of each image.
    :param checked: False: a person has yet to look at the answers.
    :raise DatasetError: if a file cannot be written.
    """
    lines = zip(images, entries, strict=True)
    text = ''.join(line_of(image, time_s, asked, checked=checked) for (image, time_s), asked in lines)
    cards = [
        Card(number, image, time_s, asked)
        for number, ((image, time_s), asked) in enumerate(zip(images, entries, strict=True), 1)
    ]
    try:
        (out / SHEET).write_text(sheet(f'{out.resolve().name}: {len(cards)} frames', cards), encoding='utf-8')
        making = out / f'{LABELS}.partial'
        making.write_text(text, encoding='utf-8')
        making.rename(out / LABELS)
    except OSError as error:
        raise DatasetError(f'{error.filename or out} cannot be written: {error.strerror or error}') from error


def empty_entries(n: int, asked: Sequence[Asked]) -> list[list[dict[str, Any]]]:
    """The same questions for every frame, without answers."""
    return [[one.entry() for one in asked or NOTHING_ASKED] for _ in range(n)]


def _look_through(
    path: Path,
    topic: str | None,
    every_s: float,
    folder: Path,
    max_side: int,
    broken: Counter[str],
    n_before: int,
    on_share: Callable[[float], None],
) -> Iterator[_Candidate]:
    """Every frame that might be taken, written to a file of its own."""
    with open_bag(path) as bag:
        if not bag.topics:
            raise DatasetError(
                f'{path} has no images: no topic of type sensor_msgs/msg/Image or CompressedImage was recorded. '
                'Record the camera, too: `ros2 bag record /camera/image_raw`'
            )
        chosen = bag.topic(topic)
        name, span_ns = chosen.name, max(1, chosen.last_ns - chosen.first_ns)
        for number, frame in enumerate(bag.frames(name, every_s=every_s, stamp='receive'), n_before + 1):
            on_share(min(1.0, (frame.received_ns - chosen.first_ns) / span_ns))
            try:
                rgb_hwc = frame.decode()
            except BadImageError:
                broken['broken'] += 1
                continue
            file = folder / f'candidate-{number}.jpg'
            _write(rgb_hwc, file, max_side)
            yield _Candidate(str(path), name, frame.index, frame.stamp_ns, frame.received_ns, file, look_at(rgb_hwc))
        if bag.n_broken:
            broken['broken'] += bag.n_broken


def _write(rgb_hwc: NDArray[np.uint8], path: Path, max_side: int) -> None:
    picture = Image.fromarray(rgb_hwc)
    picture.thumbnail((max_side, max_side))
    picture.save(path, quality=_QUALITY)


def _keep(
    found: Sequence[_Candidate], n_most: int, limits: Limits | None, folder: Path, broken: Counter[str], out: Path
) -> Picked:
    """Rename what is kept, remove the rest, and say so."""
    verdicts = choose([one.look for one in found], n_most, limits)
    left_out = broken + Counter(verdict for verdict in verdicts if verdict != 'kept')
    kept = [one for one, verdict in zip(found, verdicts, strict=True) if verdict == 'kept']
    if not kept:
        reasons = ', '.join(f'{n} {reason}' for reason, n in sorted(left_out.items()))
        raise DatasetError(
            f'none of {left_out.total()} frames can be used: {reasons}. Change the limits, or record again'
        )
    digits = max(4, len(str(len(kept))))
    images, notes = [], []
    for number, one in enumerate(kept, 1):
        name = f'{number:0{digits}}.jpg'
        one.file.rename(folder / name)
        images.append((f'{FRAMES}/{name}', round((one.received_ns - found[0].received_ns) / 1e9, 3)))
        source = {'bag': one.bag, 'topic': one.topic, 'index': one.index, 'stamp_ns': one.stamp_ns}
        measured = {'brightness': round(one.look.brightness, 1), 'blur': round(one.look.blur, 2)}
        notes.append({'image': images[-1][0], 'time_s': images[-1][1]} | source | measured)
    for one, verdict in zip(found, verdicts, strict=True):
        if verdict != 'kept':
            one.file.unlink()
    content = {'limits': asdict(limits or Limits()), 'left_out': dict(sorted(left_out.items())), 'frames': notes}
    (out / NOTES).write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    return Picked(images, dict(left_out))
