"""Whole models of given shapes with random weights, made in the time that their files take to write.

What a model costs depends on its shapes and on how its weights are stored, not on their values. So the blocks of a
quantised matrix are random bytes behind a sound scale, each tensor in the type that llama.cpp's quantiser would give
it (``build.quantization_types``): a 7B is there in a minute, where drawing, rounding and quantising every weight would
take half an hour and 14 GB more. What it answers means nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.build.gguf_file import atomic_file, load_gguf
from mobilevlm_ros.build.language_gguf import add_language_metadata
from mobilevlm_ros.build.llama_tensors import LlamaTensor, language_tensors
from mobilevlm_ros.build.quantization_types import BLOCKS, predicted_bytes, tensor_types
from mobilevlm_ros.build.vocabulary import Vocabulary, read_vocabulary
from mobilevlm_ros.errors import BuildError, EngineError
from mobilevlm_ros.model.config import LanguageConfig, ModelConfig
from mobilevlm_ros.model.layout import PROJECTOR_PREFIX, TOWER_PREFIX, projector_tensors, tower_tensors
from mobilevlm_ros.model.random_weights import RandomWeights
from mobilevlm_ros.model.tokenizer_files import TOKENIZER_MODEL, write_made_up_tokenizer
from mobilevlm_ros.runtime.bundle import FORMAT_VERSION, file_entry, write_description

__all__ = ['LANGUAGE', 'RandomModels', 'language_bytes', 'vision_bytes', 'write_random_gguf']

LANGUAGE = 'language.gguf'
_VISION = 'vision.onnx'
_DEVIATION = 0.02
"""Of all weights, about that of trained ones."""

# Where a block has its float16 scales and offsets (ggml-common.h), and which values make the weights' deviation that of
# above, and their mean 0, when all other bytes are random.
_SCALES: dict[str, tuple[tuple[int, float], ...]] = {
    'Q4_0': ((0, 4.3e-3),),
    'Q5_0': ((0, 2.2e-3),),
    'Q5_1': ((0, 2.2e-3), (2, -15.5 * 2.2e-3)),
    'Q8_0': ((0, 2.7e-4),),
    'Q4_K': ((0, 7.7e-5), (2, 7.5 * 7.7e-5)),
    'Q5_K': ((0, 3.8e-5), (2, 15.5 * 3.8e-5)),
    'Q6_K': ((208, 1.5e-5),),
}
_FILE_TYPE = {'F16': 1, 'Q4_0': 2, 'Q8_0': 7, 'Q4_K_S': 14, 'Q4_K_M': 15, 'Q5_K_M': 17, 'Q6_K': 18}
"""``LLAMA_FTYPE`` of llama.h."""


def language_bytes(config: LanguageConfig, quantization: str) -> int:
    """Size of the file that ``write_random_gguf`` makes, but for the texts of the tokens.

    :raise BuildError: if there is no such quantisation.
    """
    return predicted_bytes(config, quantization)


def vision_bytes(config: ModelConfig) -> int:
    """Size of the vision engine in float32, the blocks that never run included; 0 without a tower."""
    if config.vision is None or config.projector is None:
        return 0
    projector = projector_tensors(config.projector, config.vision.feature_width, config.language.n_embd)
    return 4 * sum(prod(shape) for _, shape in (*tower_tensors(config.vision), *projector))


def write_random_gguf(config: LanguageConfig, quantization: str, vocabulary: Vocabulary, out: Path, name: str) -> None:
    """Write a language model as ``quantize_gguf`` would have left it, but for the values of its weights.

    :param quantization: one of ``build.quantize.QUANTIZATIONS``.
    :raise BuildError: if there is no such quantisation, the vocabulary does not fit, or the disk is full.
    :raise DependencyError: if gguf is missing.
    """
    types = tensor_types(config, quantization)
    if len(vocabulary.tokens) != config.n_vocab:
        raise BuildError(f'the vocabulary has {len(vocabulary.tokens)} tokens, the model {config.n_vocab}')
    gguf = load_gguf()
    tensors = language_tensors(config)
    with atomic_file(out) as partial:
        writer = gguf.GGUFWriter(partial, 'llama')
        try:
            add_language_metadata(writer, config, vocabulary, name)
            writer.add_file_type(_FILE_TYPE[quantization])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            for tensor in tensors:
                n_values, n_bytes = BLOCKS[types[tensor.name]]
                size = prod(tensor.shape) // n_values * n_bytes
                kind = gguf.GGMLQuantizationType[types[tensor.name]]
                writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(_values(tensor, types[tensor.name]))
        finally:
            writer.close()


def _values(tensor: LlamaTensor, kind: str) -> NDArray[Any]:
    """What stands in the file: vectors (of norms) are 1, matrices random."""
    if len(tensor.shape) == 1:
        return np.ones(tensor.shape, dtype=np.float32)
    random = np.random.default_rng(zlib.crc32(tensor.name.encode()))
    if kind in ('F16', 'F32'):
        values = random.standard_normal(tensor.shape, dtype=np.float32) * np.float32(_DEVIATION)
        return values.astype(np.float16) if kind == 'F16' else values
    n_values, n_bytes = BLOCKS[kind]
    n_blocks = prod(tensor.shape) // n_values
    blocks = np.frombuffer(bytearray(random.bytes(n_blocks * n_bytes)), dtype=np.uint8).reshape(n_blocks, n_bytes)
    for offset, scale in _SCALES[kind]:
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(scale).tobytes(), dtype=np.uint8)
    return blocks.reshape(*tensor.shape[:-1], -1)


class _VisionWeights(Mapping[str, NDArray[np.float32]]):
    """Random tower and projector under the names that the vision graph wants, each made when it is asked for."""

    def __init__(self, config: ModelConfig) -> None:
        self._weights = RandomWeights(config, 0)
        seeing = (name for name in self._weights if name.startswith((TOWER_PREFIX, PROJECTOR_PREFIX)))
        self._names = {name.removeprefix(TOWER_PREFIX): name for name in seeing}

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self._weights[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class RandomModels:
    """Writes models into folders; in a process of its own, whose memory ends with it."""

    def write_language(self, config: ModelConfig, quantization: str, tokenizer: str, folder: str) -> str:
        """Write ``language.gguf``; returns its path.

        :param tokenizer: a ``tokenizer.model``, ``tokenizer.json`` or GGUF whose vocabulary it gets; empty: a made-up
            one.
        :raise BuildError: as ``write_random_gguf``, or if there is no such tokenizer.
        """
        out = Path(folder) / LANGUAGE
        vocabulary = _vocabulary(Path(tokenizer) if tokenizer else None, config.language.n_vocab, Path(folder))
        write_random_gguf(config.language, quantization, vocabulary, out, f'{config.name}-random')
        return str(out)

    def write_bundle(self, config: ModelConfig, quantization: str, folder: str) -> None:
        """Make a bundle of the folder that holds ``language.gguf``: vision in float32, as the paper measured it.

        :raise BuildError: if the model has no tower, or the disk is full.
        """
        from mobilevlm_ros.build.vision_graph import write_vision_graph

        path, vision, projector = Path(folder), config.vision, config.projector
        if vision is None or projector is None:
            raise BuildError(f'{config.name} is a language model alone: Table 6 is about models that see')
        write_vision_graph(_VisionWeights(config), vision, projector, config.language.n_embd, path / _VISION)
        names = [name for name in (LANGUAGE, _VISION, f'{_VISION}.data') if (path / name).exists()]
        description = {
            'format_version': FORMAT_VERSION,
            'name': config.name,
            'profile': 'cpu',
            'warning': 'random weights: the answers mean nothing',
            'generator': 'mobilevlm bench',
            'sources': [],
            'vision': {
                'backend': 'onnxruntime',
                'precision': 'fp32',
                'file': _VISION,
                'image_size': vision.image_size,
                'n_tokens': config.n_visual_tokens,
                'aspect': config.aspect,
                'mean': list(vision.mean),
                'std': list(vision.std),
            },
            'language': {'file': LANGUAGE, 'quantization': quantization, 'n_ctx': config.language.n_ctx},
            'prompt': {'template': config.template},
            'files': {name: file_entry(path / name) for name in names},
        }
        write_description(path, description)


def _vocabulary(tokenizer: Path | None, n_vocab: int, folder: Path) -> Vocabulary:
    if tokenizer is None:
        made_up = folder / TOKENIZER_MODEL
        write_made_up_tokenizer(made_up, n_vocab)
        vocabulary = read_vocabulary(made_up, n_vocab)
        made_up.unlink()
        return vocabulary
    return _vocabulary_of_gguf(tokenizer) if tokenizer.suffix == '.gguf' else read_vocabulary(tokenizer, n_vocab)


def _vocabulary_of_gguf(path: Path) -> Vocabulary:
    """The SentencePiece vocabulary in a GGUF, such as llama.cpp's ``ggml-vocab-llama-spm.gguf``."""
    try:
        fields = load_gguf().GGUFReader(path).fields
        texts, scores, types = (
            fields[f'tokenizer.ggml.{name}'].contents() for name in ('tokens', 'scores', 'token_type')
        )
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise EngineError(f'{path} is no GGUF with a SentencePiece vocabulary ({error})') from error
    return Vocabulary('llama', [text.encode() for text in texts], scores, types)
