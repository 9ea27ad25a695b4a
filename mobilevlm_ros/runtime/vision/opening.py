"""Opens the vision engine that a bundle names; each backend's library is loaded only when a bundle wants it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobilevlm_ros.errors import EngineError
from mobilevlm_ros.runtime.vision import VisionEngine

__all__ = ['open_engine']


def open_engine(
    backend: str,
    path: Path,
    precision: str,
    *,
    n_threads: int = 0,
    plan_key: Mapping[str, Any] | None = None,
    onnx_sha256: str | None = None,
) -> VisionEngine:
    """Open ``path`` with ``backend``.

    :param n_threads: threads of one run on a CPU; 0: all cores.
    :param plan_key: for which TensorRT and GPU a plan was built.
    :param onnx_sha256: of the graph that lies beside the plan now; None: not known.
    :raise EngineError: if the file does not load, or is a plan for another TensorRT, GPU or graph.
    :raise DependencyError: if the backend's library is missing.
    """
    if backend == 'onnxruntime':
        from mobilevlm_ros.runtime.vision.onnxruntime import OnnxRuntimeVision

        return OnnxRuntimeVision(path, n_threads)
    if backend == 'openvino':
        from mobilevlm_ros.runtime.vision.openvino import OpenVinoVision

        return OpenVinoVision(path, n_threads, precision)
    if backend == 'tensorrt':
        rebuild = f'mobilevlm plan {path.parent}'
        if plan_key is None:
            raise EngineError(
                f'{path.parent} holds the graph for TensorRT, but no plan for this GPU yet. On the device itself run: '
                f'{rebuild}'
            )
        from mobilevlm_ros.runtime.vision.plan_key import PlanKey
        from mobilevlm_ros.runtime.vision.tensorrt import TensorRtVision

        return TensorRtVision(path, PlanKey.from_dict(plan_key), onnx_sha256=onnx_sha256, rebuild=rebuild)
    raise EngineError(f'unknown vision backend {backend!r}: update mobilevlm_ros, or rebuild the bundle')
