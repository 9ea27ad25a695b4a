"""The vision engine on OpenVINO's CPU plugin: twice as fast as ONNX Runtime where the CPU has bfloat16 or VNNI.

The file is an ONNX graph or OpenVINO's own ``.xml`` (with its ``.bin`` beside it), one graph
``pixels_nchw [1, 3, S, S] -> visual_tokens [1, n_tokens, n_embd]``, both float32.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import DependencyError, EngineError
from mobilevlm_ros.runtime.cancel import CancelToken

__all__ = ['OpenVinoVision']

_HINTS = {'fp32': {'INFERENCE_PRECISION_HINT': 'f32'}, 'bf16': {'INFERENCE_PRECISION_HINT': 'bf16'}, 'int8': {}}
"""What is computed in, by the bundle's precision. What int8 leaves in floating point is OpenVINO's choice."""
_NAMES = {'f32': 'fp32', 'f16': 'fp16'}


class OpenVinoVision:
    """See the module.

    :param path: the graph.
    :param n_threads: threads of one run; 0: all cores.
    :param precision: ``fp32``, ``bf16`` (fp32 where the CPU has none: ``description`` says) or ``int8``.
    :raise DependencyError: if openvino is missing.
    :raise EngineError: if the file is no such graph, or the precision is unknown.
    """

    def __init__(self, path: Path, n_threads: int = 0, precision: str = 'fp32') -> None:
        try:
            import openvino as ov
        except ImportError as error:
            raise DependencyError(
                f'openvino cannot be loaded ({error}). Install it with: pip install openvino'
            ) from error
        if precision not in _HINTS:
            raise EngineError(f'OpenVINO computes in {", ".join(_HINTS)}; found {precision!r}. Rebuild the bundle.')
        n_threads = n_threads or len(os.sched_getaffinity(0))
        if not path.is_file():
            raise EngineError(f'{path} is missing. Rebuild the bundle.')
        core = ov.Core()
        try:
            model = core.read_model(str(path))
            shape_in, shape_out = _shapes(model)
            _check_shapes(path, shape_in, shape_out)
            # No cache of compiled models: compiling takes seconds, a cache as much disk as the model once more.
            compiled = core.compile_model(
                model,
                'CPU',
                {
                    'PERFORMANCE_HINT': 'LATENCY',
                    'INFERENCE_NUM_THREADS': n_threads,
                    # The robot's other processes must be free to use the same cores.
                    'ENABLE_CPU_PINNING': False,
                    **_HINTS[precision],
                },
            )
        except RuntimeError as error:
            raise EngineError(f'OpenVINO cannot load {path}: {_last_line(error)}. Rebuild the bundle.') from error
        self._compiled: Any = compiled
        self._request: Any = compiled.create_infer_request()
        self.image_size: int = shape_in[2]
        self.n_tokens: int = shape_out[1]
        self.n_embd: int = shape_out[2]
        self.description = (
            f'openvino {ov.__version__.partition("-")[0]} CPU, {_computed_in(compiled, precision)}, '
            f'{compiled.get_property("INFERENCE_NUM_THREADS")} threads'
        )

    def encode(self, pixels_nchw: NDArray[np.float32], cancel: CancelToken) -> NDArray[np.float32]:
        """See ``VisionEngine.encode``; interrupted between two nodes of the graph."""
        if self._request is None:
            raise EngineError('the vision engine is closed')
        cancel.raise_if_set()
        request = self._request
        try:
            with cancel.on_set(request.cancel):
                request.start_async({0: pixels_nchw})
                # A request that was not running when it was cancelled runs all the same.
                if cancel.is_set:
                    request.cancel()
                request.wait()
        except (RuntimeError, ValueError, TypeError) as error:
            cancel.raise_if_set()
            raise EngineError(f'OpenVINO failed on an image: {_last_line(error)}') from error
        cancel.raise_if_set()
        rows: NDArray[np.float32] = np.array(request.get_output_tensor(0).data[0], dtype=np.float32)
        if not np.isfinite(rows).all():
            raise EngineError('the vision engine gave values that are not finite: rebuild the bundle')
        return rows

    def close(self) -> None:
        """Free the compiled model; may be called again."""
        self._request = self._compiled = None


def _shapes(model: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the only input and output; empty where there are several or sizes are open."""
    if len(model.inputs) != 1 or len(model.outputs) != 1 or model.is_dynamic():
        return (), ()
    return tuple(model.input(0).shape), tuple(model.output(0).shape)


def _check_shapes(path: Path, shape_in: tuple[int, ...], shape_out: tuple[int, ...]) -> None:
    fits = (len(shape_in) == 4 and shape_in[:2] == (1, 3) and shape_in[2] == shape_in[3]) and (
        len(shape_out) == 3 and shape_out[0] == 1
    )
    if not fits:
        raise EngineError(
            f'{path} maps {shape_in} to {shape_out}; expected one input [1, 3, S, S] and one output '
            '[1, n_tokens, n_embd]. Rebuild the bundle.'
        )


def _computed_in(compiled: Any, precision: str) -> str:
    """What the plugin really computes in, which may be another precision than it was asked for."""
    name: str = compiled.get_property('INFERENCE_PRECISION_HINT').get_type_name()
    floating = _NAMES.get(name, name)
    if precision == 'int8':
        return f'int8 and {floating}'
    return floating if floating == precision else f'{floating} (this CPU has no {precision})'


def _last_line(error: Exception) -> str:
    """OpenVINO tells where in its sources an error arose, then the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ' '.join(line for line in lines if not line.startswith('Exception from')) or repr(error)
