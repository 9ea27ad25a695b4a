"""Both halves of the module ``tensorrt``, building and running, so that a plan that is built here can be run here."""

from __future__ import annotations

import json
from typing import Any

from fake_cudart import FakeCudart
from fake_tensorrt import FakeTensorRt
from fake_tensorrt_builder import FakeBuilderTensorRt

_BUILDING = ('NetworkDefinitionCreationFlag', 'BuilderFlag', 'MemoryPoolType', 'IProgressMonitor')


class FakeTensorRtModule(FakeTensorRt):
    """See the module.

    :param plan: what every build gives (``fake_tensorrt.plan_bytes``), but for a number that makes each another one.
    :ivar half: the building half, whose behaviour a test may change.
    :ivar n_built: plans that were built.
    """

    def __init__(self, cudart: FakeCudart, version: str, plan: bytes) -> None:
        super().__init__(cudart, version)
        self.plan = plan
        self.half = FakeBuilderTensorRt(version)
        self.half.DataType = self.DataType  # type: ignore[misc]
        self.n_built = 0
        for name in _BUILDING:
            if hasattr(self.half, name):
                setattr(self, name, getattr(self.half, name))

    def Builder(self, logger: Any) -> _NumberedBuilder:
        return _NumberedBuilder(self, self.half.Builder(logger))

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        return self.half.OnnxParser(network, logger)


class _NumberedBuilder:
    def __init__(self, module: FakeTensorRtModule, builder: Any) -> None:
        self._module, self._builder = module, builder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._builder, name)

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        result = self._builder.build_serialized_network(network, config)
        if result is None:
            return None
        self._module.n_built += 1
        return json.dumps({**json.loads(self._module.plan), 'number': self._module.n_built}).encode()
