"""The ONNX graph as OpenVINO's own model: in floating point, or quantised to int8 by NNCF with a few real images.

Weights get half of int8's range, so that CPUs without VNNI do not saturate when they add products up in 16 bits: a
bundle must be right on any machine, and costs a little accuracy on those that would not need it. Ranges of activations
are fixed when the model is made, so it is less exact than ``vision_int8`` for ONNX Runtime (visual tokens of CLIP B/16:
a cosine of 0.996 against 0.999), and only CPUs with VNNI make it faster.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.build.float_graph import FloatGraph
from mobilevlm_ros.errors import BuildError, DependencyError

__all__ = ['write_openvino']

_PRECISIONS = ('fp32', 'bf16', 'int8')


def write_openvino(onnx: Path, out: Path, precision: str, calibration: Sequence[NDArray[np.float32]] = ()) -> None:
    """Write ``out`` (``.xml``) and the file of its weights beside it (``.bin``).

    :param onnx: the float32 graph of ``write_vision_graph``.
    :param precision: ``fp32``; ``bf16``, whose weights are stored in half precision; ``int8``.
    :param calibration: for int8: pixels_nchw of real images, float32 ``[1, 3, S, S]`` each; a handful is enough.
    :raise BuildError: if the graph cannot be read, the precision is unknown or int8 has no images to calibrate with.
    :raise DependencyError: if openvino, or nncf for int8, is missing.
    """
    if precision not in _PRECISIONS:
        raise BuildError(f'OpenVINO models are made in {", ".join(_PRECISIONS)}; found {precision!r}')
    if precision == 'int8' and not calibration:
        raise BuildError('int8 for OpenVINO needs images to calibrate with, and there are none: give some photographs')
    try:
        import openvino as ov
    except ImportError as error:
        raise DependencyError(f'openvino cannot be loaded ({error}). Install it with: pip install openvino') from error
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}-', dir=out.parent) as folder:
        partial = Path(folder) / out.name
        try:
            if precision == 'int8':
                model = _quantized(onnx, Path(folder) / 'rewritten.onnx', calibration)
            else:
                model = ov.Core().read_model(str(onnx))
            ov.save_model(model, str(partial), compress_to_fp16=precision == 'bf16')
        except RuntimeError as error:
            reason = ' '.join(str(error).split())
            raise BuildError(f'OpenVINO cannot convert {onnx} to {precision}: {reason}') from error
        partial.with_suffix('.bin').replace(out.with_suffix('.bin'))
        partial.replace(out)


def _quantized(onnx: Path, rewritten: Path, calibration: Sequence[NDArray[np.float32]]) -> Any:
    # Without this it tells its makers of every use, and asks nobody.
    os.environ.setdefault('NNCF_CI', '1')
    try:
        import nncf
        from nncf.quantization.advanced_parameters import (
            AdvancedQuantizationParameters,
            AdvancedSmoothQuantParameters,
            OverflowFix,
        )
    except ImportError as error:
        raise DependencyError(f'nncf cannot be loaded ({error}). Install it with: pip install nncf') from error
    import openvino as ov

    exact = _rewrite(onnx, rewritten, calibration)
    model = ov.Core().read_model(str(rewritten))
    name = model.input(0).any_name
    with redirect_stdout(io.StringIO()):  # its progress bars; the caller shows its own
        return nncf.quantize(
            model,
            nncf.Dataset([{name: pixels_nchw} for pixels_nchw in calibration]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(calibration),
            ignored_scope=nncf.IgnoredScope(names=exact),
            advanced_parameters=AdvancedQuantizationParameters(
                overflow_fix=OverflowFix.ENABLE,
                # The graph is smooth already; smoothed twice, CLIP B/16 falls from a cosine of 0.996 to 0.981.
                smooth_quant_alphas=AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
            ),
        )


def _rewrite(onnx: Path, out: Path, calibration: Sequence[NDArray[np.float32]]) -> list[str]:
    """Write the graph smoothed, with outliers apart; returns the names of products that stay in floating point."""
    graph = FloatGraph(onnx, calibration)
    graph.smooth()
    graph.set_outliers_apart()
    graph.write(out)
    products = [node.output[0] for node in graph.nodes if node.op_type == 'MatMul']
    return [name for name in products if name not in graph.quantizable()]
