"""The running half of the module ``tensorrt`` without a GPU, in the generations 8.6, 10 and 11.

Names, arguments and results are those of NVIDIA's bindings of these versions; what a version lacks is absent here too.
A plan is a description of its inputs and outputs, and computes a known function. Kernels run on ``fake_cudart``.
"""

from __future__ import annotations

import ctypes
import enum
import json
import math
import weakref
from typing import Any

import numpy as np
from fake_cudart import FakeCudart, Misuse
from numpy.typing import NDArray

VERSIONS = ('8.6.2', '10.0.1', '10.3.0', '11.1.0')
DTYPES = {'FLOAT': np.float32, 'HALF': np.float16, 'INT8': np.int8, 'INT32': np.int32, 'BF16': np.uint16}


def tokens_of(pixels: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """What every fake plan computes: pixels picked in a scattered order, times two, minus a half."""
    flat = pixels.ravel()
    return (flat[np.arange(math.prod(shape)) * 7 % flat.size] * 2 - 0.5).reshape(shape)


def plan_bytes(
    *,
    side: int = 4,
    n_tokens: int = 4,
    n_embd: int = 3,
    dtype_in: str = 'FLOAT',
    dtype_out: str = 'FLOAT',
    recordable: bool = True,
    io: list[list[Any]] | None = None,
) -> bytes:
    """A plan; ``io`` gives name, mode, shape and type of every tensor instead."""
    tensors = io or [
        ['pixels_nchw', 'INPUT', [1, 3, side, side], dtype_in],
        ['visual_tokens', 'OUTPUT', [1, n_tokens, n_embd], dtype_out],
    ]
    return json.dumps({'fake': True, 'io': tensors, 'recordable': recordable}).encode()


class FakeTensorRt:
    """The module: see the top.

    :ivar fail: what goes wrong next: 'runtime', 'deserialize', 'context' or 'execute', with what the log says then.
    """

    DataType = enum.Enum('DataType', list(DTYPES))
    TensorIOMode = enum.Enum('TensorIOMode', ['NONE', 'INPUT', 'OUTPUT'])

    class ILogger:
        """Base of loggers in Python; a subclass must run this constructor, or the real one crashes."""

        Severity = enum.IntEnum('Severity', ['INTERNAL_ERROR', 'ERROR', 'WARNING', 'INFO', 'VERBOSE'], start=0)

        def __init__(self) -> None:
            self.is_constructed = True

    def __init__(self, cudart: FakeCudart, version: str = '10.3.0') -> None:
        self.__name__ = 'tensorrt'
        self.__version__ = version
        self.cudart = cudart
        self.fail: dict[str, str] = {}
        self.n_deserialized = 0

    @property
    def number(self) -> tuple[int, int]:
        """Major and minor version."""
        major, minor = self.__version__.split('.')[:2]
        return int(major), int(minor)

    def Runtime(self, logger: Any) -> _Runtime:
        return _Runtime(self, logger)


class _Counted:
    """Counts itself, so that what is not given back is found; the parent is kept alive, as pybind11 does."""

    def __init__(self, trt: FakeTensorRt, parent: Any) -> None:
        self._trt, self._parent = trt, parent
        alive, kind = trt.cudart.alive, type(self).__name__
        alive[kind] += 1
        weakref.finalize(self, alive.subtract, {kind: 1})


class _Runtime(_Counted):
    def __init__(self, trt: FakeTensorRt, logger: Any) -> None:
        assert isinstance(logger, FakeTensorRt.ILogger)
        assert logger.is_constructed
        self.logger = logger
        if 'runtime' in trt.fail:
            self.say('ERROR', trt.fail.pop('runtime'))
            raise TypeError('pybind11::init(): factory function returned nullptr')
        super().__init__(trt, logger)

    def say(self, severity: str, message: str) -> None:
        self.logger.log(FakeTensorRt.ILogger.Severity[severity], message)

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> _Engine | None:
        self._trt.n_deserialized += 1
        memoryview(serialized_engine)
        self.say('VERBOSE', 'deserialising')
        if 'deserialize' in self._trt.fail:
            self.say('ERROR', self._trt.fail.pop('deserialize'))
            return None
        try:
            plan = json.loads(serialized_engine)
        except ValueError:
            self.say('ERROR', 'IRuntime::deserializeCudaEngine: Error Code 1: Serialization (magicTagRead mismatch)')
            return None
        return _Engine(self._trt, self, plan)


class _Engine(_Counted):
    def __init__(self, trt: FakeTensorRt, runtime: _Runtime, plan: dict[str, Any]) -> None:
        super().__init__(trt, runtime)
        self._tensors = {name: (mode, tuple(shape), dtype) for name, mode, shape, dtype in plan['io']}
        self._recordable = plan['recordable']
        if trt.number >= (10, 1):
            self.device_memory_size_v2 = 40 << 20
        if trt.number < (11, 0):
            self.device_memory_size = 40 << 20

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return FakeTensorRt.TensorIOMode[self._tensors[name][0]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][1]

    def get_tensor_dtype(self, name: str) -> Any:
        return FakeTensorRt.DataType[self._tensors[name][2]]

    def create_execution_context(self) -> _Context | None:
        if 'context' in self._trt.fail:
            self._parent.say('ERROR', self._trt.fail.pop('context'))
            return None
        return _Context(self._trt, self)


class _Context(_Counted):
    def __init__(self, trt: FakeTensorRt, engine: _Engine) -> None:
        super().__init__(trt, engine)
        self._addresses: dict[str, int] = {}
        self._streams: set[int] = set()
        self._is_set_up = False
        weakref.finalize(self, self._check_end, trt.cudart, self._addresses, self._streams)

    @staticmethod
    def _check_end(cudart: FakeCudart, addresses: dict[str, int], streams: set[int]) -> None:
        if not set(addresses.values()) <= set(cudart.blocks):
            cudart.misuses.append('the memory of an execution context was freed before the context')
        if not streams <= set(cudart.streams):
            cudart.misuses.append('the stream of an execution context was destroyed before the context')

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._parent._tensors:
            return False
        block = self._trt.cudart.blocks.get(memory)
        _, shape, dtype = self._parent._tensors[name]
        needed = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        if block is None or block.kind != 'device' or block.n_bytes < needed:
            raise Misuse(f'{name} is given an address that is not {needed} bytes of device memory')
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        trt, engine = self._trt, self._parent
        cudart = trt.cudart
        missing = set(engine._tensors) - set(self._addresses)
        if missing:
            raise Misuse(f'no address was set for {missing}')
        self._streams.add(stream_handle)
        if 'execute' in trt.fail:
            engine._parent.say('ERROR', trt.fail.pop('execute'))
            return False
        if cudart.is_capturing(stream_handle) and not (self._is_set_up and engine._recordable):
            cudart.invalidate(stream_handle)
            engine._parent.say('ERROR', 'Cuda Runtime (operation not permitted when stream is capturing)')
            return False
        self._is_set_up = True
        (name_in, (_, shape_in, dtype_in)), (name_out, (_, shape_out, dtype_out)) = engine._tensors.items()

        def show(name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
            data = cudart.blocks[self._addresses[name]].data
            return np.frombuffer(data, DTYPES[dtype], math.prod(shape)).reshape(shape)

        def run() -> None:
            pixels = show(name_in, shape_in, dtype_in)
            target = ctypes.addressof(cudart.blocks[self._addresses[name_out]].data)
            tokens = tokens_of(pixels, shape_out).astype(DTYPES[dtype_out])
            ctypes.memmove(target, tokens.tobytes(), tokens.nbytes)

        return cudart.queue(stream_handle, run, list(self._addresses.values()))
