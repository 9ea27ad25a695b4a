"""A run over a bag: which answers it has, that it goes on where it stopped, and what it keeps when it fails."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bag_runs
import bag_writing as writing
import numpy as np
import psutil
import pytest
from bag_runs import camera_bag, question
from PIL import Image

from mobilevlm_ros.errors import BagRangeError, BagTopicError, DiskSpaceError, EvaluationError
from mobilevlm_ros.evaluate import results
from mobilevlm_ros.evaluate.answerer import BundleAnswerer, Reply
from mobilevlm_ros.evaluate.results import read_results, read_run
from mobilevlm_ros.runtime.assistant import Assistant, AssistantSettings
from mobilevlm_ros.types import Frame, Question, ResultCode, Timing


@dataclass
class Scripted:
    """Says whether the picture is grey, and remembers what it was asked."""

    model_id: str = 'scripted'
    asked: list[tuple[str, bool]] = field(default_factory=list)
    fails_at: int | None = None

    def answer(self, frame: Frame, question: Question) -> Reply:
        if len(self.asked) == self.fails_at:
            raise KeyboardInterrupt
        is_grey = bool((frame.rgb_hwc == 128).all())
        self.asked.append((question.id, is_grey))
        return Reply('no' if is_grey else 'yes', 0.8, Timing(total_s=0.5), prompt_hash='h')

    def answer_many(self, frame: Frame, questions: Sequence[Question]) -> list[Reply]:
        return [self.answer(frame, one) for one in questions]

    def close(self) -> None:
        pass


def test_every_frame_of_a_question_has_a_line(tmp_path: Path) -> None:
    questions = [
        question(),
        question('late', when={'from_s': 0.2}, truth='no', kind='door'),
        question('open', truth=None),
    ]
    rows = bag_runs.run(camera_bag(tmp_path / 'b'), questions, Scripted(), tmp_path / 'out')
    assert [(row['question_id'], row['frame_index'], row['correct']) for row in rows] == [
        ('q', 0, True),
        ('open', 0, None),
        ('q', 1, True),
        ('open', 1, None),
        ('q', 2, True),
        ('late', 2, False),
        ('open', 2, None),
        ('q', 3, True),
        ('late', 3, False),
        ('open', 3, None),
    ]
    late = rows[5]
    assert (late['kind'], late['truth'], late['answer'], late['camera']) == ('door', 'no', 'yes', '/camera')
    assert late['stamp_ns'] == writing.START_NS + 200_000_000
    assert late['timing']['total_s'] > 0.5, 'decoding the picture counts'
    with Image.open(tmp_path / 'out' / late['image']) as picture:
        assert picture.size == (96, 64)
    run = read_run(tmp_path / 'out')
    assert (run['finished'], run['n_done'], run['n_expected']) == (True, 10, 10)
    assert [one['id'] for one in run['questions']] == ['q', 'late', 'open']


@pytest.mark.parametrize(
    ('when', 'frames'),
    [
        ({'at_s': 0.15}, [2]),
        ({'stamp_ns': writing.START_NS + 100_000_000}, [1]),
        ({'from_s': 0.1, 'to_s': 0.2}, [1, 2]),
        ({'every_s': 0.2}, [0, 2]),
    ],
)
def test_when(tmp_path: Path, when: Any, frames: list[int]) -> None:
    rows = bag_runs.run(camera_bag(tmp_path / 'b'), [question(when=when)], Scripted(), tmp_path / 'out')
    assert [row['frame_index'] for row in rows] == frames


def test_the_blind_pass_asks_once_about_each_size(tmp_path: Path) -> None:
    scripted = Scripted()
    rows = bag_runs.run(camera_bag(tmp_path / 'b'), [question()], scripted, tmp_path / 'out', blind=True)
    blind = [row for row in rows if row['pass'] == 'blind']
    assert [(row['answer'], row['correct'], row['image']) for row in blind] == [('no', False, '')] * 4
    assert sum(is_grey for _, is_grey in scripted.asked) == 1


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    path, out = camera_bag(tmp_path / 'b'), tmp_path / 'out'
    questions = [question(), question('second')]
    with pytest.raises(KeyboardInterrupt):
        bag_runs.run(path, questions, Scripted(fails_at=4), out)
    assert not read_run(out)['finished']
    assert len(list(read_results(out))) == 4
    scripted, progress = Scripted(), []
    rows = bag_runs.run(path, questions, scripted, out, on_progress=lambda *numbers: progress.append(numbers))
    assert len(scripted.asked) == 4, 'only what was missing'
    assert len({row['key'] for row in rows}) == len(rows) == 8
    assert progress[-1] == (8, 8)
    assert read_run(out)['finished']


def test_a_blind_pass_can_be_added(tmp_path: Path) -> None:
    path, out = camera_bag(tmp_path / 'b'), tmp_path / 'out'
    bag_runs.run(path, [question()], Scripted(), out)
    assert len(bag_runs.run(path, [question()], Scripted(), out, blind=True)) == 8


def test_another_run_is_not_mixed_in(tmp_path: Path) -> None:
    path, out = camera_bag(tmp_path / 'b'), tmp_path / 'out'
    bag_runs.run(path, [question()], Scripted(), out)
    with pytest.raises(EvaluationError, match="the question 'q', which is another one now"):
        bag_runs.run(path, [question(text='Is it blue?')], Scripted(), out)
    with pytest.raises(EvaluationError, match='results of another bag'):
        bag_runs.run(camera_bag(tmp_path / 'c', n=2), [question()], Scripted(), out)
    assert len(bag_runs.run(path, [question(), question('new')], Scripted(), out)) == 8, 'a new question may be added'


def test_a_question_without_a_frame_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    scripted = Scripted()
    questions = [question(), question('never', when={'from_s': 60.0})]
    with pytest.raises(BagRangeError, match=r'no frame for 1 of 2 questions: never \(from_s 60.0\)'):
        bag_runs.run(camera_bag(tmp_path / 'b'), questions, scripted, tmp_path / 'out')
    assert scripted.asked == []


def test_an_unknown_camera_is_named(tmp_path: Path) -> None:
    with pytest.raises(BagTopicError, match=r'/camera \(4\)'):
        bag_runs.run(camera_bag(tmp_path / 'b'), [question(camera='/rear')], Scripted(), tmp_path / 'out')


def test_a_broken_frame_is_counted_and_the_run_goes_on(tmp_path: Path) -> None:
    messages = writing.stream('/camera', writing.pictures(3))
    broken = writing.Message('/camera', messages[1].received_ns, writing.serialized(messages[1].message)[:200],
                             'sensor_msgs/msg/Image')  # fmt: skip
    path = writing.write_bag(tmp_path / 'b', [messages[0], broken, messages[2]])
    rows = bag_runs.run(path, [question()], Scripted(), tmp_path / 'out')
    assert [row['frame_index'] for row in rows] == [0, 2]
    run = read_run(tmp_path / 'out')
    assert (run['n_broken_frames'], run['broken_frames'][0]['frame_index']) == (1, 1)


def test_a_failed_answer_is_wrong(tmp_path: Path) -> None:
    class Failing(Scripted):
        def answer(self, frame: Frame, question: Question) -> Reply:
            return Reply('yes', result_code=ResultCode.ENGINE_ERROR, message='no')

    (row,) = bag_runs.run(camera_bag(tmp_path / 'b', n=1), [question()], Failing(), tmp_path / 'out')
    assert (row['correct'], row['result_code'], row['message']) == (False, 'ENGINE_ERROR', 'no')


def test_a_full_disk_keeps_what_was_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = camera_bag(tmp_path / 'b'), tmp_path / 'out'
    add, n_added = results.ResultsWriter.add, 0

    def add_until_full(self: Any, row: Any) -> None:
        nonlocal n_added
        n_added += 1
        if n_added > 2:
            raise DiskSpaceError('the disk is full')
        add(self, row)

    with monkeypatch.context() as patch, pytest.raises(DiskSpaceError):
        patch.setattr(results.ResultsWriter, 'add', add_until_full)
        bag_runs.run(path, [question()], Scripted(), out)
    assert len(list(read_results(out))) == 2
    assert len(bag_runs.run(path, [question()], Scripted(), out)) == 4


def test_a_bundle_answers_as_the_node_asks_it(tmp_path: Path, tiny_assistant: Assistant) -> None:
    """The same text, probabilities and prompt hash as from the assistant that the node has."""
    questions = [question(), question('choice', format='choice', choices=['red', 'blue'], truth='red')]
    answerer = BundleAnswerer(tiny_assistant)
    rows = bag_runs.run(camera_bag(tmp_path / 'b', n=2), questions, answerer, tmp_path / 'out')
    settings = AssistantSettings(min_confidence=0.0)
    pictures = writing.pictures(2)
    tiny_assistant.forget()
    for row in rows:
        asked = next(one for one in questions if one.id == row['question_id']).asked()
        answer = tiny_assistant.ask(asked, Frame(pictures[row['frame_index']]), settings=settings)
        assert (row['answer'], row['prompt_hash']) == (answer.text, answer.prompt_hash)
        np.testing.assert_allclose(row['probabilities'], answer.probabilities, atol=1e-4)


def test_the_time_of_an_open_question_holds_no_other_ones(tmp_path: Path, tiny_assistant: Assistant) -> None:
    """Of the order of the file, too: the replies come back as the questions stood."""
    slow = {'format': 'text', 'truth': None, 'max_tokens': 1500}
    questions = [question('slow', **slow), question(), question('short', **(slow | {'max_tokens': 1}))]
    rows = bag_runs.run(camera_bag(tmp_path / 'b', n=1), questions, BundleAnswerer(tiny_assistant), tmp_path / 'out')
    assert [row['question_id'] for row in rows] == ['slow', 'q', 'short']
    times = {row['question_id']: row['timing'] for row in rows}
    assert times['short']['generated_tokens'] == 1 and times['slow']['generated_tokens'] == 1500
    assert times['short']['total_s'] < times['slow']['decode_s'] / 2
    stages = sum(times['short'][f'{name}_s'] for name in ('image', 'preprocess', 'vision', 'prefill', 'decode'))
    assert stages <= times['short']['total_s'] < stages + times['slow']['decode_s'] / 2


def test_memory_does_not_grow_with_the_run(tmp_path: Path) -> None:
    def peak(n: int) -> int:
        path = writing.write_bag(tmp_path / f'b{n}', writing.stream('/camera', writing.pictures(1) * n))
        tracemalloc.start()
        try:
            bag_runs.run(path, [question()], Forgetful(), tmp_path / f'out{n}')
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # what is loaded and cached on first use
    assert peak(200) < peak(20) + (1 << 20), 'of 3.3 MB of pictures'


@pytest.mark.slow
def test_resident_memory_does_not_grow_with_an_engine(tmp_path: Path, tiny_assistant: Assistant) -> None:
    """The engines' memory, too: 300 answers about 75 frames that hold 69 MB of pixels."""
    process = psutil.Process()
    seen: list[int] = []
    pictures = writing.pictures(25, (640, 480))
    shifted = [np.roll(picture, 9 * step, axis=1) for step in range(3) for picture in pictures]
    path = writing.write_bag(tmp_path / 'b', writing.stream('/camera', shifted))
    del pictures, shifted
    closed = [question(f'q{number}', text=f'Is the car red or {number}?') for number in range(3)]
    questions = [*closed, question('open', format='text', truth=None, max_tokens=4)]
    bag_runs.run(
        path,
        questions,
        BundleAnswerer(tiny_assistant),
        tmp_path / 'out',
        on_progress=lambda done, total: seen.append(process.memory_info().rss),
    )
    assert len(seen) == 75
    assert seen[-1] < seen[24] + (16 << 20), 'two thirds of the pixels are 46 MB'


class Forgetful(Scripted):
    """Remembers nothing."""

    def answer(self, frame: Frame, question: Question) -> Reply:
        return Reply('yes', 0.8)
