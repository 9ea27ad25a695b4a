"""Tiny models in the real file formats, made in the test run: a LLaMA in GGUF, a CLIP with LDPv2 in ONNX, a bundle.

Weights are random but seeded. The end token's row of the output matrix is zero, so that a greedy answer never ends by
itself: tests of cancelling and of token limits need one that goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.build.language_gguf import write_language_gguf
from mobilevlm_ros.build.vision_graph import write_vision_graph
from mobilevlm_ros.build.vocabulary import Vocabulary
from mobilevlm_ros.model.config import LanguageConfig, ProjectorConfig, VisionConfig
from mobilevlm_ros.model.layout import PROJECTOR_PREFIX, projector_tensors, tower_tensors
from mobilevlm_ros.runtime.bundle import FORMAT_VERSION, file_entry, write_description
from mobilevlm_ros.runtime.preprocess import CLIP_MEAN, CLIP_STD

Weights = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class TinyLlama:
    """Sizes of the tiny language model."""

    n_embd: int = 64
    n_layers: int = 2
    n_heads: int = 4
    n_ff: int = 128
    n_ctx: int = 2048
    rope_base: float = 10000.0
    norm_eps: float = 1e-6


WORDS = ['yes', 'no', 'red', 'blue', 'green', 'car', 'truck', 'the', 'a', 'is', 'what', 'table']
TINY_VISION = VisionConfig(
    name='tiny', image_size=32, patch_size=8, width=32, n_heads=4, n_blocks=3, mlp_width=64, projection_width=16
)
TINY_PROJECTOR = ProjectorConfig('ldpnetv2')


Words = tuple[list[bytes], list[float], list[int]]


def vocabulary(controls: tuple[str, ...] = ()) -> Words:
    """Texts, scores and types of a SentencePiece vocabulary.

    Controls (``controls`` besides the usual three), bytes, and words with every prefix that merging needs.
    """
    normal, unknown, control, byte = 1, 2, 3, 6
    pieces: list[tuple[str, float, int]] = [('<unk>', 0.0, unknown), ('<s>', 0.0, control), ('</s>', 0.0, control)]
    pieces += [(f'<0x{value:02X}>', 0.0, byte) for value in range(256)]
    seen = set()
    for word in WORDS:
        for spelling in (f'▁{word}', f'▁{word.capitalize()}', word):
            for end in range(1, len(spelling) + 1):
                if spelling[:end] not in seen:
                    seen.add(spelling[:end])
                    # Longer pieces merge first, as in a trained vocabulary.
                    pieces.append((spelling[:end], float(end) - 100.0, normal))
    for character in 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:?!{}[]"\'-▁':
        if character not in seen:
            seen.add(character)
            pieces.append((character, -200.0, normal))
    pieces += [(name, 0.0, control) for name in controls]
    return [p.encode() for p, _, _ in pieces], [s for _, s, _ in pieces], [t for _, _, t in pieces]


def llama_weights(sizes: TinyLlama, n_vocab: int, seed: int = 0) -> Weights:
    """Random weights under Hugging Face's names, matrices ``[out, in]``."""
    random = np.random.default_rng(seed)

    def matrix(n_out: int, n_in: int, scale: float = 1.0) -> NDArray[np.float32]:
        return (random.normal(0.0, scale / np.sqrt(n_in), (n_out, n_in))).astype(np.float32)

    d, f = sizes.n_embd, sizes.n_ff
    weights: Weights = {'model.embed_tokens.weight': matrix(n_vocab, d, np.sqrt(d))}
    for i in range(sizes.n_layers):
        root = f'model.layers.{i}'
        for name in ('q_proj', 'k_proj', 'v_proj', 'o_proj'):
            weights[f'{root}.self_attn.{name}.weight'] = matrix(d, d, 2.0)
        weights[f'{root}.mlp.gate_proj.weight'] = matrix(f, d, 2.0)
        weights[f'{root}.mlp.up_proj.weight'] = matrix(f, d, 2.0)
        weights[f'{root}.mlp.down_proj.weight'] = matrix(d, f, 2.0)
        weights[f'{root}.input_layernorm.weight'] = random.uniform(0.5, 1.5, d).astype(np.float32)
        weights[f'{root}.post_attention_layernorm.weight'] = random.uniform(0.5, 1.5, d).astype(np.float32)
    weights['model.norm.weight'] = random.uniform(0.5, 1.5, d).astype(np.float32)
    weights['lm_head.weight'] = matrix(n_vocab, d, 3.0)
    weights['lm_head.weight'][:3] = 0.0
    return weights


def language_config(sizes: TinyLlama, n_vocab: int) -> LanguageConfig:
    """The same sizes as the builders take them."""
    return LanguageConfig(
        n_vocab=n_vocab,
        n_embd=sizes.n_embd,
        n_layers=sizes.n_layers,
        n_heads=sizes.n_heads,
        n_kv_heads=sizes.n_heads,
        n_ff=sizes.n_ff,
        n_ctx=sizes.n_ctx,
        rope_base=sizes.rope_base,
        norm_eps=sizes.norm_eps,
    )


def write_gguf(path: Path, sizes: TinyLlama | None = None, seed: int = 0, vocab: Words | None = None) -> Weights:
    """Write the tiny language model in float32; returns its weights under Hugging Face's names."""
    sizes = sizes or TinyLlama()
    words = Vocabulary('llama', *(vocab or vocabulary()))
    weights = llama_weights(sizes, len(words.tokens), seed)
    write_language_gguf(weights, language_config(sizes, len(words.tokens)), words, path, dtype='f32', name='tiny')
    return weights


def vision_weights(
    vision: VisionConfig = TINY_VISION,
    seed: int = 0,
    projector: ProjectorConfig = TINY_PROJECTOR,
    n_embd: int = TinyLlama.n_embd,
) -> Weights:
    """Random weights of a whole tower, the blocks that never run among them, and of a projector."""
    random = np.random.default_rng(seed)
    shapes = dict(tower_tensors(vision))
    inner = projector_tensors(projector, vision.feature_width, n_embd)
    shapes |= {PROJECTOR_PREFIX + name: shape for name, shape in inner}
    weights = {name: random.normal(0.0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    # Vectors that scale belong to norms, and do so around 1.
    return {name: value + 1.0 if _scales(name, value) else value for name, value in weights.items()}


def _scales(name: str, value: NDArray[np.float32]) -> bool:
    return name.endswith('.weight') and value.ndim == 1


def write_vision(path: Path, vision: VisionConfig = TINY_VISION, seed: int = 0) -> None:
    """Write the tiny vision engine."""
    write_vision_graph(vision_weights(vision, seed), vision, TINY_PROJECTOR, TinyLlama.n_embd, path)


def write_reshape(path: Path, n_inputs: int, shape_in: list[Any], shape_out: list[Any]) -> None:
    """Write a graph that is no vision engine: its first input in another shape. Sizes may be names."""
    from onnx import TensorProto, helper, numpy_helper

    inputs = [helper.make_tensor_value_info(f'x{i}', TensorProto.FLOAT, shape_in) for i in range(n_inputs)]
    target = np.asarray([n if isinstance(n, int) else -1 for n in shape_out], np.int64)
    graph = helper.make_graph(
        [helper.make_node('Reshape', ['x0', 'shape'], ['y'])],
        'other',
        inputs,
        [helper.make_tensor_value_info('y', TensorProto.FLOAT, shape_out)],
        [numpy_helper.from_array(target, 'shape')],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())


def write_bundle(path: Path, **language: Any) -> Path:
    """Write a whole tiny bundle; ``language`` adds to its part about the language model."""
    path.mkdir(parents=True)
    write_vision(path / 'vision.onnx')
    write_gguf(path / 'language.gguf')
    description = {
        'format_version': FORMAT_VERSION,
        'name': 'tiny',
        'profile': 'cpu',
        'warning': 'random weights: the answers mean nothing',
        'generator': 'tests',
        'sources': [],
        'vision': {
            'backend': 'onnxruntime',
            'precision': 'fp32',
            'file': 'vision.onnx',
            'image_size': TINY_VISION.image_size,
            'n_tokens': TINY_PROJECTOR.grid_out(TINY_VISION.grid) ** 2,
            'aspect': 'pad',
            'mean': list(CLIP_MEAN),
            'std': list(CLIP_STD),
            'n_threads': 1,
        },
        'language': {
            'file': 'language.gguf',
            'quantization': 'F32',
            'n_ctx': 2048,
            'n_threads': 1,
            'n_threads_batch': 1,
            **language,
        },
        'prompt': {'template': 'v1'},
        'files': {name: file_entry(path / name) for name in ('vision.onnx', 'language.gguf')},
    }
    write_description(path, description)
    return path
