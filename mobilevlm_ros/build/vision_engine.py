"""Vision tower and projector for a device profile: from weights to the file that the runtime opens.

Every backend starts from the same graph. Files other than the one that is opened (external data, an IR's weights) lie
beside it and are named in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.build.profile import Profile
from mobilevlm_ros.build.stages import Workshop
from mobilevlm_ros.model.config import ProjectorConfig, VisionConfig

__all__ = ['VisionFiles', 'build_vision']

_GRAPH = 'vision.onnx'
_F32_GRAPH = 'vision-fp32.onnx'
Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class VisionFiles:
    """What was built.

    :ivar names: every file that belongs into the bundle; the first one is opened.
    :ivar graph: the exported graph, to check the tower by itself.
    :ivar temporary_stage: stage whose files are not needed once everything is checked; empty: none.
    """

    names: tuple[str, ...]
    graph: Path
    temporary_stage: str = ''


def build_vision(
    workshop: Workshop,
    weights: Callable[[], Weights],
    vision: VisionConfig,
    projector: ProjectorConfig,
    n_embd: int,
    profile: Profile,
    calibration: Sequence[NDArray[np.float32]],
    inputs: Sequence[object],
) -> VisionFiles:
    """Build it.

    :param weights: gives them when they are needed.
    :param calibration: pixels_nchw of real images, float32 ``[1, 3, S, S]`` each.
    :param inputs: what the weights are, for the stages' fingerprints.
    :raise BuildError: if a weight is missing or misshapen, or a tool fails.
    :raise DependencyError: if the backend's library is missing.
    """
    target = profile.vision
    inputs = [*inputs, vision, projector, n_embd]
    title = 'vision tower and projector as one ONNX graph'

    def write_graph(precision: str, name: str) -> Callable[[Path], None]:
        from mobilevlm_ros.build.vision_graph import write_vision_graph

        def write(folder: Path) -> None:
            write_vision_graph(weights(), vision, projector, n_embd, folder / name, precision=precision)

        return write

    # A TensorRT plan is built on the device itself, from this graph: see plan.py.
    if target.backend == 'tensorrt' or (target.backend, target.precision) == ('onnxruntime', 'fp32'):
        made = workshop.stage(
            'vision',
            f'{title}, {target.precision}',
            [*inputs, target.precision],
            [_GRAPH, f'{_GRAPH}.data?'],
            write_graph(target.precision, _GRAPH),
        )
        return VisionFiles(made, workshop.path(_GRAPH))

    workshop.stage('vision-fp32', title, inputs, [_F32_GRAPH, f'{_F32_GRAPH}.data?'], write_graph('fp32', _F32_GRAPH))
    graph = workshop.path(_F32_GRAPH)
    inputs = [*inputs, target, *(pixels.tobytes() for pixels in calibration)]
    if target.backend == 'onnxruntime':
        from mobilevlm_ros.build.vision_int8 import quantize_vision_onnx

        made = workshop.stage(
            'vision',
            'vision engine in int8',
            inputs,
            [_GRAPH, f'{_GRAPH}.data?'],
            lambda folder: quantize_vision_onnx(graph, folder / _GRAPH, calibration=calibration),
        )
    else:
        from mobilevlm_ros.build.openvino_ir import write_openvino

        made = workshop.stage(
            'vision',
            f'OpenVINO model in {target.precision}',
            inputs,
            ['vision.xml', 'vision.bin'],
            lambda folder: write_openvino(graph, folder / 'vision.xml', target.precision, calibration),
        )
    return VisionFiles(made, graph, temporary_stage='vision-fp32')
