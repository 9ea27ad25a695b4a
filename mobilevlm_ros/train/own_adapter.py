"""An adapter out of its GGUF file, as peft saves one: what a bundle answers with is what training goes on from.

The inverse of ``build/adapter_gguf.py``. Values are those that llama.cpp computes with, to the bit.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.build.llama_tensors import language_tensors, rope_order
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.model.config import LanguageConfig
from mobilevlm_ros.train.config import LoraConfig

__all__ = ['unpack_adapter']


def unpack_adapter(path: Path, config: LanguageConfig, out: Path) -> LoraConfig:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``; the folder is there when it is whole.

    :param config: of the language model that the adapter belongs to.
    :return: its rank and alpha.
    :raise BuildError: if it is no adapter of such a model, or its matrices differ in rank.
    :raise DependencyError: if gguf is missing.
    """
    from safetensors.numpy import save_file

    reader = _open(path)
    alpha = float(reader.fields['adapter.lora.alpha'].contents())
    halves = {tensor.name: tensor for tensor in reader.tensors}
    values: dict[str, NDArray[np.float32]] = {}
    ranks = set()
    for target in language_tensors(config):
        pair = [halves.pop(f'{target.name}.lora_{half}', None) for half in 'ab']
        if pair == [None, None]:
            continue
        if None in pair:
            raise BuildError(f'{path} has one half of {target.name} and not the other: build the bundle again')
        a, b = (_values(tensor) for tensor in pair)
        n_out, n_in = target.shape
        rank = a.shape[0]
        if a.shape != (rank, n_in) or b.shape != (n_out, rank):
            raise BuildError(
                f'{path} has matrices of {a.shape} and {b.shape} for {target.name}, expected {(rank, n_in)} and '
                f'{(n_out, rank)}: it belongs to another model'
            )
        ranks.add(rank)
        module = target.source.removesuffix('.weight')
        values[f'base_model.model.{module}.lora_A.weight'] = a
        values[f'base_model.model.{module}.lora_B.weight'] = _published_rows(b, target.n_rope_heads)
    if halves or len(ranks) != 1 or not alpha.is_integer():
        raise BuildError(
            f'{path} has ranks {sorted(ranks)}, alpha {alpha:g} and {len(halves)} tensors that the model does not '
            'have; training goes on from adapters of one rank and a whole alpha only. Merge it into the checkpoint '
            'with `mobilevlm train merge`, and give that as --base'
        )
    lora = LoraConfig(rank=ranks.pop(), alpha=int(alpha))
    making = out.with_name(f'{out.name}.partial')
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    settings = {'peft_type': 'LORA', 'r': lora.rank, 'lora_alpha': lora.alpha, 'bias': 'none'}
    (making / 'adapter_config.json').write_text(json.dumps(settings, indent=2) + '\n', encoding='utf-8')
    save_file(values, making / 'adapter_model.safetensors', metadata={'format': 'pt'})
    making.rename(out)
    return lora


def _open(path: Path) -> Any:
    from mobilevlm_ros.build.gguf_file import load_gguf

    gguf = load_gguf()
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise BuildError(f'{path} is no GGUF file ({error}): build the bundle again') from error
    if 'adapter.lora.alpha' not in reader.fields:
        raise BuildError(f'{path} holds no LoRA adapter: build the bundle again')
    return reader


def _values(tensor: Any) -> NDArray[np.float32]:
    from gguf.quants import dequantize

    return np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32)


def _published_rows(b: NDArray[np.float32], n_rope_heads: int) -> NDArray[np.float32]:
    """Rows as Hugging Face has them."""
    if not n_rope_heads:
        return b
    order = rope_order(np.arange(len(b))[:, None], n_rope_heads)[:, 0]
    rows = np.empty_like(b)
    rows[order] = b
    return rows
