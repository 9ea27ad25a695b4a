"""The plan of a bundle: added on the device, checked against PyTorch's record, and never half there.

TensorRT and CUDA are fakes of NVIDIA's API (``tests/runtime/vision``), whose plans compute a known function; the record
in the bundle is what that function gives. The bundle, its files and its language model are real.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from fake_cudart import FakeCudart
from fake_tensorrt import plan_bytes, tokens_of
from fake_tensorrt_builder import VERSIONS
from fake_tensorrt_module import FakeTensorRtModule
from numpy.typing import NDArray

from mobilevlm_ros.build import plan as plan_module
from mobilevlm_ros.build import tensorrt_plan
from mobilevlm_ros.build.parity import PLAN_TOKENS, VISUAL_TOKENS, ParityReport, StageParity, read_report
from mobilevlm_ros.build.plan import plan_bundle
from mobilevlm_ros.build.reference import Reference, ReferenceAnswer, ReferenceImage, write_reference
from mobilevlm_ros.build.stages import SilentReporter
from mobilevlm_ros.cli import main
from mobilevlm_ros.errors import (
    BuildError,
    BundleError,
    BundleHashError,
    DependencyError,
    EngineError,
    ParityError,
    PlanMismatchError,
)
from mobilevlm_ros.runtime.bundle import DESCRIPTION, Bundle, file_entry, open_bundle, write_description
from mobilevlm_ros.runtime.loading import load_assistant_from
from mobilevlm_ros.runtime.preprocess import PreprocessSpec, preprocess
from mobilevlm_ros.runtime.vision import tensorrt as engine_module
from mobilevlm_ros.runtime.vision.cuda import Cuda
from mobilevlm_ros.types import Frame, Question

PLAN = plan_bytes(side=32, n_tokens=4, n_embd=64)


class Steps(SilentReporter):
    """Remembers what it is told; presses Ctrl-C at a step, or while it is built."""

    def __init__(self, interrupt_at: str = '') -> None:
        self.steps: list[str] = []
        self.shares: list[float] = []
        self._interrupt_at = interrupt_at

    def step(self, text: str) -> None:
        self.steps.append(text)
        if self._interrupt_at and self._interrupt_at in text:
            raise KeyboardInterrupt

    def progress(self, done: float, total: float) -> None:
        self.shares.append(done / total)
        if self._interrupt_at == 'progress':
            raise KeyboardInterrupt


@dataclass
class Device:
    """A bundle on a device with a GPU.

    :ivar trt: the module ``tensorrt`` there.
    """

    path: Path
    trt: FakeTensorRtModule
    cudart: FakeCudart

    def plan(self, interrupt_at: str = '') -> Bundle:
        return plan_bundle(self.path, Steps(interrupt_at))

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.path.iterdir()}

    def describe_again(self) -> None:
        """Put the hashes of the files as they are into the description."""
        description = json.loads((self.path / DESCRIPTION).read_text())
        description['files'] = {name: file_entry(self.path / name) for name in description['files']}
        write_description(self.path, description)


def picture(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 255, (40, 56, 3), dtype=np.uint8)


def reference() -> Reference:
    """The record of a model that computes what the fake plans compute."""
    answer = ReferenceAnswer('x', (1,), (300,), (301,), np.zeros((1, 7), np.float32))
    images = []
    for seed in range(2):
        pixels = preprocess(picture(seed), PreprocessSpec(32))
        resized = np.zeros((3, 32, 32), np.uint8)
        spec = PreprocessSpec(32)
        mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (spec.mean, spec.std))
        resized[:] = np.rint((pixels[0] * std + mean) * 255)
        images.append(ReferenceImage(picture(seed), resized, None, tokens_of(pixels, (4, 64)), (answer,)))
    return Reference('PyTorch 2', 'PyTorch 2', tuple(images))


@pytest.fixture(scope='module')
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle as ``mobilevlm build --profile my-robot`` leaves it: the graph for TensorRT, and no plan."""
    path = tiny_models.write_bundle(tmp_path_factory.mktemp('bundles') / 'tiny-my-robot')
    write_reference(path / 'reference.npz', reference())
    stages = (
        StageParity('preprocess', 'levels', 0.0, 0.0, 2, 0.01),
        StageParity(VISUAL_TOKENS, 'cosine', 1.0, 1.0, 2, 0.999, 1.0),
        StageParity('logits', 'cosine', 0.99, 0.99, 2, 0.95, 1.0),
    )
    (path / 'parity.json').write_text(ParityReport('PyTorch 2', 'PyTorch 2', stages).as_json())
    description = open_bundle(path).description
    description['vision'] |= {'backend': 'tensorrt', 'precision': 'fp16'}
    description |= {'profile': 'my-robot', 'parity': 'parity.json'}
    names = ('vision.onnx', 'language.gguf', 'reference.npz', 'parity.json')
    description['files'] = {name: file_entry(path / name) for name in names}
    write_description(path, description)
    return path


MakeDevice = Callable[..., Device]


@pytest.fixture
def make(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeDevice]:
    """Makes a device; nothing may be left on its GPU."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    cudart = FakeCudart()
    for module in (tensorrt_plan, engine_module):
        monkeypatch.setattr(module, 'open_cuda', lambda: Cuda(cudart))

    def device(version: str = '10.3.0', plan: bytes = PLAN) -> Device:
        trt = FakeTensorRtModule(cudart, version, plan)
        monkeypatch.setitem(sys.modules, 'tensorrt', trt)  # type: ignore[arg-type]
        path = tmp_path / 'tiny-my-robot'
        if not path.exists():
            shutil.copytree(template, path)
        return Device(path, trt, cudart)

    yield device
    cudart.assert_clean()


@pytest.fixture
def device(make: MakeDevice) -> Device:
    return make()


# -- what is added --------------------------------------------------------------------------------------------------


def test_before_it_has_a_plan_a_bundle_is_not_loaded_and_says_what_to_run(device: Device) -> None:
    with pytest.raises(EngineError, match=f'no plan for this GPU yet.*mobilevlm plan {device.path}$'):
        load_assistant_from(device.path)


@pytest.mark.parametrize('version', VERSIONS)
def test_a_bundle_with_a_plan_answers(make: MakeDevice, version: str) -> None:
    device = make(version)

    bundle = device.plan()

    assert bundle.vision['plan_key'] == {
        'flavour': 'tensorrt',
        'tensorrt': version,
        'gpu': 'Orin',
        'compute_capability': '8.7',
        'onnx_sha256': file_entry(device.path / 'vision.onnx')['sha256'],
        'precision': 'fp16',
    }
    assistant = load_assistant_from(device.path)
    try:
        answer = assistant.ask(Question('what is it', max_tokens=3), Frame(picture(5)))
    finally:
        assistant.close()
    assert answer.timing.generated_tokens == 3
    assert answer.model_id == bundle.model_id


def test_plan_and_report_take_the_place_of_the_old_report(device: Device) -> None:
    before = open_bundle(device.path)

    after = device.plan()

    names = set(device.files())
    (plan,) = (name for name in names if name.endswith('.plan'))
    (parity,) = (name for name in names if name.startswith('parity'))
    assert names == {'bundle.json', 'language.gguf', 'reference.npz', 'vision.onnx', plan, parity}
    assert set(after.description['files']) == names - {'bundle.json'}
    assert (after.vision['file'], after.vision['onnx'], after.description['parity']) == (plan, 'vision.onnx', parity)
    assert parity != 'parity.json'
    assert after.model_id != before.model_id
    open_bundle(device.path, verify_hashes=True)


def test_the_report_tells_of_the_plan_too(device: Device) -> None:
    stages = read_report(device.plan()).stages

    assert [stage.stage for stage in stages] == ['preprocess', VISUAL_TOKENS, 'logits', PLAN_TOKENS]
    assert (stages[-1].limit, stages[-1].n) == (0.999, 2)
    assert stages[-1].worst == pytest.approx(1)
    assert stages[-1].scale == pytest.approx(1, abs=1e-3)


def test_progress_is_told_and_timings_are_kept_for_all_bundles(device: Device, tmp_path: Path) -> None:
    reporter = Steps()

    plan_bundle(device.path, reporter)

    assert ['TensorRT plan' in reporter.steps[0], 'PyTorch' in reporter.steps[1]] == [True, True]
    assert reporter.shares[-1] == 1.0
    assert (tmp_path / 'cache' / 'mobilevlm_ros' / 'tensorrt.timing-cache').is_file()


def test_the_command_prints_report_and_path(device: Device, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['plan', str(device.path)]) == 0

    captured = capsys.readouterr()
    assert captured.out == f'{device.path}\n'
    assert 'visual tokens of the plan' in captured.err
    assert '· TensorRT plan' in captured.err


# -- again ----------------------------------------------------------------------------------------------------------


def test_planning_again_replaces_the_plan(device: Device) -> None:
    first = device.plan()

    second = device.plan()

    assert second.vision['file'] != first.vision['file']
    assert len(device.files()) == 6
    assert [stage.stage for stage in read_report(second).stages].count(PLAN_TOKENS) == 1
    open_bundle(device.path, verify_hashes=True)
    load_assistant_from(device.path).close()


def test_the_same_plan_again_changes_nothing(device: Device) -> None:
    device.plan()
    before = device.files()
    device.trt.n_built = 0

    device.plan()

    assert device.files() == before


def test_another_tensorrt_needs_another_plan(make: MakeDevice) -> None:
    """As after an update of JetPack."""
    make('8.6.2').plan()
    device = make('10.3.0')
    loaded = device.trt.n_deserialized
    with pytest.raises(PlanMismatchError, match=rf'TensorRT 8\.6\.2, here is 10\.3\.0.*mobilevlm plan {device.path}$'):
        load_assistant_from(device.path)
    assert device.trt.n_deserialized == loaded

    device.plan()

    load_assistant_from(device.path).close()


def test_another_gpu_needs_another_plan(device: Device) -> None:
    device.plan()
    loaded = device.trt.n_deserialized
    device.cudart.name, device.cudart.capability = b'NVIDIA Thor', (11, 0)

    with pytest.raises(PlanMismatchError, match=r'GPU Orin, here is NVIDIA Thor; compute capability 8\.7'):
        load_assistant_from(device.path)

    assert device.trt.n_deserialized == loaded


# -- a graph that changed -------------------------------------------------------------------------------------------


def test_a_graph_that_changed_is_refused_before_the_plan_is_read(device: Device) -> None:
    """Whoever replaces the graph in a bundle and describes it rightly, but keeps the plan."""
    device.plan()
    tiny_models.write_vision(device.path / 'vision.onnx', seed=7)
    device.describe_again()
    loaded = device.trt.n_deserialized

    with pytest.raises(PlanMismatchError, match=rf'ONNX graph \(SHA-256\) .*mobilevlm plan {device.path}$'):
        load_assistant_from(device.path)

    assert device.trt.n_deserialized == loaded
    device.plan()
    load_assistant_from(device.path).close()


def test_a_graph_that_changed_unseen_is_no_file_of_the_bundle(device: Device) -> None:
    device.plan()
    tiny_models.write_vision(device.path / 'vision.onnx', seed=7)

    with pytest.raises(BundleHashError, match=r'vision\.onnx'):
        load_assistant_from(device.path)
    with pytest.raises(BundleHashError, match=r'vision\.onnx'):
        device.plan()


# -- what is refused ------------------------------------------------------------------------------------------------


def assert_unchanged(device: Device, before: dict[str, bytes]) -> None:
    assert device.files() == before
    open_bundle(device.path, verify_hashes=True)


def test_a_plan_of_another_model_is_refused(device: Device) -> None:
    device.plan()
    before = device.files()
    device.trt.plan = plan_bytes(
        io=[['pixels_nchw', 'INPUT', [1, 3, 32, 32], 'FLOAT'], ['visual_tokens', 'OUTPUT', [1, 4, 64], 'BF16']]
    )
    with pytest.raises(EngineError, match='BF16'):
        device.plan()
    assert_unchanged(device, before)
    device.trt.plan = plan_bytes(side=32, n_tokens=8, n_embd=64)
    with pytest.raises(ParityError, match=r'shape \(8, 64\), expected \(4, 64\)'):
        device.plan()
    assert_unchanged(device, before)


def test_a_plan_that_is_too_far_off_is_refused_with_advice(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    before = device.files()
    encode = engine_module.TensorRtVision.encode
    monkeypatch.setattr(engine_module.TensorRtVision, 'encode', lambda *arguments: 1.2 * encode(*arguments))

    with pytest.raises(ParityError, match=r'visual tokens of the plan: .*scale 1\.2.*fp16 loses too much'):
        device.plan()

    assert_unchanged(device, before)


def test_a_bundle_of_another_backend_has_no_plan(tiny_bundle: Path) -> None:
    with pytest.raises(BuildError, match=r'with onnxruntime; only bundles .*--profile jetson-orin'):
        plan_bundle(tiny_bundle, Steps())


def test_a_damaged_bundle_is_refused_before_the_minutes(device: Device) -> None:
    (device.path / 'language.gguf').write_bytes(b'short')

    with pytest.raises(BundleError, match=r'language\.gguf'):
        device.plan()

    assert device.trt.n_built == 0


@pytest.mark.parametrize(
    ('name', 'content', 'says'),
    [
        ('reference.npz', b'damaged', r'reference\.npz is no record of what PyTorch computes'),
        ('parity.json', b'{}', r'parity\.json is no parity report'),
    ],
)
def test_a_damaged_record_or_report_is_refused_before_the_minutes(
    device: Device, name: str, content: bytes, says: str
) -> None:
    (device.path / name).write_bytes(content)
    device.describe_again()

    with pytest.raises(BuildError, match=says):
        device.plan()

    assert device.trt.n_built == 0


def test_a_report_that_says_nothing_of_the_visual_tokens_has_no_limit_for_the_plan(device: Device) -> None:
    (device.path / 'parity.json').write_text(ParityReport('PyTorch 2', 'PyTorch 2', ()).as_json())
    device.describe_again()

    with pytest.raises(BuildError, match='says nothing of visual tokens: build the bundle again'):
        device.plan()


def test_without_tensorrt_it_is_told_what_to_install(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    before = device.files()
    monkeypatch.setitem(sys.modules, 'tensorrt', None)

    with pytest.raises(DependencyError, match=r'TensorRT cannot be loaded.*JetPack.*pip install tensorrt'):
        device.plan()

    assert_unchanged(device, before)


def test_without_a_gpu_it_is_told_where_to_build(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    before = device.files()

    def no_gpu() -> Cuda:
        raise EngineError('no GPU can be used here')

    monkeypatch.setattr(tensorrt_plan, 'open_cuda', no_gpu)

    with pytest.raises(BuildError, match='built on the device that will run it: no GPU can be used here'):
        device.plan()

    assert_unchanged(device, before)


def test_a_graph_that_tensorrt_refuses_is_told(device: Device) -> None:
    before = device.files()
    device.trt.half.parser_errors = [(3, 'tower', 'Odd', 'unsupported')]

    with pytest.raises(BuildError, match=r'refuses .*vision\.onnx: node tower \(Odd\): unsupported'):
        device.plan()

    assert_unchanged(device, before)


# -- interruptions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('has_one', [False, True], ids=['first', 'again'])
@pytest.mark.parametrize('at', ['TensorRT plan', 'progress', 'comparing', 'description'])
def test_interrupted_the_bundle_is_as_it_was_and_the_next_time_nothing_is_left_over(
    device: Device, monkeypatch: pytest.MonkeyPatch, at: str, has_one: bool
) -> None:
    if has_one:
        device.plan()
    before = device.files()
    if at == 'description':

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(plan_module, 'write_description', interrupt)

    with pytest.raises(KeyboardInterrupt):
        device.plan(at)

    after = device.files()
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if name.startswith('.')]
    assert at == 'description' or after == before
    open_bundle(device.path, verify_hashes=True)
    if has_one:
        load_assistant_from(device.path).close()
    monkeypatch.setattr(plan_module, 'write_description', write_description)
    device.plan()
    assert len(device.files()) == 6
    load_assistant_from(device.path).close()


def test_what_a_killed_process_left_goes(device: Device) -> None:
    for name in ('.vision.plan.partial', '.vision.plan.partial.json', 'vision-0123abcd.plan', 'parity-0123abcd.json'):
        (device.path / name).write_text('half')

    device.plan()

    assert len(device.files()) == 6


@pytest.mark.parametrize('full', ['.vision.plan.partial', '.parity.partial'])
def test_a_disk_that_fills_up_is_told_and_the_bundle_is_as_it_was(
    device: Device, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    device.plan()
    before = device.files()
    replace = Path.replace

    def fill_up(self: Path, target: Path) -> Path:
        if self.name in (full, f'.{full}.partial'):
            raise OSError(28, 'No space left on device', str(self))
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'replace', fill_up)
        with pytest.raises(BuildError, match='No space left on device'):
            device.plan()

    after = device.files()
    assert {name: after[name] for name in before} == before
    open_bundle(device.path, verify_hashes=True)
    device.plan()
    assert len(device.files()) == 6


def test_too_little_room_is_told_before_the_minutes(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(device.path)._replace(free=1000)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)

    with pytest.raises(BuildError, match='has 0 MiB free, a TensorRT plan takes'):
        device.plan()

    assert device.trt.n_built == 0
