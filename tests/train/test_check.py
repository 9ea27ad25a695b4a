"""The checker: what is in the data, what is wrong with it, and an exit code that says whether to train."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from pictures import record, write_json, write_picture

from mobilevlm_ros.errors import CheckpointMissingError, DatasetMissingError, SettingsError
from mobilevlm_ros.model.tokenizer_files import write_made_up_tokenizer
from mobilevlm_ros.runtime.preprocess import PreprocessSpec
from mobilevlm_ros.train.check import check_dataset
from mobilevlm_ros.train.check_command import add_check_arguments, run_check
from mobilevlm_ros.train.templates import Turn, encode_dialogue
from mobilevlm_ros.train.tokens import open_tokenizer

SPEC = PreprocessSpec(16)
SHOWN = record('<image>\nwhat?', 'a cat', 'red?', 'no', id='shown', image='a.png')
SAID = record('hello', 'hi', id='said')


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_picture(tmp_path / 'images' / 'a.png')
    (tmp_path / 'images' / 'broken.png').write_text('<html>404</html>')
    return tmp_path / 'images'


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    path = tmp_path / 'tokenizer.model'
    write_made_up_tokenizer(path, 1000)
    return path


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_check_arguments(parser)
    return run_check(parser.parse_args([str(one) for one in arguments]))


def test_good_data_is_counted(tmp_path: Path, images: Path) -> None:
    report = check_dataset(write_json(tmp_path / 'data.json', SHOWN, SHOWN, SAID), images, spec=SPEC)

    assert (report.n_records, report.n_good, report.n_with_image, report.n_text_only) == (3, 3, 2, 1)
    assert (report.n_images, report.n_answers) == (1, 5)
    assert report.flawless
    assert report.usable


def test_tokens_are_those_of_the_template(tmp_path: Path, images: Path, vocabulary: Path) -> None:
    tokenizer = open_tokenizer(vocabulary)
    encoded = encode_dialogue([Turn('human', 'hello'), Turn('gpt', 'hi')], 'v1', tokenizer, 2048)

    report = check_dataset(write_json(tmp_path / 'data.json', SAID, SAID), images, tokenizer=tokenizer)

    counts = report.tokens
    assert counts is not None
    assert (counts.total, counts.trained) == (2 * len(encoded.input_ids), 2 * encoded.n_trained)
    assert (counts.longest, counts.n_cut) == (len(encoded.input_ids), 0)


def test_long_dialogues_are_counted_as_cut(tmp_path: Path, vocabulary: Path) -> None:
    tokenizer = open_tokenizer(vocabulary)
    data = write_json(tmp_path / 'data.json', SAID, record('hello', 'word ' * 400))

    report = check_dataset(data, None, tokenizer=tokenizer, max_tokens=256)

    assert report.tokens is not None
    assert report.tokens.n_cut == 1
    assert report.tokens.longest > 400
    assert report.flawless


def test_an_image_that_cannot_be_decoded_is_found(tmp_path: Path, images: Path) -> None:
    bad = record('<image>', 'a', id='bad', image='broken.png')
    data = write_json(tmp_path / 'data.json', SHOWN, bad, bad)

    report = check_dataset(data, images, spec=SPEC)

    (problem,) = report.problems
    assert (problem.kind, problem.count) == ('broken image', 2)
    assert 'broken.png' in str(problem.examples[0])
    assert (report.n_good, report.n_records) == (1, 3)


def test_an_image_too_narrow_to_be_cropped_is_found(tmp_path: Path, images: Path) -> None:
    write_picture(images / 'line.png', width=200, height=2)
    data = write_json(tmp_path / 'data.json', record('<image>', 'a', image='line.png'))

    assert check_dataset(data, images, spec=PreprocessSpec(16, 'pad')).flawless
    assert check_dataset(data, images, spec=PreprocessSpec(16, 'square')).problems.count('broken image') == 1


def test_without_decoding_images_only_have_to_be_there(tmp_path: Path, images: Path) -> None:
    data = write_json(tmp_path / 'data.json', record('<image>', 'a', image='broken.png'))

    assert check_dataset(data, images).flawless


def test_samples_that_the_rules_mask_are_found(tmp_path: Path, vocabulary: Path) -> None:
    data = write_json(tmp_path / 'data.json', SAID, record('hello', 'a</s>b', id='odd'))

    report = check_dataset(data, None, tokenizer=open_tokenizer(vocabulary))

    (problem,) = report.problems
    assert (problem.kind, problem.examples[0].record) == ('not trained on', 'odd')


def test_dialogues_that_do_not_fit_the_template_are_found(tmp_path: Path, vocabulary: Path) -> None:
    report = check_dataset(
        write_json(tmp_path / 'data.json', SAID), None, tokenizer=open_tokenizer(vocabulary), template='plain'
    )

    assert report.problems.count('not a caption') == 1
    assert not report.usable


def test_a_file_that_is_cut_off_keeps_what_was_found_before(tmp_path: Path, images: Path) -> None:
    data = write_json(tmp_path / 'data.json', SHOWN, {}, SAID)
    data.write_text(data.read_text()[:-10])

    report = check_dataset(data, images)

    assert (report.n_good, report.problems.count('no dialogue')) == (1, 1)
    assert 'line 1, column' in report.broken_off
    assert not report.usable


def test_progress_ends_with_all_records(tmp_path: Path) -> None:
    told: list[tuple[float, float]] = []

    check_dataset(write_json(tmp_path / 'data.json', SAID, SAID), None, on_progress=lambda *done: told.append(done))

    assert told == [(1, 2), (2, 2)]


# -- the command --------------------------------------------------------------------------------------------------


def test_good_data_passes(tmp_path: Path, images: Path, vocabulary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_json(tmp_path / 'data.json', SHOWN, SAID)

    assert run(data, '--images', images, '--tokenizer', vocabulary) == 0
    shown = capsys.readouterr().out
    assert '2 of 2 records can be trained on: 1 with an image (1 files), 1 text only; 3 answers' in shown
    assert '0 are cut' in shown
    assert 'problem' not in shown


@pytest.mark.parametrize(('on_bad', 'code'), [('refuse', 1), ('skip', 0)])
def test_bad_records_fail_the_check_unless_they_may_be_skipped(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], on_bad: str, code: int
) -> None:
    bad = record('<image>', 'a', id='b[red]ad', image='../a.png')
    data = write_json(tmp_path / 'data.json', SHOWN, bad)

    assert run(data, '--images', images, '--on-bad', on_bad) == code
    shown = ''.join(capsys.readouterr().out.split())
    assert 'imageoutsidethefolder' in shown
    assert 'b[red]ad(data.json:1)' in shown


@pytest.mark.parametrize('on_bad', ['refuse', 'skip'])
@pytest.mark.parametrize('content', ['[{"id": 1', '[{}]', '', '[]'])
def test_data_of_which_nothing_can_be_used_fails_the_check(tmp_path: Path, content: str, on_bad: str) -> None:
    data = tmp_path / 'data.json'
    data.write_text(content)

    assert run(data, '--on-bad', on_bad) == 1


def test_the_report_is_json_if_asked(
    tmp_path: Path, images: Path, vocabulary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_json(tmp_path / 'data.json', SHOWN, SAID, {'id': '\ud800'})

    assert run(data, '--images', images, '--tokenizer', vocabulary, '--json') == 1

    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found['records'] == 3
    assert found['tokens']['trained'] > 0
    assert found['problems'] == [{'kind': 'no dialogue', 'count': 1, 'examples': [found['problems'][0]['examples'][0]]}]


@pytest.mark.parametrize(
    ('form', 'value', 'bad'),
    [
        ('vicuna', {'conversations': [{'from': 'user', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}]}, {}),
        ('alpaca', {'instruction': 'add', 'output': '3'}, {'instruction': 'add'}),
    ],
)
def test_other_formats_are_checked_too(
    tmp_path: Path, vocabulary: Path, capsys: pytest.CaptureFixture[str], form: str, value: object, bad: object
) -> None:
    good, mixed = (write_json(tmp_path / name, *values) for name, values in (('a', [value]), ('b', [value, bad])))

    assert run(good, '--format', form, '--tokenizer', vocabulary) == 0
    assert run(good) == 1  # it is not LLaVA's
    assert run(mixed, '--format', form) == 1
    assert '1 of 2 records' in capsys.readouterr().out


def test_broken_images_pass_only_if_not_decoded(tmp_path: Path, images: Path) -> None:
    data = write_json(tmp_path / 'data.json', record('<image>', 'a', image='broken.png'))

    assert run(data, '--images', images) == 1
    assert run(data, '--images', images, '--no-decode') == 0


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    data = write_json(tmp_path / 'data.json', SAID)
    with pytest.raises(DatasetMissingError, match=r'nowhere\.json'):
        run(tmp_path / 'nowhere.json')
    with pytest.raises(DatasetMissingError, match='--images'):
        run(data, '--images', tmp_path / 'nowhere')
    with pytest.raises(CheckpointMissingError, match=r'nowhere\.model'):
        run(data, '--tokenizer', tmp_path / 'nowhere.model')


def test_a_template_that_does_not_fit_the_tokenizer_is_an_error(tmp_path: Path, vocabulary: Path) -> None:
    with pytest.raises(SettingsError, match='chatml'):
        run(write_json(tmp_path / 'data.json', SAID), '--tokenizer', vocabulary, '--template', 'chatml')
