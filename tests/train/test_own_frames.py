"""From bags to a folder that a person labels, through the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bag_writing as writing
import numpy as np
import pytest
from own_recordings import TOPIC, photographs, record
from PIL import Image

from mobilevlm_ros.cli import main
from mobilevlm_ros.errors import BagMissingError, BagTopicError, DatasetError, SettingsError
from mobilevlm_ros.train.own_asked import Asked, parse_asked
from mobilevlm_ros.train.own_frames import pick_frames
from mobilevlm_ros.train.own_labels import read_labels

Capture = pytest.CaptureFixture[str]
DOOR = 'yes_no: Is the door open?'


@pytest.fixture(scope='module')
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight photographs a second apart, each seen for a second, and one of them in the dark."""
    seen = [picture for picture in photographs(8) for _ in range(2)]
    seen[6] = seen[7] = (seen[6] // 20).astype(np.uint8)
    return record(tmp_path_factory.mktemp('bags') / 'hall', seen, every_s=0.5)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / 'labels.jsonl').read_text().splitlines()]


def test_frames_labels_and_a_page_are_made(bag: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / 'frames'
    place = 'place: Where is the <table>? [left | right]'
    assert main(['train', 'frames', str(bag), '--out', str(out), '--every', '0.5', '--ask', DOOR, '--ask', place]) == 0

    said = capsys.readouterr()
    assert '7 frames; left out: 2 dark, 7 near-duplicate' in said.err
    assert str(out / 'labels.jsonl') in said.out
    found = lines(out)
    assert [one['image'] for one in found] == [f'frames/{number:04}.jpg' for number in range(1, 8)]
    assert [one['time_s'] for one in found] == [0, 1, 2, 4, 5, 6, 7]
    assert found[0]['questions'] == [
        {'kind': 'yes_no', 'format': 'YES_NO', 'question': 'Is the door open?', 'answer': ''},
        {
            'kind': 'place',
            'format': 'CHOICE',
            'question': 'Where is the <table>?',
            'choices': ['left', 'right'],
            'answer': '',
        },
    ]
    with Image.open(out / found[2]['image']) as picture:
        assert picture.format == 'JPEG' and picture.size == (96, 64)
        assert np.abs(np.asarray(picture).astype(int) - photographs(3)[2]).mean() < 12
    page = (out / 'sheet.html').read_text()
    assert page.count('<figure') == 7 and 'frames/0003.jpg' in page and 'line 3' in page
    assert '&lt;table&gt;' in page and '<table>' not in page
    assert sorted(path.name for path in out.iterdir()) == ['frames', 'frames.json', 'labels.jsonl', 'sheet.html']
    notes = json.loads((out / 'frames.json').read_text())
    assert notes['left_out'] == {'dark': 2, 'near-duplicate': 7}
    assert (notes['frames'][1]['topic'], notes['frames'][1]['index']) == (TOPIC, 2)


def test_the_same_bags_give_the_same_folder(bag: Path, tmp_path: Path) -> None:
    for name in ('one', 'two'):
        assert main(['train', 'frames', str(bag), '--out', str(tmp_path / name), '--frames', '3', '--every', '1']) == 0
    files = [
        path.relative_to(tmp_path / 'one') for path in (tmp_path / 'one').rglob('*.*') if path.name != 'sheet.html'
    ]
    assert len(files) == 3 + 2
    assert all((tmp_path / 'one' / file).read_bytes() == (tmp_path / 'two' / file).read_bytes() for file in files)


def test_several_bags_share_one_time(bag: Path, tmp_path: Path) -> None:
    later = writing.START_NS + 100_000_000_000
    second = writing.write_bag(tmp_path / 'second', writing.stream(TOPIC, photographs(12)[10:], start_ns=later))
    picked = pick_frames([second, bag], tmp_path / 'out', every_s=0.1)
    assert [time_s for _, time_s in picked.images] == [0, 1, 2, 4, 5, 6, 7, 100, 100.1]


def test_compressed_images_are_read_and_broken_ones_counted(tmp_path: Path) -> None:
    messages = writing.stream('/c/compressed', photographs(4), every_ns=2 * 10**9, compressed=True)
    broken = writing.compressed_image(photographs(1)[0], messages[1].message.header.stamp.sec * 10**9)
    broken.data = broken.data[: len(broken.data) // 2]
    messages[1] = writing.Message('/c/compressed', messages[1].received_ns, broken)
    bag = writing.write_bag(tmp_path / 'bag', messages)
    picked = pick_frames([bag], tmp_path / 'out')
    assert (len(picked.images), picked.left_out) == (3, {'broken': 1})


def test_labels_are_never_written_over(bag: Path, tmp_path: Path) -> None:
    out = tmp_path / 'frames'
    assert main(['train', 'frames', str(bag), '--out', str(out)]) == 0
    before = {path: path.read_bytes() for path in out.rglob('*.*')}
    with pytest.raises(SettingsError, match=r'has labels.jsonl already, .*choose another --out'):
        pick_frames([bag], out)
    assert before == {path: path.read_bytes() for path in out.rglob('*.*')}
    (out / 'labels.jsonl').unlink()  # a run that was ended before it wrote them
    assert len(pick_frames([bag], out, n_most=2).images) == 2


def test_bags_without_usable_images_are_named(bag: Path, tmp_path: Path) -> None:
    words = writing.write_bag(
        tmp_path / 'words', [writing.Message('/chatter', writing.START_NS, writing.text('hello'))]
    )
    night = record(tmp_path / 'night', [np.zeros((48, 64, 3), np.uint8)] * 3)
    with pytest.raises(DatasetError, match=r'words has no images: .*ros2 bag record'):
        pick_frames([words], tmp_path / 'out')
    with pytest.raises(DatasetError, match='none of 3 frames can be used: 3 dark'):
        pick_frames([night], tmp_path / 'out')
    with pytest.raises(BagTopicError, match=TOPIC):
        pick_frames([bag], tmp_path / 'out', topic='/nowhere')
    with pytest.raises(BagMissingError):
        pick_frames([tmp_path / 'nowhere'], tmp_path / 'out')
    with pytest.raises(SettingsError, match='expected 1 or more'):
        pick_frames([bag], tmp_path / 'out', n_most=0)
    assert not (tmp_path / 'out' / 'frames').exists() and not list((tmp_path / 'out').glob('*partial*'))


@pytest.mark.parametrize(
    'written', ['Is it?', 'yesno: Is it?', 'yes_no:', 'yes_no: Is it? [a | b]', 'name: What? [a]', 'name: What?\x07']
)
def test_questions_that_cannot_be_asked_are_named(written: str) -> None:
    with pytest.raises(SettingsError, match='--ask'):
        parse_asked(written)


def test_questions_are_read() -> None:
    assert parse_asked(DOOR) == Asked('yes_no', 'Is the door open?')
    assert parse_asked(' scene : Which room? [ hall|dock a ] ') == Asked('scene', 'Which room?', ('hall', 'dock a'))


def test_a_bundle_suggests_answers_that_do_not_count_before_they_are_checked(
    bag: Path, tmp_path: Path, tiny_bundle: Path
) -> None:
    out = tmp_path / 'frames'
    arguments = ['train', 'frames', str(bag), '--out', str(out), '--frames', '2', '--suggest', str(tiny_bundle)]
    assert main(arguments) == 2  # without a question
    assert main([*arguments, '--ask', DOOR, '--ask', 'name: What is it?']) == 0
    for line in lines(out):
        door, name = line['questions']
        assert line['checked'] is False
        assert door['answer'] in ('yes', 'no') and 0.5 <= door['confidence'] <= 1.0
        assert set(name) == {'kind', 'format', 'question', 'answer', 'confidence'}
    with pytest.raises(DatasetError, match='2 frames still say "checked": false'):
        read_labels(out / 'labels.jsonl')
    text = (out / 'labels.jsonl').read_text().replace('"checked": false', '"checked": true')
    (out / 'labels.jsonl').write_text(text)
    labels = read_labels(out / 'labels.jsonl')
    assert len(labels.frames) == 2 and labels.n_questions + labels.n_open == 4
