"""What nano's training starts from: its frozen parts and an untrained projector, as a checkpoint folder.

The tower and the language model are those of nano's bundle, dequantised to float32, which holds them exactly; so
whatever is trained on this folder fits the bundle. At 384 pixels the tower's position embeddings are interpolated.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mobilevlm_ros.build.nano import NanoSource
from mobilevlm_ros.build.nano_language import (
    read_byte_level_tokenizer,
    read_language_config,
    read_language_weights,
)
from mobilevlm_ros.build.stages import Reporter, SilentReporter
from mobilevlm_ros.errors import CheckpointError
from mobilevlm_ros.model.checkpoint import Dtype
from mobilevlm_ros.model.config import LanguageConfig, ModelConfig, VisionConfig
from mobilevlm_ros.model.layout import PROJECTOR_PREFIX, TOWER_PREFIX
from mobilevlm_ros.model.projectors import build_projector
from mobilevlm_ros.model.publish import write_checkpoint

__all__ = ['RESOLUTIONS', 'interpolate_positions', 'write_nano_base']

RESOLUTIONS = (224, 384)
"""Pixels a side: 49 and 144 visual tokens."""

_POSITIONS = 'vision_model.embeddings.position_embedding.weight'
_IM_START, _IM_END, _END_OF_TEXT = '<|im_start|>', '<|im_end|>', '<|endoftext|>'
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_nano_base(
    out: Path,
    *,
    resolution: int | None = None,
    seed: int = 0,
    projector: Literal['random', 'shipped'] = 'random',
    dtype: Dtype = 'fp32',
    packages: Path | None = None,
    reporter: Reporter | None = None,
) -> Path:
    """Write the checkpoint; about 0.9 GB in fp32.

    :param resolution: one of ``RESOLUTIONS``; None: that of nano's bundle.
    :param seed: of the untrained projector.
    :param projector: ``random``, or the one of nano's bundle, to go on with its training.
    :param dtype: fp32 keeps the weights as they are; the two smaller ones round them.
    :param packages: a folder that holds the two wheels; None: download them.
    :raise BuildError: if an ingredient is missing or damaged.
    :raise CheckpointError: if there is no such resolution, or ``out`` is taken or cannot be written.
    :raise DependencyError: if a library is missing.
    :raise DiskSpaceError: if there is no room for it.
    """
    import gguf

    if resolution is not None and resolution not in RESOLUTIONS:
        raise CheckpointError(f'nano sees {" or ".join(map(str, RESOLUTIONS))} pixels a side, not {resolution}')
    if out.exists():
        raise CheckpointError(f'{out} exists already: remove it, or choose another place')
    reporter = reporter or SilentReporter()
    source = NanoSource(packages, reporter)
    vision = replace(source.vision, image_size=resolution or source.vision.image_size)
    weights: dict[str, NDArray[np.float32]] = {
        name if name.startswith(PROJECTOR_PREFIX) else TOWER_PREFIX + name: value
        for name, value in source.vision_weights().items()
        if name.startswith((PROJECTOR_PREFIX, 'vision_model.'))  # CLIP's way to its text tower is of no use here
    }
    positions = TOWER_PREFIX + _POSITIONS
    weights[positions] = interpolate_positions(weights[positions], vision.grid)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f'.{out.name}-') as scratch:
        path = Path(scratch) / 'language.gguf'
        path.write_bytes(source.language_file())
        reader = gguf.GGUFReader(path)
        language = read_language_config(reader, source.n_ctx)
        weights |= read_language_weights(reader, language)
        config = ModelConfig(
            f'nano-{vision.image_size}',
            language,
            vision,
            source.projector,
            source.aspect,
            template=source.prompt['template'],
            system=source.prompt.get('system', ''),
        )
        if projector == 'random':
            weights |= _untrained_projector(config, vision, language, seed)
        tokenizer = Path(scratch) / 'tokenizer.json'
        read_byte_level_tokenizer(reader).save(str(tokenizer))
        reporter.step(f'writing {out.name}')
        made = write_checkpoint(
            Path(scratch) / out.name,
            config,
            weights,
            tokenizer,
            dtype=dtype,
            file_format='safetensors',
            on_progress=reporter.progress,
        )
        _name_special_tokens(made, reader, language.n_ctx)
        shutil.move(made, out)  # on one disk: a rename, so the folder is whole or not there
    return out


def interpolate_positions(positions: NDArray[np.float32], grid: int) -> NDArray[np.float32]:
    """Position embeddings ``[1 + n * n, width]`` for ``grid`` patches a side, the class token's first.

    As transformers' ``interpolate_pos_encoding``: bicubic, corners not aligned.
    """
    old = round((len(positions) - 1) ** 0.5)
    if old == grid:
        return positions
    square = torch.from_numpy(positions[1:]).reshape(1, old, old, -1).permute(0, 3, 1, 2)
    larger = torch.nn.functional.interpolate(square, (grid, grid), mode='bicubic', align_corners=False)
    patches = larger.permute(0, 2, 3, 1).reshape(grid * grid, -1).numpy()
    return np.concatenate([positions[:1], patches]).astype(np.float32)


def _untrained_projector(
    config: ModelConfig, vision: VisionConfig, language: LanguageConfig, seed: int
) -> dict[str, NDArray[np.float32]]:
    """PyTorch's own initialisation, as published training starts."""
    assert config.projector is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build_projector(config.projector, vision.feature_width, language.n_embd)
    return {f'{PROJECTOR_PREFIX}{name}': value.numpy() for name, value in module.state_dict().items()}


def _name_special_tokens(folder: Path, reader: Any, n_ctx: int) -> None:
    """Say which tokens start and end a turn: the published files speak of LLaMA's."""
    tokens = list(reader.fields['tokenizer.ggml.tokens'].contents())
    named = {'bos_token': _IM_START, 'eos_token': _IM_END, 'pad_token': _IM_END, 'unk_token': _END_OF_TEXT}
    ids = {f'{name}_id': tokens.index(text) for name, text in named.items() if name != 'unk_token'}
    settings = {
        **named,
        'add_bos_token': False,
        'add_eos_token': False,
        'chat_template': _CHATML,
        'clean_up_tokenization_spaces': False,
        'model_max_length': n_ctx,
        'tokenizer_class': 'PreTrainedTokenizerFast',
    }
    _write(folder / 'tokenizer_config.json', settings)
    _write(folder / 'special_tokens_map.json', named)
    for name in ('config.json', 'generation_config.json'):
        content = json.loads((folder / name).read_text(encoding='utf-8'))
        _write(folder / name, content | ids)


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + '\n', encoding='utf-8')
