"""From a tiny random checkpoint in the published layout to a bundle that answers as PyTorch does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints
import yaml
from numpy.typing import NDArray

from mobilevlm_ros.build import bundle_build
from mobilevlm_ros.build.making import make_bundle
from mobilevlm_ros.build.parity import ParityReport, StageParity, read_report
from mobilevlm_ros.build.profile import read_profile
from mobilevlm_ros.build.stages import SilentReporter
from mobilevlm_ros.errors import BuildError, CheckpointError, ParityError
from mobilevlm_ros.runtime.bundle import Bundle, open_bundle
from mobilevlm_ros.runtime.loading import load_assistant
from mobilevlm_ros.types import Frame, Question

pytestmark = pytest.mark.timeout(300)
EXACT: dict[str, Any] = {
    'name': 'exact',
    'device': 'tests',
    'vision': {'backend': 'onnxruntime', 'precision': 'fp32', 'n_threads': 1},
    'language': {'quantization': 'F32', 'kv_type': 'f32', 'n_threads': 1, 'n_threads_batch': 1},
    'parity': {'logits_cosine': 0.99999},
}


class Steps(SilentReporter):
    def __init__(self) -> None:
        self.steps: list[str] = []

    def step(self, text: str) -> None:
        self.steps.append(text)


def profile(folder: Path, **changes: Any) -> str:
    path = folder / 'exact.yaml'
    path.write_text(yaml.safe_dump({**EXACT, **changes}))
    return str(path)


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny V1 and a tiny V2."""
    folder = tmp_path_factory.mktemp('checkpoints')
    tiny_checkpoints.write(folder / 'v1', tiny_checkpoints.config('ldpnet'), dtype='fp32')
    tiny_checkpoints.write(
        folder / 'v2', tiny_checkpoints.config('ldpnetv2'), dtype='bf16', layout='safetensors-shards'
    )
    return folder


@pytest.fixture(scope='module', params=['v1', 'v2'])
def exact(request: pytest.FixtureRequest, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp('exact')
    return make_bundle(str(checkpoints / request.param), profile(folder), folder / 'out', SilentReporter())


def stage(report: ParityReport, name: str) -> StageParity:
    return next(one for one in report.stages if one.stage == name)


def test_the_bundle_is_the_model(exact: Bundle) -> None:
    report = read_report(exact)
    assert report.passed
    assert 'PyTorch' in report.reference
    assert stage(report, 'preprocess').worst <= 0.01
    assert stage(report, 'vision tower').worst >= 0.99999
    assert stage(report, 'visual tokens').worst >= 0.99999
    assert stage(report, 'logits').worst >= 0.99999
    assert stage(report, 'prompt').worst == 1.0


def test_greedy_tokens_of_the_whole_path_equal_pytorch(exact: Bundle) -> None:
    """From image file to tokens, in float32, over all images and questions."""
    report = read_report(exact)
    assert stage(report, 'image to tokens').n == 6
    assert stage(report, 'image to tokens').worst == 1.0
    assert stage(report, 'greedy tokens').worst == 1.0


def test_the_bundle_answers(exact: Bundle, photo: NDArray[np.uint8]) -> None:
    assistant = load_assistant(exact)
    try:
        answer = assistant.ask(Question('what is it', max_tokens=5), Frame(photo))
    finally:
        assistant.close()
    assert answer.timing.generated_tokens == 5
    assert answer.model_id.startswith(exact.name)


def test_no_file_is_left_over(exact: Bundle) -> None:
    names = {path.name for path in exact.path.iterdir()}
    assert names == {'bundle.json', *exact.description['files']}
    assert list(exact.path.parent.glob('*.partial')) == []
    open_bundle(exact.path, verify_hashes=True)


def test_a_finished_bundle_is_found(exact: Bundle, checkpoints: Path) -> None:
    steps = Steps()
    source = 'v1' if exact.path.parent.name.endswith('exact0') else 'v2'
    again = make_bundle(str(checkpoints / source), str(exact.path.parent / 'exact.yaml'), exact.path, steps)
    assert again.hash == exact.hash
    assert 'built already' in steps.steps[-1]


@pytest.mark.parametrize('precision', ['int8'])
def test_int8_keeps_to_its_limit(checkpoints: Path, tmp_path: Path, precision: str) -> None:
    changes = {
        'vision': {'backend': 'onnxruntime', 'precision': precision, 'n_threads': 1},
        'parity': {'vision_cosine': 0.98, 'logits_cosine': 0.9},
        'language': {'quantization': 'Q8_0', 'n_threads': 1},
    }
    bundle = make_bundle(str(checkpoints / 'v2'), profile(tmp_path, **changes), tmp_path / 'out', SilentReporter())
    report = read_report(bundle)
    assert 0.98 <= stage(report, 'visual tokens').worst < 0.999999
    assert bundle.language['quantization'] == 'Q8_0'
    assert not (bundle.path / 'vision-fp32.onnx').exists()


def test_below_its_limit_the_build_refuses_and_says_what_to_try(checkpoints: Path, tmp_path: Path) -> None:
    changes = {
        'language': {'quantization': 'Q4_0', 'n_threads': 1},
        'parity': {'logits_cosine': 1.0},
    }
    with pytest.raises(ParityError, match=r'logits: cosine 0\.\d+, expected 1.*Q5_K_M'):
        make_bundle(str(checkpoints / 'v2'), profile(tmp_path, **changes), tmp_path / 'out', SilentReporter())
    assert not (tmp_path / 'out').exists()


class Interrupting(Steps):
    """Presses Ctrl-C at the n-th step."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at

    def step(self, text: str) -> None:
        super().step(text)
        if len(self.steps) == self._at:
            raise KeyboardInterrupt


@pytest.fixture
def many(checkpoints: Path, tmp_path: Path) -> tuple[str, str, Path]:
    """A model, a profile with every stage, and a place."""
    settings = profile(tmp_path, language={'quantization': 'Q8_0', 'n_threads': 1}, parity={'logits_cosine': 0.9})
    return str(checkpoints / 'v2'), settings, tmp_path / 'out'


def test_interrupted_anywhere_nothing_half_is_left_and_the_next_build_goes_on(many: tuple[str, str, Path]) -> None:
    model, settings, out = many
    at = 1
    while True:
        interrupting = Interrupting(at)
        try:
            bundle = make_bundle(model, settings, out, interrupting)
            break
        except KeyboardInterrupt:
            assert not out.exists()
            left = [path.name for path in out.parent.rglob('*') if path.is_file() and path.suffix != '.yaml']
            assert not [name for name in left if name.startswith('.')], left
        at += 1
        assert at < 30
    assert any('finished earlier' in step for step in interrupting.steps)
    open_bundle(bundle.path, verify_hashes=True)


def test_a_changed_checkpoint_is_built_again(many: tuple[str, str, Path], tmp_path: Path) -> None:
    model, settings, out = many
    copy = tmp_path / 'copy'
    shutil.copytree(model, copy)
    first = make_bundle(str(copy), settings, out, SilentReporter())
    shutil.rmtree(copy)
    tiny_checkpoints.write(copy, tensors=tiny_checkpoints.random_tensors(tiny_checkpoints.config(), seed=5))
    assert make_bundle(str(copy), settings, out, SilentReporter()).hash != first.hash


@pytest.mark.parametrize(
    ('model', 'named'),
    [('no-such-model', 'mobilevlm_v2-1.7b'), ('mobilevlm_v2-1.7b', 'mobilevlm fetch mobilevlm_v2-1.7b')],
)
def test_what_cannot_be_found_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, named: str
) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises((BuildError, CheckpointError), match=named):
        make_bundle(model, profile(tmp_path), tmp_path / 'out', SilentReporter())


def test_a_language_model_alone_is_refused(tmp_path: Path) -> None:
    tiny_checkpoints.write(tmp_path / 'llm', tiny_checkpoints.config(None))
    with pytest.raises((BuildError, CheckpointError), match='language model'):
        make_bundle(str(tmp_path / 'llm'), profile(tmp_path), tmp_path / 'out', SilentReporter())


def test_an_unknown_quantisation_is_refused_before_anything_is_made(checkpoints: Path, tmp_path: Path) -> None:
    settings = profile(tmp_path, language={'quantization': 'Q3_X'})
    with pytest.raises(BuildError, match=r'Q3_X.*Q4_K_S'):
        make_bundle(str(checkpoints / 'v2'), settings, tmp_path / 'out', SilentReporter())
    assert list(tmp_path.glob('out*')) == []


def test_too_little_memory_is_said_before_starting(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_build.Workshop, 'stage', lambda *_: pytest.fail('started'))
    from mobilevlm_ros.build.published import CheckpointSource

    monkeypatch.setattr(CheckpointSource, 'memory_bytes', lambda self: 1 << 50)
    with pytest.raises(BuildError, match='of memory are free'):
        make_bundle(str(checkpoints / 'v2'), profile(tmp_path), tmp_path / 'out', SilentReporter())


def test_a_bundle_above_the_memory_of_its_profile_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match='the profile allows 64'):
        make_bundle(str(checkpoints / 'v2'), profile(tmp_path, memory_mib=64), tmp_path / 'out', SilentReporter())


@pytest.mark.parametrize(('n_ctx', 'named'), [(1 << 20, 'was trained with 2048'), (64, 'has no room for an image')])
def test_a_context_that_does_not_fit_the_model_is_refused_before_anything_is_made(
    checkpoints: Path, tmp_path: Path, n_ctx: int, named: str
) -> None:
    settings = profile(tmp_path, language={'quantization': 'F16', 'n_ctx': n_ctx})
    with pytest.raises(BuildError, match=named):
        make_bundle(str(checkpoints / 'v2'), settings, tmp_path / 'out', SilentReporter())
    assert list(tmp_path.glob('out*')) == []


@pytest.mark.parametrize('name', ['jetson-orin', 'cuda'])
def test_for_tensorrt_the_graph_is_built_and_checked_and_the_plan_is_left_to_the_device(
    checkpoints: Path, tmp_path: Path, name: str
) -> None:
    settings = {'quantization': 'F16'}
    path = profile(tmp_path, name=name, vision={'backend': 'tensorrt', 'precision': 'fp16'}, language=settings)
    bundle = make_bundle(str(checkpoints / 'v2'), path, tmp_path / 'out', SilentReporter())
    assert stage(read_report(bundle), 'visual tokens').worst >= 0.999
    with pytest.raises(Exception, match=f'mobilevlm plan {bundle.path}'):
        load_assistant(bundle)


def test_shipped_profiles_all_name_quantisations_that_exist() -> None:
    from mobilevlm_ros.build.profile import known_profiles
    from mobilevlm_ros.build.quantize import check_quantization

    for name in known_profiles():
        check_quantization(read_profile(name).quantization)
