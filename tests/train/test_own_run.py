"""A robot owner's way on a tiny random model: bag, frames, labels, adapters, bundle, answers before and after."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import own_recordings
import pytest
import tiny_runs
from own_recordings import COLOURS, label, record, tinted

from mobilevlm_ros.build.making import make_bundle
from mobilevlm_ros.build.stages import SilentReporter
from mobilevlm_ros.cli import main
from mobilevlm_ros.runtime.bundle import open_bundle
from mobilevlm_ros.runtime.images import read_image
from mobilevlm_ros.runtime.loading import load_assistant_from
from mobilevlm_ros.train import own_run
from mobilevlm_ros.types import AnswerFormat, Frame, Question

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
Capture = pytest.CaptureFixture[str]

PROFILE = """
name: exact
device: tests
vision: {backend: onnxruntime, precision: fp32, n_threads: 1}
language: {quantization: F32, kv_type: f32, n_threads: 1, n_threads_batch: 1}
parity: {logits_cosine: 0.9999}
"""
ASKED = ['--ask', 'yes_no: is it red', '--ask', 'colour: what [red | green | blue]']
SET = ['schedule.max_steps=80', 'learning_rate.language=1.0e-2', 'learning_rate.projector=5.0e-3', 'lora.rank=4']


def truth(question: dict[str, Any], colour: str) -> str:
    return colour if question['kind'] == 'colour' else 'yes' if colour == 'red' else 'no'


@pytest.fixture(scope='module')
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its bundle, and 40 labelled frames."""
    home = tmp_path_factory.mktemp('own')
    tiny_runs.write_base(home / 'tiny-base')
    (home / 'exact.yaml').write_text(PROFILE)
    make_bundle(str(home / 'tiny-base'), str(home / 'exact.yaml'), home / 'bundle', SilentReporter())
    record(home / 'hall', tinted(40))
    assert main(['train', 'frames', str(home / 'hall'), '--out', str(home / 'frames'), *ASKED]) == 0
    label(home / 'frames', truth)
    return home


def own(home: Path, *arguments: str, out: str = 'own') -> int:
    base = ['--base', str(home / 'tiny-base'), '--profile', str(home / 'exact.yaml'), '--out', str(home / out)]
    return main(['train', 'own', str(home / 'frames'), *base, *arguments])


@pytest.fixture(scope='module')
def trained(home: Path) -> Path:
    """The folder of a finished run that started from a bundle."""
    assert own(home, '--bundle', str(home / 'bundle'), '--set', *SET) == 0
    return home / 'own'


def report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / 'report.json').read_text())
    return content


def test_frames_that_were_never_seen_are_answered(trained: Path) -> None:
    scores = report(trained)['report']['scores']
    assert set(scores) == {'yes_no', 'colour', 'all'}
    assert scores['all']['after']['n'] >= 18
    assert scores['all']['after']['accuracy'] > 0.9 > scores['all']['before']['accuracy']
    assert scores['all']['after']['low'] > scores['all']['majority']['accuracy']
    assert report(trained)['report']['paired']['p'] < 0.05


def test_the_bundle_is_the_old_one_with_an_adapter(home: Path, trained: Path) -> None:
    before, after = open_bundle(home / 'bundle'), open_bundle(trained / 'bundle')
    assert (before.name, after.name) == ('tiny-base', 'tiny-base-own')
    assert before.adapter_path is None and after.adapter_path is not None
    assert 'one recording' in after.warning
    old, new = (gguf.GGUFReader(one.language_path).tensors for one in (before, after))
    assert [one.name for one in old] == [one.name for one in new]
    assert all(np.array_equal(one.data, other.data) for one, other in zip(old, new, strict=True))


def test_the_robot_gets_these_answers(home: Path, trained: Path) -> None:
    """Asked as a robot asks, without anything of training."""
    assistant = load_assistant_from(trained / 'bundle')
    try:
        right = 0
        for line in (home / 'frames' / 'labels.jsonl').read_text().splitlines()[-9:]:
            frame = json.loads(line)
            picture = Frame(read_image(home / 'frames' / frame['image']))
            question = Question('what', AnswerFormat.CHOICE, tuple(COLOURS))
            right += assistant.ask(question, picture).text == frame['questions'][1]['answer']
    finally:
        assistant.close()
    assert right >= 8


def test_no_held_out_frame_was_trained_on(home: Path, trained: Path) -> None:
    learned = {one['image'] for one in json.loads((trained / 'train.json').read_text())}
    asked = {f'frames/{one["picture"]}' for one in report(trained)['report']['after']}
    times = {
        one['image']: one['time_s']
        for one in map(json.loads, (home / 'frames' / 'labels.jsonl').read_text().split('\n')[:-1])
    }
    assert max(times[name] for name in learned) <= min(times[name] for name in asked) - 5.0
    assert learned.isdisjoint(asked) and len(learned) >= 25


def test_questions_are_learned_in_the_words_that_are_asked(trained: Path) -> None:
    first, second = json.loads((trained / 'train.json').read_text())[:2]
    suffix = 'Answer the question using a single word or phrase.'
    assert first['conversations'][0]['value'] == f'<image>\nis it red\n{suffix}'
    assert first['conversations'][1]['value'] in ('Yes', 'No')
    assert second['conversations'][0]['value'] == f'<image>\nwhat\nOptions: red, green, blue.\n{suffix}'


def test_a_run_is_not_begun_twice_and_resumed_only_with_the_same_labels(
    home: Path, trained: Path, capsys: Capture
) -> None:
    again = ['--bundle', str(home / 'bundle'), '--set', *SET]
    assert own(home, *again) == 2
    assert 'holds a run already: go on with --resume' in capsys.readouterr().err
    assert own(home, *again, '--resume', '--held-out', '0.4') == 2
    assert 'the labels, or how they are split, have changed' in capsys.readouterr().err
    before = report(trained)
    assert own(home, *again, '--resume') == 0
    assert report(trained) == before
    assert capsys.readouterr().out.splitlines()[-1] == str(trained / 'bundle')


def test_a_run_that_was_stopped_goes_on(
    home: Path, trained: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same answers, with the same confidence, as the run that nobody stopped."""
    real, looks = own_run.run_stage, itertools.count(1)

    def run(*arguments: Any, asked_to_stop: Callable[[], bool], **options: Any) -> Any:
        def look() -> bool:
            if next(looks) == 30:
                os.kill(os.getpid(), signal.SIGINT)
            return asked_to_stop()

        return real(*arguments, asked_to_stop=look, **options)

    again = ['--bundle', str(home / 'bundle'), '--set', *SET]
    monkeypatch.setattr(own_run, 'run_stage', run)
    assert own(home, *again, out='stopped') == 130
    said = capfd.readouterr().err
    assert 'go on with the same command and --resume' in said and 'mobilevlm train lora' not in said
    assert not (home / 'stopped' / 'bundle').exists() and not (home / 'stopped' / 'report.json').exists()

    monkeypatch.setattr(own_run, 'run_stage', real)
    assert own(home, *again, '--resume', out='stopped') == 0
    assert report(home / 'stopped')['report'] == report(trained)['report']


def test_training_goes_on_from_the_adapter_of_a_bundle(home: Path, trained: Path, capsys: Capture) -> None:
    """With rates of almost nothing the second bundle answers as the first: nothing was lost on the way."""
    model, adapter = str(trained / 'run' / 'model'), trained / 'run' / 'adapter'
    make_bundle(model, str(home / 'exact.yaml'), home / 'adapted', SilentReporter(), adapter=adapter)
    base = ['--base', model, '--bundle', str(home / 'adapted'), '--out', str(home / 'second')]
    rates = ['learning_rate.language=1.0e-12', 'learning_rate.projector=1.0e-12', 'schedule.max_steps=1']
    profile = ['--profile', str(home / 'exact.yaml')]
    assert main(['train', 'own', str(home / 'frames'), *base, *profile, '--set', *rates]) == 0
    found = report(home / 'second')['report']
    assert found['scores']['all']['before'] == report(trained)['report']['scores']['all']['after']
    assert [one['answer'] for one in found['before']] == [one['answer'] for one in found['after']]
    for before, after in zip(found['before'], found['after'], strict=True):
        assert after['confidence'] == pytest.approx(before['confidence'], abs=1e-3)
    assert 'neither better nor worse' in capsys.readouterr().out


def test_labels_and_their_split_can_be_looked_at_first(home: Path, capsys: Capture) -> None:
    assert own(home, '--check', out='unused') == 0
    said = capsys.readouterr().err
    assert 'labelled frames' in said and 'to learn from' in said
    assert not (home / 'unused').exists()


def test_what_does_not_fit_together_is_named_before_anything_is_computed(home: Path, capsys: Capture) -> None:
    def said(*arguments: str) -> str:
        assert main(['train', 'own', str(home / 'frames'), '--out', str(home / 'wrong'), *arguments]) == 2
        shutil.rmtree(home / 'wrong', ignore_errors=True)
        return capsys.readouterr().err

    bundle = ('--bundle', str(home / 'bundle'))
    assert 'was built from tiny-base, which is neither nano nor' in said(*bundle)
    assert "--base 'nowhere' is neither a folder nor a known model" in said(*bundle, '--base', 'nowhere')
    other = tiny_runs.write_base(home / 'other', 'ldpnet')
    assert 'was not built from this' in said(*bundle, '--base', str(other))
    assert 'did you mean schedule.epochs' in said(*bundle, '--set', 'schedule.epoch=3')
    assert 'no frame is left to learn from' in said(*bundle, '--gap', '1000')
    assert 'there is no bundle' in said('--bundle', str(home / 'nowhere'))


def test_a_picture_that_was_deleted_is_named_with_its_line(home: Path, tmp_path: Path, capsys: Capture) -> None:
    frames = Path(shutil.copytree(home / 'frames', tmp_path / 'frames'))
    (frames / 'frames' / '0003.jpg').unlink()
    assert main(['train', 'own', str(frames), '--check']) == 2
    assert "labels.jsonl:3:11: the picture 'frames/0003.jpg' is not there" in capsys.readouterr().err


def test_the_glass_of_a_picture_is_seen(home: Path) -> None:
    """The tests' own labelling."""
    assert [own_recordings.colour_of(home / 'frames' / 'frames' / f'000{n}.jpg') for n in (1, 2, 3)] == list(COLOURS)
    assert np.ptp(read_image(home / 'frames' / 'frames' / '0001.jpg')) > 0
