"""A process of its own that builds towers of timm and says on one line of JSON each what they give.

timm imports names of torchvision for its data pipeline and its BatchNorm. torchvision has to be of the same build as
torch: there is none for every CPU build of torch, and one that does not fit breaks transformers, too, so this project
does not install it. The towers are tested for real nonetheless: where torchvision is absent, a stand-in gives timm the
few names that it imports at module level and that no code of a model uses. It must not be seen by other tests.
"""

from __future__ import annotations

import enum
import importlib.util
import json
import sys
import types
from typing import Any

import torch

from mobilevlm_ros.errors import MobileVLMError
from mobilevlm_ros.model.config import VisionConfig
from mobilevlm_ros.model.towers import build_tower  # with transformers, which must come before the stand-in

MODULES = ('transforms', 'transforms.functional', 'datasets', 'ops', 'ops.misc', 'models', 'models.feature_extraction')


class StandIn(types.ModuleType):
    """A module that has every name, as an empty class."""

    InterpolationMode = enum.Enum('InterpolationMode', 'NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS')
    __path__: list[str] = []  # noqa: RUF012 - what makes a module a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        return type(name, (), {})


def describe(config: VisionConfig) -> dict[str, Any]:
    torch.manual_seed(0)
    tower: Any = build_tower(config).eval()
    pixels = torch.randn(1, 3, config.image_size, config.image_size)
    with torch.no_grad():
        features = tower(pixels)
        inner = tower.model.forward_features(pixels)
    n_prefix = getattr(tower.model, 'num_prefix_tokens', 0)

    def at(row: int, column: int) -> torch.Tensor:
        if inner.ndim == 3:
            return inner[0, n_prefix + row * config.grid + column]
        return inner[0, row, column] if inner.shape[-1] == config.width else inner[0, :, row, column]

    cells = [(row, column) for row in range(config.grid) for column in range(config.grid)]
    return {
        'shape': list(features.shape),
        'inner_shape': list(inner.shape),
        'is_row_major': all(torch.equal(features[0, index], at(*cell)) for index, cell in enumerate(cells)),
        'n_prefix_tokens': n_prefix,
        'n_parameters': sum(parameter.numel() for parameter in tower.parameters()),
    }


def main() -> None:
    if importlib.util.find_spec('torchvision') is None:
        sys.modules['torchvision'] = StandIn('torchvision')
        for module in MODULES:
            parent, _, leaf = f'torchvision.{module}'.rpartition('.')
            sys.modules[f'{parent}.{leaf}'] = StandIn(leaf)
            setattr(sys.modules[parent], leaf, sys.modules[f'{parent}.{leaf}'])
    for line in sys.argv[1:]:
        try:
            found = describe(VisionConfig(kind='timm', select_layer=-1, **{'n_heads': 1, **json.loads(line)}))
        except MobileVLMError as error:
            found = {'error': f'{type(error).__name__}: {error}'}
        print(json.dumps(found))


if __name__ == '__main__':
    main()
