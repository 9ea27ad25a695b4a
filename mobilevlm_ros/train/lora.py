"""Low-rank adapters: on which matrices, what share of the model learns, in 4 or 8 bits, saved and merged.

Published rule: the last part of the name of every linear layer of the language model but its output, which are the
seven matrices of a LLaMA block; rank 128, alpha 256, dropout 0.05 (mobilevlm/train/train.py ``find_all_linear_names``,
scripts/train/*.sh; arXiv 2312.16886, section 5.2: 8.87 % and 7.41 % of the language models learn).
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mobilevlm_ros.build.adapter_gguf import AdaptedWeights
from mobilevlm_ros.errors import (
    CheckpointKindError,
    CheckpointMissingError,
    CheckpointShapeError,
    DependencyError,
    SettingsError,
)
from mobilevlm_ros.model.checkpoint import Dtype, LazyWeights, open_checkpoint
from mobilevlm_ros.model.config import LanguageConfig, ModelConfig
from mobilevlm_ros.model.conversation import taught_by
from mobilevlm_ros.model.json_files import read_json_object
from mobilevlm_ros.model.mobilevlm import MobileVLM
from mobilevlm_ros.model.publish import OnProgress
from mobilevlm_ros.model.tensor_files import StoredTensor, open_tensor_file
from mobilevlm_ros.train.config import LoraConfig
from mobilevlm_ros.train.whole import write_whole

__all__ = [
    'NON_LORA',
    'add_adapters',
    'load_adapter',
    'merge_adapter',
    'quantise_language',
    'save_adapter',
    'target_names',
    'trainable_share',
]

NON_LORA = 'non_lora_trainables.bin'
"""What a LoRA run trained besides its adapters, under peft's names, as upstream saves it."""
_BASE_PREFIX = 'base_model.model.'


def target_names(language: nn.Module) -> list[str]:
    """Last name parts of the linear layers that get an adapter, sorted."""
    linear = {name.rpartition('.')[2] for name, module in language.named_modules() if _is_linear(module)}
    return sorted(linear - {'lm_head'})


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)  # bitsandbytes' layers are, too


def add_adapters(model: MobileVLM, lora: LoraConfig) -> None:
    """Put adapters into the language model, whose own weights are frozen by this; A random, B zero.

    :raise DependencyError: if peft is not installed.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model
    except ImportError as error:
        raise DependencyError(f'adapters need peft ({error}): pip install peft') from error
    settings = PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias='none',
        task_type='CAUSAL_LM',
        target_modules=target_names(model.language),
    )
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # peft asks transformers for an old name
        model.language = get_peft_model(model.language, settings)


def load_adapter(model: MobileVLM, lora: LoraConfig, folder: Path) -> None:
    """Give adapters that were just added the values of an earlier run, to go on from there.

    :param folder: as stage ``lora`` leaves it.
    :raise CheckpointMissingError: if there is no adapter in it.
    :raise CheckpointShapeError: if it has another rank or other matrices than the adapters of the model.
    :raise SettingsError: if its scale is another, so that the same values would mean something else.
    """
    if not folder.is_dir():
        raise CheckpointMissingError(f'there is no folder {folder}: expected an adapter, as stage lora leaves it')
    settings = read_json_object(folder / 'adapter_config.json')
    for key, mine in (('r', lora.rank), ('lora_alpha', lora.alpha)):
        if settings.get(key) != mine:
            name = {'r': 'rank', 'lora_alpha': 'alpha'}[key]
            raise SettingsError(
                f'model.adapter: {folder} has {name} {settings.get(key)}, lora.{name} is {mine}: give it the same'
            )
    stored = open_tensor_file(_adapter_file(folder))
    halves = {
        name.replace('.default.', '.'): value for name, value in model.language.named_parameters() if '.lora_' in name
    }
    if stored.keys() != halves.keys():
        odd = sorted(stored.keys() ^ halves.keys())
        raise CheckpointShapeError(
            f'{folder} and the model differ in {len(odd)} halves of adapters, the first being {odd[0]}: it was trained '
            'on another model'
        )
    for name, tensor in stored.items():
        if tuple(tensor.shape) != tuple(halves[name].shape):
            raise CheckpointShapeError(
                f'{name} in {folder} has shape {list(tensor.shape)}, the model has {list(halves[name].shape)}'
            )
        with torch.no_grad():
            halves[name].copy_(torch.from_numpy(tensor.read()))


def _adapter_file(folder: Path) -> Path:
    files = [folder / name for name in ('adapter_model.safetensors', 'adapter_model.bin')]
    return next((file for file in files if file.is_file()), files[0])


def trainable_share(config: LanguageConfig, lora: LoraConfig) -> tuple[int, float]:
    """Parameters of the adapters, and their share of the language model's own; takes no memory for weights."""
    with torch.device('meta'):
        model = MobileVLM(ModelConfig('shapes', config))
        n_own = sum(p.numel() for p in model.parameters())
        add_adapters(model, lora)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return n_trained, n_trained / n_own


def quantise_language(model: MobileVLM, bits: int, compute: torch.dtype) -> None:
    """Keep the matrices of the language model in 4 bits (nf4, double quantisation) or 8; adapters come on top.

    The weights are quantised when the model is moved to its device.

    :raise DependencyError: if bitsandbytes is not installed.
    """
    try:
        layers = importlib.import_module('bitsandbytes').nn
    except ImportError as error:
        raise DependencyError(
            f'stage qlora needs bitsandbytes ({error}): pip install bitsandbytes, or train in 16 bits with stage lora'
        ) from error
    targets = set(target_names(model.language))
    for name, module in list(model.language.named_modules()):
        if not isinstance(module, nn.Linear) or name.rpartition('.')[2] not in targets:
            continue
        shape = (module.in_features, module.out_features)
        weight = module.weight.data
        if bits == 4:
            small: Any = layers.Linear4bit(*shape, bias=False, compute_dtype=compute, quant_type='nf4')
            small.weight = layers.Params4bit(weight, requires_grad=False, quant_type='nf4', compress_statistics=True)
        else:
            small = layers.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
            small.weight = layers.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        parent, _, leaf = name.rpartition('.')
        setattr(model.language.get_submodule(parent), leaf, small)


def save_adapter(
    folder: Path,
    settings: Mapping[str, Any],
    adapter: Mapping[str, torch.Tensor],
    others: Mapping[str, torch.Tensor],
) -> None:
    """Write what peft writes, and what upstream writes beside it.

    :param settings: peft's configuration, as a dictionary.
    :param adapter: peft's names to values.
    :param others: what else was trained, published names to values.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / 'adapter_config.json').write_text(json.dumps(settings, indent=2, sort_keys=True, default=list) + '\n')
    save_file({name: value.contiguous() for name, value in adapter.items()}, folder / 'adapter_model.safetensors')
    torch.save({_BASE_PREFIX + name: value for name, value in others.items()}, folder / NON_LORA)


class _Overlaid(Mapping[str, NDArray[np.float32]]):
    """Weights of which some are replaced by those of a file."""

    def __init__(self, weights: Mapping[str, NDArray[np.float32]], over: Mapping[str, StoredTensor]) -> None:
        self._weights = weights
        self._over = over

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self._over[name].read() if name in self._over else self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def merge_adapter(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    dtype: Dtype = 'fp16',
    on_progress: OnProgress = lambda done, total: None,
) -> Path:
    """Write a checkpoint that is the base with an adapter, and what was trained besides it, put into its weights.

    Reads and writes one tensor at a time.

    :param adapter: folder with ``adapter_config.json``, ``adapter_model.*`` and perhaps ``non_lora_trainables.bin``.
    :param dtype: of the merged weights; upstream merges in float16.
    :raise CheckpointError: if a folder is damaged, or the adapter was made for a model of other shapes.
    :raise BuildError: if it is no LoRA adapter.
    :raise DiskSpaceError: if there is no room for the result.
    """
    if not adapter.is_dir():
        raise CheckpointMissingError(f'there is no folder {adapter}: expected an adapter, as stage lora leaves it')
    with open_checkpoint(base) as opened:
        over = _others(adapter / NON_LORA)
        for name, tensor in over.items():
            if name not in opened.tensors:
                raise CheckpointKindError(f'{adapter / NON_LORA} holds {name}, which {base} does not have')
            if tensor.shape != opened.tensors.shape(name):
                raise CheckpointShapeError(
                    f'{name} in {adapter / NON_LORA} has shape {list(tensor.shape)}, {base} has '
                    f'{list(opened.tensors.shape(name))}: it was trained on another model'
                )
        _check_fits(adapter, opened.tensors, base)
        merged = AdaptedWeights(_Overlaid(opened.tensors, over), adapter)
        config = taught_by(adapter, opened.config)
        return write_whole(out, config, merged, opened.tokenizer, dtype=dtype, on_progress=on_progress)


def _check_fits(adapter: Path, tensors: LazyWeights, base: Path) -> None:
    """That every matrix which the adapter changes is there, in the shape that it was trained with."""
    for key, tensor in open_tensor_file(_adapter_file(adapter)).items():
        module, found, half = key.removeprefix(_BASE_PREFIX).rpartition('.lora_')
        name = f'{module}.weight'
        if not found:
            continue  # named by AdaptedWeights
        if name not in tensors:
            raise CheckpointKindError(f'{adapter} changes {name}, which {base} does not have')
        axis = 1 if half.startswith('A') else 0
        if len(tensor.shape) != 2 or tensor.shape[axis] != tensors.shape(name)[axis]:
            raise CheckpointShapeError(
                f'{key} in {adapter} has shape {list(tensor.shape)}, but {name} in {base} has '
                f'{list(tensors.shape(name))}: the adapter was trained on another model'
            )


def _others(path: Path) -> dict[str, StoredTensor]:
    """Tensors of ``non_lora_trainables.bin`` under published names, whatever peft put before them."""
    if not path.is_file():
        return {}
    found = {}
    for name, tensor in open_tensor_file(path).items():
        name = name.removeprefix(_BASE_PREFIX)
        found[name.removeprefix('model.') if name.startswith('model.model.') else name] = tensor
    return found
