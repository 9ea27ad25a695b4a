"""The little of the CUDA runtime that running a plan needs, through ctypes: no torch, no pycuda, no compiler.

Every error code becomes an ``EngineError`` with CUDA's own name and text for it. Addresses, streams and graphs are
plain integers; who makes one frees it. What CUDA binds to a thread is set by ``use``, which every thread calls first.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevlm_ros.errors import DependencyError, DeviceMemoryError, EngineError

__all__ = ['Cuda', 'Gpu', 'open_cuda']

_NAMES = ('libcudart.so.13', 'libcudart.so.12', 'libcudart.so.11.0', 'libcudart.so')
_FOLDERS = ('/usr/local/cuda/lib64', '/usr/local/cuda/lib')

# cuda_runtime_api.h and driver_types.h; these values have not changed from CUDA 11 to 13.
_ERROR_MEMORY_ALLOCATION = 2
_ERROR_NOT_READY = 600
# After these every further call of the process fails: illegal addresses, traps, failed launches.
_ERRORS_THAT_STAY = {700, 702, 710, 714, 715, 716, 717, 718, 719}
_STREAM_NON_BLOCKING = 1
_CAPTURE_THREAD_LOCAL = 1
_TO_DEVICE, _TO_HOST = 1, 2
_ATTRIBUTE_MAJOR, _ATTRIBUTE_MINOR = 75, 76
# cudaDeviceProp has another size in every major version, but its first member is always ``char name[256]``.
_PROPERTIES_BYTES = 1 << 14

_OUT = POINTER(c_void_p)
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    'cudaGetDeviceCount': (POINTER(c_int),),
    'cudaSetDevice': (c_int,),
    'cudaDeviceGetAttribute': (POINTER(c_int), c_int, c_int),
    'cudaMemGetInfo': (POINTER(c_size_t), POINTER(c_size_t)),
    'cudaGetLastError': (),
    'cudaMalloc': (_OUT, c_size_t),
    'cudaFree': (c_void_p,),
    'cudaHostAlloc': (_OUT, c_size_t, c_uint),
    'cudaFreeHost': (c_void_p,),
    'cudaMemcpyAsync': (c_void_p, c_void_p, c_size_t, c_int, c_void_p),
    'cudaStreamCreateWithFlags': (_OUT, c_uint),
    'cudaStreamDestroy': (c_void_p,),
    'cudaStreamQuery': (c_void_p,),
    'cudaStreamBeginCapture': (c_void_p, c_int),
    'cudaStreamEndCapture': (c_void_p, _OUT),
    'cudaGraphInstantiateWithFlags': (_OUT, c_void_p, c_ulonglong),
    'cudaGraphDestroy': (c_void_p,),
    'cudaGraphLaunch': (c_void_p, c_void_p),
    'cudaGraphExecDestroy': (c_void_p,),
}
"""Functions that return a cudaError_t, and what they take."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    :ivar name: as CUDA says it.
    :ivar compute_capability: such as ``8.7``.
    """

    name: str
    compute_capability: str


class Cuda:
    """One device, through one loaded libcudart.

    :param library: the library, as ``ctypes.CDLL`` loads it.
    :raise DependencyError: if it lacks functions.
    """

    def __init__(self, library: Any, device: int = 0) -> None:
        self._library = library
        self.device = device
        try:
            for name, arguments in _PROTOTYPES.items():
                function = getattr(library, name)
                function.argtypes, function.restype = arguments, c_int
            for name in ('cudaGetErrorName', 'cudaGetErrorString'):
                function = getattr(library, name)
                function.argtypes, function.restype = (c_int,), c_char_p
            # CUDA 12 has a second version under a new name, and CUDA 13 that one under the old name again.
            named = 'cudaGetDeviceProperties_v2'
            self._get_properties = getattr(library, named if hasattr(library, named) else 'cudaGetDeviceProperties')
            self._get_properties.argtypes, self._get_properties.restype = (c_char_p, c_int), c_int
        except AttributeError as error:
            raise DependencyError(f'the CUDA runtime library is too old ({error}); 11.4 or newer is needed') from error

    # -- the device ------------------------------------------------------------------------------------------------

    def n_devices(self) -> int:
        """GPUs that CUDA sees; an error if it cannot look, as without a driver."""
        count = c_int()
        self._call('cudaGetDeviceCount', ctypes.byref(count))
        return count.value

    def use(self) -> None:
        """Make the device that of the calling thread."""
        self._call('cudaSetDevice', self.device)

    def gpu(self) -> Gpu:
        """What the device is."""
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        self._check('cudaGetDeviceProperties', self._get_properties(properties, self.device))
        version = []
        for attribute in (_ATTRIBUTE_MAJOR, _ATTRIBUTE_MINOR):
            value = c_int()
            self._call('cudaDeviceGetAttribute', ctypes.byref(value), attribute, self.device)
            version.append(str(value.value))
        name = properties.raw[:256].split(b'\0')[0].decode(errors='replace')
        return Gpu(name, '.'.join(version))

    def free_memory(self) -> tuple[int, int]:
        """Free and total memory of the device, in bytes. On a Jetson it is that of the whole computer."""
        free, total = c_size_t(), c_size_t()
        self._call('cudaMemGetInfo', ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def memory_text(self) -> str:
        """The same for an error message."""
        with suppress(EngineError):
            free, total = self.free_memory()
            return f'{free >> 20} of {total >> 20} MiB of GPU memory are free'
        return 'free GPU memory is unknown'

    # -- memory ----------------------------------------------------------------------------------------------------

    def allocate(self, n_bytes: int, what: str) -> int:
        """Address of new memory on the device.

        :raise DeviceMemoryError: if there is too little; the message says how much was needed, and for ``what``.
        """
        return self._allocate(what, n_bytes, 'cudaMalloc', n_bytes)

    def free(self, address: int) -> None:
        """Free what ``allocate`` gave; waits for the device."""
        self._call('cudaFree', address)

    def allocate_host(self, n_bytes: int, what: str) -> int:
        """Address of new pinned memory of the host, which the device can copy from and to by itself."""
        return self._allocate(what, n_bytes, 'cudaHostAlloc', n_bytes, 0)

    def free_host(self, address: int) -> None:
        """Free what ``allocate_host`` gave."""
        self._call('cudaFreeHost', address)

    def _allocate(self, what: str, n_bytes: int, function: str, *arguments: Any) -> int:
        address = c_void_p()
        code = getattr(self._library, function)(ctypes.byref(address), *arguments)
        if code == _ERROR_MEMORY_ALLOCATION:
            self._library.cudaGetLastError()
            raise DeviceMemoryError(
                f'{what} need {n_bytes / (1 << 20):.1f} MiB ({function}), but {self.memory_text()}: '
                'stop other programs that use the GPU, or build with a smaller quantisation'
            )
        self._check(function, code)
        return address.value or 0

    def copy_to_device(self, device: int, host: int, n_bytes: int, stream: int) -> None:
        """Queue a copy from pinned memory."""
        self._call('cudaMemcpyAsync', device, host, n_bytes, _TO_DEVICE, stream)

    def copy_to_host(self, host: int, device: int, n_bytes: int, stream: int) -> None:
        """Queue a copy to pinned memory."""
        self._call('cudaMemcpyAsync', host, device, n_bytes, _TO_HOST, stream)

    # -- streams and graphs ----------------------------------------------------------------------------------------

    def create_stream(self) -> int:
        """A new stream that does not wait for the default one."""
        stream = c_void_p()
        self._call('cudaStreamCreateWithFlags', ctypes.byref(stream), _STREAM_NON_BLOCKING)
        return stream.value or 0

    def destroy_stream(self, stream: int) -> None:
        """Free it."""
        self._call('cudaStreamDestroy', stream)

    def is_done(self, stream: int) -> bool:
        """Whether everything queued on the stream has run; an error if something that was queued failed."""
        code = self._library.cudaStreamQuery(stream)
        if code == _ERROR_NOT_READY:
            return False
        self._check('cudaStreamQuery', code)
        return True

    def record(self, stream: int, enqueue: Callable[[], None]) -> int:
        """Record what ``enqueue`` queues as a graph, without running it.

        Other threads may use CUDA meanwhile (the language model does): the capture is local to this thread.

        :return: the executable graph, for ``launch`` and ``destroy_graph``.
        """
        graph, executable = c_void_p(), c_void_p()
        self._call('cudaStreamBeginCapture', stream, _CAPTURE_THREAD_LOCAL)
        try:
            try:
                enqueue()
            except BaseException:
                # The stream is unusable until the capture ends, which itself fails if the capture was broken.
                self._library.cudaStreamEndCapture(stream, ctypes.byref(graph))
                self._library.cudaGetLastError()
                raise
            self._call('cudaStreamEndCapture', stream, ctypes.byref(graph))
            self._call('cudaGraphInstantiateWithFlags', ctypes.byref(executable), graph, 0)
        finally:
            if graph:
                self._library.cudaGraphDestroy(graph)
        return executable.value or 0

    def launch(self, graph: int, stream: int) -> None:
        """Queue a recorded graph."""
        self._call('cudaGraphLaunch', graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """Free a recorded graph."""
        self._call('cudaGraphExecDestroy', graph)

    # -- errors ----------------------------------------------------------------------------------------------------

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._library, name)(*arguments))

    def _check(self, name: str, code: int) -> None:
        if code:
            self._library.cudaGetLastError()  # or the next call of another library would report it
            advice = '. The GPU can only be used again by a new process: restart the node' * (code in _ERRORS_THAT_STAY)
            raise EngineError(f'{name} failed: {self.error_text(code)}{advice}')

    def error_text(self, code: int) -> str:
        """CUDA's name and text of an error."""
        name, text = (
            (function(code) or b'').decode(errors='replace')
            for function in (self._library.cudaGetErrorName, self._library.cudaGetErrorString)
        )
        return f'{name} ({code}): {text}'


def open_cuda(device: int = 0) -> Cuda:
    """Load a CUDA runtime that works with the driver of this machine, and choose a device.

    Several may be installed, and one newer than the driver sees no device: the first that sees one is taken.

    :raise DependencyError: if there is no libcudart.
    :raise EngineError: if there is no driver, or no such device.
    """
    reason = ''
    for path in _candidates():
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        cuda = Cuda(library, device)
        try:
            n_devices = cuda.n_devices()
        except EngineError as error:
            reason = reason or f'{path}: {error}'
            continue
        if device < n_devices:
            cuda.use()
            return cuda
        reason = reason or f'CUDA sees {n_devices} devices, number {device} was asked for'
    if reason:
        raise EngineError(
            f'no GPU can be used here ({reason}). Check the driver with nvidia-smi (on a Jetson: the JetPack '
            'installation), or build a bundle for the CPU: --profile cpu'
        )
    raise DependencyError(
        'the CUDA runtime (libcudart.so.11.0, .12 or .13) is not found. On a Jetson install JetPack (sudo apt install '
        'nvidia-jetpack), elsewhere the CUDA toolkit, or add its folder to LD_LIBRARY_PATH'
    )


def _candidates() -> Iterator[str]:
    """Where libcudart may be: on the loader's path, in the toolkit's folder, in NVIDIA's Python packages."""
    yield from _NAMES
    for folder in _FOLDERS:
        yield from (str(path) for name in _NAMES if (path := Path(folder, name)).exists())
    for site in sys.path:
        for pattern in ('nvidia/cuda_runtime/lib/libcudart.so.*', 'nvidia/cu1?/lib/libcudart.so.*'):
            yield from (str(path) for path in sorted(Path(site).glob(pattern), reverse=True))
