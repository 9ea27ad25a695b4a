"""The command line: what it prints, its exit codes, its errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints
import yaml
from numpy.typing import NDArray
from PIL import Image

import mobilevlm_ros
from mobilevlm_ros.build.stages import Workshop
from mobilevlm_ros.cli import main
from mobilevlm_ros.errors import MobileVLMError
from mobilevlm_ros.model import fetch as fetch_module
from mobilevlm_ros.model import publish
from mobilevlm_ros.model.checkpoint import open_checkpoint
from mobilevlm_ros.model.manifest import Manifest
from mobilevlm_ros.runtime.bundle import open_bundle

Pixels = NDArray[np.uint8]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def picture(tmp_path: Path, photo: Pixels) -> str:
    """An image file."""
    path = tmp_path / 'picture.png'
    Image.fromarray(photo).save(path)
    return str(path)


def ask(tiny_bundle: Path, *arguments: str) -> int:
    return main(['ask', *arguments, '--bundle', str(tiny_bundle), '--max-tokens', '6'])


def test_text_is_streamed_to_stdout(tiny_bundle: Path, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tiny_bundle, picture, 'what is the table') == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert 'random weights' in captured.err
    assert 'confidence' in captured.err


def test_yes_no_prints_the_probabilities(tiny_bundle: Path, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tiny_bundle, picture, 'is the car red', '--format', 'yes_no') == 0
    lines = capsys.readouterr().out.split('\n')
    assert lines[0] in ('yes', 'no')
    assert '%  yes' in lines[1]
    assert '%  no' in lines[2]


def test_json_output_is_one_object(tiny_bundle: Path, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ('what is it', '--format', 'choice', '--choices', 'red,blue,green', '--min-confidence', '0', '--json')
    assert ask(tiny_bundle, picture, *arguments) == 0
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert record['result_code'] == 'OK'
    assert record['options'] == ['red', 'blue', 'green']
    assert record['text'] in record['options']
    assert record['timing']['vision_s'] > 0


def test_schema_is_read_from_a_file(
    tiny_bundle: Path, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = tmp_path / 'schema.json'
    schema.write_text('{"enum": ["a", "b"]}')
    assert ask(tiny_bundle, picture, 'which', '--format', 'json', '--schema', str(schema), '--json') == 0
    assert json.loads(json.loads(capsys.readouterr().out)['text']) in ('a', 'b')


def test_unanswered_question_exits_with_1(tiny_bundle: Path, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tiny_bundle, picture, 'which', '--format', 'choice') == 1
    assert 'BAD_FORMAT' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        (['ask', '/nonexistent.png', 'x'], 'cannot be read'),
        (['ask', 'PICTURE', 'x', '--bundle', '/nonexistent'], 'mobilevlm build nano'),
        (['ask', 'PICTURE', 'x', '--format', 'json', '--schema', '/nonexistent'], 'cannot be read'),
        (['build', 'nano', '--profile', 'toaster'], 'the profiles are: cpu'),
        (['build', 'nano', '--out', '/proc/nowhere/bundle'], '--out'),
    ],
)
def test_errors_of_the_set_up_exit_with_2(
    arguments: list[str], says: str, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([picture if argument == 'PICTURE' else argument for argument in arguments]) == 2
    assert says in capsys.readouterr().err


# -- building -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in the published layout; not to be changed."""
    folder = tmp_path_factory.mktemp('checkpoints') / 'tiny-v2'
    tiny_checkpoints.write(folder)
    return folder


@pytest.fixture(scope='module')
def fine_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with the 24 x 24 patches of the published models."""
    folder = tmp_path_factory.mktemp('checkpoints') / 'fine'
    config = tiny_checkpoints.config()
    vision = replace(tiny_checkpoints.VISION, image_size=96, patch_size=4)
    tiny_checkpoints.write(folder, replace(config, vision=vision))
    return folder


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a cache of its own."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    return tmp_path / 'work'


def own_profile(folder: Path, **changes: Any) -> str:
    """A profile of one's own."""
    content = {
        'name': 'mine',
        'device': 'a robot',
        'vision': {'backend': 'onnxruntime', 'precision': 'fp32', 'n_threads': 1},
        'language': {'quantization': 'F16', 'n_threads': 1, 'n_threads_batch': 1},
        'parity': {'logits_cosine': 0.99},
    }
    (folder / 'mine.yaml').write_text(yaml.safe_dump({**content, **changes}))
    return str(folder / 'mine.yaml')


def last_line(text: str) -> str:
    return text.rstrip('\n').rpartition('\n')[2]


def test_build_prints_what_it_does_how_near_it_is_and_the_path(
    checkpoint: Path, work: Path, picture: str, capsys: Capture
) -> None:
    assert main(['build', str(checkpoint), '--profile', own_profile(work), '--out', str(work / 'out')]) == 0

    captured = capsys.readouterr()
    assert captured.out == f'{work / "out"}\n'
    assert '· language model in F16' in captured.err
    assert '· comparing the engines with PyTorch' in captured.err
    assert re.search(r'visual tokens .*cosine .*1\.000000', captured.err)
    assert re.search(r'tiny-?\S*-mine@[0-9a-f]{12}, \d+ MiB', captured.err)
    assert main(['ask', picture, 'what is it', '--bundle', str(work / 'out'), '--max-tokens', '3']) == 0


def test_build_without_a_place_builds_in_the_cache(
    checkpoint: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Named after the folder and the profile, however the folder is given; and the second time it is there."""
    expected = work.parent / 'cache' / 'mobilevlm_ros' / 'bundles' / 'tiny-v2-mine'
    profile = own_profile(work)

    assert main(['build', f'{checkpoint}/', '--profile', profile]) == 0
    assert last_line(capsys.readouterr().out) == str(expected)
    monkeypatch.chdir(checkpoint)
    assert main(['build', '.', '--profile', profile]) == 0

    captured = capsys.readouterr()
    assert last_line(captured.out) == str(expected)
    assert 'is built already' in captured.err


def test_build_takes_pictures_of_ones_own(checkpoint: Path, work: Path, picture: str) -> None:
    (work / 'pictures').mkdir()
    Image.open(picture).save(work / 'pictures' / 'robot.jpg')
    arguments = ['build', str(checkpoint), '--profile', own_profile(work), '--images', 'pictures', '--out', 'out']

    assert main(arguments) == 0

    from mobilevlm_ros.build.reference import read_reference

    (image,) = read_reference(work / 'out' / 'reference.npz').images
    assert image.rgb_hwc.shape == (48, 64, 3)


def test_build_with_an_mmproj_says_what_is_wrong_with_it(fine_checkpoint: Path, work: Path, capsys: Capture) -> None:
    arguments = ['build', str(fine_checkpoint), '--profile', own_profile(work), '--mmproj', '--out', 'out']

    assert main(arguments) == 0

    assert 'mmproj.gguf' in open_bundle(work / 'out').description['files']
    assert 'note on mmproj.gguf' in capsys.readouterr().err


def test_an_mmproj_that_cannot_be_is_refused_before_the_work(checkpoint: Path, work: Path, capsys: Capture) -> None:
    assert main(['build', str(checkpoint), '--profile', own_profile(work), '--mmproj', '--out', 'out']) == 2

    captured = capsys.readouterr()
    assert '24' in last_line(captured.err)
    assert captured.out == ''
    assert '· language model' not in captured.err
    assert not (work / 'out').exists()


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        (['CHECKPOINT', '--images', 'nowhere'], 'the pictures in nowhere cannot be read'),
        (['CHECKPOINT', '--images', '.'], 'holds 0 pictures'),
        (['CHECKPOINT', '--adapter', 'nowhere'], 'there is no folder nowhere'),
        (['CHECKPOINT', '--packages', '.'], '--packages is for nano'),
        (['nano', '--adapter', '.'], 'nano takes no --adapter'),
        (['nano', '--mmproj'], 'nano takes no --mmproj'),
        (['nano', '--packages', '.'], 'there is no wheel of'),
        (['no-such-model'], 'known are: nano, '),
        (['mobilevlm_v2-1.7b'], 'mobilevlm fetch mobilevlm_v2-1.7b'),
        (['.'], 'config.json'),
        (['CHECKPOINT', '--profile', 'nowhere.yaml'], 'cannot be read'),
    ],
)
def test_what_cannot_be_built_exits_with_2(
    checkpoint: Path, work: Path, capsys: Capture, arguments: list[str], says: str
) -> None:
    given = [str(checkpoint) if argument == 'CHECKPOINT' else argument for argument in arguments]
    profile = [] if '--profile' in given else ['--profile', own_profile(work)]

    assert main(['build', *given, *profile, '--out', 'out']) == 2

    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ''
    assert not (work / 'out').exists()


def test_a_bundle_that_is_too_far_off_exits_with_2_and_advice(checkpoint: Path, work: Path, capsys: Capture) -> None:
    profile = own_profile(work, language={'quantization': 'Q4_0', 'n_threads': 1}, parity={'logits_cosine': 1.0})

    assert main(['build', str(checkpoint), '--profile', profile, '--out', 'out']) == 2

    assert 'take a profile with a larger quantization' in capsys.readouterr().err
    assert not (work / 'out').exists()


def test_ctrl_c_while_building_exits_with_130(
    checkpoint: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    arguments = ['build', str(checkpoint), '--profile', own_profile(work), '--out', 'out']
    with monkeypatch.context() as patch:
        patch.setattr(Workshop, 'finish', interrupt)
        assert main(arguments) == 130
    assert last_line(capsys.readouterr().err) == 'mobilevlm: interrupted'
    assert not (work / 'out').exists()

    assert main(arguments) == 0
    assert 'language model in F16: finished earlier' in capsys.readouterr().err


@pytest.mark.parametrize(('bundle', 'says'), [('nowhere', 'there is no bundle'), ('TINY', 'with onnxruntime')])
def test_what_has_no_plan_exits_with_2(tiny_bundle: Path, capsys: Capture, bundle: str, says: str) -> None:
    assert main(['plan', str(tiny_bundle) if bundle == 'TINY' else bundle]) == 2

    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ''


# -- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model has the shapes of the tiny one: a full-size one is gigabytes."""
    config = replace(tiny_checkpoints.config(), name='mobilevlm_v2-1.7b')
    monkeypatch.setattr(publish, 'read_manifest', lambda name: config)
    monkeypatch.setattr(fetch_module, 'open_manifest', lambda name: Manifest(config, 1, '', {}))


def test_fetch_takes_a_local_folder(checkpoint: Path, work: Path, tiny_manifest: None, capsys: Capture) -> None:
    assert main(['fetch', 'mobilevlm_v2-1.7b', '--from', str(checkpoint)]) == 0

    path = Path(last_line(capsys.readouterr().out))
    assert path == work.parent / 'cache' / 'mobilevlm_ros' / 'checkpoints' / 'mobilevlm_v2-1.7b'
    assert path.resolve() == checkpoint.resolve()


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        (['no-such-model'], "there is no model 'no-such-model'"),
        (['mobilevlm_v2-1.7b', '--from', 'CHECKPOINT'], 'mobilevlm_v2-1.7b is'),
        (['mobilevlm_v2-1.7b', '--from', 'nowhere'], 'nowhere'),
    ],
)
def test_what_cannot_be_fetched_exits_with_2(
    checkpoint: Path, work: Path, capsys: Capture, arguments: list[str], says: str
) -> None:
    given = [str(checkpoint) if argument == 'CHECKPOINT' else argument for argument in arguments]

    assert main(['fetch', *given]) == 2

    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ''


def test_init_writes_a_random_checkpoint(work: Path, tiny_manifest: None, capsys: Capture) -> None:
    arguments = ['init', 'mobilevlm_v2-1.7b', '--random', '--dtype', 'fp32']
    for out, seed in (('a', '3'), ('b', '3'), ('c', '4')):
        assert main([*arguments, '--seed', seed, '--out', out]) == 0
        assert last_line(capsys.readouterr().out) == out

    with open_checkpoint(work / 'a') as a, open_checkpoint(work / 'b') as b, open_checkpoint(work / 'c') as c:
        name = 'model.layers.0.mlp.up_proj.weight'
        assert (a.kind, a.dtype) == ('vlm', 'fp32')
        np.testing.assert_array_equal(a.tensors[name], b.tensors[name])
        assert not np.array_equal(a.tensors[name], c.tensors[name])


@pytest.mark.parametrize('missing', ['--random', '--out'])
def test_init_needs_to_be_told_that_weights_are_random_and_where(
    work: Path, tiny_manifest: None, capsys: Capture, missing: str
) -> None:
    arguments = [argument for argument in ('--random', '--out=out') if not argument.startswith(missing)]

    with pytest.raises(SystemExit) as raised:
        main(['init', 'mobilevlm_v2-1.7b', *arguments])

    assert raised.value.code == 2
    assert f'required: {missing}' in capsys.readouterr().err
    assert list(work.iterdir()) == []


def test_init_overwrites_nothing(work: Path, tiny_manifest: None, capsys: Capture) -> None:
    (work / 'out').mkdir()
    (work / 'out' / 'precious').write_text('x')

    assert main(['init', 'mobilevlm_v2-1.7b', '--random', '--out', 'out']) == 2

    assert 'out exists already' in capsys.readouterr().err
    assert [path.name for path in (work / 'out').iterdir()] == ['precious']


def test_init_of_an_unknown_model_exits_with_2(work: Path, capsys: Capture) -> None:
    assert main(['init', 'no-such-model', '--random', '--out', 'out']) == 2
    assert "there is no model 'no-such-model'" in capsys.readouterr().err


# -- everything -----------------------------------------------------------------------------------------------------


def test_an_error_of_this_package_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MobileVLMError('found this, expected that')

    monkeypatch.setattr('mobilevlm_ros.build.making.make_bundle', fail)

    assert main(['build', 'nano']) == 2

    assert capsys.readouterr().err == 'mobilevlm: found this, expected that\n'


def test_wrong_arguments_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(['ask'])
    assert raised.value.code == 2
    assert 'usage: mobilevlm ask' in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(['--version'])
    assert raised.value.code == 0
    assert mobilevlm_ros.__version__ in capsys.readouterr().out


def test_asking_loads_neither_torch_nor_ros(tiny_bundle: Path, picture: str) -> None:
    code = (
        'import sys; from mobilevlm_ros.cli import main; '
        f'main(["ask", {picture!r}, "what is the table", "--bundle", {str(tiny_bundle)!r}, "--max-tokens", "2"]); '
        'assert not {"torch", "transformers", "rclpy", "onnx", "gguf"} & set(sys.modules)'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
