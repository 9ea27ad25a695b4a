"""The building half of the module ``tensorrt``, in the generations 8.6, 10 and 11, with NVIDIA's names and arguments.

It refuses what the real ones refuse: flags that a version lacks or that contradict each other, a network without
explicit batch, garbage. A plan is the list of what was asked for.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

VERSIONS = ('8.6.2', '10.0.1', '10.3.0', '11.1.0')
_CACHE_MAGIC = b'CACHE of '


class _HostMemory:
    """IHostMemory as a bytes-like object is written in Python 3.11 only by C; so bytes and the one attribute."""

    def __new__(cls, data: bytes) -> Any:
        return type('IHostMemory', (bytes,), {'nbytes': property(len)})(data)


class FakeBuilderTensorRt:
    """See the module.

    :ivar is_half: whether the parsed network has layers in half precision.
    :ivar parser_errors: what the parser finds wrong: (node, name, operator, description).
    :ivar on_build: called while it builds; its result, if any, is that of the build.
    :ivar refuses_cache: whether timings are taken to be of another GPU.
    """

    DataType = enum.Enum('DataType', ['FLOAT', 'HALF'])
    MemoryPoolType = enum.Enum('MemoryPoolType', ['WORKSPACE'])

    class ILogger:
        def __init__(self) -> None:
            self.is_constructed = True

    def __init__(self, version: str) -> None:
        self.__name__ = 'tensorrt'
        self.__version__ = version
        major = int(version.split('.')[0])
        self.is_half = True
        self.parser_errors: list[tuple[int, str, str, str]] = []
        self.on_build: Callable[[_Config], Any] = lambda config: None
        self.refuses_cache = False
        self.asked: dict[str, Any] = {}
        flags = {'EXPLICIT_BATCH': 0} if major < 11 else {}
        flags |= {'STRONGLY_TYPED': 1 if major == 10 else 0} if major >= 10 else {}
        self.NetworkDefinitionCreationFlag = enum.IntEnum('NetworkDefinitionCreationFlag', flags)
        builder_flags = ['TF32', 'REFIT'] + (['FP16', 'INT8'] if major < 11 else [])
        self.BuilderFlag = enum.Enum('BuilderFlag', builder_flags)
        if major >= 10:
            self.IProgressMonitor = type('IProgressMonitor', (), {})
        self.major = major

    def Builder(self, logger: Any) -> _Builder:
        assert logger.is_constructed
        return _Builder(self, logger)

    def OnnxParser(self, network: _Network, logger: Any) -> _Parser:
        return _Parser(self, network)


class _Network:
    def __init__(self, trt: FakeBuilderTensorRt, flags: int) -> None:
        names = trt.NetworkDefinitionCreationFlag.__members__
        known = sum(1 << int(value) for value in names.values())
        assert flags & ~known == 0, f'flags {flags:b} are unknown to TensorRT {trt.__version__}'
        if trt.major == 8:
            assert flags & 1, 'implicit batch: the ONNX parser refuses it'
        self.is_strongly_typed = trt.major > 10 or (trt.major == 10 and bool(flags & 2))
        self.is_parsed = False
        half = trt.DataType.HALF if trt.is_half else trt.DataType.FLOAT
        self._types = [trt.DataType.FLOAT, half]

    @property
    def num_layers(self) -> int:
        return len(self._types) if self.is_parsed else 0

    def get_layer(self, index: int) -> Any:
        return SimpleNamespace(num_outputs=1, get_output=lambda i: SimpleNamespace(dtype=self._types[index]))


class _Parser:
    def __init__(self, trt: FakeBuilderTensorRt, network: _Network) -> None:
        self._trt, self._network = trt, network

    def parse_from_file(self, path: str) -> bool:
        assert isinstance(path, str)
        self._network.is_parsed = not self._trt.parser_errors
        return self._network.is_parsed

    @property
    def num_errors(self) -> int:
        return len(self._trt.parser_errors)

    def get_error(self, index: int) -> Any:
        node, name, operator, text = self._trt.parser_errors[index]
        methods = {'node': lambda: node, 'desc': lambda: text}
        if self._trt.major >= 10:
            methods |= {'node_name': lambda: name, 'node_operator': lambda: operator}
        return SimpleNamespace(**methods)


class _Cache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> Any:
        return _HostMemory(self.data)


class _Config:
    def __init__(self, trt: FakeBuilderTensorRt) -> None:
        self._trt = trt
        self.flags = {'TF32'}
        self.limits: dict[str, int] = {}
        self.cache: _Cache | None = None
        self._monitor: Any = None

    @property
    def progress_monitor(self) -> Any:
        assert self._trt.major >= 10
        return self._monitor

    @progress_monitor.setter
    def progress_monitor(self, monitor: Any) -> None:
        assert self._trt.major >= 10, 'pybind11 objects take no new attributes'
        assert isinstance(monitor, self._trt.IProgressMonitor)
        self._monitor = monitor

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag.name)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self.limits[pool.name] = pool_size

    def create_timing_cache(self, serialized_timing_cache: bytes) -> _Cache | None:
        if serialized_timing_cache and not serialized_timing_cache.startswith(_CACHE_MAGIC):
            return None
        return _Cache(serialized_timing_cache)

    def set_timing_cache(self, cache: _Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.data and self._trt.refuses_cache:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> _Cache | None:
        return self.cache


class _Builder:
    def __init__(self, trt: FakeBuilderTensorRt, logger: Any) -> None:
        self._trt, self._logger = trt, logger

    def create_network(self, flags: int) -> _Network:
        return _Network(self._trt, flags)

    def create_builder_config(self) -> _Config:
        return _Config(self._trt)

    def build_serialized_network(self, network: _Network, config: _Config) -> Any:
        trt = self._trt
        assert network.is_parsed
        assert not (network.is_strongly_typed and config.flags & {'FP16', 'INT8'}), 'precision flags with strong types'
        trt.asked = {
            'strong': network.is_strongly_typed,
            'flags': set(config.flags),
            'limits': dict(config.limits),
            'cache': config.cache.data if config.cache else None,
            'thread': threading.current_thread().name,
        }
        result = trt.on_build(config)
        if isinstance(result, str):
            self._logger.log(1, result)
            return None
        if config.cache is not None:
            config.cache.data = _CACHE_MAGIC + trt.__version__.encode()
        return _HostMemory(b'PLAN of ' + trt.__version__.encode())


def steps(config: _Config, n_steps: int, step_s: float) -> str | None:
    """A build of some steps within two phases, which a monitor may end."""
    monitor = config._monitor
    if monitor is None:
        time.sleep(n_steps * step_s)
        return None
    monitor.phase_start('Building engine', None, 2)
    for outer in range(2):
        monitor.phase_start('Timing', 'Building engine', n_steps // 2)
        for step in range(n_steps // 2):
            time.sleep(step_s)
            if not monitor.step_complete('Timing', step):
                return 'Error Code 7: BuildCanceled (Build canceled by user)'
        monitor.phase_finish('Timing')
        monitor.step_complete('Building engine', outer)
    monitor.phase_finish('Building engine')
    return None
