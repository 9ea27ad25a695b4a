"""The cost card: what an answer costs, what this machine can do, and so how fast an answer can be at best.

Bounds are the greater of two times: computing at the measured rate of products, and reading the weights at the
measured rate of memory. They leave out everything else, so nothing real reaches them quite.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mobilevlm_ros.bench.language_cost import LanguageCost
from mobilevlm_ros.bench.limits import Product
from mobilevlm_ros.bench.process import Contestant
from mobilevlm_ros.bench.vision_cost import VisionCost

__all__ = ['PROMPT_TOKENS', 'Ceilings', 'CostCard', 'measure_ceilings']

PROMPT_TOKENS = 164
"""Rows of the prompt's product: 144 visual tokens and a short question, about what a new frame computes."""


@dataclass(frozen=True)
class Ceilings:
    """Measured on this machine, with as many threads as the engines get.

    :ivar read_bytes: from memory, in bytes a second.
    :ivar vision_fp32: products of the vision tower's largest shape, in FLOP/s; ``_int8`` in operations a second.
    :ivar prompt_fp32: products of the prompt's largest shape.
    :ivar foreign_cores: load of other programs meanwhile: the machine can do more than this says.
    """

    n_threads: int
    read_bytes: float
    vision_product: Product | None
    vision_fp32: float | None
    vision_int8: float | None
    prompt_product: Product
    prompt_fp32: float
    prompt_int8: float | None
    foreign_cores: float = 0.0


def measure_ceilings(
    language: LanguageCost, vision: VisionCost | None, n_threads: int, *, seconds: float, buffer_bytes: int
) -> Ceilings:
    """Measure in a fresh process whose BLAS has ``n_threads`` threads.

    :param seconds: for each ceiling; about six of them.
    """
    prompt: Product = (PROMPT_TOKENS, language.n_embd, language.n_ff)
    threads = {'OPENBLAS_NUM_THREADS': str(n_threads), 'OMP_NUM_THREADS': str(n_threads)}
    with Contestant('limits', threads, n_threads=n_threads, seconds=seconds) as limits:
        product = vision.product if vision is not None else None
        return Ceilings(
            n_threads=n_threads,
            read_bytes=limits.call('read_bytes_per_s', buffer_bytes=buffer_bytes),
            vision_product=product,
            vision_fp32=limits.call('fp32_flops', product=product) if product else None,
            vision_int8=limits.call('int8_flops', product=product) if product else None,
            prompt_product=prompt,
            prompt_fp32=limits.call('fp32_flops', product=prompt),
            prompt_int8=limits.call('int8_flops', product=prompt),
        )


@dataclass(frozen=True)
class CostCard:
    """Costs of one model beside the ceilings."""

    language: LanguageCost
    vision: VisionCost | None
    ceilings: Ceilings

    @property
    def vision_flops_per_s(self) -> float | None:
        """The rate that bounds the vision engine: int8 products if it multiplies in int8."""
        if self.vision is None:
            return None
        return self.ceilings.vision_int8 if self.vision.int8 else self.ceilings.vision_fp32

    @property
    def prompt_flops_per_s(self) -> float:
        """The rate that bounds a prompt: llama.cpp multiplies quantised weights with int8 activations."""
        int8 = self.ceilings.prompt_int8
        return max(int8, self.ceilings.prompt_fp32) if self.language.quantized and int8 else self.ceilings.prompt_fp32

    @property
    def vision_bound_s(self) -> float | None:
        """Of one image."""
        rate = self.vision_flops_per_s
        return None if self.vision is None or rate is None else self.vision.flops / rate

    def prefill_bound_s(self, n_tokens: int, n_past: int = 0) -> float:
        """Of a prompt of ``n_tokens`` after ``n_past`` positions."""
        computing_s = self.language.prefill_flops(n_tokens, n_past) / self.prompt_flops_per_s
        read = self.language.weight_bytes + n_past * self.language.kv_bytes
        return max(computing_s, read / self.ceilings.read_bytes)

    def decode_bound_s(self, n_past: int) -> float:
        """Of one token after ``n_past`` positions."""
        read = self.language.weight_bytes + n_past * self.language.kv_bytes
        return read / self.ceilings.read_bytes

    def as_record(self) -> dict[str, Any]:
        """For the JSON line."""
        return {
            'language': asdict(self.language),
            'vision': None if self.vision is None else asdict(self.vision) | {'flops': self.vision.flops},
            'ceilings': asdict(self.ceilings),
            'bounds': {
                'decode_tokens_per_s': 1 / self.decode_bound_s(0),
                'prefill_tokens_per_s': PROMPT_TOKENS / self.prefill_bound_s(PROMPT_TOKENS),
                'vision_s': self.vision_bound_s,
            },
        }
