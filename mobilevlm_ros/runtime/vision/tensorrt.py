"""The vision engine on TensorRT: a plan that was built on this very machine (``mobilevlm_ros.build.tensorrt_plan``).

The key of the plan is compared with what is here before the plan is read. Everything that a run needs is allocated
once; a run is one copy, one execution and one copy on a stream of its own, recorded as a CUDA graph where that works.
One code path for TensorRT 8.6 to 11: only names that all of them have, or looked up. No torch, no pycuda.

A kernel that runs on the GPU cannot be stopped. A cancelled image is abandoned: the caller is free at once, and the
next image waits until the GPU has finished the old one.
"""

from __future__ import annotations

import ctypes
import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import DependencyError, DeviceMemoryError, EngineError
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.vision.cuda import Cuda, Gpu, open_cuda
from mobilevlm_ros.runtime.vision.plan_key import REBUILD, PlanKey, check_plan
from mobilevlm_ros.runtime.vision.tensorrt_log import log_of

__all__ = ['TensorRtVision', 'key_here', 'load_tensorrt']

_OLDEST = (8, 6)
_POLL_S = 0.0002
_logger = logging.getLogger(__name__)
# Engines that were closed while the GPU hung in them: their memory cannot be freed, and must not be reused either.
_hung: list[ExitStack] = []


def load_tensorrt() -> Any:
    """The module ``tensorrt``.

    :raise DependencyError: if it is missing, does not load, or is too old.
    """
    try:
        import tensorrt
    except (ImportError, OSError, RuntimeError) as error:
        raise DependencyError(
            f'TensorRT cannot be loaded ({error}). On a Jetson it is part of JetPack (sudo apt install '
            'python3-libnvinfer) for the Python of the system: make a virtual environment with --system-site-packages. '
            'Elsewhere: pip install tensorrt'
        ) from error
    version = str(tensorrt.__version__)
    if tuple(int(part) for part in version.split('.')[:2]) < _OLDEST:
        raise DependencyError(
            f'TensorRT {version} found; 8.6 or newer is needed (older ones lack layer normalisation). JetPack 6 has it.'
        )
    return tensorrt


def key_here(trt: Any, gpu: Gpu, onnx_sha256: str, precision: str) -> PlanKey:
    """The key of a plan that is built from a graph with this TensorRT for this GPU."""
    return PlanKey(
        flavour=str(trt.__name__),
        tensorrt=str(trt.__version__),
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        onnx_sha256=onnx_sha256,
        precision=precision,
    )


@dataclass(frozen=True)
class _Tensor:
    """An input or output of the plan; ``dtype`` is None for types that are not handled."""

    name: str
    shape: tuple[int, ...]
    dtype: Any


@dataclass(frozen=True)
class _Buffer:
    """Addresses of a tensor's memory: on the GPU, and pinned memory of the host to copy from or to."""

    device: int
    host: int
    n_bytes: int


class TensorRtVision:
    """See the module.

    :param plan: file of the plan.
    :param key: what it was built for, as the bundle says.
    :param onnx_sha256: of the graph that lies beside the plan now; None: there is none to compare with.
    :param rebuild: the command that builds the plan again, for messages.
    :param cuda_graph: record a run as a CUDA graph, if the plan allows it.
    :param run_limit_s: longest time that one image may take, in seconds; above it the GPU is taken to hang.
    :param trt: the module ``tensorrt``, or one that is like it; None: import it.
    :param cuda: the device; None: the first one.
    :raise DependencyError: if TensorRT or the CUDA runtime is missing.
    :raise PlanMismatchError: if the plan was built for something else; nothing was loaded then.
    :raise DeviceMemoryError: if the GPU has too little free memory.
    :raise EngineError: if there is no GPU, the plan is damaged, or it is not one of a vision engine.
    """

    def __init__(
        self,
        plan: Path,
        key: PlanKey,
        *,
        onnx_sha256: str | None = None,
        rebuild: str = REBUILD,
        cuda_graph: bool = True,
        run_limit_s: float = 30.0,
        trt: Any = None,
        cuda: Cuda | None = None,
    ) -> None:
        self._trt = trt or load_tensorrt()
        self._cuda = cuda or open_cuda()
        self._cuda.use()
        gpu = self._cuda.gpu()
        check_plan(key, key_here(self._trt, gpu, onnx_sha256 or key.onnx_sha256, key.precision), rebuild=rebuild)
        self._log = log_of(self._trt)
        self._rebuild = rebuild
        self._run_limit_s = run_limit_s
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._pixels: NDArray[Any] | None = None
        self._tokens: NDArray[Any] | None = None
        self._stream = 0
        self._graph = 0
        self._closed = False
        self._stack = ExitStack()
        try:
            self._open(plan, cuda_graph)
        except BaseException:
            self.close()
            raise
        self.description = f'TensorRT {key.tensorrt} on {gpu.name} ({gpu.compute_capability}), {key.precision}' + (
            ', CUDA graph' if self._graph else ''
        )

    def encode(self, pixels_nchw: NDArray[np.float32], cancel: CancelToken) -> NDArray[np.float32]:
        """See ``VisionEngine.encode``; abandoned as soon as ``cancel`` is set, see the module."""
        if self._closed or self._pixels is None or self._tokens is None:
            raise EngineError('the vision engine is closed')
        cancel.raise_if_set()
        if pixels_nchw.shape != self._pixels.shape:
            raise EngineError(
                f'the vision engine failed on an image: its pixels have shape {pixels_nchw.shape}, '
                f'expected {self._pixels.shape}'
            )
        self._cuda.use()
        self._wait(cancel)  # an abandoned image may still be running, in the same buffers
        np.copyto(self._pixels, pixels_nchw, casting='same_kind')
        if self._graph:
            self._cuda.launch(self._graph, self._stream)
        else:
            self._enqueue()
        self._wait(cancel)
        cancel.raise_if_set()
        rows: NDArray[np.float32] = np.array(self._tokens[0], dtype=np.float32)
        if not np.isfinite(rows).all():
            raise EngineError('the vision engine gave values that are not finite: rebuild the bundle')
        return rows

    def close(self) -> None:
        """Free everything; may be called again. Waits for the GPU, but not longer than an image may take."""
        if self._closed:
            return
        self._closed = True
        stack, self._stack = self._stack, ExitStack()
        try:
            self._cuda.use()
            if self._stream:
                self._wait(CancelToken())
        except _HangError as error:
            _logger.error('closing the vision engine: %s. Its GPU memory is kept until the process ends.', error)
            _hung.append(stack)
            return
        except EngineError as error:  # what was queued has failed: nothing runs any more
            _logger.warning('closing the vision engine: %s', error)
        stack.close()

    # -- opening, each step undone by the stack in reverse order -----------------------------------------------------

    def _open(self, plan: Path, cuda_graph: bool) -> None:
        self._load(plan)
        pixels, tokens = self._check_io(plan)
        self.image_size: int = pixels.shape[2]
        self.n_tokens: int = tokens.shape[1]
        self.n_embd: int = tokens.shape[2]
        self._input = self._allocate(pixels, 'the pixels')
        self._output = self._allocate(tokens, 'the visual tokens')
        self._stream = self._cuda.create_stream()
        self._on_close(self._cuda.destroy_stream, self._stream)
        self._make_context()
        for tensor, buffer in ((pixels, self._input), (tokens, self._output)):
            if not self._context.set_tensor_address(tensor.name, buffer.device):
                raise EngineError(f'TensorRT refuses the memory of {tensor.name}: {self._log.last_lines()}')
        # The stack forgets the arrays before it frees the memory that they show.
        self._pixels = self._show(pixels, self._input)
        self._stack.callback(setattr, self, '_pixels', None)
        self._tokens = self._show(tokens, self._output)
        self._stack.callback(setattr, self, '_tokens', None)
        self._pixels[...] = 0
        # TensorRT sets up lazily in the first run; what is recorded must not do so any more.
        self._enqueue()
        self._wait(CancelToken())
        if cuda_graph:
            self._record()

    def _load(self, plan: Path) -> None:
        try:
            serialized = plan.read_bytes()
        except OSError as error:
            raise EngineError(f'{plan} cannot be read: {error.strerror}. Build it again: {self._rebuild}') from error
        self._log.forget()
        try:
            self._runtime = self._trt.Runtime(self._log.native)
        except Exception as error:  # the bindings raise TypeError when TensorRT gives nothing
            raise EngineError(f'TensorRT does not start: {self._log.last_lines()} ({error})') from error
        self._stack.callback(setattr, self, '_runtime', None)
        self._engine = self._runtime.deserialize_cuda_engine(serialized)
        self._stack.callback(setattr, self, '_engine', None)
        if self._engine is None:
            self._raise_if_out_of_memory('the weights of the plan', len(serialized))
            raise EngineError(
                f'TensorRT cannot load {plan} ({len(serialized) >> 20} MiB): {self._log.last_lines()}. '
                f'Build it again: {self._rebuild}'
            )

    def _make_context(self) -> None:
        self._log.forget()
        self._context = self._engine.create_execution_context()
        self._stack.callback(setattr, self, '_context', None)
        if self._context is None:
            # The first name is that of TensorRT 10.1 and later, the second one that of versions before 11.
            names = ('device_memory_size_v2', 'device_memory_size')
            needed = next((int(size) for name in names if (size := getattr(self._engine, name, 0))), 0)
            self._raise_if_out_of_memory('the activations of the plan', needed)
            raise EngineError(f'TensorRT makes no execution context: {self._log.last_lines()}')

    def _check_io(self, plan: Path) -> tuple[_Tensor, _Tensor]:
        # No local name for the engine here or elsewhere: the traceback of an error would keep its memory.
        trt = self._trt
        dtypes = {trt.DataType.FLOAT: np.float32, trt.DataType.HALF: np.float16}
        inputs: list[_Tensor] = []
        outputs: list[_Tensor] = []
        found = []
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            shape = tuple(int(n) for n in self._engine.get_tensor_shape(name))
            dtype = self._engine.get_tensor_dtype(name)
            is_input = self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            found.append(f'{"input" if is_input else "output"} {name} {list(shape)} {dtype}')
            (inputs if is_input else outputs).append(_Tensor(name, shape, dtypes.get(dtype)))
        fits = (
            len(inputs) == len(outputs) == 1
            and len(inputs[0].shape) == 4
            and inputs[0].shape[:2] == (1, 3)
            and inputs[0].shape[2] == inputs[0].shape[3]
            and len(outputs[0].shape) == 3
            and outputs[0].shape[0] == 1
            and all(n > 0 for n in (*inputs[0].shape, *outputs[0].shape))
            and inputs[0].dtype is not None
            and outputs[0].dtype is not None
        )
        if not fits:
            raise EngineError(
                f'{plan} has {"; ".join(found)}; expected one input [1, 3, S, S] and one output '
                f'[1, n_tokens, n_embd], float32 or float16. Build it again: {self._rebuild}'
            )
        return inputs[0], outputs[0]

    def _allocate(self, tensor: _Tensor, what: str) -> _Buffer:
        n_bytes = int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize
        device = self._cuda.allocate(n_bytes, what)
        self._on_close(self._cuda.free, device)
        host = self._cuda.allocate_host(n_bytes, what)
        self._on_close(self._cuda.free_host, host)
        return _Buffer(device, host, n_bytes)

    @staticmethod
    def _show(tensor: _Tensor, buffer: _Buffer) -> NDArray[Any]:
        memory = (ctypes.c_char * buffer.n_bytes).from_address(buffer.host)
        return np.ndarray(tensor.shape, tensor.dtype, memoryview(memory))

    def _record(self) -> None:
        """One submission instead of one for each kernel. Plans with operations that cannot be recorded run without."""
        graph = 0
        try:
            graph = self._cuda.record(self._stream, self._enqueue)
            self._cuda.launch(graph, self._stream)  # the first launch uploads it
            self._wait(CancelToken())
        except EngineError as error:
            _logger.warning('the vision engine runs without a CUDA graph: %s', error)
            if graph:
                self._cuda.destroy_graph(graph)
            self._enqueue()  # whatever failed must not have harmed the rest
            self._wait(CancelToken())
            return
        self._on_close(self._cuda.destroy_graph, graph)
        self._graph = graph

    def _on_close(self, free: Any, handle: int) -> None:
        def quietly() -> None:
            try:
                free(handle)
            except EngineError as error:  # the rest must be freed nevertheless
                _logger.warning('closing the vision engine: %s', error)

        self._stack.callback(quietly)

    # -- running -----------------------------------------------------------------------------------------------------

    def _enqueue(self) -> None:
        cuda, stream = self._cuda, self._stream
        self._log.forget()
        cuda.copy_to_device(self._input.device, self._input.host, self._input.n_bytes, stream)
        if not self._context.execute_async_v3(stream):
            self._raise_if_out_of_memory('a run of the plan', 0)
            raise EngineError(f'TensorRT failed on an image: {self._log.last_lines()}')
        cuda.copy_to_host(self._output.host, self._output.device, self._output.n_bytes, stream)

    def _wait(self, cancel: CancelToken) -> None:
        """Until everything queued has run; Python looks again and again, so that it can be cancelled."""
        end_s = time.monotonic() + self._run_limit_s
        while not self._cuda.is_done(self._stream):
            cancel.raise_if_set()
            if time.monotonic() > end_s:
                raise _HangError(
                    f'the GPU has not finished an image within {self._run_limit_s:g} s: it hangs, or is busy with '
                    'other programs. Restart the node; see nvidia-smi or tegrastats'
                )
            time.sleep(_POLL_S)

    def _raise_if_out_of_memory(self, what: str, n_bytes: int) -> None:
        if self._log.is_out_of_memory:
            needed = f'about {n_bytes >> 20} MiB' if n_bytes else 'more memory'
            raise DeviceMemoryError(
                f'{what} need {needed}, but {self._cuda.memory_text()} ({self._log.last_lines()}): '
                'stop other programs that use the GPU, or build with a smaller quantisation'
            )


class _HangError(EngineError):
    """The GPU does not finish what was queued."""
