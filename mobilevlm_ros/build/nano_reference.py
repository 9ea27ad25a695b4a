"""Records what PyTorch makes of nano, when its weights change: ``python -m mobilevlm_ros.build.nano_reference``.

Remakes what its bundle is compared with (``models/nano/reference.npz``), and with ``--parity FILE`` what the tests
compare whole answers with, for the picture that is in that file. Needs PyTorch and transformers. The language model is
read back out of its GGUF file, the LoRA merged into it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
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
from mobilevlm_ros.build.reference import QUESTIONS, Reference, write_reference
from mobilevlm_ros.build.stages import SilentReporter
from mobilevlm_ros.model.config import ModelConfig
from mobilevlm_ros.paths import shared_file
from mobilevlm_ros.runtime.prompt import SHORT_SUFFIX, described_template

__all__ = ['record_nano', 'write_parity']

_N_IMAGES = 3
_END = '<|im_end|>'
_PARITY_QUESTIONS = tuple(
    question + SHORT_SUFFIX for question in ('Is there a car here?', 'Is there a cat?', 'Is there a person?')
)
_PARITY_TOKENS = 48


def record_nano(
    packages: Path | None = None,
    *,
    images: Sequence[NDArray[np.uint8]] = (),
    questions: Sequence[str] = QUESTIONS,
    n_tokens: int = 12,
) -> Reference:
    """Compute the reference.

    :param images: uint8 ``[height, width, 3]``, RGB; none: three that are shipped for calibration.
    """
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
            images or read_images(shared_file('models/calibration'))[:_N_IMAGES],
            SilentReporter(),
            questions=questions,
            n_tokens=n_tokens,
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

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, up to the token that ends it."""
        ending = self._tokenizer.token_to_id(_END)
        kept = list(ids)[: list(ids).index(ending)] if ending in ids else list(ids)
        return str(self._tokenizer.decode(kept)).strip()


def write_parity(path: Path) -> None:
    """Answer the tests' questions about the picture in ``path`` with PyTorch, and write both there."""
    import gguf

    with np.load(path, allow_pickle=False) as file:
        image = file['image']
    reference = record_nano(images=[image], questions=_PARITY_QUESTIONS, n_tokens=_PARITY_TOKENS)
    source = NanoSource(None, SilentReporter())
    with tempfile.TemporaryDirectory() as folder:
        language = Path(folder) / 'language.gguf'
        language.write_bytes(source.language_file())
        tokenizer = _PromptTokenizer(gguf.GGUFReader(language))
    seen = reference.images[0]
    arrays: dict[str, Any] = {'image': image, 'projected': seen.visual_tokens}
    for index, answer in enumerate(seen.answers):
        arrays |= {
            'before_ids': np.array(answer.before_ids, np.int32),
            f'question_{index}': np.array(answer.question),
            f'answer_{index}': np.array(tokenizer.decode(answer.greedy_ids)),
            f'after_ids_{index}': np.array(answer.after_ids, np.int32),
        }
    np.savez_compressed(path, **arrays)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Records what PyTorch makes of nano, when its weights change.')
    parser.add_argument('--parity', metavar='FILE', type=Path, help='remake this file of the tests, too')
    options = parser.parse_args()
    target = shared_file('models/nano') / REFERENCE
    reference = record_nano()
    write_reference(target, reference)
    print(json.dumps({'written': str(target), 'bytes': target.stat().st_size, 'made_by': reference.made_by}))
    if options.parity:
        write_parity(options.parity)
