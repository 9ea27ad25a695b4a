"""The bundle of what was learned from one's own frames.

A checkpoint's is built as any other, from the run's model and adapter. nano's is put together from the same packages as
before, with the run's projector and adapter in place of the shipped ones; what PyTorch makes of it is recorded anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.build.adapter_gguf import AdaptedWeights, write_adapter_gguf
from mobilevlm_ros.build.bundle_build import REFERENCE, build_bundle, read_images
from mobilevlm_ros.build.nano import NanoSource
from mobilevlm_ros.build.profile import read_profile
from mobilevlm_ros.build.published import CheckpointSource, CheckpointTokenizer
from mobilevlm_ros.build.record import record_reference
from mobilevlm_ros.build.reference import write_reference
from mobilevlm_ros.build.stages import Reporter
from mobilevlm_ros.model.checkpoint import Checkpoint, open_checkpoint
from mobilevlm_ros.model.layout import PROJECTOR_PREFIX
from mobilevlm_ros.paths import shared_file
from mobilevlm_ros.runtime.bundle import Bundle
from mobilevlm_ros.runtime.prompt import described_template
from mobilevlm_ros.train.own_start import OWN_SUFFIX, OwnStart
from mobilevlm_ros.train.product import ADAPTER, MODEL

__all__ = ['build_own']

_N_IMAGES = 3
_WARNING = 'trained on frames of one recording: its answers about other places were not examined.'


def build_own(
    start: OwnStart, run: Path, out: Path, work: Path, reporter: Reporter, *, packages: Path | None = None
) -> Bundle:
    """Build the bundle, or find it finished.

    :param run: folder of the finished run of stage ``lora``.
    :param work: for what is made on the way.
    :raise BuildError: if it cannot be built, or computes something else than PyTorch.
    :raise CheckpointError: if the run's product cannot be read.
    """
    profile = read_profile(start.profile)
    trained = run / MODEL if (run / MODEL).is_dir() else start.checkpoint  # with a frozen projector, the base itself
    with ExitStack() as stack:
        model = stack.enter_context(open_checkpoint(trained, kind='vlm'))
        source: NanoSource | CheckpointSource
        if start.is_nano:
            source = _OwnNano(model, run / ADAPTER, work, packages, reporter)
        else:
            source = CheckpointSource(model, run / ADAPTER)
        source.name = start.name + OWN_SUFFIX
        source.warning = f'{start.before.warning} It was {_WARNING}'.lstrip()
        return build_bundle(source, profile, out, reporter)


class _OwnNano(NanoSource):
    """nano with another projector, adapter and record; the files are written into ``work``."""

    def __init__(self, model: Checkpoint, adapter: Path, work: Path, packages: Path | None, reporter: Reporter) -> None:
        super().__init__(packages, reporter)
        self.answers = {}  # limits of confidence were found for the shipped weights, not for these
        from safetensors.numpy import save_file

        work.mkdir(parents=True, exist_ok=True)
        self._own = {
            'projector': work / 'projector.safetensors',
            'adapter': work / 'adapter.gguf',
            'reference': work / REFERENCE,
        }
        projector = {name: model.tensors[name] for name in model.tensors if name.startswith(PROJECTOR_PREFIX)}
        save_file(projector, self._own['projector'], metadata={'format': 'pt'})
        write_adapter_gguf(adapter, self._own['adapter'], model.config.language, name='nano, own frames')
        reporter.step('PyTorch answers about a few images, to compare with')
        images: Sequence[NDArray[np.uint8]] = read_images(shared_file('models/calibration'))[:_N_IMAGES]
        reference = record_reference(
            model.config,
            model.vision_weights,
            AdaptedWeights(model.language_weights, adapter),
            CheckpointTokenizer(model.tokenizer),
            described_template(self.prompt),
            images,
            reporter,
            n_kept=1,
        )
        write_reference(self._own['reference'], reference)
