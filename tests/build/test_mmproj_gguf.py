"""The mmproj export: llama.cpp loads it, computes from it what it is known to compute, and that is not the model."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
from numpy.typing import NDArray

from mobilevlm_ros.build.mmproj_gguf import DEFECTS, mmproj_entries, write_mmproj_gguf
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.model.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from mobilevlm_ros.model.layout import PROJECTOR_PREFIX, projector_tensors, tower_tensors
from mobilevlm_ros.runtime.language.llamacpp_library import load_library

# llama.cpp's graphs of LDP and LDPv2 have 24 patches a side as a constant.
VISION = VisionConfig('tiny', image_size=96, patch_size=4, width=64, n_heads=4, n_blocks=4, mlp_width=128)
N_EMBD = tiny_models.TinyLlama.n_embd
PROJECTORS = ['ldpnet', 'ldpnetv2', 'mlp2x_gelu']
IMAGE_CHUNK = 1

Weights = dict[str, NDArray[np.float32]]
Encoder = Callable[[Path], NDArray[np.float32]]


def model_config(projector: str = 'ldpnetv2', vision: VisionConfig = VISION) -> ModelConfig:
    language = LanguageConfig(n_embd=N_EMBD, n_heads=4, n_kv_heads=4)
    return ModelConfig('tiny', language, vision, ProjectorConfig(projector))


def random_weights(config: ModelConfig) -> Weights:
    assert config.vision is not None
    assert config.projector is not None
    random = np.random.default_rng(21)
    projector = projector_tensors(config.projector, config.vision.width, N_EMBD)
    weights = {}
    for key, shape in [*tower_tensors(config.vision), *((PROJECTOR_PREFIX + key, shape) for key, shape in projector)]:
        n_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        is_gain = len(shape) == 1 and key.endswith('weight')
        scale = 1.5 * n_in**-0.5 if len(shape) > 1 else 0.2
        weights[key] = random.normal(float(is_gain), scale, shape).astype(np.float32)
    weights['vision_model.embeddings.position_embedding.weight'] *= 3
    return weights


def photo() -> NDArray[np.uint8]:
    """A picture of the tower's size, so that nothing is resized, uint8 ``[96, 96, 3]``."""
    ys, xs = np.mgrid[0:96, 0:96]
    noise = np.random.default_rng(22).integers(0, 60, (96, 96))
    return (
        np.stack((xs * 2 + noise // 2, ys * 2 + noise, (xs * ys) % 200 + noise // 2), axis=-1)
        .clip(0, 255)
        .astype(np.uint8)
    )


# -- what it should be, and what llama.cpp makes of it -------------------------------------------------------------


def computed(
    config: ModelConfig, weights: Weights, class_token: str = 'first', n_blocks: int = 3
) -> NDArray[np.float32]:
    """Visual tokens ``[n, n_embd]`` by PyTorch.

    :param class_token: ``first`` is the model; ``last`` is what llama.cpp does: positions and rows are numbered as if
        it were the first all the same.
    """
    torch = pytest.importorskip('torch', reason='needs torch and transformers as references: make venv-dev')
    pytest.importorskip('transformers')
    from mobilevlm_ros.model.projectors import build_projector
    from mobilevlm_ros.model.towers import ClipTower

    assert config.vision is not None
    assert config.projector is not None
    as_torch = {name: torch.from_numpy(value) for name, value in weights.items()}
    tower = ClipTower(config.vision).eval()
    tower.load_state_dict({n: v for n, v in as_torch.items() if n.startswith('vision_model.')}, strict=False)
    projector = build_projector(config.projector, config.vision.width, N_EMBD).eval()
    projector.load_state_dict(
        {n.removeprefix(PROJECTOR_PREFIX): v for n, v in as_torch.items() if n.startswith(PROJECTOR_PREFIX)}
    )
    inner = tower.vision_model
    pixels = (photo().astype(np.float32) / 255 - np.float32(VISION.mean)) / np.float32(VISION.std)
    with torch.no_grad():
        patches = inner.embeddings.patch_embedding(torch.from_numpy(pixels.transpose(2, 0, 1)[None]))
        patches = patches.flatten(2).transpose(1, 2)
        token = inner.embeddings.class_embedding[None, None]
        sequence = torch.cat([token, patches] if class_token == 'first' else [patches, token], dim=1)
        x = inner.pre_layrnorm(sequence + inner.embeddings.position_embedding.weight)
        for block in islice(inner.encoder.layers, n_blocks):
            x = block(x, attention_mask=None)
        tokens: NDArray[np.float32] = projector(x[:, 1:])[0].numpy()
    return tokens


@pytest.fixture(scope='module')
def encode(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encoder]:
    """Encodes the picture with llama.cpp's own vision encoder, given an mmproj file."""
    lib = load_library()
    mtmd = pytest.importorskip(
        'llama_cpp.mtmd_cpp', reason='llama-cpp-python was built without mtmd (-DLLAVA_BUILD=OFF)', exc_type=Exception
    )
    with ExitStack() as stack:
        quiet = lib.llama_log_callback(lambda level, text, data: None)
        mtmd.mtmd_log_set(quiet, None)
        language = tmp_path_factory.mktemp('language') / 'tiny.gguf'
        tiny_models.write_gguf(language)
        model = lib.llama_model_load_from_file(os.fsencode(language), lib.llama_model_default_params())
        stack.callback(lib.llama_model_free, model)

        def run(mmproj: Path) -> NDArray[np.float32]:
            with ExitStack() as own:
                params = mtmd.mtmd_context_params_default()
                params.n_threads, params.use_gpu, params.warmup, params.print_timings = 1, False, False, False
                context = mtmd.mtmd_init_from_file(os.fsencode(mmproj), model, params)
                assert context, 'llama.cpp refuses the file'
                own.callback(mtmd.mtmd_free, context)
                rgb = np.ascontiguousarray(photo())
                bitmap = mtmd.mtmd_bitmap_init(96, 96, rgb.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
                own.callback(mtmd.mtmd_bitmap_free, bitmap)
                marker = mtmd.mtmd_default_marker()
                # Without its length the text counts as empty.
                text = mtmd.mtmd_input_text(text=marker, text_len=len(marker), add_special=True, parse_special=True)
                chunks = mtmd.mtmd_input_chunks_init()
                own.callback(mtmd.mtmd_input_chunks_free, chunks)
                bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
                assert mtmd.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1) == 0
                found = [mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks))]
                (chunk,) = [one for one in found if mtmd.mtmd_input_chunk_get_type(one) == IMAGE_CHUNK]
                assert mtmd.mtmd_encode_chunk(context, chunk) == 0
                n_tokens = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
                rows = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), (n_tokens, N_EMBD))
                return np.array(rows)

        yield run


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Mean cosine of rows."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)))


@pytest.mark.parametrize('projector', PROJECTORS)
@pytest.mark.parametrize('dtype', ['f16', 'f32'])
def test_llama_cpp_computes_it_with_the_class_token_last(
    projector: str, dtype: Any, encode: Encoder, tmp_path: Path
) -> None:
    """The known defect, held so that its repair is noticed: then ``DEFECTS`` is to be changed."""
    config = model_config(projector)
    weights = random_weights(config)
    write_mmproj_gguf(weights, config, tmp_path / 'mmproj.gguf', dtype=dtype)

    found = encode(tmp_path / 'mmproj.gguf')

    assert found.shape == (config.n_visual_tokens, N_EMBD)
    assert cosine(found, computed(config, weights, 'last')) > 0.999
    assert cosine(found, computed(config, weights)) < 0.99
    assert 'class token' in DEFECTS


def test_without_the_key_of_the_last_layer_a_block_is_missing(encode: Encoder, tmp_path: Path) -> None:
    config = model_config()
    weights = random_weights(config)
    write_mmproj_gguf(weights, config, tmp_path / 'mmproj.gguf')
    whole = (tmp_path / 'mmproj.gguf').read_bytes()
    assert whole.count(b'clip.vision.feature_layer') == 1
    (tmp_path / 'short.gguf').write_bytes(whole.replace(b'clip.vision.feature_layer', b'clip.vision.feature_lay__'))

    found = encode(tmp_path / 'short.gguf')

    assert cosine(found, computed(config, weights, 'last', n_blocks=2)) > 0.999
    assert cosine(found, computed(config, weights, 'last')) < 0.99


# -- what stands in the file --------------------------------------------------------------------------------------


def test_the_keys_are_those_of_the_legacy_converter(tmp_path: Path) -> None:
    config = model_config()

    write_mmproj_gguf(random_weights(config), config, tmp_path / 'mmproj.gguf')

    fields = gguf.GGUFReader(tmp_path / 'mmproj.gguf').fields
    found = {name: field.contents() for name, field in fields.items() if not name.startswith('GGUF.')}
    assert found.pop('clip.vision.image_mean') == pytest.approx(VISION.mean)
    assert found.pop('clip.vision.image_std') == pytest.approx(VISION.std)
    assert found.pop('clip.vision.attention.layer_norm_epsilon') == pytest.approx(1e-5)
    assert found == {
        'general.architecture': 'clip',
        'clip.has_text_encoder': False,
        'clip.has_vision_encoder': True,
        'clip.has_llava_projector': True,
        'general.file_type': 1,
        'general.name': 'tiny',
        'general.description': 'image encoder for LLaVA',
        'clip.projector_type': 'ldpv2',
        'clip.vision.image_size': 96,
        'clip.vision.patch_size': 4,
        'clip.vision.embedding_length': 64,
        'clip.vision.feed_forward_length': 128,
        'clip.vision.projection_dim': 768,
        'clip.vision.attention.head_count': 4,
        'clip.vision.block_count': 3,
        'clip.vision.feature_layer': [3],
        'clip.use_gelu': False,
    }
    assert len(found) + 3 == 20


@pytest.mark.parametrize(
    ('projector', 'types', 'published_bytes'),
    [
        ('ldpnet', {'f32': 247, 'f16': 150}, 620_384_896),
        ('ldpnetv2', {'f32': 236, 'f16': 143}, 595_103_072),
    ],
)
def test_published_sizes_have_the_published_tensors(
    projector: str, types: dict[str, int], published_bytes: int
) -> None:
    config = ModelConfig('published', LanguageConfig(), VisionConfig('openai'), ProjectorConfig(projector))

    entries = list(mmproj_entries({}, config, 'f16'))

    assert Counter(entry.storage for entry in entries) == types
    header = sum(8 + len(entry.name) + 4 + 8 * len(entry.shape) + 12 for entry in entries)
    data = sum(-(-entry.n_bytes // 32) * 32 for entry in entries)
    # The rest is what 19 keys take.
    assert 800 < published_bytes - header - data < 1000


def test_names_shapes_and_types_are_the_legacy_ones(tmp_path: Path) -> None:
    config = model_config('ldpnet')

    write_mmproj_gguf(random_weights(config), config, tmp_path / 'mmproj.gguf')

    found = {
        tensor.name: (tensor.shape.tolist(), tensor.tensor_type.name)
        for tensor in gguf.GGUFReader(tmp_path / 'mmproj.gguf').tensors
    }
    assert found['v.class_embd'] == ([64], 'F32')
    assert found['v.patch_embd.weight'] == ([4, 4, 3, 64], 'F16')
    assert found['v.position_embd.weight'] == ([64, 577], 'F16')
    assert found['v.pre_ln.bias'] == ([64], 'F32')
    assert found['v.blk.2.ffn_down.weight'] == ([64, 128], 'F16')
    assert found['v.blk.2.ffn_up.bias'] == ([64], 'F32')
    assert found['mm.model.mlp.3.weight'] == ([64, 64], 'F16')
    assert found['mm.model.mb_block.1.block.0.0.weight'] == ([3, 3, 64], 'F16')
    assert found['mm.model.mb_block.2.block.1.fc1.weight'] == ([64, 16], 'F16')
    assert found['mm.model.mb_block.2.block.2.1.bias'] == ([64], 'F32')
    assert not [name for name in found if name.startswith(('v.blk.3', 'v.post'))]
    v2 = {entry.name for entry in mmproj_entries({}, model_config(), 'f16') if entry.name.startswith('mm.')}
    assert v2 == {f'mm.model.{n}.{w}' for n in ('mlp.0', 'mlp.2', 'peg.0') for w in ('weight', 'bias')}


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (ModelConfig('words'), 'words is a language model alone'),
        (model_config('linear'), 'no projector linear; it has mlp2x_gelu'),
        (model_config('mlp3x_gelu'), 'no projector mlp3x_gelu'),
        (model_config('pw2_dw1_dws2'), 'no projector pw2_dw1_dws2'),
        (model_config(vision=VisionConfig('b16', image_size=224, patch_size=16)), r'14 patches a side.* for 24 only'),
        (model_config(vision=replace(VISION, also_layers=(-3,))), 'after blocks .* side by side; llama'),
        (model_config(vision=VisionConfig('swin', kind='timm', select_layer=-1)), 'swin is none of CLIP'),
    ],
)
def test_what_llama_cpp_does_not_have_is_refused(config: ModelConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=message):
        write_mmproj_gguf({}, config, tmp_path / 'mmproj.gguf')

    assert list(tmp_path.iterdir()) == []


def test_a_missing_tensor_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    config = model_config()
    weights = random_weights(config)
    del weights['vision_model.encoder.layers.1.mlp.fc1.bias']

    with pytest.raises(BuildError, match=r'lack vision_model\.encoder\.layers\.1\.mlp\.fc1\.bias'):
        write_mmproj_gguf(weights, config, tmp_path / 'mmproj.gguf')

    assert list(tmp_path.iterdir()) == []
