"""The work folder of a build: what is finished is kept, what is not is not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from mobilevlm_ros.build.stages import SilentReporter, Workshop, check_room
from mobilevlm_ros.errors import BuildError


class Steps(SilentReporter):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def step(self, text: str) -> None:
        self.steps.append(text)


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    with closing(Workshop(tmp_path / 'out', Steps())) as workshop:
        yield workshop


def again(workshop: Workshop) -> Workshop:
    workshop.close()
    return Workshop(workshop.out, Steps())


def writes(name: str, text: str = 'x') -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        (folder / name).write_text(text)

    return work


def must_not_run(folder: Path) -> None:
    raise AssertionError('this stage was finished')


def test_a_finished_stage_is_not_run_again(workshop: Workshop) -> None:
    assert workshop.stage('a', 'A', [1], ['a.txt'], writes('a.txt')) == ('a.txt',)
    with closing(again(workshop)) as second:
        assert second.stage('a', 'A', [1], ['a.txt'], must_not_run) == ('a.txt',)
        assert second.reporter.steps == ['A: finished earlier']  # type: ignore[attr-defined]


def test_other_inputs_run_it_again(workshop: Workshop) -> None:
    workshop.stage('a', 'A', [1], ['a.txt'], writes('a.txt', 'one'))
    workshop.stage('a', 'A', [2], ['a.txt'], writes('a.txt', 'two'))
    assert workshop.path('a.txt').read_text() == 'two'


@pytest.mark.parametrize('damage', [Path.unlink, lambda path: path.write_text('longer')])
def test_a_file_that_is_gone_or_has_another_size_is_made_again(
    workshop: Workshop, damage: Callable[[Path], object]
) -> None:
    workshop.stage('a', 'A', [], ['a.txt'], writes('a.txt', 'abc'))
    damage(workshop.path('a.txt'))
    workshop.stage('a', 'A', [], ['a.txt'], writes('a.txt', 'abc'))
    assert workshop.path('a.txt').read_text() == 'abc'


@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError])
def test_an_interrupted_stage_leaves_nothing(workshop: Workshop, error: type[BaseException]) -> None:
    def work(folder: Path) -> None:
        (folder / 'a.txt').write_text('half')
        raise error

    workshop.stage('first', 'First', [], ['first.txt'], writes('first.txt'))
    with pytest.raises(error):
        workshop.stage('a', 'A', [], ['a.txt'], work)
    assert sorted(path.name for path in workshop.folder.iterdir()) == ['first.txt', 'stages.json']
    assert not workshop.out.exists()


def test_leftovers_of_a_killed_build_are_removed(workshop: Workshop) -> None:
    (workshop.folder / '.a').mkdir()
    (workshop.folder / '.a' / 'half').write_text('x')
    with closing(again(workshop)) as second:
        assert list(second.folder.iterdir()) == []


@pytest.mark.parametrize('notes', ['', '[]', '{"a": 1}', '{"a": {"fingerprint": "x", "bytes": {"../up": 1}}}', 'nul\0'])
def test_damaged_notes_mean_that_everything_is_made_again(workshop: Workshop, notes: str) -> None:
    (workshop.folder / 'stages.json').write_text(notes)
    with closing(again(workshop)) as second:
        second.stage('a', 'A', [], ['a.txt'], writes('a.txt'))
        assert json.loads((second.folder / 'stages.json').read_text())['a']['bytes'] == {'a.txt': 1}


def test_optional_files_are_kept_if_they_were_made(workshop: Workshop) -> None:
    assert workshop.stage('a', 'A', [], ['a.txt', 'b.txt?'], writes('a.txt')) == ('a.txt',)
    assert workshop.stage('b', 'B', [], ['b.txt?'], writes('b.txt')) == ('b.txt',)


def test_a_stage_that_makes_nothing_is_a_mistake(workshop: Workshop) -> None:
    with pytest.raises(BuildError, match=r'did not make a\.txt'):
        workshop.stage('a', 'A', [], ['a.txt'], lambda folder: None)


def test_a_full_disk_is_an_error_that_says_so(workshop: Workshop) -> None:
    def work(folder: Path) -> None:
        raise OSError(28, 'No space left on device', str(folder / 'a.txt'))

    with pytest.raises(BuildError, match=r'No space left on device.*--out'):
        workshop.stage('a', 'A', [], ['a.txt'], work)


def test_discarded_files_go(workshop: Workshop) -> None:
    workshop.stage('a', 'A', [], ['a.txt'], writes('a.txt'))
    workshop.discard('a')
    workshop.discard('a')
    assert not workshop.path('a.txt').exists()


def test_finishing_replaces_an_earlier_result(workshop: Workshop) -> None:
    workshop.out.mkdir()
    (workshop.out / 'old.txt').write_text('old')
    workshop.stage('a', 'A', [], ['a.txt'], writes('a.txt'))
    (workshop.folder / 'other').write_text('of another build')
    workshop.finish(['a.txt'])
    assert [path.name for path in workshop.out.iterdir()] == ['a.txt']
    assert sorted(path.name for path in workshop.out.parent.iterdir()) == ['out']


def test_two_builds_in_one_place_are_refused(workshop: Workshop) -> None:
    with pytest.raises(BuildError, match='another process'):
        Workshop(workshop.out, Steps())


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(BuildError, match='--out'):
        Workshop(tmp_path / 'file' / 'out', Steps())


def test_room_is_checked_where_the_folder_will_be(tmp_path: Path) -> None:
    check_room(tmp_path / 'not' / 'yet', 1, 'this')
    with pytest.raises(BuildError, match='building it takes'):
        check_room(tmp_path / 'not' / 'yet', shutil.disk_usage(tmp_path).total * 2, 'building it')
