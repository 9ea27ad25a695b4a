"""The page about one's own pictures: its three commands are run as they stand, on nano's stand-in and photographs."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import own_recordings
import pytest
import test_docs
from own_recordings import label, photographs, record

from mobilevlm_ros.build import bundle_build, nano, nano_reference
from mobilevlm_ros.build.parity import read_report
from mobilevlm_ros.build.reference import write_reference
from mobilevlm_ros.cli import build_parser, main
from mobilevlm_ros.runtime.bundle import open_bundle
from mobilevlm_ros.runtime.formats import prepare
from mobilevlm_ros.train import own_bundle
from mobilevlm_ros.train.config import read_config
from mobilevlm_ros.train.exam_questions import KINDS
from mobilevlm_ros.train.own_labels import FORMATS, read_labels
from mobilevlm_ros.train.own_looks import Limits

PAGE = 'docs/own_data.md'
TEXT = (test_docs.ROOT / PAGE).read_text()


@pytest.fixture(scope='module')
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a recording and nothing else, where nano is its stand-in, its packages in the cache."""
    tiny_nano = own_recordings.helper('build', 'tiny_nano')
    home = tmp_path_factory.mktemp('reader')
    root = home / 'stand-in'
    tiny_nano.write_all(root)
    (root / 'cache' / 'mobilevlm_ros').mkdir(parents=True)
    (root / 'packages').rename(root / 'cache' / 'mobilevlm_ros' / 'downloads')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XDG_CACHE_HOME', str(root / 'cache'))
        for module in (nano, nano_reference, bundle_build, own_bundle):
            patch.setattr(module, 'shared_file', lambda relative: root / relative)
        write_reference(root / 'models' / 'nano' / 'reference.npz', nano_reference.record_nano())
        patch.chdir(home)
        record(home / 'hall', photographs(16))
        yield home


@pytest.fixture(scope='module')
def done(home: Path) -> Path:
    """What the reader has in the end."""
    block = re.search(r'^```\n(.*?)^```', TEXT, flags=re.S | re.M)
    assert block is not None
    recording, frames, own = (shlex.split(line) for line in block.group(1).splitlines())
    assert recording[:5] == ['ros2', 'bag', 'record', '-o', 'hall']
    assert main(frames[1:]) == 0
    numbers = iter(range(1000))

    def answer(question: dict[str, Any], colour: str) -> str:
        choices = question.get('choices', ['yes', 'no'])
        return str(choices[next(numbers) // 2 % len(choices)])

    label(home / 'hall-frames', answer)
    assert main(own[1:]) == 0
    return home / 'hall-frames' / 'own'


@pytest.mark.slow
@pytest.mark.timeout(600)
class TestCommands:
    """The first block of the page."""

    def test_they_leave_a_bundle_that_computes_what_was_trained(self, done: Path) -> None:
        """Its engines were compared with PyTorch, projector and adapter of the run included."""
        bundle = open_bundle(done / 'bundle')
        assert bundle.name == 'nano-own' and bundle.adapter_path is not None
        report = read_report(bundle)
        assert len(report.stages) >= 4
        report.raise_if_failed(bundle.vision['precision'], bundle.language['quantization'])

    def test_the_language_model_is_nanos_own_and_adapter_and_projector_are_new(self, done: Path) -> None:
        before, after = (open_bundle(done / name).description['files'] for name in ('before', 'bundle'))
        same = {name for name in before if before[name]['sha256'] == after[name]['sha256']}
        assert 'language.gguf' in same and 'adapter.gguf' not in same
        assert any(name.endswith('.onnx') and name not in same for name in before)
        assert before['adapter.gguf']['bytes'] >= after['adapter.gguf']['bytes'] // 2

    def test_the_report_is_of_both(self, done: Path) -> None:
        report = json.loads((done / 'report.json').read_text())
        assert report['before'].startswith('nano-cpu@') and report['after'].startswith('nano-own-cpu@')
        answers = [report['report'][when] for when in ('before', 'after')]
        assert [one['id'] for one in answers[0]] == [one['id'] for one in answers[1]]
        assert {one['kind'] for one in answers[0]} == {'yes_no', 'colour'}

    def test_files_that_the_page_names_are_there(self, done: Path) -> None:
        for name in ('frames', 'labels.jsonl', 'sheet.html', 'frames.json'):
            assert f'| `{name}' in TEXT and (done.parent / name).exists()
        for name in (
            'bundle',
            'report.json',
            'train.json',
            'own.yaml',
            'run',
            'features',
            'run/adapter',
            'run/log.jsonl',
        ):
            assert (done / name).exists(), name

    def test_it_goes_on_from_nanos_adapter(self, done: Path) -> None:
        config = read_config(str(done / 'own.yaml'))
        assert config.model.adapter is not None and config.lora is not None
        assert (config.data.template, config.lora.rank, config.lora.alpha) == ('chatml', 4, 8)


def test_links_and_commands_hold() -> None:
    test_docs.test_linked_files_exist(PAGE)
    test_docs.test_mobilevlm_commands_parse(PAGE)
    assert len(test_docs.commands(PAGE, 'mobilevlm')) > 6


def test_the_line_of_labels_on_the_page_is_one(tmp_path: Path) -> None:
    line = re.search(r'^```json\n(.*?)\n```', TEXT, flags=re.S | re.M)
    assert line is not None
    own_recordings.helper('train', 'pictures').write_picture(tmp_path / 'frames' / '0001.jpg')
    (tmp_path / 'labels.jsonl').write_text(line.group(1) + '\n')
    asked = read_labels(tmp_path / 'labels.jsonl').frames[0].questions
    assert [one.answers for one in asked] == [('No',), ('box', 'crate')]
    assert 'Answer the question using a single word or phrase.' in prepare(asked[1].asked()).text


def test_what_the_page_says_of_limits_kinds_and_options_holds() -> None:
    limits, frames = Limits(), build_parser().parse_args(['train', 'frames', 'a', '--out', 'b'])
    assert f'below {limits.darkest:g} or above {limits.brightest:g}' in TEXT
    assert f'above {limits.blur:g} ' in TEXT and f'by {limits.change:g} grey levels' in TEXT
    assert (frames.every, frames.frames) == (2.0, 200)
    own = build_parser().parse_args(['train', 'own', 'a', '--set', 'a=1', 'b=2', '--set', 'c=3'])
    assert (own.held_out, own.gap, own.set) == (0.25, 5.0, ['a=1', 'b=2', 'c=3'])
    assert all(f'`{kind}`' in TEXT for kind in KINDS) and all(f'`{form}`' in TEXT for form in FORMATS)


def test_the_configuration_is_one() -> None:
    config = read_config('own-data')
    assert (config.stage, config.learning_rate.language) == ('lora', 2e-4)
