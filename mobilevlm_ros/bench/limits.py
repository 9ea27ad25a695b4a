"""What this machine can read and compute in a second: the ceilings that every figure is compared with.

Measured, not looked up: memory reads by numpy's vectorised maximum and bitwise-or over int32, one large buffer a
thread; fp32 products by numpy's BLAS; int8 products by ONNX Runtime's MatMulInteger (u8 x s8), both at the shapes that
the model itself multiplies. The best run counts, since a ceiling is what was possible once. A library with better
kernels than these can pass them, so a share slightly above 1 is no error.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ['Limits', 'Product']

Product = tuple[int, int, int]
"""Rows, depth and columns of a matrix product: ``[m, k] x [k, n]``."""

_BUFFER_BYTES = 256 << 20


class Limits:
    """Measures; lives in a process of its own, whose BLAS was told the number of threads.

    :param n_threads: threads of everything.
    :param seconds: how long to try each ceiling.
    """

    def __init__(self, n_threads: int, seconds: float) -> None:
        self._n_threads = n_threads
        self._seconds = seconds

    def read_bytes_per_s(self, buffer_bytes: int = _BUFFER_BYTES) -> float:
        """Bytes read from memory in a second.

        :param buffer_bytes: for each thread; must be far larger than the caches.
        """
        buffers = [np.full(buffer_bytes // 4, index, dtype=np.int32) for index in range(self._n_threads)]

        def read(reduce: Callable[[Any], Any]) -> None:
            threads = [threading.Thread(target=reduce, args=(buffer,)) for buffer in buffers[1:]]
            for thread in threads:
                thread.start()
            reduce(buffers[0])
            for thread in threads:
                thread.join()

        n_bytes = sum(buffer.nbytes for buffer in buffers)
        best_s = min(self._best_s(lambda r=r: read(r)) for r in (np.maximum.reduce, np.bitwise_or.reduce))  # type: ignore[misc]
        return n_bytes / best_s

    def fp32_flops(self, product: Product) -> float:
        """FLOP/s of numpy's BLAS on one product."""
        m, k, n = product
        random = np.random.default_rng(0)
        left = random.normal(size=(m, k)).astype(np.float32)
        right = random.normal(size=(k, n)).astype(np.float32)
        out = np.empty((m, n), dtype=np.float32)
        return 2.0 * m * k * n / self._best_s(lambda: np.matmul(left, right, out=out))

    def int8_flops(self, product: Product) -> float | None:
        """Operations a second (two for each multiply-add) of ONNX Runtime on one product; None without onnx."""
        try:
            import onnx
            import onnxruntime as ort
        except ImportError:
            return None
        m, k, n = product
        helper, types = onnx.helper, onnx.TensorProto
        random = np.random.default_rng(0)
        weights = onnx.numpy_helper.from_array(random.integers(-127, 128, (k, n), np.int8), 'weights')
        graph = helper.make_graph(
            [helper.make_node('MatMulInteger', ['left', 'weights'], ['out'])],
            'product',
            [helper.make_tensor_value_info('left', types.UINT8, [m, k])],
            [helper.make_tensor_value_info('out', types.INT32, [m, n])],
            [weights],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._n_threads
        session = ort.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
        left = random.integers(0, 256, (m, k), np.uint8)
        return 2.0 * m * k * n / self._best_s(lambda: session.run(None, {'left': left}))

    def _best_s(self, work: Callable[[], Any]) -> float:
        work()
        best_s = float('inf')
        end_s = time.perf_counter() + self._seconds
        while True:
            started_s = time.perf_counter()
            work()
            now_s = time.perf_counter()
            best_s = min(best_s, now_s - started_s)
            if now_s >= end_s:
                return best_s
