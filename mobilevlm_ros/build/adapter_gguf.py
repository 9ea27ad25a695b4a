"""A LoRA adapter as PEFT saves it, as a GGUF that llama.cpp applies over a language model.

llama.cpp adds ``alpha / rank * B (A x)`` to a matrix, with one alpha for all, so other scalings (rsLoRA, patterns) are
put into B. What it cannot take (DoRA, biases, embeddings, whole modules) is refused: leaving it out would give a model
that answers wrongly without a word.

Source of names and keys: llama.cpp's ``convert_lora_to_gguf.py`` and ``src/llama-adapter.cpp``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.build.gguf_file import OnProgress, Storage, TensorEntry, write_gguf
from mobilevlm_ros.build.llama_tensors import LlamaTensor, language_tensors, rope_order
from mobilevlm_ros.build.tokenizer_parts import read_json
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.model.config import LanguageConfig

if TYPE_CHECKING:
    from mobilevlm_ros.model.tensor_files import StoredTensor

__all__ = ['AdaptedWeights', 'write_adapter_gguf']

_FILES = ('adapter_model.safetensors', 'adapter_model.bin')
_KEY = re.compile(r'(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight\Z')
_PLAIN = re.compile(r'[\w.]+\Z')
_UNKNOWN = ('modules_to_save', 'use_dora', 'fan_in_fan_out', 'lora_bias', 'alora_invocation_tokens')
"""Settings that change what is computed in ways that llama.cpp does not know."""


@dataclass(frozen=True)
class _Settings:
    """How strongly each matrix is changed, and of what rank; patterns are ends of a module's name."""

    alpha: float
    rank: int
    by_root: bool
    alphas: Mapping[str, float]
    ranks: Mapping[str, int]

    def rank_of(self, module: str) -> int:
        return next((rank for end, rank in self.ranks.items() if f'.{module}'.endswith(f'.{end}')), self.rank)

    def factor_of(self, module: str) -> float:
        """What B is multiplied with, because llama.cpp multiplies with the one alpha over this matrix's rank."""
        alpha = next((value for end, value in self.alphas.items() if f'.{module}'.endswith(f'.{end}')), self.alpha)
        return alpha / self.alpha * (self.rank_of(module) ** 0.5 if self.by_root else 1.0)


def write_adapter_gguf(
    adapter: Path,
    out: Path,
    config: LanguageConfig,
    *,
    storage: Storage = 'f16',
    name: str = 'LoRA',
    on_progress: OnProgress = lambda done, total: None,
) -> None:
    """Write the adapter.

    :param adapter: folder with ``adapter_config.json`` and ``adapter_model.safetensors`` or ``.bin``.
    :param config: of the language model that it was trained on.
    :param storage: ``q8_0`` is about half as large as ``f16``, and not exact; matrices whose rows are no multiple of 32
        (B of a rank of 16) stay in f16.
    :raise BuildError: if it is no LoRA adapter, does not belong to such a model, or does what llama.cpp cannot.
    :raise CheckpointError: if its file of weights is missing or damaged.
    :raise DependencyError: if gguf is missing.
    """
    settings = _read_settings(adapter / 'adapter_config.json')
    targets = {tensor.source: tensor for tensor in language_tensors(config) if len(tensor.shape) == 2}
    entries = []
    for module, (a, b) in sorted(_pairs(_open(adapter)).items()):
        target = targets.get(f'{module}.weight')
        if target is None or target.name == 'token_embd.weight':
            raise BuildError(
                f'the adapter changes {module}, which llama.cpp cannot take: only the matrices of attention, MLP and '
                'an output of its own. Merge it into the weights instead.'
            )
        entries += _entries(module, target, a, b, settings, storage)

    def add_metadata(writer: Any) -> None:
        writer.add_type('adapter')
        writer.add_name(name)
        writer.add_string('adapter.type', 'lora')
        writer.add_float32('adapter.lora.alpha', settings.alpha)

    write_gguf(out, 'llama', add_metadata, entries, on_progress)


class AdaptedWeights(Mapping[str, NDArray[np.float32]]):
    """Weights with an adapter merged into them, tensor by tensor as they are read.

    :param adapter: folder of the adapter, as for ``write_adapter_gguf``.
    :raise BuildError: if it is no LoRA adapter.
    """

    def __init__(self, weights: Mapping[str, NDArray[np.float32]], adapter: Path) -> None:
        self._weights = weights
        self._settings = _read_settings(adapter / 'adapter_config.json')
        self._pairs = _pairs(_open(adapter))

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        weight = self._weights[name]
        module = name.removesuffix('.weight')
        if module not in self._pairs:
            return weight
        a, b = self._pairs[module]
        settings = self._settings
        scale = settings.alpha * settings.factor_of(module) / settings.rank_of(module)
        merged: NDArray[np.float32] = weight + np.float32(scale) * (b.read() @ a.read())
        return merged

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _read_settings(path: Path) -> _Settings:
    if not path.is_file():
        raise BuildError(f'{path} is missing: expected a folder that peft saved an adapter in')
    config = read_json(path)
    if config.get('peft_type') != 'LORA':
        raise BuildError(f'{path} describes an adapter of type {config.get("peft_type")!r}, expected LORA')
    unusable = [key for key in _UNKNOWN if config.get(key)]
    if config.get('bias', 'none') != 'none':
        unusable.append('bias')
    if unusable:
        found = ', '.join(f'{key} {config[key]!r}' for key in unusable)
        raise BuildError(f'{path} has {found}, which llama.cpp cannot take: merge the adapter into the weights instead')
    alphas, ranks = (config.get(f'{what}_pattern') or {} for what in ('alpha', 'rank'))
    if not isinstance(alphas, dict) or not isinstance(ranks, dict) or not all(map(_PLAIN.match, [*alphas, *ranks])):
        raise BuildError(f'{path} has patterns that are no names of modules: {alphas!r}, {ranks!r}')
    alpha, rank = config.get('lora_alpha'), config.get('r')
    if not all(map(_is_positive, (alpha, *alphas.values()))) or not all(map(_is_count, (rank, *ranks.values()))):
        raise BuildError(f'{path} has r {rank!r}, lora_alpha {alpha!r}, patterns {ranks!r} and {alphas!r}: no numbers')
    return _Settings(float(alpha), int(rank), config.get('use_rslora') is True, alphas, ranks)  # type: ignore[arg-type]


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 20


def _open(adapter: Path) -> dict[str, StoredTensor]:
    from mobilevlm_ros.model.tensor_files import open_tensor_file

    path = next((adapter / file for file in _FILES if (adapter / file).is_file()), adapter / _FILES[0])
    return open_tensor_file(path)


def _pairs(stored: Mapping[str, StoredTensor]) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """A and B by module.

    :raise BuildError: if there is something else, or one without the other.
    """
    halves: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in stored.items():
        match = _KEY.match(key)
        if match is None:
            raise BuildError(
                f'the adapter holds {key}, which is no matrix of a LoRA and nothing that llama.cpp can take: merge it '
                'into the weights instead'
            )
        halves.setdefault(match[1], {})[match[2]] = tensor
    if not halves:
        raise BuildError('the adapter holds no tensors')
    for module, both in halves.items():
        if len(both) != 2:
            raise BuildError(f'the adapter has lora_{next(iter(both))} of {module} and not the other half')
    return {module: (both['A'], both['B']) for module, both in halves.items()}


def _entries(
    module: str, target: LlamaTensor, a: StoredTensor, b: StoredTensor, settings: _Settings, storage: Storage
) -> list[TensorEntry]:
    """What is written for one matrix; A ``[rank, in]``, B ``[out, rank]``."""
    rank, (n_out, n_in) = settings.rank_of(module), target.shape
    if a.shape != (rank, n_in) or b.shape != (n_out, rank):
        raise BuildError(
            f'the adapter has matrices of {a.shape} and {b.shape} for {module}, expected {(rank, n_in)} and '
            f'{(n_out, rank)}: it was made for a model of other shapes'
        )
    factor = np.float32(settings.factor_of(module))

    def read_b() -> NDArray[np.float32]:
        rows = b.read() * factor
        return rope_order(rows, target.n_rope_heads) if target.n_rope_heads else rows

    return [
        _entry(f'{target.name}.lora_a', (rank, n_in), storage, a.read),
        _entry(f'{target.name}.lora_b', (n_out, rank), storage, read_b),
    ]


def _entry(name: str, shape: tuple[int, int], storage: Storage, read: Callable[[], NDArray[np.float32]]) -> TensorEntry:
    return TensorEntry(name, shape, 'f16' if storage == 'q8_0' and shape[1] % 32 else storage, read)
