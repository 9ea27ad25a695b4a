"""The vision engine on ONNX Runtime's CPU provider: the default where there is no TensorRT.

The file is one graph, ``pixels_nchw [1, 3, S, S] -> visual_tokens [1, n_tokens, n_embd]``, both float32.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import DependencyError, EngineError
from mobilevlm_ros.runtime.cancel import CancelToken

__all__ = ['OnnxRuntimeVision']


class OnnxRuntimeVision:
    """See the module.

    :param path: the ONNX file.
    :param n_threads: threads of one run; 0: all cores.
    :raise DependencyError: if onnxruntime is missing.
    :raise EngineError: if the file is no such graph.
    """

    def __init__(self, path: Path, n_threads: int = 0) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise DependencyError(
                f'onnxruntime cannot be loaded ({error}). Install it with: pip install onnxruntime'
            ) from error
        self._ort = ort
        options = ort.SessionOptions()
        options.intra_op_num_threads = n_threads or len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Between frames the threads must sleep: the robot needs its cores.
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')
        try:
            session = ort.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        except Exception as error:  # onnxruntime raises its own classes, derived from Exception or RuntimeError
            reason = ' '.join(str(error).split())  # some versions end it with a line break
            raise EngineError(f'onnxruntime cannot load {path}: {reason}. Rebuild the bundle.') from error
        inputs, outputs = session.get_inputs(), session.get_outputs()
        shape_in = tuple(inputs[0].shape) if inputs else ()
        shape_out = tuple(outputs[0].shape) if outputs else ()
        fits = (
            len(inputs) == len(outputs) == 1
            and len(shape_in) == 4
            and shape_in[:2] == (1, 3)
            and shape_in[2] == shape_in[3]
            and len(shape_out) == 3
            and all(isinstance(n, int) for n in (*shape_in, *shape_out))
        )
        if not fits:
            raise EngineError(
                f'{path} maps {shape_in} to {shape_out}; expected one input [1, 3, S, S] and one output '
                '[1, n_tokens, n_embd]. Rebuild the bundle.'
            )
        self._session: Any = session
        self._input_name, self._output_name = inputs[0].name, outputs[0].name
        self.image_size: int = shape_in[2]
        self.n_tokens: int = shape_out[1]
        self.n_embd: int = shape_out[2]
        self.description = f'onnxruntime {ort.__version__} CPU, {options.intra_op_num_threads} threads'

    def encode(self, pixels_nchw: NDArray[np.float32], cancel: CancelToken) -> NDArray[np.float32]:
        """See ``VisionEngine.encode``; interrupted between two nodes of the graph."""
        if self._session is None:
            raise EngineError('the vision engine is closed')
        cancel.raise_if_set()
        run_options = self._ort.RunOptions()

        def terminate() -> None:
            run_options.terminate = True

        try:
            with cancel.on_set(terminate):
                (tokens,) = self._session.run([self._output_name], {self._input_name: pixels_nchw}, run_options)
        except Exception as error:  # see above
            cancel.raise_if_set()
            raise EngineError(f'onnxruntime failed on an image: {error}') from error
        cancel.raise_if_set()
        rows: NDArray[np.float32] = np.asarray(tokens[0], dtype=np.float32)
        if not np.isfinite(rows).all():
            raise EngineError('the vision engine gave values that are not finite: rebuild the bundle')
        return rows

    def close(self) -> None:
        """Free the session; may be called again."""
        self._session = None
