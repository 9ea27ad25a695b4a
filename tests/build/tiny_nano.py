"""All that nano is made of, in small: manifest, projector, adapter, two packages, images, and PyTorch's record.

The language model has what SmolLM2 has: a byte-level vocabulary with ChatML's tokens, grouped heads, tied embeddings,
and a LoRA beside it.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import yaml
from PIL import Image
from quantized_tower import write_quantized_tower
from safetensors.numpy import save_file
from tokenizers.pre_tokenizers import ByteLevel

from mobilevlm_ros.build.gguf_file import TensorEntry, write_gguf
from mobilevlm_ros.build.language_gguf import write_language_gguf
from mobilevlm_ros.build.llama_tensors import language_tensors
from mobilevlm_ros.build.nano import build_nano
from mobilevlm_ros.build.tokenizer_parts import CONTROL, NORMAL
from mobilevlm_ros.build.vocabulary import Vocabulary
from mobilevlm_ros.model.config import LanguageConfig
from mobilevlm_ros.runtime.bundle import Bundle, sha256_of

SHAPE = replace(tiny_models.TINY_VISION, also_layers=(-4,))
WORDS = ('user', 'assistant', 'picture', 'Ġpicture', 'Ġthe', 'Ġperson', 'What', 'Ġword')
SPECIALS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
RANK = 4


def vocabulary() -> Vocabulary:
    """Three control tokens, 256 bytes, and a few words with every beginning that merging needs."""
    tokens = [*SPECIALS, *sorted(ByteLevel.alphabet())]
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append(f'{word[: end - 1]} {word[end - 1]}')
    types = [CONTROL] * len(SPECIALS) + [NORMAL] * (len(tokens) - len(SPECIALS))
    return Vocabulary(
        'gpt2',
        [token.encode() for token in tokens],
        [0.0] * len(tokens),
        types,
        bos=1,
        eos=2,
        padding=2,
        unknown=0,
        add_bos=False,
        merges=merges,
        splitter='smollm',
    )


LANGUAGE = LanguageConfig(
    n_vocab=len(vocabulary().tokens),
    n_embd=tiny_models.TinyLlama.n_embd,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    n_ff=96,
    n_ctx=512,
    rope_base=100000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
)


def write_language(path: Path) -> None:
    """The language model in float32."""
    random = np.random.default_rng(3)
    weights = {}
    for tensor in language_tensors(LANGUAGE):
        is_vector = len(tensor.shape) == 1
        scale = 0.2 if is_vector else 1.5 * tensor.shape[-1] ** -0.5
        weights[tensor.source] = (random.normal(float(is_vector), scale, tensor.shape)).astype(np.float32)
    write_language_gguf(weights, LANGUAGE, vocabulary(), path, dtype='f32', name='tiny words')


def write_adapter(path: Path, seed: int = 4) -> None:
    """A LoRA on every matrix of the layers, strong enough to be noticed."""
    random = np.random.default_rng(seed)
    entries = []
    for tensor in language_tensors(LANGUAGE):
        if '.layers.' not in tensor.source or len(tensor.shape) != 2:
            continue
        n_out, n_in = tensor.shape
        for suffix, shape, scale in (('a', (RANK, n_in), n_in**-0.5), ('b', (n_out, RANK), 0.3)):
            values = random.normal(0, scale, shape).astype(np.float32)
            entries.append(TensorEntry(f'{tensor.name}.lora_{suffix}', shape, 'f32', lambda values=values: values))

    def add_metadata(writer: Any) -> None:
        writer.add_type('adapter')
        writer.add_string('adapter.type', 'lora')
        writer.add_float32('adapter.lora.alpha', 8.0)

    write_gguf(path, 'llama', add_metadata, entries)


def write_projector(path: Path, seed: int = 0) -> None:
    """The projector of a seed."""
    weights = tiny_models.vision_weights(SHAPE, seed=seed)
    save_file({name: value for name, value in weights.items() if name.startswith('model.mm_projector.')}, path)


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


def write_all(root: Path) -> None:
    """Everything but the record: packages/, models/nano/ and models/calibration/."""
    packages, models, images = root / 'packages', root / 'models' / 'nano', root / 'models' / 'calibration'
    for folder in (packages, models, images):
        folder.mkdir(parents=True)
    write_quantized_tower(root / 'tower.onnx', tiny_models.vision_weights(SHAPE))
    write_language(root / 'language.gguf')
    write_projector(models / 'projector.safetensors')
    write_adapter(models / 'adapter.gguf')
    random = np.random.default_rng(5)
    for index, (height, width) in enumerate(((48, 64), (40, 40), (64, 33))):
        coarse = random.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(images / f'{index}.png')
    sizes = ('image_size', 'patch_size', 'width', 'n_heads', 'n_blocks', 'mlp_width', 'select_layer')
    manifest = {
        'name': 'nano',
        'warning': 'a stand-in',
        'vision': {
            **write_package(packages, 'tiny_eyes', 'tiny_eyes/tower.onnx', (root / 'tower.onnx').read_bytes()),
            **{size: getattr(SHAPE, size) for size in sizes},
            'also_layers': list(SHAPE.also_layers),
            'aspect': 'pad',
        },
        'projector': {'file': 'projector.safetensors', 'type': 'ldpnetv2'},
        'language': {
            **write_package(packages, 'tiny_words', 'tiny_words/model.gguf', (root / 'language.gguf').read_bytes()),
            'quantization': 'F32',
            'n_embd': LANGUAGE.n_embd,
            'n_ctx': LANGUAGE.n_ctx,
            'kv_bytes_per_token': 4 * LANGUAGE.n_layers * LANGUAGE.n_kv_heads * LANGUAGE.head_width,
            'adapter': 'adapter.gguf',
        },
        'prompt': {'template': 'chatml', 'system': ''},
    }
    (models / 'manifest.yaml').write_text(yaml.safe_dump(manifest))


class NanoWorkshop:
    """A copy of all this, and a place for the bundle; remembers what it is told while it is built."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.packages = root / 'packages'
        self.out = root / 'bundles' / 'nano-cpu'
        self.partial = self.out.with_name('nano-cpu.partial')
        self.own = root / 'models' / 'nano'
        self.manifest_path = self.own / 'manifest.yaml'
        self.projector_path = self.own / 'projector.safetensors'
        self.steps: list[str] = []
        self.interrupt_at = ''

    def step(self, text: str) -> None:
        """Remember it, and press Ctrl-C where that was asked for."""
        self.steps.append(text)
        if self.interrupt_at and self.interrupt_at in text:
            raise KeyboardInterrupt

    def progress(self, done: float, total: float) -> None:
        """Nothing."""

    def change_manifest(self, **changes: Any) -> None:
        """Change parts of the manifest, or its own entries."""
        manifest = yaml.safe_load(self.manifest_path.read_text())
        for part, value in changes.items():
            if isinstance(value, dict):
                manifest[part].update(value)
            else:
                manifest[part] = value
        self.manifest_path.write_text(yaml.safe_dump(manifest))

    def profile(self, **changes: Any) -> str:
        """The path of a profile that computes exactly, on one thread; ``changes`` are its keys."""
        path = self.root / 'one-thread.yaml'
        content = {
            'name': 'cpu',
            'device': 'tests',
            'vision': {'backend': 'onnxruntime', 'precision': 'fp32', 'n_threads': 1},
            'language': {'quantization': 'Q4_K_S', 'kv_type': 'f32', 'n_threads': 1, 'n_threads_batch': 1},
            'parity': {'logits_cosine': 0.99999},
        }
        path.write_text(yaml.safe_dump({**content, **changes}))
        return str(path)

    def build(self, profile: str = '') -> Bundle:
        """Build it."""
        return build_nano(self.out, profile=profile or self.profile(), packages=self.packages, reporter=self)

    def leftovers(self) -> list[str]:
        """What lies beside the bundle."""
        parent = self.out.parent
        return sorted(path.name for path in parent.iterdir() if path != self.out) if parent.is_dir() else []

    def assert_nothing_half(self) -> None:
        """No bundle, and in the work folder only whole files that are noted, or nothing of a stage that did not end."""
        assert not self.out.exists()
        assert self.leftovers() in ([], [self.partial.name])
        found = {path.name: path.stat().st_size for path in self.partial.glob('*')}
        notes = json.loads((self.partial / 'stages.json').read_text()) if found.pop('stages.json', 0) else {}
        assert found == {name: size for note in notes.values() for name, size in note['bytes'].items()}
