"""What the vision tower inside an exported graph computes, before the projector: the graph cut off there and run."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ['tower_features']


def tower_features(graph: Path, pixels_nchw: NDArray[np.float32]) -> NDArray[np.float32]:
    """Features of one image, float32 ``[n_patches, width]``.

    :param graph: as ``vision_graph`` writes it, with the tower's result named ``PATCH_FEATURES``.
    :param pixels_nchw: float32 ``[1, 3, S, S]``.
    """
    import onnx
    import onnxruntime as ort
    from onnx.utils import Extractor

    from mobilevlm_ros.build.vision_graph import PATCH_FEATURES

    model = onnx.load(str(graph))
    cut = Extractor(model).extract_model(['pixels_nchw'], [PATCH_FEATURES])
    with tempfile.TemporaryDirectory(dir=graph.parent) as folder:
        path = Path(folder) / 'tower.onnx'
        onnx.save_model(cut, str(path), save_as_external_data=True, location='tower.data')
        session = ort.InferenceSession(str(path), providers=['CPUExecutionProvider'])
        (features,) = session.run(None, {'pixels_nchw': pixels_nchw})
    result: NDArray[np.float32] = np.asarray(features[0], dtype=np.float32)
    return result
