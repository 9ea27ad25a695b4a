"""Questions to be filled in by a person: a file of them about a new bag, beside pictures of what there is to see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from mobilevlm_ros.bags import Bag, BagFrame, Clock
from mobilevlm_ros.bags.choosing import check_range
from mobilevlm_ros.errors import BagTopicError, EvaluationError
from mobilevlm_ros.evaluate.results import replace_file
from mobilevlm_ros.evaluate.rows import Pictures
from mobilevlm_ros.evaluate.runner import decoded

__all__ = ['QUESTIONS', 'write_template']

QUESTIONS = 'questions.yaml'
SHEET = 'index.html'
_MOST_PICTURES = 500

_HEAD = """\
# Questions about {bag}
# Look at index.html, then fill in `truth` below; a question without truth is asked, but not scored. Change, add and
# remove questions as you like:
#
# - id: cups                         # names the question; letters, digits, anything but /
#   text: How many cups are on the table?
#   camera: {camera}
#   when: {{from_s: 2.0, to_s: 8.5, every_s: 0.5}}   # or each_frame, {{stamp_ns: ...}}, {{at_s: 3.0}}, {{every_s: 1.0}}
#   short: true                      # asks for a single word or phrase
#   truth: {{checker: number, accepted: [3], tolerance: 0}}
#
# format:   text (default), yes_no, choice (with choices: [...]), json (with schema: {{...}})
# truth:    an answer, a list of accepted ones, or {{checker: ..., accepted: ...}}
# checker:  normalised (default), exact, number, choice, yes_no, json_field (with field: a.b)
# more:     kind (scores are given by kind), negation_of (id of the opposite yes_no question), max_tokens, deadline_s
"""

_PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:14px sans-serif;margin:1em}}figure{{display:inline-block;margin:4px;vertical-align:top}}
img{{max-width:320px;display:block}}figcaption{{font-size:12px}}code{{user-select:all}}</style>
<h1>{title}</h1>
"""


@dataclass(frozen=True)
class _Shown:
    """A picture in the sheet."""

    message: BagFrame
    second: float
    image: str

    @property
    def when(self) -> str:
        """How a question names the frame."""
        stamp_ns = self.message.stamp_ns
        return f'{{stamp_ns: {stamp_ns}}}' if stamp_ns else f'{{at_s: {self.second:.6f}}}'


def write_template(bag: Bag, out: Path, *, every_s: float = 1.0, clock: Clock = 'header') -> Path:
    """Write ``questions.yaml``, pictures, and ``index.html`` that shows them.

    :param every_s: seconds between two pictures of a camera.
    :return: where the questions are.
    :raise BagTopicError: if the bag has no images.
    :raise BagRangeError: if ``every_s`` is not above 0.
    :raise EvaluationError: if there are questions already, or more pictures than a person would look at.
    :raise DiskSpaceError: if there is no room.
    """
    path = out / QUESTIONS
    check_range(None, None, every_s)
    if not bag.topics:
        raise BagTopicError(f'{bag.path} has no topic with images')
    if path.exists():
        raise EvaluationError(f'{path} is there already, and may hold work: give another --out, or remove it')
    length_s = (bag.end_ns(clock) - bag.start_ns(clock)) / 1e9
    n_pictures = len(bag.topics) * (int(length_s / every_s) + 1)
    if n_pictures > _MOST_PICTURES:
        raise EvaluationError(
            f'{bag.path} would make about {n_pictures} pictures ({length_s:.0f} s, {len(bag.topics)} cameras), the '
            f'limit is {_MOST_PICTURES}: use --every {length_s * len(bag.topics) / _MOST_PICTURES + 1:.0f}'
        )
    pictures = Pictures(out, [topic.name for topic in bag.topics])
    shown = []
    for message in bag.frames(every_s=every_s, stamp=clock):
        frame = decoded(bag, message)
        if frame is not None:
            second = (message.time_ns(clock) - bag.start_ns(clock)) / 1e9
            shown.append(_Shown(message, second, pictures.save(message, frame.rgb_hwc)))
    shown.sort(key=lambda one: (one.message.topic, one.message.index))
    replace_file(out / SHEET, _sheet(bag, shown).encode())
    replace_file(path, _questions(bag, shown, every_s).encode())
    return path


def _questions(bag: Bag, shown: Sequence[_Shown], every_s: float) -> str:
    parts = [_HEAD.format(bag=bag.path, camera=bag.topics[0].name)]
    numbers = {topic.name: number for number, topic in enumerate(bag.topics)}
    for topic, number in numbers.items():
        parts.append(
            f'\n# -- {topic}: every {every_s:g} s, without truth\n'
            f'- id: what-{number}\n  text: What can be seen?\n  camera: {topic}\n  when: {{every_s: {every_s:g}}}\n'
        )
    for one in shown:
        topic = one.message.topic
        parts.append(
            f'\n# {topic} at {one.second:.3f} s: {one.image}\n'
            f'- id: person-{numbers[topic]}-{one.message.index:06}\n'
            f'  text: Is there a person in the picture?\n'
            f'  camera: {topic}\n'
            f'  when: {one.when}\n'
            f'  format: yes_no\n'
            f'  truth:  # yes or no\n'
        )
    return ''.join(parts)


def _sheet(bag: Bag, shown: Sequence[_Shown]) -> str:
    parts = [_PAGE.format(title=escape(str(bag.path)))]
    for topic in bag.topics:
        parts.append(f'<h2>{escape(topic.name)}</h2>\n')
        for one in shown:
            if one.message.topic == topic.name:
                parts.append(
                    f'<figure><img loading="lazy" src="{escape(one.image)}" alt="">'
                    f'<figcaption>{one.second:.3f} s, frame {one.message.index}<br><code>when: {one.when}</code>'
                    '</figcaption></figure>\n'
                )
    return ''.join(parts)
