"""A libcudart without a GPU, at the level of its C functions: what ``ctypes.CDLL`` would give.

Memory is real memory of the host, streams are queues that run when they have been asked often enough, graphs are
recorded queues. Whatever the real one would punish later or never (wrong order, use after free, double free, a buffer
overwritten while it is read, a thread without a device) raises ``Misuse`` at once, or is found by ``assert_clean``.
"""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SUCCESS, OUT_OF_MEMORY, NOT_READY = 0, 2, 600
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 900, 901
ERRORS = {
    2: ('cudaErrorMemoryAllocation', 'out of memory'),
    35: ('cudaErrorInsufficientDriver', 'CUDA driver version is insufficient for CUDA runtime version'),
    100: ('cudaErrorNoDevice', 'no CUDA-capable device is detected'),
    700: ('cudaErrorIllegalAddress', 'an illegal memory access was encountered'),
    900: ('cudaErrorStreamCaptureUnsupported', 'operation not permitted when stream is capturing'),
    901: ('cudaErrorStreamCaptureInvalidated', 'operation failed due to a previous error during capture'),
}


class Misuse(AssertionError):
    """The code under test did what CUDA forbids."""


@dataclass
class Block:
    """Memory that was allocated."""

    kind: str
    data: Any
    n_bytes: int


@dataclass
class Operation:
    """Something queued: ``run`` does it; ``reads`` is a block of the host that must not change until then."""

    run: Callable[[], None]
    blocks: list[int]
    reads: tuple[int, int] | None = None
    content: bytes = b''


@dataclass
class Stream:
    """A queue."""

    operations: list[Operation] = field(default_factory=list)
    captured: list[Operation] | None = None
    invalidated: bool = False
    polls_left: int = 0
    error: int = SUCCESS


class _Function:
    """Checks arguments as ctypes would, against the prototype that the code under test declares."""

    def __init__(self, library: FakeCudart, name: str, work: Callable[..., Any]) -> None:
        self._library, self._name, self._work = library, name, work
        self.argtypes: tuple[Any, ...] | None = None
        self.restype: Any = None

    def __call__(self, *arguments: Any) -> Any:
        if self.argtypes is None or self.restype is None:
            raise Misuse(f'{self._name} is called without a prototype: 64-bit addresses would be cut')
        if len(arguments) != len(self.argtypes):
            raise Misuse(f'{self._name} is called with {len(arguments)} arguments, declared are {len(self.argtypes)}')
        for declared, argument in zip(self.argtypes, arguments, strict=True):
            declared.from_param(argument)
        library = self._library
        library.calls.append(self._name)
        if code := library.fail.pop(self._name, 0) or library.fail_at.pop(len(library.calls) - 1, 0):
            if self._name == 'cudaStreamEndCapture':  # it ends even when it fails
                library.streams[arguments[0]].captured = None
            return code
        return self._work(*(_plain(argument) for argument in arguments))


def _plain(argument: Any) -> Any:
    """The target of a pointer, or the number in a handle."""
    if hasattr(argument, '_obj'):
        return argument._obj
    if isinstance(argument, ctypes.c_void_p):
        return argument.value or 0
    return argument


class FakeCudart:
    """See the module.

    :ivar fail: error codes by the name of a function: its next call gives it and does nothing.
    :ivar fail_at: the same by the number of the call, counted from 0.
    :ivar calls: names of the functions called.
    :ivar polls: how often a stream is asked before it has run what was queued; -1: it hangs.
    :ivar async_error: what a stream reports after its next run.
    """

    def __init__(self, *, major: int = 12, total_bytes: int = 1 << 30, polls: int = 2) -> None:
        self.major = major
        self.total_bytes = total_bytes
        self.polls = polls
        self.name, self.capability, self.n_devices = b'Orin', (8, 7), 1
        self.fail: dict[str, int] = {}
        self.fail_at: dict[int, int] = {}
        self.calls: list[str] = []
        self.async_error = SUCCESS
        self.blocks: dict[int, Block] = {}
        self.streams: dict[int, Stream] = {}
        self.graphs: dict[int, list[Operation]] = {}
        self.executables: dict[int, list[Operation]] = {}
        self.alive: Counter[str] = Counter()
        self.misuses: list[str] = []
        self._threads: set[int] = set()
        self._freed: list[Block] = []
        self._last_handle = 0x7F00_0000_0000
        self._functions: dict[str, _Function] = {}

    def __getattr__(self, name: str) -> Any:
        if name == 'cudaGetDeviceProperties_v2' and self.major == 12:
            work = self._do_cudaGetDeviceProperties
        elif name.startswith('cuda') and hasattr(type(self), f'_do_{name}'):
            work = getattr(self, f'_do_{name}')
        else:
            raise AttributeError(f'libcudart.so.{self.major}: undefined symbol: {name}')
        return self._functions.setdefault(name, _Function(self, name, work))

    # -- for tests -------------------------------------------------------------------------------------------------

    def assert_clean(self) -> None:
        """Nothing was leaked, nothing was misused."""
        assert self.misuses == []
        left = {
            'memory': len(self.blocks),
            'streams': len(self.streams),
            'graphs': len(self.graphs),
            'executable graphs': len(self.executables),
            **self.alive,
        }
        assert {name: count for name, count in left.items() if count} == {}

    def queue(self, stream: int, run: Callable[[], None], addresses: list[int]) -> bool:
        """What TensorRT does to run a kernel; False if the capture has failed."""
        if stream not in self.streams:
            raise Misuse(f'a kernel is started on the stream {stream}, which does not exist')
        return self._queue(stream, Operation(run, [self._block_of(a, 1) for a in addresses])) == SUCCESS

    def is_capturing(self, stream: int) -> bool:
        return self.streams[stream].captured is not None

    def invalidate(self, stream: int) -> None:
        """A capture meets an operation that cannot be recorded."""
        self.streams[stream].invalidated = True

    # -- the device ------------------------------------------------------------------------------------------------

    def _do_cudaGetDeviceCount(self, count: Any) -> int:
        count.value = self.n_devices
        return SUCCESS

    def _do_cudaSetDevice(self, device: int) -> int:
        assert device < self.n_devices
        self._threads.add(threading.get_ident())
        return SUCCESS

    def _do_cudaGetDeviceProperties(self, properties: Any, device: int) -> int:
        assert len(properties) >= 2048, 'cudaDeviceProp is larger'
        ctypes.memset(properties, 0xAB, 2048)
        ctypes.memmove(properties, self.name + b'\0', len(self.name) + 1)
        return SUCCESS

    def _do_cudaDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
        value.value = self.capability[{75: 0, 76: 1}[attribute]]
        return SUCCESS

    def _do_cudaMemGetInfo(self, free: Any, total: Any) -> int:
        used = sum(block.n_bytes for block in self.blocks.values())
        free.value, total.value = self.total_bytes - used, self.total_bytes
        return SUCCESS

    def _do_cudaGetLastError(self) -> int:
        return SUCCESS

    def _do_cudaGetErrorName(self, code: int) -> bytes:
        return ERRORS.get(code, ('cudaErrorUnknown', ''))[0].encode()

    def _do_cudaGetErrorString(self, code: int) -> bytes:
        return ERRORS.get(code, ('', 'unknown error'))[1].encode()

    # -- memory ----------------------------------------------------------------------------------------------------

    def _allocate(self, out: Any, n_bytes: int, kind: str) -> int:
        self._need_device()
        if n_bytes > self.total_bytes - sum(block.n_bytes for block in self.blocks.values()):
            return OUT_OF_MEMORY
        data = ctypes.create_string_buffer(b'\xff' * n_bytes, n_bytes)  # not a number, whatever the type
        out.value = ctypes.addressof(data)
        self.blocks[ctypes.addressof(data)] = Block(kind, data, n_bytes)
        return SUCCESS

    def _free(self, address: int, kind: str) -> int:
        self._need_device()
        block = self.blocks.get(address)
        if block is None or block.kind != kind:
            raise Misuse(f'{kind} memory at {address:#x} is freed, which is {block.kind if block else "not allocated"}')
        if any(address in op.blocks for stream in self.streams.values() for op in stream.operations):
            raise Misuse(f'{kind} memory is freed while something queued uses it')
        # Kept, so that a late read finds no numbers rather than crash the test.
        ctypes.memset(address, 0xFF, block.n_bytes)
        self._freed.append(self.blocks.pop(address))
        return SUCCESS

    def _do_cudaMalloc(self, out: Any, n_bytes: int) -> int:
        return self._allocate(out, n_bytes, 'device')

    def _do_cudaFree(self, address: int) -> int:
        return self._free(address, 'device')

    def _do_cudaHostAlloc(self, out: Any, n_bytes: int, flags: int) -> int:
        return self._allocate(out, n_bytes, 'host')

    def _do_cudaFreeHost(self, address: int) -> int:
        return self._free(address, 'host')

    def _block_of(self, address: int, n_bytes: int) -> int:
        for start, block in self.blocks.items():
            if start <= address and address + n_bytes <= start + block.n_bytes:
                return start
        raise Misuse(f'{n_bytes} bytes at {address:#x} are not allocated')

    def _do_cudaMemcpyAsync(self, to: int, source: int, n_bytes: int, kind: int, stream: int) -> int:
        target, origin = self._block_of(to, n_bytes), self._block_of(source, n_bytes)
        kinds = (self.blocks[origin].kind, self.blocks[target].kind)
        if kinds != {1: ('host', 'device'), 2: ('device', 'host')}[kind]:
            raise Misuse(f'a copy of kind {kind} from {kinds[0]} to {kinds[1]}')

        def run() -> None:
            self._block_of(to, n_bytes)
            self._block_of(source, n_bytes)
            ctypes.memmove(to, source, n_bytes)

        reads = (source, n_bytes) if kind == 1 else None
        return self._queue(stream, Operation(run, [target, origin], reads))

    # -- streams ---------------------------------------------------------------------------------------------------

    def _need_device(self) -> None:
        if threading.get_ident() not in self._threads:
            raise Misuse('a thread uses CUDA without having set the device')

    def _new_handle(self) -> int:
        self._last_handle += 0x100
        return self._last_handle

    def _stream(self, handle: int) -> Stream:
        self._need_device()
        if handle not in self.streams:
            raise Misuse(f'{handle:#x} is no stream (0 is the default stream, which is not ours)')
        return self.streams[handle]

    def _queue(self, handle: int, operation: Operation) -> int:
        stream = self._stream(handle)
        if stream.captured is not None:
            if stream.invalidated:
                return CAPTURE_INVALIDATED
            stream.captured.append(operation)
            return SUCCESS
        self._submit(stream, [operation])
        return SUCCESS

    def _submit(self, stream: Stream, operations: list[Operation]) -> None:
        for one in operations:
            content = ctypes.string_at(*one.reads) if one.reads else b''
            stream.operations.append(Operation(one.run, one.blocks, one.reads, content))
        stream.polls_left = self.polls

    def _do_cudaStreamCreateWithFlags(self, out: Any, flags: int) -> int:
        self._need_device()
        if flags != 1:
            raise Misuse('the stream would wait for the default stream, which the language model uses')
        out.value = self._new_handle()
        self.streams[out.value] = Stream()
        return SUCCESS

    def _do_cudaStreamDestroy(self, handle: int) -> int:
        if self._stream(handle).operations or self._stream(handle).captured is not None:
            raise Misuse('a stream is destroyed while it runs')
        del self.streams[handle]
        return SUCCESS

    def _do_cudaStreamQuery(self, handle: int) -> int:
        stream = self._stream(handle)
        if stream.captured is not None:
            stream.invalidated = True
            return CAPTURE_UNSUPPORTED
        if stream.operations and stream.polls_left:
            stream.polls_left -= 1
            return NOT_READY
        operations, stream.operations = stream.operations, []
        for one in operations:
            if one.reads and ctypes.string_at(*one.reads) != one.content:
                raise Misuse('pinned memory was overwritten before it was copied')
            one.run()
        if operations and self.async_error:
            stream.error, self.async_error = self.async_error, SUCCESS
        return stream.error

    def _do_cudaStreamBeginCapture(self, handle: int, mode: int) -> int:
        stream = self._stream(handle)
        if mode != 1:
            raise Misuse('only a capture that is local to its thread leaves the language model alone')
        assert stream.captured is None
        stream.captured, stream.invalidated = [], False
        return SUCCESS

    def _do_cudaStreamEndCapture(self, handle: int, out: Any) -> int:
        stream = self._stream(handle)
        if stream.captured is None:
            raise Misuse('there is no capture to end')
        operations, stream.captured = stream.captured, None
        out.value = None
        if stream.invalidated:
            return CAPTURE_INVALIDATED
        out.value = self._new_handle()
        self.graphs[out.value] = operations
        return SUCCESS

    def _do_cudaGraphInstantiateWithFlags(self, out: Any, graph: int, flags: int) -> int:
        out.value = self._new_handle()
        self.executables[out.value] = self.graphs[graph]
        return SUCCESS

    def _do_cudaGraphDestroy(self, graph: int) -> int:
        if self.graphs.pop(graph, None) is None:
            raise Misuse('a graph is destroyed that does not exist')
        return SUCCESS

    def _do_cudaGraphLaunch(self, executable: int, handle: int) -> int:
        self._submit(self._stream(handle), self.executables[executable])
        return SUCCESS

    def _do_cudaGraphExecDestroy(self, executable: int) -> int:
        if self.executables.pop(executable, None) is None:
            raise Misuse('an executable graph is destroyed that does not exist')
        return SUCCESS
