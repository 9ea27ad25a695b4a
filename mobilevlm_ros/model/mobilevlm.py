"""MobileVLM in PyTorch: vision tower, projector and language model, put together by the published rules.

The reference that engines are compared with, and the model that training trains. Prompts come as token ids in which
-200 stands for an image; where the ids come from is not known here. Sources: mobilevlm/model/mobilevlm.py
(``prepare_inputs_labels_for_multimodal``), mobilevlm/constants.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from mobilevlm_ros.errors import CheckpointShapeError, SettingsError
from mobilevlm_ros.model.config import LanguageConfig, ModelConfig
from mobilevlm_ros.model.layout import PROJECTOR_PREFIX, TOWER_PREFIX
from mobilevlm_ros.model.projectors import build_projector
from mobilevlm_ros.model.towers import ClipTower, build_tower, clip_config

__all__ = ['IGNORED_LABEL', 'IMAGE_TOKEN', 'MobileVLM', 'Spliced', 'load_mobilevlm', 'published_name']

IMAGE_TOKEN = -200
"""Stands for an image among token ids."""
IGNORED_LABEL = -100
"""The label of a position that takes no part in the loss."""

Pixels = Tensor | Sequence[Tensor] | None


@dataclass(frozen=True)
class Spliced:
    """What the language model reads, images in place, shorter samples padded on the right.

    :ivar embeddings: ``[B, L, n_embd]``, zero in padding.
    :ivar attention_mask: ``[B, L]``, int64, 0 in padding.
    :ivar labels: ``[B, L]``, int64, -100 on images and padding; None where none were given.
    :ivar positions: ``[B, L]``, int64: which of the ids a row stands for, rows of an image for its slot; -1 in padding.
    """

    embeddings: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    positions: Tensor


class MobileVLM(nn.Module):
    """A model of any configuration, freshly initialised; one without vision is a language model alone.

    The tower is frozen, as every published recipe leaves it.

    :raise DependencyError: if its tower is one of timm's, and timm cannot be imported.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower: nn.Module | None = None
        self.projector: nn.Module | None = None
        if config.vision is not None and config.projector is not None:
            self.vision_tower = build_tower(config.vision).requires_grad_(False)
            self.projector = build_projector(config.projector, config.vision.feature_width, config.language.n_embd)
        self.language = LlamaForCausalLM(_llama_config(config.language))

    def encode_images(self, pixels_nchw: Tensor) -> Tensor:
        """``[B, 3, S, S]``, normalised, to visual tokens ``[B, n_visual_tokens, n_embd]``.

        :raise SettingsError: if it is a language model alone.
        """
        if self.vision_tower is None or self.projector is None:
            raise SettingsError(f'{self.config.name} is a language model alone and takes no images')
        dtype = next(self.projector.parameters()).dtype
        tokens: Tensor = self.projector(self.vision_tower(pixels_nchw.to(dtype)).to(dtype))
        return tokens

    def splice(
        self,
        input_ids: Tensor,
        pixels_nchw: Pixels = None,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Spliced:
        """Put visual tokens where the ids say -200.

        Images are used up in order: one by each -200, and one by each sample without any, whose slot is not looked at.

        :param input_ids: ``[B, L]``, int64, padded on the right.
        :param pixels_nchw: ``[N, 3, S, S]``, one image for each slot; or ``[N, K, 3, S, S]`` or N tensors
            ``[K, 3, S, S]``, where a slot takes all K images.
        :param attention_mask: ``[B, L]``, nonzero where ids count; None: everywhere.
        :param labels: ``[B, L]``, int64.
        :raise SettingsError: if there are more or fewer images than slots.
        """
        slots = self._slots(pixels_nchw)
        n_needed = sum(max(1, int((ids == IMAGE_TOKEN).sum())) for ids in input_ids)
        if len(slots) != n_needed and (slots or bool((input_ids == IMAGE_TOKEN).any())):
            raise SettingsError(
                f'the prompts have room for {n_needed} images (a prompt without any takes one, unseen), '
                f'found {len(slots)}'
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
        samples = []
        for row, ids in enumerate(input_ids):
            n_taken = max(1, int((ids == IMAGE_TOKEN).sum()))
            images, slots = slots[:n_taken], slots[n_taken:]
            samples.append(self._spliced_sample(ids, images, mask[row], None if labels is None else labels[row]))
        pad = nn.utils.rnn.pad_sequence
        return Spliced(
            embeddings=pad([one[0] for one in samples], batch_first=True),
            attention_mask=pad([one[1] for one in samples], batch_first=True),
            labels=None
            if labels is None
            else pad([one[2] for one in samples if one[2] is not None], True, IGNORED_LABEL),
            positions=pad([one[3] for one in samples], True, -1),
        )

    def forward(
        self,
        input_ids: Tensor,
        pixels_nchw: Pixels = None,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Logits, and with labels the loss: next-token cross-entropy, mean over labels that are not -100.

        :param options: passed on to transformers' LlamaForCausalLM, such as ``use_cache``.
        :return: transformers' CausalLMOutputWithPast; ``logits [B, L', n_vocab]`` are those of the spliced sequence.
        :raise SettingsError: as ``splice``, whose parameters these are.
        """
        spliced = self.splice(input_ids, pixels_nchw, attention_mask=attention_mask, labels=labels)
        return self.language(
            inputs_embeds=spliced.embeddings,
            attention_mask=spliced.attention_mask,
            labels=spliced.labels,
            **options,
        )

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        pixels_nchw: Pixels = None,
        *,
        max_new_tokens: int = 512,
        stop_tokens: Sequence[int] = (2,),
    ) -> list[int]:
        """Greedy answer to one prompt ``[1, L]``, without the stop token; ends early where the context is full.

        :raise SettingsError: if there is more than one prompt, or as ``splice``.
        """
        if input_ids.shape[0] != 1:
            raise SettingsError(f'one prompt can be answered at a time, found {input_ids.shape[0]}')
        embeddings = self.splice(input_ids, pixels_nchw).embeddings
        n_room = self.config.language.n_ctx - embeddings.shape[1]
        step: dict[str, Any] = {'inputs_embeds': embeddings}
        answer: list[int] = []
        for _ in range(min(max_new_tokens, n_room)):
            output = self.language(**step, use_cache=True, logits_to_keep=1)
            token = int(output.logits[0, -1].argmax())
            if token in stop_tokens:
                break
            answer.append(token)
            step = {'input_ids': input_ids.new_tensor([[token]]), 'past_key_values': output.past_key_values}
        return answer

    def _slots(self, pixels_nchw: Pixels) -> list[Tensor]:
        """Visual tokens ``[rows, n_embd]`` of each image slot."""
        if pixels_nchw is None:
            return []
        if isinstance(pixels_nchw, Tensor) and pixels_nchw.ndim == 4:
            return list(self.encode_images(pixels_nchw))
        counts = [len(images) for images in pixels_nchw]
        tokens = self.encode_images(torch.cat(list(pixels_nchw)))
        return [part.flatten(0, 1) for part in tokens.split(counts)]

    def _spliced_sample(
        self, ids: Tensor, images: list[Tensor], mask: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        positions = torch.arange(len(ids), device=ids.device)
        at = torch.nonzero(ids == IMAGE_TOKEN).flatten().tolist()
        embedded = self.language.get_input_embeddings()(ids.where(ids != IMAGE_TOKEN, 0))
        images = [image.to(embedded.dtype) for image in images]
        if not at:
            # Nothing of the unseen image but its gradient: parallel training waits for that of every parameter.
            return torch.cat([embedded, *(image[:0] for image in images)]), mask, labels, positions
        seen = [mask.new_ones(len(image)) for image in images]
        ignored = [mask.new_full((len(image),), IGNORED_LABEL) for image in images]
        # Published code lengthens the mask with ones on the left; for masks with ones first that is the same.
        return (
            _replaced(embedded, at, images),
            _replaced(mask, at, seen),
            None if labels is None else _replaced(labels, at, ignored),
            _replaced(
                positions, at, [positions[slot].expand(len(image)) for slot, image in zip(at, images, strict=True)]
            ),
        )


def _replaced(row: Tensor, at: Sequence[int], pieces: Sequence[Tensor]) -> Tensor:
    """``row [L, ...]`` with a piece ``[any, ...]`` in the place of each position of ``at``."""
    parts = []
    start = 0
    for position, piece in zip(at, pieces, strict=True):
        parts += [row[start:position], piece]
        start = position + 1
    return torch.cat([*parts, row[start:]])


def _llama_config(config: LanguageConfig) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=config.n_vocab,
        hidden_size=config.n_embd,
        intermediate_size=config.n_ff,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        max_position_embeddings=config.n_ctx,
        rms_norm_eps=config.norm_eps,
        rope_parameters={'rope_type': 'default', 'rope_theta': config.rope_base},
        tie_word_embeddings=config.tie_embeddings,
    )


# -- published weights --------------------------------------------------------------------------------------------


def published_name(name: str) -> str:
    """What published checkpoints call a parameter of ``MobileVLM``."""
    for ours, published in (('language.', ''), ('projector.', PROJECTOR_PREFIX), ('vision_tower.', TOWER_PREFIX)):
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    raise ValueError(f'{name} is no parameter of MobileVLM')


def load_mobilevlm(
    config: ModelConfig, tensors: Mapping[str, NDArray[np.float32]], dtype: torch.dtype = torch.float32
) -> MobileVLM:
    """The model with given weights, in eval mode.

    Reads each tensor once and lets it go before the next, so that with lazy values only one model is in memory.

    :param tensors: under published names; of a model with tied embeddings without ``lm_head.weight``.
    :raise CheckpointShapeError: if a tensor is missing, too many or of another shape.
    """
    with torch.device('meta'):
        model = MobileVLM(config)
    parameters = dict(model.named_parameters())
    expected = {published_name(name): name for name in parameters}
    # A set, as asking a Mapping whether it holds a key may read the value.
    _check_names(config.name, set(tensors), {name: tuple(parameters[ours].shape) for name, ours in expected.items()})
    for published, name in expected.items():
        before = parameters[name]
        parent, _, leaf = name.rpartition('.')
        value = _read(tensors, published, config.name, tuple(before.shape), dtype)
        setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=before.requires_grad))
    if config.language.tie_embeddings:
        model.language.tie_weights()
    _compute_buffers(model)
    return model.eval()


def _read(
    tensors: Mapping[str, NDArray[np.float32]], name: str, model: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """A copy of one tensor; the array that it came from does not outlive the call."""
    array = tensors[name]
    if array.shape != shape:
        raise CheckpointShapeError(f'{name} has shape {array.shape}, {model} has {shape}: these are other weights')
    return torch.tensor(array, dtype=dtype)


def _check_names(model: str, found: set[str], expected: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointShapeError(
            f'the weights lack {len(missing)} of the {len(expected)} tensors of {model}, the first being {missing[0]} '
            f'of shape {expected[missing[0]]}'
        )
    unknown = sorted(found - expected.keys())
    if unknown:
        raise CheckpointShapeError(
            f'the weights have {len(unknown)} tensors that {model} does not have, the first being {unknown[0]}'
        )


def _compute_buffers(model: MobileVLM) -> None:
    """Give values to what transformers computes while it builds, which on the meta device it cannot."""
    language = _llama_config(model.config.language)
    language.num_hidden_layers, language.vocab_size = 0, 1
    _take_buffers(model.language, LlamaForCausalLM(language))
    if isinstance(model.vision_tower, ClipTower) and model.config.vision is not None:
        vision = clip_config(model.config.vision)
        vision.num_hidden_layers = 0
        small = CLIPVisionModel(vision)
        _take_buffers(model.vision_tower.vision_model, getattr(small, 'vision_model', small))


def _take_buffers(module: nn.Module, small: nn.Module) -> None:
    for name, buffer in small.named_buffers():
        parent, _, leaf = name.rpartition('.')
        setattr(module.get_submodule(parent), leaf, buffer)
