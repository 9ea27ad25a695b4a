"""The costs of a bundle's files; in a process of its own, since a parsed graph of a gigabyte stays in memory."""

from __future__ import annotations

from pathlib import Path

from mobilevlm_ros.bench.language_cost import LanguageCost, read_language_cost
from mobilevlm_ros.bench.vision_cost import VisionCost, read_vision_cost
from mobilevlm_ros.runtime.bundle import open_bundle

__all__ = ['Shapes']


class Shapes:
    """Reads files; see ``read_language_cost`` and ``read_vision_cost``."""

    def of_bundle(self, path: str) -> tuple[LanguageCost, VisionCost | None]:
        """Costs of a bundle's two engines."""
        bundle = open_bundle(Path(path), verify_hashes=False)
        kv_type = bundle.language_options().kv_type
        return (
            read_language_cost(bundle.language_path, bundle.adapter_path, kv_type),
            read_vision_cost(bundle.vision_path),
        )

    def of_gguf(self, path: str) -> LanguageCost:
        """Costs of a language model alone."""
        return read_language_cost(Path(path))
