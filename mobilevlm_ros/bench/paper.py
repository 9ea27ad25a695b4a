"""The latency tables of the MobileVLM paper (arXiv 2312.16886, Tables 5 and 6) and how they were taken.

Figures and protocols only. What must be known before comparing with them:

- Totals of Table 5 have next to no loading time in them (they equal the sum of their parts).
- Table 6's total (the paper's Eq. 4) has no term for the vision encoder. Its two Snapdragon rows of LLaVA with
  OpenLLaMA and TinyLLaMA exceed their own totals by 20 s and 8 s if 576 visual tokens are prefilled.
- Whether VE divides by 144 visual tokens or 576 patches is not said. Users measured 143 to 147 ms a patch (by 144) on
  the same phone, about twenty times the paper's figure; llama.cpp's own log agrees with the users.
"""

from __future__ import annotations

from dataclasses import dataclass

from mobilevlm_ros.bench.language_cost import LanguageCost
from mobilevlm_ros.model.config import LanguageConfig

__all__ = [
    'TABLE5',
    'TABLE5_PROMPT',
    'TABLE5_TOKENS',
    'TABLE6',
    'TABLE6_PROMPT',
    'TABLE6_SIDE',
    'TABLE6_TOKENS',
    'Table5Row',
    'Table6Row',
    'model_of',
]

TABLE5_PROMPT = 'Building a website can be done in 10 simple steps:\nStep 1:'
TABLE5_TOKENS = 400
TABLE6_PROMPT = 'What is in the picture?'
TABLE6_TOKENS = 256
TABLE6_SIDE = 336

_SHAPES = {
    (26, 3200, 8640): 'OpenLLaMA 3B',
    (32, 2560, 6912): 'MobileLLaMA 2.7B',
    (22, 2048, 5632): 'TinyLLaMA 1.1B',
    (24, 2048, 5632): 'MobileLLaMA 1.4B',
    (32, 4096, 11008): 'Vicuna 7B',
}


def model_of(cost: LanguageCost | LanguageConfig) -> str:
    """The paper's name for a language model of these sizes; empty if it has none."""
    return _SHAPES.get((cost.n_layers, cost.n_embd, cost.n_ff), '')


@dataclass(frozen=True)
class Table5Row:
    """Latency of a language model: tokens a second, and seconds in all."""

    model: str
    bits: int
    device: str
    size_gb: float
    sample: float
    prompt: float
    eval: float
    total_s: float


@dataclass(frozen=True)
class Table6Row:
    """Latency of a vision language model; VE in milliseconds a patch."""

    model: str
    language: str
    device: str
    size_gb: float
    ve_ms: float
    sample: float
    prompt: float
    eval: float
    total_s: float


_PHONE, _ORIN = 'Snapdragon 888', 'Jetson AGX Orin'

TABLE5 = (
    Table5Row('OpenLLaMA 3B', 8, _PHONE, 3.4, 3093, 7.32, 6.58, 63.33),
    Table5Row('OpenLLaMA 3B', 4, _PHONE, 2.3, 3604, 8.97, 7.14, 58.04),
    Table5Row('MobileLLaMA 2.7B', 8, _PHONE, 2.7, 3919, 17.59, 9.14, 44.85),
    Table5Row('MobileLLaMA 2.7B', 4, _PHONE, 1.5, 3932, 18.10, 14.71, 28.30),
    Table5Row('TinyLLaMA 1.1B', 8, _PHONE, 1.1, 4215, 39.49, 19.75, 20.83),
    Table5Row('TinyLLaMA 1.1B', 4, _PHONE, 0.6, 3887, 44.17, 31.54, 13.22),
    Table5Row('MobileLLaMA 1.4B', 8, _PHONE, 1.4, 3846, 35.46, 17.93, 22.81),
    Table5Row('MobileLLaMA 1.4B', 4, _PHONE, 0.7, 3870, 36.20, 28.32, 14.76),
    Table5Row('OpenLLaMA 3B', 8, _ORIN, 3.4, 2382, 80.34, 29.97, 13.94),
    Table5Row('OpenLLaMA 3B', 4, _ORIN, 2.3, 3340, 143.25, 32.16, 12.83),
    Table5Row('MobileLLaMA 2.7B', 8, _ORIN, 2.7, 3040, 133.41, 33.28, 12.46),
    Table5Row('MobileLLaMA 2.7B', 4, _ORIN, 1.5, 2647, 130.97, 38.99, 10.74),
    Table5Row('TinyLLaMA 1.1B', 8, _ORIN, 1.1, 3007, 279.61, 72.30, 5.89),
    Table5Row('TinyLLaMA 1.1B', 4, _ORIN, 0.6, 3801, 306.76, 78.83, 5.38),
    Table5Row('MobileLLaMA 1.4B', 8, _ORIN, 1.4, 3289, 249.56, 60.73, 6.96),
    Table5Row('MobileLLaMA 1.4B', 4, _ORIN, 0.7, 3738, 253.22, 66.79, 6.33),
)

TABLE6 = (
    Table6Row('LLaVA-1.5 Vicuna-7B', 'Vicuna 7B', _PHONE, 4.70, 8.23, 17347, 5.36, 0.25, 329.89),
    Table6Row('LLaVA-1.5 OpenLLaMA-3B', 'OpenLLaMA 3B', _PHONE, 2.88, 7.98, 27530, 8.95, 7.22, 84.43),
    Table6Row('LLaVA-1.5 TinyLLaMA-1B', 'TinyLLaMA 1.1B', _PHONE, 1.18, 7.77, 31370, 41.70, 18.40, 20.70),
    Table6Row('MobileVLM 2.7B', 'MobileLLaMA 2.7B', _PHONE, 2.14, 8.43, 27660, 18.36, 12.21, 33.10),
    Table6Row('MobileVLM 1.4B', 'MobileLLaMA 1.4B', _PHONE, 1.40, 6.82, 34892, 34.93, 21.54, 18.51),
    Table6Row('LLaVA-1.5 Vicuna-7B', 'Vicuna 7B', _ORIN, 4.70, 2.89, 9281, 367.26, 17.74, 19.75),
    Table6Row('LLaVA-1.5 OpenLLaMA-3B', 'OpenLLaMA 3B', _ORIN, 2.88, 2.94, 22270, 474.49, 30.66, 12.52),
    Table6Row('LLaVA-1.5 TinyLLaMA-1B', 'TinyLLaMA 1.1B', _ORIN, 1.18, 2.98, 24655, 1253.94, 76.63, 5.90),
    Table6Row('MobileVLM 2.7B', 'MobileLLaMA 2.7B', _ORIN, 2.14, 3.11, 15678, 440.60, 38.34, 8.31),
    Table6Row('MobileVLM 1.4B', 'MobileLLaMA 1.4B', _ORIN, 1.40, 3.32, 17712, 667.69, 65.27, 5.14),
)
