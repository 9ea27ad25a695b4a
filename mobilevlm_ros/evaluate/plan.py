"""Which question is asked about which frame of a bag: found out before anything is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mobilevlm_ros.bags import Bag, BagFrame, Clock
from mobilevlm_ros.bags.choosing import FrameFilter
from mobilevlm_ros.errors import BagRangeError
from mobilevlm_ros.evaluate.questions import BagQuestion

__all__ = ['Plan']


class Plan:
    """The questions about a bag.

    :param clock: which the seconds in the questions are of.
    :raise BagTopicError: if a question names a camera that is not in the bag, or none where there are several.
    """

    def __init__(self, bag: Bag, questions: Sequence[BagQuestion], clock: Clock = 'header') -> None:
        self._bag = bag
        self._clock = clock
        self._origin_ns = bag.start_ns(clock)
        self.topics = {question.id: bag.topic(question.camera or None).name for question in questions}
        self.questions = tuple(questions)

    def frames(self) -> Iterator[tuple[BagFrame, list[BagQuestion]]]:
        """The frames that are asked about, in the order of recording, each with its questions.

        :raise BagError: if the bag is damaged there.
        """
        return ((frame, asked) for frame, asked in self.all_frames() if asked)

    def all_frames(self) -> Iterator[tuple[BagFrame, list[BagQuestion]]]:
        """The same with the frames of these cameras that nothing is asked about."""
        choosers: dict[str, list[_Chooser]] = {topic: [] for topic in self.topics.values()}
        for question in self.questions:
            choosers[self.topics[question.id]].append(_Chooser(question, self._origin_ns, self._clock))
        for frame in self._bag.frames(choosers):
            asked = [chooser.question for chooser in choosers[frame.topic] if chooser.takes(frame)]
            yield frame, asked

    def count(self) -> dict[str, int]:
        """About how many frames each question is asked; reads the bag once, and decodes nothing.

        :raise BagRangeError: if a question has no frame; names all of them.
        :raise BagError: if the bag is damaged.
        """
        counts = {question.id: 0 for question in self.questions}
        for _, asked in self.frames():
            for question in asked:
                counts[question.id] += 1
        nowhere = [question for question in self.questions if not counts[question.id]]
        if nowhere:
            bag = self._bag
            length_s = (bag.end_ns(self._clock) - self._origin_ns) / 1e9
            listed = ', '.join(f'{one.id} ({_shown(one)})' for one in nowhere[:10])
            more = f' and {len(nowhere) - 10} more' if len(nowhere) > 10 else ''
            raise BagRangeError(
                f'{bag.path} has no frame for {len(nowhere)} of {len(counts)} questions: {listed}{more}; its images '
                f'span {length_s:.3f} s, from stamp {self._origin_ns} to {bag.end_ns(self._clock)} ns'
            )
        return counts


def _shown(question: BagQuestion) -> str:
    when = question.when.model_dump(exclude_none=True)
    return ', '.join(f'{name} {value}' for name, value in when.items())


class _Chooser:
    """Whether a question is asked about a frame; asked about each frame of its camera in turn."""

    def __init__(self, question: BagQuestion, origin_ns: int, clock: Clock) -> None:
        when = question.when
        self.question = question
        self._clock = clock
        self._stamp_ns = when.stamp_ns
        self._only_once = when.at_s is not None or when.stamp_ns is not None
        self._filter = FrameFilter(
            origin_ns,
            start_s=when.at_s if when.at_s is not None else when.from_s,
            end_s=when.to_s,
            every_s=when.every_s,
        )
        self._is_done = False

    def takes(self, frame: BagFrame) -> bool:
        """Whether this frame is one."""
        if self._is_done or (self._stamp_ns is not None and frame.stamp_ns != self._stamp_ns):
            return False
        taken = self._filter.takes(frame.topic, frame.time_ns(self._clock))
        self._is_done = taken and self._only_once
        return taken
