"""Assembling the embedded default, end to end, from tiny stand-ins for its two packages."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import yaml
from numpy.typing import NDArray
from quantized_tower import write_quantized_tower
from safetensors.numpy import save_file

from mobilevlm_ros.build import nano
from mobilevlm_ros.build.nano import build_nano
from mobilevlm_ros.errors import BuildError, DependencyError
from mobilevlm_ros.paths import shared_file
from mobilevlm_ros.runtime.bundle import DESCRIPTION, open_bundle, sha256_of
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.loading import load_assistant_from
from mobilevlm_ros.runtime.vision.onnxruntime import OnnxRuntimeVision
from mobilevlm_ros.types import Frame, Question

SHAPE = tiny_models.TINY_VISION


class Workshop:
    """A folder with manifest, profile, projector and the two packages."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.packages = root / 'packages'
        self.out = root / 'bundles' / 'nano-cpu'
        self.steps: list[str] = []

    @property
    def manifest_path(self) -> Path:
        return self.root / 'models' / 'nano' / 'manifest.yaml'

    @property
    def projector_path(self) -> Path:
        return self.manifest_path.with_name('projector.safetensors')

    def change_manifest(self, **changes: Any) -> None:
        manifest = yaml.safe_load(self.manifest_path.read_text())
        for part, value in changes.items():
            if isinstance(value, dict):
                manifest[part].update(value)
            else:
                manifest[part] = value
        self.manifest_path.write_text(yaml.safe_dump(manifest))

    def build(self, **options: Any) -> Any:
        return build_nano(self.out, packages=self.packages, on_step=self.steps.append, **options)

    def leftovers(self) -> list[str]:
        """What lies beside the bundle."""
        parent = self.out.parent
        return sorted(path.name for path in parent.iterdir() if path != self.out) if parent.is_dir() else []


def write_package(folder: Path, name: str, member: str, content: bytes) -> dict[str, str]:
    """A wheel with one file; returns its entries of a manifest."""
    wheel = folder / f'{name}-1.0-py3-none-any.whl'
    with zipfile.ZipFile(wheel, 'w') as archive:
        archive.writestr(member, content)
    return {
        'package': f'{name}==1.0',
        'wheel_sha256': sha256_of(wheel),
        'member': member,
        'sha256': hashlib.sha256(content).hexdigest(),
    }


@pytest.fixture(scope='module')
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once; every test gets a copy."""
    root = tmp_path_factory.mktemp('workshop')
    packages, models, engines = root / 'packages', root / 'models' / 'nano', root / 'engines'
    for folder in (packages, models, engines):
        folder.mkdir(parents=True)
    weights = tiny_models.vision_weights()
    write_quantized_tower(root / 'tower.onnx', weights)
    tiny_models.write_gguf(root / 'language.gguf')
    projector = {name: value for name, value in weights.items() if name.startswith('model.mm_projector.')}
    save_file(projector, models / 'projector.safetensors')
    shutil.copy(shared_file('engines/cpu.yaml'), engines / 'cpu.yaml')
    sizes = {key: getattr(SHAPE, key) for key in ('image_size', 'patch_size', 'width', 'n_heads', 'mlp_width')}
    manifest = {
        'name': 'nano',
        'warning': 'a stand-in',
        'vision': {
            **write_package(packages, 'tiny_eyes', 'tiny_eyes/tower.onnx', (root / 'tower.onnx').read_bytes()),
            **sizes,
            'n_blocks': SHAPE.n_run_blocks,
            'aspect': 'pad',
        },
        'projector': {'file': 'projector.safetensors', 'type': 'ldpnetv2'},
        'language': {
            **write_package(packages, 'tiny_words', 'tiny_words/model.gguf', (root / 'language.gguf').read_bytes()),
            'quantization': 'F32',
            'n_embd': tiny_models.TinyLlama.n_embd,
            'n_ctx': 512,
        },
        'prompt': {'template': 'v1'},
    }
    (models / 'manifest.yaml').write_text(yaml.safe_dump(manifest))
    return root


@pytest.fixture
def workshop(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    root = Path(shutil.copytree(template, tmp_path / 'workshop'))
    monkeypatch.setattr(nano, 'shared_file', lambda relative: root / relative)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return Workshop(root)


def test_the_bundle_answers(workshop: Workshop, photo: NDArray[np.uint8]) -> None:
    bundle = workshop.build()

    assert bundle.model_id.startswith('nano-cpu@')
    assert bundle.warning == 'a stand-in'
    assistant = load_assistant_from(workshop.out)
    assert assistant.ask(Question('what?', max_tokens=4), Frame(photo)).success
    assistant.close()


def test_everything_is_hashed(workshop: Workshop) -> None:
    workshop.build()

    assert open_bundle(workshop.out, verify_hashes=True).size_bytes > 0
    assert sorted(path.name for path in workshop.out.iterdir()) == [DESCRIPTION, 'language.gguf', 'vision.onnx']
    assert workshop.leftovers() == []


def test_the_vision_engine_is_close_to_the_weights_before_quantisation(workshop: Workshop, tmp_path: Path) -> None:
    bundle = workshop.build()
    tiny_models.write_vision(tmp_path / 'exact.onnx')
    pixels = np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)

    built = OnnxRuntimeVision(bundle.vision_path, 1).encode(pixels, CancelToken())
    exact = OnnxRuntimeVision(tmp_path / 'exact.onnx', 1).encode(pixels, CancelToken())

    assert 0 < np.abs(built - exact).max() < 0.1 * np.abs(exact).max()


def test_the_profile_is_part_of_the_description(workshop: Workshop) -> None:
    profile = {'name': 'robot', 'vision': {'backend': 'onnxruntime', 'precision': 'fp32', 'n_threads': 3}}
    profile['language'] = {'kv_type': 'f32', 'frame_cache': 7}
    (workshop.root / 'engines' / 'robot.yaml').write_text(yaml.safe_dump(profile))

    bundle = workshop.build(profile='robot')

    assert bundle.profile == 'robot'
    assert bundle.vision['n_threads'] == 3
    assert (bundle.language_options().kv_type, bundle.language_options().frame_cache) == ('f32', 7)


def test_an_unknown_profile_is_named_with_those_that_exist(workshop: Workshop) -> None:
    with pytest.raises(BuildError, match="no device profile 'abacus'; the profiles are: cpu"):
        workshop.build(profile='abacus')


def test_an_adapter_becomes_part_of_the_bundle(workshop: Workshop) -> None:
    workshop.manifest_path.with_name('adapter.gguf').write_bytes(b'an adapter')
    workshop.change_manifest(language={'adapter': 'adapter.gguf'})

    bundle = workshop.build()

    assert bundle.adapter_path is not None
    assert bundle.adapter_path.read_bytes() == b'an adapter'


def test_a_finished_build_is_left_as_it_is(workshop: Workshop) -> None:
    first = workshop.build()
    written = {path: path.stat().st_mtime_ns for path in workshop.out.iterdir()}
    workshop.steps.clear()

    second = workshop.build()

    assert second.model_id == first.model_id
    assert workshop.steps == [f'nano is built already: {workshop.out}']
    assert {path: path.stat().st_mtime_ns for path in workshop.out.iterdir()} == written


def test_another_projector_is_another_build(workshop: Workshop) -> None:
    first = workshop.build()
    weights = tiny_models.vision_weights(seed=9)
    save_file({k: v for k, v in weights.items() if k.startswith('model.mm_projector.')}, workshop.projector_path)

    second = workshop.build()

    assert second.model_id != first.model_id
    assert second.description['files']['vision.onnx'] != first.description['files']['vision.onnx']


def test_another_recipe_is_another_build(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.build()
    workshop.steps.clear()
    monkeypatch.setattr(nano, '_RECIPE', -1)

    workshop.build()

    assert 'checking' in workshop.steps


def test_a_half_written_bundle_is_built_again(workshop: Workshop) -> None:
    workshop.build()
    (workshop.out / 'language.gguf').write_bytes(b'short')

    workshop.build()

    assert open_bundle(workshop.out).name == 'nano'


def test_the_same_ingredients_give_the_same_bundle(workshop: Workshop) -> None:
    first = workshop.build().model_id
    shutil.rmtree(workshop.out)

    assert workshop.build().model_id == first


@pytest.mark.parametrize('step', ['language model', 'vision tower from', 'one ONNX graph', 'checking'])
def test_an_interrupted_build_leaves_nothing(workshop: Workshop, step: str) -> None:
    def interrupt(text: str) -> None:
        if step in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_nano(workshop.out, packages=workshop.packages, on_step=interrupt)

    assert not workshop.out.exists()
    assert workshop.leftovers() == []


def test_an_interrupted_rebuild_leaves_the_old_bundle(workshop: Workshop) -> None:
    old = workshop.build().model_id
    workshop.change_manifest(warning='another')

    def interrupt(text: str) -> None:
        if text == 'checking':
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_nano(workshop.out, packages=workshop.packages, on_step=interrupt)

    assert open_bundle(workshop.out).model_id == old
    assert workshop.leftovers() == []


def test_what_a_killed_build_left_is_cleared_away(workshop: Workshop) -> None:
    partial = workshop.out.with_name('nano-cpu.partial')
    partial.mkdir(parents=True)
    (partial / 'vision.onnx').write_bytes(b'half')

    workshop.build()

    assert open_bundle(workshop.out).name == 'nano'
    assert workshop.leftovers() == []


def test_too_little_room_is_told_before_the_work(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(workshop.root)._replace(free=5 << 20)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)

    with pytest.raises(BuildError, match='has 5 MiB free, building nano takes 1024 MiB'):
        workshop.build()

    assert workshop.steps == []


def test_a_disk_that_fills_up_is_told_and_nothing_left(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def fill_up(self: Path, data: bytes) -> int:
        if self.name == 'vision.onnx':
            raise OSError(28, 'No space left on device', str(self))
        return write(self, data)

    monkeypatch.setattr(Path, 'write_bytes', fill_up)

    with pytest.raises(BuildError, match=r'vision\.onnx: No space left on device\. Free some space'):
        workshop.build()

    assert not workshop.out.exists()
    assert workshop.leftovers() == []


def test_a_place_that_cannot_be_written_is_told(workshop: Workshop) -> None:
    (workshop.root / 'file').write_text('in the way')

    with pytest.raises(BuildError, match=r'cannot write to .*file'):
        build_nano(workshop.root / 'file' / 'bundle', packages=workshop.packages)


def test_a_file_in_the_place_of_the_bundle_is_not_overwritten(workshop: Workshop) -> None:
    workshop.out.parent.mkdir()
    workshop.out.write_text('precious')

    with pytest.raises(BuildError, match='nano-cpu'):
        workshop.build()

    assert workshop.out.read_text() == 'precious'
    assert workshop.leftovers() == []


def test_a_missing_projector_is_named(workshop: Workshop) -> None:
    workshop.projector_path.unlink()

    with pytest.raises(BuildError, match=r"projector\.safetensors is missing \(nano's projector\)"):
        workshop.build()


def test_a_damaged_projector_is_named(workshop: Workshop) -> None:
    workshop.projector_path.write_bytes(b'damaged')

    with pytest.raises(BuildError, match=r'projector\.safetensors is no safetensors file'):
        workshop.build()


def test_a_projector_without_a_tensor_is_named(workshop: Workshop) -> None:
    weights = tiny_models.vision_weights()
    tensors = {k: v for k, v in weights.items() if k.startswith('model.mm_projector.') and 'peg' not in k}
    save_file(tensors, workshop.projector_path)

    with pytest.raises(BuildError, match=r'lack model\.mm_projector\.peg'):
        workshop.build()

    assert workshop.leftovers() == []


@pytest.mark.parametrize('part', ['vision', 'language'])
def test_a_missing_package_is_named(workshop: Workshop, part: str) -> None:
    workshop.change_manifest(**{part: {'package': 'not-there==9.9'}})

    with pytest.raises(BuildError, match=r'no wheel of not-there==9\.9'):
        workshop.build()

    assert not workshop.out.exists()


@pytest.mark.parametrize('key', ['wheel_sha256', 'sha256'])
def test_a_package_of_another_content_is_refused(workshop: Workshop, key: str) -> None:
    workshop.change_manifest(language={key: 'ab' * 32})

    with pytest.raises(BuildError, match='SHA-256'):
        workshop.build()

    assert not workshop.out.exists()


@pytest.mark.parametrize(('content', 'reason'), [('{', 'is not YAML'), ('- a\n', 'should hold a mapping')])
def test_a_damaged_manifest_is_told(workshop: Workshop, content: str, reason: str) -> None:
    workshop.manifest_path.write_text(content)

    with pytest.raises(BuildError, match=reason):
        workshop.build()


def test_the_shipped_manifest_describes_a_bundle() -> None:
    """The real one, checked without downloading: its sizes fit each other and its pins are whole."""
    manifest = yaml.safe_load(shared_file('models/nano/manifest.yaml').read_text())

    for part in ('vision', 'language'):
        assert len(bytes.fromhex(manifest[part]['wheel_sha256'])) == 32
        assert len(bytes.fromhex(manifest[part]['sha256'])) == 32
        assert manifest[part]['package'].count('==') == 1
    from safetensors.numpy import load_file

    projector = load_file(shared_file('models/nano') / manifest['projector']['file'])
    width, n_embd = manifest['vision']['width'], manifest['language']['n_embd']
    assert projector['model.mm_projector.mlp.mlp.0.weight'].shape == (n_embd, width)
    assert projector['model.mm_projector.peg.peg.0.weight'].shape == (n_embd, 1, 3, 3)
    assert 'MobileVLM' not in json.dumps(manifest['name'])
    assert manifest['warning']


def test_a_missing_library_is_told_before_the_work(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nano.importlib.util, 'find_spec', lambda name: None if name == 'onnx' else object())
    with pytest.raises(DependencyError, match=r'pip install onnx$'):
        workshop.build()
    assert workshop.steps == []
