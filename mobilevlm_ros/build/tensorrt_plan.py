"""From an ONNX graph to a TensorRT plan: for the TensorRT and the GPU of this machine, and for no other.

The network is strongly typed: it computes in the types that the graph has, so fp16 is decided where the graph is
written and not by flags. One code path for TensorRT 8.6 to 11 (and for ``tensorrt_rtx``, with which tests build without
a GPU): what a version lacks is looked up. Only 8.6 has no strongly typed networks, and chooses types layer by layer.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mobilevlm_ros.errors import BuildError, EngineError
from mobilevlm_ros.runtime.bundle import sha256_of
from mobilevlm_ros.runtime.vision.cuda import Gpu, open_cuda
from mobilevlm_ros.runtime.vision.plan_key import PlanKey, graph_sha256
from mobilevlm_ros.runtime.vision.tensorrt import key_here, load_tensorrt
from mobilevlm_ros.runtime.vision.tensorrt_log import TensorRtLog, log_of

__all__ = ['build_plan', 'key_file']

_LOOK_S = 0.1
# A graph whose weights are in other files is small itself; larger ones need not be looked through for names of files.
_LARGEST_WITH_EXTERNAL_DATA = 256 << 20
_logger = logging.getLogger(__name__)


def build_plan(
    onnx: Path,
    plan: Path,
    *,
    timing_cache: Path | None = None,
    workspace_bytes: int = 0,
    on_progress: Callable[[float, float], None] = lambda done, total: None,
    trt: Any = None,
    gpu: Gpu | None = None,
) -> PlanKey:
    """Build it; minutes on a Jetson, most of them for timing kernels, which the timing cache saves the next time.

    The key is also written beside the plan (``key_file``). Either both files are whole, or there is no key.

    :param onnx: the graph; files with its weights lie beside it.
    :param plan: where the plan is written.
    :param timing_cache: file of earlier timings, made if missing; one that is damaged, or of another GPU or TensorRT,
        is not used, with a warning, and replaced.
    :param workspace_bytes: scratch memory on the GPU that a kernel may use; 0: as much as there is.
    :param on_progress: told how much is done of how much, on the calling thread; TensorRT before 10 does not say.
    :param trt: the module; None: ``tensorrt``.
    :param gpu: for which GPU; None: the one of this machine.
    :raise BuildError: if TensorRT refuses the graph or cannot build it (the message has its reasons), there is no GPU,
        or a file cannot be read or written.
    :raise DependencyError: if TensorRT or the CUDA runtime is missing.
    :raise KeyboardInterrupt: after Ctrl-C, once TensorRT has stopped; nothing is written then.
    """
    if not onnx.is_file():
        raise BuildError(f'there is no ONNX graph at {onnx}: build the bundle again')
    trt = trt or load_tensorrt()
    if gpu is None:
        try:
            gpu = open_cuda().gpu()
        except EngineError as error:
            raise BuildError(f'a TensorRT plan is built on the device that will run it: {error}') from error
    graph_hash = _graph_hash(onnx)
    log = log_of(trt)
    log.forget()
    try:
        builder = trt.Builder(log.native)
    except Exception as error:  # the bindings raise TypeError when TensorRT gives nothing
        raise BuildError(f'TensorRT {trt.__version__} does not start: {log.last_lines()} ({error})') from error
    network = builder.create_network(_network_flags(trt))
    # The parser owns weights of the network and must outlive the build.
    parser = trt.OnnxParser(network, log.native)
    _parse(trt, parser, onnx)
    precision = _precision_of(trt, network)
    config = builder.create_builder_config()
    _configure(trt, config, precision, workspace_bytes)
    if timing_cache is not None:
        _load_timing_cache(config, timing_cache, log)
    log.forget()
    serialized = _build(trt, builder, network, config, on_progress)
    if serialized is None:
        hint = ': the GPU has too little memory, stop other programs' if log.is_out_of_memory else ''
        raise BuildError(f'TensorRT {trt.__version__} cannot build a plan from {onnx}{hint}: {log.last_lines()}')
    key = key_here(trt, gpu, graph_hash, precision)
    _write(plan, serialized, key)
    if timing_cache is not None:
        _save_timing_cache(config, timing_cache)
    return key


def key_file(plan: Path) -> Path:
    """The file beside a plan that says for what it was built, in JSON (``PlanKey.to_dict``)."""
    return plan.with_name(f'{plan.name}.json')


def _graph_hash(onnx: Path) -> str:
    files = [onnx]
    if onnx.stat().st_size <= _LARGEST_WITH_EXTERNAL_DATA:
        files += _external_data_of(onnx)
    try:
        return graph_sha256({file.name: sha256_of(file) for file in files})
    except OSError as error:
        raise BuildError(f'{error.filename}, a part of {onnx}, cannot be read: {error.strerror}') from error


def _external_data_of(onnx: Path) -> list[Path]:
    import onnx as onnx_library

    try:
        graph = onnx_library.load(str(onnx), load_external_data=False).graph
    except Exception:  # protobuf's errors; TensorRT's parser will say what is wrong
        return []
    external = onnx_library.TensorProto.EXTERNAL
    tensors = (tensor for tensor in graph.initializer if tensor.data_location == external)
    names = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == 'location'}
    return [onnx.parent / name for name in sorted(names)]


def _network_flags(trt: Any) -> int:
    """8.6 needs EXPLICIT_BATCH, 10 STRONGLY_TYPED; to later versions both are a matter of course."""
    flags = trt.NetworkDefinitionCreationFlag
    return sum(1 << int(getattr(flags, name)) for name in ('EXPLICIT_BATCH', 'STRONGLY_TYPED') if hasattr(flags, name))


def _parse(trt: Any, parser: Any, onnx: Path) -> None:
    if parser.parse_from_file(str(onnx)):
        return
    problems = [_problem_text(parser.get_error(index), onnx) for index in range(parser.num_errors)]
    raise BuildError(
        f'TensorRT {trt.__version__} refuses {onnx}: {"; ".join(problems) or "it gives no reason"}. '
        'Build the graph again, or use a newer TensorRT.'
    )


def _problem_text(error: Any, onnx: Path) -> str:
    """Where and what; -1 is the number of no node."""
    if error.node() < 0:
        return str(error.desc())
    if hasattr(error, 'node_name'):
        name, operator = error.node_name(), error.node_operator()
    else:  # TensorRT before 10 tells the number only
        name, operator = _node_of(onnx, error.node())
    return f'node {name or error.node()} ({operator or "unknown operator"}): {error.desc()}'


def _node_of(onnx: Path, number: int) -> tuple[str, str]:
    import onnx as onnx_library

    with suppress(Exception):  # a damaged file: the number must do
        node = onnx_library.load(str(onnx), load_external_data=False).graph.node[number]
        return str(node.name), str(node.op_type)
    return '', ''


def _precision_of(trt: Any, network: Any) -> str:
    """The graph decides: fp16 if any layer gives half precision."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    types = {layer.get_output(index).dtype for layer in layers for index in range(layer.num_outputs)}
    return 'fp16' if trt.DataType.HALF in types else 'fp32'


def _configure(trt: Any, config: Any, precision: str, workspace_bytes: int) -> None:
    if workspace_bytes:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    if precision == 'fp32' and hasattr(trt.BuilderFlag, 'TF32'):
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and keeps only 10 bits of a factor
    is_weakly_typed = not hasattr(trt.NetworkDefinitionCreationFlag, 'STRONGLY_TYPED')
    if precision == 'fp16' and is_weakly_typed and hasattr(trt.BuilderFlag, 'FP16'):
        config.set_flag(trt.BuilderFlag.FP16)
        _logger.warning(
            'TensorRT %s has no strongly typed networks: it chooses where to compute in fp16. Look at the parity '
            'report of the bundle.',
            trt.__version__,
        )


# -- the timing cache -----------------------------------------------------------------------------------------------


def _load_timing_cache(config: Any, path: Path, log: TensorRtLog) -> None:
    data, reason = b'', ''
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        pass
    except OSError as error:
        reason = str(error)
    if data:
        reason = _use_timing_cache(config, data, log)
    if reason:
        _logger.warning('the timing cache %s is not used, all kernels are timed again: %s', path, reason)
    if reason or not data:
        config.set_timing_cache(config.create_timing_cache(b''), False)


def _use_timing_cache(config: Any, data: bytes, log: TensorRtLog) -> str:
    """Why it cannot be used; empty if it is."""
    log.forget()
    try:
        cache = config.create_timing_cache(data)
        is_used = cache is not None and config.set_timing_cache(cache, False)
    except Exception as error:  # whatever the bindings raise for data that they do not like
        return f'{error} ({log.last_lines()})'
    # TensorRT takes garbage for an empty cache, and complains in its log only.
    return log.last_lines() if log.has_complaints or not is_used else ''


def _save_timing_cache(config: Any, path: Path) -> None:
    cache = config.get_timing_cache()
    if cache is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, cache.serialize())
    except OSError as error:  # only the next build is slower
        _logger.warning('the timing cache %s cannot be written: %s', path, error.strerror)


# -- building -------------------------------------------------------------------------------------------------------


class _Phases:
    """Phases of a build, each with a number of steps, some of them within others; told from TensorRT's threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phases: dict[str, list[Any]] = {}
        self._share = 0.0
        self._is_running = False
        self.is_stopped = False

    def begin(self) -> bool:
        """Whether the build may start: not after ``stop``."""
        with self._lock:
            self._is_running = not self.is_stopped
            return self._is_running

    def stop(self) -> bool:
        """Stop at the next step; whether there was a build to stop."""
        with self._lock:
            self.is_stopped = True
            return self._is_running

    def start(self, name: str, parent: str | None, n_steps: int) -> None:
        with self._lock:
            self._phases[name] = [parent, max(n_steps, 1), 0]

    def step(self, name: str) -> None:
        with self._lock:
            if name in self._phases:
                self._phases[name][2] += 1

    def finish(self, name: str) -> None:
        with self._lock:
            self._phases.pop(name, None)

    def share(self) -> float:
        """How much is done, 0 to 1; never less than before."""
        with self._lock:
            self._share = max([self._share, *(self._of(n) for n, (p, _, _) in self._phases.items() if not p)])
            return self._share

    def _of(self, name: str) -> float:
        _, n_steps, n_done = self._phases[name]
        inner = max((self._of(n) for n, (parent, _, _) in self._phases.items() if parent == name), default=0.0)
        return min(1.0, (n_done + inner) / n_steps)


def _monitor_of(trt: Any, phases: _Phases) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            phases.step(phase_name)
            return not phases.is_stopped

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()


def _build(trt: Any, builder: Any, network: Any, config: Any, on_progress: Callable[[float, float], None]) -> Any:
    """Build on another thread, so that Ctrl-C reaches this one: the bindings swallow what is raised in a monitor."""
    phases = _Phases()
    has_monitor = hasattr(trt, 'IProgressMonitor')
    if has_monitor:
        config.progress_monitor = _monitor_of(trt, phases)
    results: list[Any] = []
    # Not Thread.join: when Ctrl-C meets it, Python up to 3.12 takes the thread for ended.
    is_done = threading.Event()

    def work() -> None:
        try:
            if phases.begin():
                results.append(builder.build_serialized_network(network, config))
        except Exception as error:
            results.append(error)
        finally:
            is_done.set()

    try:
        threading.Thread(target=work, name='tensorrt-build', daemon=True).start()
        while not is_done.wait(_LOOK_S):
            on_progress(phases.share(), 1.0)
    except BaseException:
        if phases.stop():
            if not has_monitor:
                _logger.warning('TensorRT %s cannot be interrupted: waiting until the plan is built', trt.__version__)
            is_done.wait()  # it uses what would be freed otherwise
        raise
    if isinstance(results[0], Exception):
        raise BuildError(f'TensorRT {trt.__version__} failed: {results[0]}') from results[0]
    on_progress(1.0, 1.0)
    return results[0]


def _write(plan: Path, serialized: Any, key: PlanKey) -> None:
    """The key last: a key beside a plan is never that of an older one."""
    try:
        key_file(plan).unlink(missing_ok=True)
        _replace(plan, serialized)
        _replace(key_file(plan), f'{json.dumps(key.to_dict(), indent=2)}\n'.encode())
    except OSError as error:
        raise BuildError(f'{plan} cannot be written: {error.strerror}. Free some space.') from error


def _replace(path: Path, content: Any) -> None:
    """Write a file so that it is whole or not there."""
    partial = path.with_name(f'.{path.name}.partial')
    try:
        with partial.open('wb') as file:
            file.write(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
