"""Records what PyTorch makes of a few images, for ``parity.py`` to hold a bundle's engines against.

The only module of this room that runs the model in PyTorch. Tower and projector always in float32; the language model
too if it fits the memory, else in bfloat16, which the record says. The two are never in memory together.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import psutil
from numpy.typing import NDArray

from mobilevlm_ros.build.reference import QUESTIONS, Reference, ReferenceAnswer, ReferenceImage
from mobilevlm_ros.build.stages import Reporter
from mobilevlm_ros.errors import BuildError, DependencyError
from mobilevlm_ros.model.config import LanguageConfig, ModelConfig
from mobilevlm_ros.runtime.prompt import PromptTemplate

if TYPE_CHECKING:
    import torch

__all__ = ['Tokenizer', 'n_language_parameters', 'record_reference']

Weights = Mapping[str, NDArray[np.float32]]
_WORKING_BYTES = 2 << 30


class Tokenizer(Protocol):
    """The model's own tokenizer, not llama.cpp's."""

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Token ids of ``text``."""
        ...


def record_reference(
    config: ModelConfig,
    vision_weights: Weights,
    language_weights: Weights,
    tokenizer: Tokenizer,
    template: PromptTemplate,
    images: Sequence[NDArray[np.uint8]],
    reporter: Reporter,
    *,
    questions: Sequence[str] = QUESTIONS,
    n_tokens: int = 12,
    n_kept: int = 4,
    n_features: int = 1,
) -> Reference:
    """Run the model on every image.

    :param images: uint8 ``[height, width, 3]``, RGB.
    :param questions: asked about each of them.
    :param n_tokens: greedy tokens of each answer.
    :param n_kept: before how many of them the logits are kept.
    :param n_features: of how many images the tower's features are kept.
    :raise DependencyError: if PyTorch or transformers is missing.
    :raise BuildError: if the memory does not suffice.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise DependencyError(
            f'checking a bundle against PyTorch needs torch and transformers ({error}). Install them with: '
            'pip install torch transformers sentencepiece (exact versions: requirements/convert.txt)'
        ) from error
    made_by = f'PyTorch {torch.__version__.split("+")[0]}, transformers {transformers.__version__}'
    resized = [_published_preprocessing(config, rgb_hwc) for rgb_hwc in images]
    with torch.inference_mode():
        features, tokens = _run_vision(config, vision_weights, resized, reporter)
        language, precision = _load_language(config, language_weights)
        done: list[ReferenceImage] = []
        for i, rgb_hwc in enumerate(images):
            reporter.progress(i, len(images))
            answers = []
            for question in questions:
                before, after = template.chunks(question, tokenizer)
                answers.append(_answer(language, question, before, after, tokens[i], n_tokens, n_kept))
            kept = features[i] if i < n_features else None
            done.append(ReferenceImage(rgb_hwc, resized[i], kept, tokens[i], tuple(answers)))
    return Reference(f'{made_by}, float32', f'{made_by}, {precision}', tuple(done))


def _published_preprocessing(config: ModelConfig, rgb_hwc: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Uint8 ``[3, S, S]`` by expand2square of mobilevlm/utils.py and transformers' CLIP image processor."""
    from PIL import Image
    from transformers.models.clip import CLIPImageProcessorPil

    vision = config.vision
    assert vision is not None
    picture = Image.fromarray(rgb_hwc)
    if config.aspect == 'pad' and picture.width != picture.height:
        side = max(picture.size)
        square = Image.new('RGB', (side, side), tuple(int(channel * 255) for channel in vision.mean))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    size = vision.image_size
    processor: Any = CLIPImageProcessorPil(
        size={'shortest_edge': size}, crop_size={'height': size, 'width': size}, do_normalize=False, do_rescale=False
    )
    pixels = np.asarray(processor(picture, return_tensors='np')['pixel_values'][0])
    return np.ascontiguousarray(np.rint(pixels).astype(np.uint8))


def _run_vision(
    config: ModelConfig, weights: Weights, resized: Sequence[NDArray[np.uint8]], reporter: Reporter
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
    import torch

    from mobilevlm_ros.model.projectors import build_projector
    from mobilevlm_ros.model.towers import build_tower

    assert config.vision is not None
    assert config.projector is not None
    tower = build_tower(config.vision).eval()
    projector = build_projector(config.projector, config.vision.feature_width, config.language.n_embd).eval()
    _fill(tower, weights, '', config.vision.n_run_blocks)
    _fill(projector, weights, 'model.mm_projector.')
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.vision.mean, config.vision.std))
    features, tokens = [], []
    for i, picture in enumerate(resized):
        reporter.progress(i, len(resized))
        pixels = (torch.from_numpy(picture).float() / 255 - mean) / std
        seen = tower(pixels[None])
        features.append(seen[0].numpy().copy())
        tokens.append(projector(seen)[0].numpy().copy())
    del tower, projector
    gc.collect()
    return features, tokens


def _fill(module: Any, weights: Weights, prefix: str, n_run_blocks: int | None = None) -> None:
    """Copy weights into a module; those of blocks that never run may be missing."""
    import torch

    for name, parameter in module.named_parameters():
        match = re.search(r'encoder\.layers\.(\d+)\.', name)
        dead = 'post_layernorm' in name or (match and n_run_blocks is not None and int(match[1]) >= n_run_blocks)
        if dead:
            continue
        value = weights.get(prefix + name)
        if value is None or value.shape != tuple(parameter.shape):
            found = 'none' if value is None else f'one of shape {value.shape}'
            raise BuildError(f'expected the tensor {prefix + name} of shape {tuple(parameter.shape)}, found {found}')
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)))


def _load_language(config: ModelConfig, weights: Weights) -> tuple[Any, str]:
    """The language model, in float32 if that fits."""
    import torch

    from mobilevlm_ros.model.mobilevlm import load_mobilevlm

    n_parameters = n_language_parameters(config.language)
    available = psutil.virtual_memory().available
    for dtype, precision, n_bytes in ((torch.float32, 'float32', 4), (torch.bfloat16, 'bfloat16', 2)):
        if n_parameters * n_bytes + _WORKING_BYTES <= available:
            alone = replace(config, vision=None, projector=None)
            return load_mobilevlm(alone, weights, dtype).language, precision
    raise BuildError(
        f'checking {config.name} against PyTorch takes {(n_parameters * 2 + _WORKING_BYTES) >> 20} MiB of memory, '
        f'{available >> 20} MiB are free: stop other programs, or build on a larger computer and copy the bundle'
    )


def n_language_parameters(config: LanguageConfig) -> int:
    """Parameters of the matrices, which are all that counts."""
    block = 2 * config.n_embd**2 + 2 * config.n_embd * config.n_kv_heads * config.head_width
    block += 3 * config.n_embd * config.n_ff
    return config.n_layers * block + (1 if config.tie_embeddings else 2) * config.n_vocab * config.n_embd


def _answer(
    language: Any,
    question: str,
    before: list[int],
    after: list[int],
    visual_tokens: NDArray[np.float32],
    n_tokens: int,
    n_kept: int,
) -> ReferenceAnswer:
    import torch

    embed: Callable[[torch.Tensor], torch.Tensor] = language.get_input_embeddings()
    rows = torch.from_numpy(visual_tokens).to(language.dtype)
    parts = [embed(torch.tensor(before, dtype=torch.long)), rows, embed(torch.tensor(after, dtype=torch.long))]
    output = language(inputs_embeds=torch.cat(parts)[None], use_cache=True)
    logits: list[NDArray[np.float32]] = []
    ids: list[int] = []
    for _ in range(n_tokens):
        last = output.logits[0, -1].float().numpy()
        ids.append(int(last.argmax()))
        if len(logits) < n_kept:
            logits.append(last.copy())
        output = language(input_ids=torch.tensor([[ids[-1]]]), past_key_values=output.past_key_values, use_cache=True)
    return ReferenceAnswer(question, tuple(before), tuple(after), tuple(ids), np.stack(logits))
