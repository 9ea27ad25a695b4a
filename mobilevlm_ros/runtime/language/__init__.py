"""Language engines: tokens and embeddings in, logits out; llama.cpp, and a deterministic fake."""

from mobilevlm_ros.runtime.language.interface import (
    EmbeddingSegment,
    Grammar,
    LanguageEngine,
    LanguageOptions,
    PerfCounters,
    PrefillStats,
    Segment,
    TokenSegment,
)

__all__ = [
    'EmbeddingSegment',
    'Grammar',
    'LanguageEngine',
    'LanguageOptions',
    'PerfCounters',
    'PrefillStats',
    'Segment',
    'TokenSegment',
]
