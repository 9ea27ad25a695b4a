"""Assembling the embedded default, end to end, from tiny stand-ins for its two packages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import tiny_models
import tiny_nano
import yaml
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tiny_nano import NanoWorkshop

from mobilevlm_ros.build import bundle_build, nano
from mobilevlm_ros.build.nano import build_nano
from mobilevlm_ros.build.parity import read_report
from mobilevlm_ros.build.reference import read_reference
from mobilevlm_ros.errors import BuildError, DependencyError, ParityError
from mobilevlm_ros.paths import shared_file
from mobilevlm_ros.runtime.bundle import DESCRIPTION, open_bundle
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.loading import load_assistant_from
from mobilevlm_ros.runtime.vision.onnxruntime import OnnxRuntimeVision
from mobilevlm_ros.types import Frame, Question

STEPS = ['ingredients', 'language model in', 'language model from', 'adapter', 'one ONNX graph', 'vision tower from']
STEPS += ['reference', 'comparing']
NO_TORCH = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in BLOCKED:
            raise ImportError(f'{name} is blocked')

BLOCKED = {'torch', 'transformers', 'sentencepiece', 'huggingface_hub', 'tokenizers', 'peft', 'timm', 'openvino'}
sys.meta_path.insert(0, Blocker())

from pathlib import Path
from mobilevlm_ros.build import bundle_build, nano

root = Path(sys.argv[1])
nano.shared_file = bundle_build.shared_file = lambda relative: root / relative
bundle = nano.build_nano(root / 'bundle', profile=sys.argv[2], packages=root / 'packages')
assert not BLOCKED & set(sys.modules)
print(bundle.model_id)
"""


def interrupt(workshop: NanoWorkshop, at: str) -> None:
    workshop.interrupt_at = at
    with pytest.raises(KeyboardInterrupt):
        workshop.build()
    workshop.interrupt_at = ''
    workshop.steps.clear()


# -- what is built --------------------------------------------------------------------------------------------------


def test_the_bundle_answers(nano_workshop: NanoWorkshop, photo: NDArray[np.uint8]) -> None:
    bundle = nano_workshop.build()

    assert bundle.model_id.startswith('nano-cpu@')
    assert bundle.warning == 'a stand-in'
    assistant = load_assistant_from(nano_workshop.out)
    assert assistant.ask(Question('what?', max_tokens=4), Frame(photo)).success
    assistant.close()


def test_it_is_what_pytorch_computes(nano_workshop: NanoWorkshop) -> None:
    """The record was made from the same packages, the LoRA merged; the bundle applies it at run time."""
    report = read_report(nano_workshop.build())

    stages = {stage.stage: stage for stage in report.stages}
    assert report.passed
    assert 'PyTorch' in report.reference
    assert stages['vision tower'].worst >= 0.99999
    assert stages['logits'].worst >= 0.99999
    assert stages['logits'].n == 6
    assert stages['prompt'].worst == stages['image to tokens'].worst == 1.0


def test_without_its_adapter_it_is_something_else(nano_workshop: NanoWorkshop) -> None:
    """That the adapter is in the record, and strong enough for the comparison to notice it."""
    tiny_nano.write_adapter(nano_workshop.own / 'adapter.gguf', seed=9)

    with pytest.raises(ParityError, match='logits'):
        nano_workshop.build()


def test_it_is_built_without_pytorch(nano_workshop: NanoWorkshop) -> None:
    arguments = [sys.executable, '-c', NO_TORCH, str(nano_workshop.root), nano_workshop.profile()]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=100, check=False)

    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == nano_workshop.build().model_id


def test_everything_is_hashed(nano_workshop: NanoWorkshop) -> None:
    nano_workshop.build()

    assert open_bundle(nano_workshop.out, verify_hashes=True).size_bytes > 0
    files = {'adapter.gguf', 'language.gguf', 'parity.json', 'reference.npz', 'vision.onnx'}
    assert {path.name for path in nano_workshop.out.iterdir()} == files | {DESCRIPTION}
    assert nano_workshop.leftovers() == []


def test_the_record_travels_in_the_bundle(nano_workshop: NanoWorkshop) -> None:
    bundle = nano_workshop.build()

    assert len(read_reference(bundle.path / 'reference.npz').images) == 3


def test_the_vision_engine_is_close_to_the_weights_before_quantisation(
    nano_workshop: NanoWorkshop, tmp_path: Path
) -> None:
    bundle = nano_workshop.build()
    tiny_models.write_vision(tmp_path / 'exact.onnx', tiny_nano.SHAPE)
    pixels = np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)

    built = OnnxRuntimeVision(bundle.vision_path, 1).encode(pixels, CancelToken())
    exact = OnnxRuntimeVision(tmp_path / 'exact.onnx', 1).encode(pixels, CancelToken())

    assert 0 < np.abs(built - exact).max() < 0.1 * np.abs(exact).max()


def test_the_profile_is_part_of_the_description(nano_workshop: NanoWorkshop) -> None:
    vision = {'backend': 'onnxruntime', 'precision': 'fp32', 'n_threads': 3}
    language = {'quantization': 'Q4_0', 'kv_type': 'f32', 'frame_cache': 7, 'n_ctx': 256}

    bundle = nano_workshop.build(nano_workshop.profile(name='robot', vision=vision, language=language))

    assert bundle.profile == 'robot'
    assert bundle.vision['n_threads'] == 3
    options = bundle.language_options()
    assert (options.kv_type, options.frame_cache, options.n_ctx) == ('f32', 7, 256)
    # The language model is packaged as it is; nano does not quantise it.
    assert bundle.language['quantization'] == 'F32'


def test_vision_in_int8(nano_workshop: NanoWorkshop) -> None:
    vision = {'backend': 'onnxruntime', 'precision': 'int8', 'n_threads': 1}
    limits = {'vision_cosine': 0.95, 'logits_cosine': 0.99999}

    bundle = nano_workshop.build(nano_workshop.profile(vision=vision, parity=limits))

    stages = {stage.stage: stage for stage in read_report(bundle).stages}
    assert 0.95 <= stages['visual tokens'].worst < 0.99999
    # The logits are compared under PyTorch's visual tokens, so they do not depend on it.
    assert stages['logits'].worst >= 0.99999
    names = {path.name for path in bundle.path.iterdir()}
    assert 'vision-fp32.onnx' not in names
    assert bundle.vision['precision'] == 'int8'


def test_an_unknown_profile_is_named_with_those_that_exist(nano_workshop: NanoWorkshop) -> None:
    with pytest.raises(BuildError, match=r"no device profile 'abacus'; the profiles are: cpu"):
        nano_workshop.build('abacus')


# -- building again -------------------------------------------------------------------------------------------------


def test_a_finished_build_is_left_as_it_is(nano_workshop: NanoWorkshop) -> None:
    first = nano_workshop.build()
    written = {path: path.stat().st_mtime_ns for path in nano_workshop.out.iterdir()}
    nano_workshop.steps.clear()

    second = nano_workshop.build()

    assert second.model_id == first.model_id
    assert nano_workshop.steps == ['ingredients', f'nano is built already: {nano_workshop.out}']
    assert {path: path.stat().st_mtime_ns for path in nano_workshop.out.iterdir()} == written


def test_another_manifest_is_another_build(nano_workshop: NanoWorkshop) -> None:
    first = nano_workshop.build()
    nano_workshop.change_manifest(warning='another')

    second = nano_workshop.build()

    assert second.model_id != first.model_id
    assert second.warning == 'another'


def test_another_recipe_is_another_build(nano_workshop: NanoWorkshop, monkeypatch: pytest.MonkeyPatch) -> None:
    nano_workshop.build()
    nano_workshop.steps.clear()
    monkeypatch.setattr(bundle_build, '_RECIPE', -1)

    nano_workshop.build()

    assert any('comparing' in step for step in nano_workshop.steps)


def test_another_projector_than_the_recorded_one_is_refused(nano_workshop: NanoWorkshop) -> None:
    """Whoever trains a projector and forgets to record what PyTorch makes of it."""
    old = nano_workshop.build().model_id
    tiny_nano.write_projector(nano_workshop.projector_path, seed=9)

    with pytest.raises(ParityError, match=r'visual tokens: cosine -?0\.\d+, expected 0.99999'):
        nano_workshop.build()

    assert open_bundle(nano_workshop.out).model_id == old


def test_a_projector_of_another_scale_is_refused(nano_workshop: NanoWorkshop) -> None:
    """The cosine is 1 then."""
    tensors = load_file(nano_workshop.projector_path)
    for name in tensors:
        # ldpnetv2 ends with a convolution over the tokens, added to them.
        if '.mlp.mlp.2.' in name or name.endswith('peg.0.bias'):
            tensors[name] = 2 * tensors[name]
    save_file(tensors, nano_workshop.projector_path)

    with pytest.raises(ParityError, match=r'visual tokens: cosine 1\.0+, expected 0\.99999 \(scale 2\.000[01]'):
        nano_workshop.build()


def test_a_half_written_bundle_is_built_again(nano_workshop: NanoWorkshop) -> None:
    nano_workshop.build()
    (nano_workshop.out / 'language.gguf').write_bytes(b'short')

    nano_workshop.build()

    assert open_bundle(nano_workshop.out).name == 'nano'


def test_the_same_ingredients_give_the_same_bundle(nano_workshop: NanoWorkshop) -> None:
    first = nano_workshop.build().model_id
    shutil.rmtree(nano_workshop.out)

    assert nano_workshop.build().model_id == first


# -- interruptions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('step', STEPS)
def test_an_interrupted_build_leaves_nothing_half_and_the_next_goes_on(nano_workshop: NanoWorkshop, step: str) -> None:
    interrupt(nano_workshop, step)

    nano_workshop.assert_nothing_half()
    nano_workshop.build()
    finished = sum('finished earlier' in step for step in nano_workshop.steps)
    assert finished == {'adapter': 1, 'one ONNX graph': 2, 'vision tower from': 2, 'reference': 3, 'comparing': 4}.get(
        step, 0
    )
    open_bundle(nano_workshop.out, verify_hashes=True)
    assert nano_workshop.leftovers() == []


def test_an_interrupted_rebuild_leaves_the_old_bundle(nano_workshop: NanoWorkshop) -> None:
    old = nano_workshop.build().model_id
    nano_workshop.change_manifest(warning='another')

    interrupt(nano_workshop, 'comparing')

    assert open_bundle(nano_workshop.out).model_id == old
    assert nano_workshop.build().model_id != old


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError(5, 'Input/output error')])
def test_between_the_last_two_renames_the_old_bundle_comes_back(
    nano_workshop: NanoWorkshop, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    old = nano_workshop.build().model_id
    nano_workshop.change_manifest(warning='another')
    rename = Path.rename

    def interrupt(self: Path, target: Path) -> Path:
        if self == nano_workshop.partial:
            raise error
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'rename', interrupt)
        with pytest.raises((KeyboardInterrupt, BuildError)):
            nano_workshop.build()

    assert open_bundle(nano_workshop.out).model_id == old
    assert nano_workshop.leftovers() == [nano_workshop.partial.name]
    assert nano_workshop.build().model_id != old


def test_what_a_killed_build_left_is_not_trusted(nano_workshop: NanoWorkshop) -> None:
    nano_workshop.partial.mkdir(parents=True)
    (nano_workshop.partial / 'vision.onnx').write_bytes(b'half')
    (nano_workshop.partial / '.language').mkdir()
    (nano_workshop.partial / '.language' / 'language.gguf').write_bytes(b'half')

    nano_workshop.build()

    open_bundle(nano_workshop.out, verify_hashes=True)
    assert nano_workshop.leftovers() == []


# -- room and memory ------------------------------------------------------------------------------------------------


def test_too_little_room_is_told_before_the_work(nano_workshop: NanoWorkshop, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(nano_workshop.root)._replace(free=5 << 20)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)

    with pytest.raises(BuildError, match=r'has 5 MiB free, building nano takes \d{3,4} MiB.*--out'):
        nano_workshop.build()

    assert nano_workshop.steps == ['ingredients']
    assert not nano_workshop.partial.exists()


def test_too_little_memory_is_told_before_the_work(
    nano_workshop: NanoWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = psutil.virtual_memory()._replace(available=100 << 20)
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: memory)

    with pytest.raises(BuildError, match='100 MiB of memory are free, building nano takes 1024 MiB'):
        nano_workshop.build()

    assert nano_workshop.steps == ['ingredients']


def test_a_bundle_above_the_memory_of_its_profile_is_refused(nano_workshop: NanoWorkshop) -> None:
    with pytest.raises(BuildError, match=r'would take about \d+ MiB when loaded; the profile allows 64'):
        nano_workshop.build(nano_workshop.profile(memory_mib=64))

    assert not nano_workshop.out.exists()


@pytest.mark.parametrize('full', ['language.gguf', 'parity.json'])
def test_a_disk_that_fills_up_is_told_and_nothing_half_is_left(
    nano_workshop: NanoWorkshop, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    with monkeypatch.context() as patch:
        for method in ('write_bytes', 'write_text'):
            write = getattr(Path, method)

            def fill_up(self: Path, *arguments: object, write: object = write) -> int:
                if self.name == full:
                    raise OSError(28, 'No space left on device', str(self))
                return write(self, *arguments)  # type: ignore[operator]

            patch.setattr(Path, method, fill_up)
        with pytest.raises(BuildError, match=rf'{full}: No space left on device\. Free some space.*--out'):
            nano_workshop.build()

    nano_workshop.assert_nothing_half()
    nano_workshop.build()


def test_a_place_that_cannot_be_written_is_told(nano_workshop: NanoWorkshop) -> None:
    (nano_workshop.root / 'file').write_text('in the way')

    with pytest.raises(BuildError, match=r'cannot make .*file.*--out'):
        build_nano(nano_workshop.root / 'file' / 'bundle', packages=nano_workshop.packages)


def test_a_file_in_the_place_of_the_bundle_is_not_overwritten(nano_workshop: NanoWorkshop) -> None:
    nano_workshop.out.parent.mkdir()
    nano_workshop.out.write_text('precious')

    with pytest.raises(BuildError, match='nano-cpu is there already and no folder'):
        nano_workshop.build()

    assert nano_workshop.out.read_text() == 'precious'
    assert nano_workshop.leftovers() == []


# -- ingredients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['projector.safetensors', 'adapter.gguf', 'reference.npz'])
def test_a_missing_ingredient_of_this_project_is_named(nano_workshop: NanoWorkshop, name: str) -> None:
    (nano_workshop.own / name).unlink()

    with pytest.raises(BuildError, match=rf"{name} is missing \(nano's {name.split('.')[0]}\)"):
        nano_workshop.build()


@pytest.mark.parametrize(
    ('name', 'says'),
    [
        ('projector.safetensors', r'projector\.safetensors is no safetensors file'),
        ('reference.npz', r'reference\.npz is no record of what PyTorch computes'),
    ],
)
def test_a_damaged_ingredient_of_this_project_is_named(nano_workshop: NanoWorkshop, name: str, says: str) -> None:
    (nano_workshop.own / name).write_bytes(b'damaged')

    with pytest.raises(BuildError, match=says):
        nano_workshop.build()

    nano_workshop.assert_nothing_half()


def test_a_projector_without_a_tensor_is_named(nano_workshop: NanoWorkshop) -> None:
    tensors = load_file(nano_workshop.projector_path)
    save_file({name: value for name, value in tensors.items() if 'peg' not in name}, nano_workshop.projector_path)

    with pytest.raises(BuildError, match=r'lack model\.mm_projector\.peg'):
        nano_workshop.build()

    nano_workshop.assert_nothing_half()


@pytest.mark.parametrize('part', ['vision', 'language'])
def test_a_missing_package_is_named(nano_workshop: NanoWorkshop, part: str) -> None:
    nano_workshop.change_manifest(**{part: {'package': 'not-there==9.9'}})

    with pytest.raises(BuildError, match=r'no wheel of not-there==9\.9'):
        nano_workshop.build()

    nano_workshop.assert_nothing_half()


@pytest.mark.parametrize('key', ['wheel_sha256', 'sha256'])
@pytest.mark.parametrize('part', ['vision', 'language'])
def test_a_package_of_another_content_is_refused(nano_workshop: NanoWorkshop, part: str, key: str) -> None:
    nano_workshop.change_manifest(**{part: {key: 'ab' * 32}})

    with pytest.raises(BuildError, match='SHA-256'):
        nano_workshop.build()

    nano_workshop.assert_nothing_half()


@pytest.mark.parametrize(('content', 'reason'), [('{', 'cannot be read'), ('- a\n', 'should hold a mapping')])
def test_a_damaged_manifest_is_told(nano_workshop: NanoWorkshop, content: str, reason: str) -> None:
    nano_workshop.manifest_path.write_text(content)

    with pytest.raises(BuildError, match=rf'manifest\.yaml.*{reason}'):
        nano_workshop.build()


def test_a_missing_library_is_told_before_the_work(
    nano_workshop: NanoWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nano.importlib.util, 'find_spec', lambda name: None if name == 'onnx' else object())

    with pytest.raises(DependencyError, match=r'pip install onnx$'):
        nano_workshop.build()

    assert nano_workshop.steps == []


# -- what is shipped ------------------------------------------------------------------------------------------------


def test_the_shipped_manifest_describes_a_bundle() -> None:
    """The real one, checked without downloading: its sizes fit each other and its pins are whole."""
    manifest = yaml.safe_load(shared_file('models/nano/manifest.yaml').read_text())

    for part in ('vision', 'language'):
        assert len(bytes.fromhex(manifest[part]['wheel_sha256'])) == 32
        assert len(bytes.fromhex(manifest[part]['sha256'])) == 32
        assert manifest[part]['package'].count('==') == 1
    projector = load_file(shared_file('models/nano') / manifest['projector']['file'])
    n_used = 1 + len(manifest['vision']['also_layers'])
    width, n_embd = n_used * manifest['vision']['width'], manifest['language']['n_embd']
    assert projector['model.mm_projector.mlp.mlp.0.weight'].shape == (n_embd, width)
    assert projector['model.mm_projector.peg.peg.0.weight'].shape == (n_embd, 1, 3, 3)
    vision = manifest['vision']
    assert (vision['n_blocks'], vision['also_layers'], vision['select_layer']) == (12, [-12], -2)
    # SmolLM2-135M: 30 layers, 3 heads of 64 for keys and for values, two bytes each.
    assert manifest['language']['kv_bytes_per_token'] == 30 * 3 * 64 * 2 * 2
    assert 'MobileVLM' not in json.dumps(manifest['name'])
    assert manifest['warning']


def test_the_shipped_record_belongs_to_the_shipped_manifest() -> None:
    manifest = yaml.safe_load(shared_file('models/nano/manifest.yaml').read_text())
    reference = read_reference(shared_file('models/nano/reference.npz'))

    vision = manifest['vision']
    grid = vision['image_size'] // vision['patch_size']
    assert len(reference.images) == 3
    assert reference.images[0].features is not None
    assert reference.images[0].features.shape == (grid**2, (1 + len(vision['also_layers'])) * vision['width'])
    for image in reference.images:
        assert image.resized_chw.shape == (3, vision['image_size'], vision['image_size'])
        assert image.visual_tokens.shape[1] == manifest['language']['n_embd']
        assert len(image.answers) == 2
