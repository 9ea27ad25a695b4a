"""The PyTorch model, from a checkpoint in the published layout, on the CPU with the same number of threads.

Greedy, with keys and values kept from token to token, under ``inference_mode``; what a user gets who runs the published
model with transformers. Prompts come as token ids, so that everybody computes the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mobilevlm_ros.bench.scenes import scene
from mobilevlm_ros.errors import DependencyError, EngineError
from mobilevlm_ros.runtime.preprocess import PreprocessSpec, preprocess

__all__ = ['PyTorchModel']


class PyTorchModel:
    """See the module.

    :param dtype: ``float32`` or ``bfloat16``.
    :param before: token ids before the image.
    :param after: token ids after it, by question.
    :raise DependencyError: if torch or transformers is missing.
    :raise MobileVLMError: if the checkpoint cannot be read.
    """

    def __init__(
        self,
        checkpoint: str,
        n_threads: int,
        dtype: str,
        before: Sequence[int],
        after: dict[str, list[int]],
        height: int,
        width: int,
    ) -> None:
        started_s = time.perf_counter()
        try:
            import torch

            from mobilevlm_ros.model.checkpoint import open_checkpoint
            from mobilevlm_ros.model.mobilevlm import load_mobilevlm
        except ImportError as error:
            raise DependencyError(
                f'the PyTorch model needs torch and transformers ({error}). '
                'Install them with: pip install -r requirements/dev.txt'
            ) from error
        torch.set_num_threads(n_threads)
        self._torch = torch
        self._dtype = getattr(torch, dtype)
        with open_checkpoint(Path(checkpoint)) as opened:
            config = opened.config
            if config.vision is None:
                raise EngineError(f'{checkpoint} has no vision tower: expected the checkpoint of a whole MobileVLM')
            self._model: Any = load_mobilevlm(config, opened.tensors, dtype=self._dtype)
        self._spec = PreprocessSpec(config.vision.image_size, config.aspect, config.vision.mean, config.vision.std)
        self._before, self._after = list(before), after
        self._size = height, width
        self._load_s = time.perf_counter() - started_s

    def describe(self) -> dict[str, Any]:
        """How long it took to load."""
        return {'load_s': self._load_s}

    def first_token(self, index: int, question: str) -> dict[str, float]:
        """See the package; every frame is cold."""
        torch = self._torch
        rgb_hwc = scene(index, *self._size)
        with torch.inference_mode():
            started_s = time.perf_counter()
            pixels = torch.from_numpy(preprocess(rgb_hwc, self._spec)).to(self._dtype)
            vision_started_s = time.perf_counter()
            image = self._model.encode_images(pixels)
            vision_s = time.perf_counter() - vision_started_s
            embed = self._model.language.get_input_embeddings()
            before, after = (embed(self._ids(ids)) for ids in (self._before, self._after[question]))
            prompt = torch.cat([before, image.to(before.dtype), after], dim=1)
            out = self._model.language(inputs_embeds=prompt, use_cache=True, logits_to_keep=1)
            int(out.logits[0, -1].argmax())
            total_s = time.perf_counter() - started_s
        return {
            'total_s': total_s,
            'vision_s': vision_s,
            'prompt_tokens': float(prompt.shape[1]),
            'reused_tokens': 0.0,
        }

    def prefill(self, tokens: Sequence[int]) -> float:
        """See the package."""
        with self._torch.inference_mode():
            started_s = time.perf_counter()
            self._model.language(input_ids=self._ids(tokens), use_cache=True, logits_to_keep=1)
            return time.perf_counter() - started_s

    def decode(self, tokens: Sequence[int], n_tokens: int) -> float:
        """See the package."""
        with self._torch.inference_mode():
            out = self._model.language(input_ids=self._ids(tokens), use_cache=True, logits_to_keep=1)
            started_s = time.perf_counter()
            for _ in range(n_tokens):
                token = int(out.logits[0, -1].argmax())
                out = self._model.language(
                    input_ids=self._ids([token]), past_key_values=out.past_key_values, use_cache=True
                )
            int(out.logits[0, -1].argmax())
            return time.perf_counter() - started_s

    def _ids(self, tokens: Sequence[int]) -> Any:
        return self._torch.tensor([list(tokens)])
