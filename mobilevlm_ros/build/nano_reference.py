"""Records what PyTorch makes of nano, when its weights change: ``python -m mobilevlm_ros.build.nano_reference``.

Needs PyTorch and transformers. The language model is read back out of its GGUF file, the LoRA merged into it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.build.bundle_build import REFERENCE, read_images
from mobilevlm_ros.build.nano import NanoSource
from mobilevlm_ros.build.nano_language import (
    read_byte_level_tokenizer,
    read_language_config,
    read_language_weights,
)
from mobilevlm_ros.build.record import record_reference
from mobilevlm_ros.build.reference import Reference, write_reference
from mobilevlm_ros.build.stages import SilentReporter
from mobilevlm_ros.model.config import ModelConfig
from mobilevlm_ros.paths import shared_file
from mobilevlm_ros.runtime.prompt import described_template

__all__ = ['record_nano']

_N_IMAGES = 3


def record_nano(packages: Path | None = None) -> Reference:
    """Compute the reference."""
    import gguf

    source = NanoSource(packages, SilentReporter())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'language.gguf'
        path.write_bytes(source.language_file())
        reader = gguf.GGUFReader(path)
        config = _config(source, reader)
        weights = read_language_weights(reader, config.language, _merged(shared_file('models/nano/adapter.gguf')))
        return record_reference(
            config,
            source.vision_weights(),
            weights,
            _PromptTokenizer(reader),
            described_template(source.prompt),
            read_images(shared_file('models/calibration'))[:_N_IMAGES],
            SilentReporter(),
            n_kept=1,
        )


def _config(source: NanoSource, reader: Any) -> ModelConfig:
    language = read_language_config(reader, source.n_ctx)
    return ModelConfig(
        name=source.name, language=language, vision=source.vision, projector=source.projector, template='chatml'
    )


def _merged(adapter: Path) -> Callable[[str, NDArray[np.float32]], NDArray[np.float32]]:
    """What adds the adapter's delta to a matrix of the language model, by its name in GGUF."""
    import gguf

    lora = gguf.GGUFReader(adapter)
    alpha = float(lora.fields['adapter.lora.alpha'].contents())
    factors = {tensor.name: np.asarray(tensor.data, np.float32) for tensor in lora.tensors}

    def merge(name: str, matrix: NDArray[np.float32]) -> NDArray[np.float32]:
        a = factors.get(f'{name}.lora_a')
        if a is None:
            return matrix
        return matrix + np.float32(alpha / a.shape[0]) * (factors[f'{name}.lora_b'] @ a)

    return merge


class _PromptTokenizer:
    """The tokenizer of the GGUF, asked as prompts ask."""

    def __init__(self, reader: Any) -> None:
        self._tokenizer = read_byte_level_tokenizer(reader)

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Token ids; this vocabulary starts no text with a special token."""
        if special:
            return [self._tokenizer.token_to_id(text)]
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


if __name__ == '__main__':
    target = shared_file('models/nano') / REFERENCE
    reference = record_nano()
    write_reference(target, reference)
    print(json.dumps({'written': str(target), 'bytes': target.stat().st_size, 'made_by': reference.made_by}))
