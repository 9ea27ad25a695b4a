"""Where training on one's own frames starts: the bundle that the robot answers with now, and the checkpoint behind it.

A bundle holds engines, which cannot be trained. So the checkpoint that it was built from is opened (nano's is put
together from its packages), and compared with what the bundle says it is made of. If the bundle has an adapter,
training goes on from it: the two small matrices beside each large one are changed further, nothing is merged. So the
language model of the new bundle has the old weights, quantised as they were (merged, they would be rounded anew), the
adapter stays as small as it was, and training sees exactly the sum that llama.cpp computes with.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from mobilevlm_ros.build.making import make_bundle
from mobilevlm_ros.build.nano import NanoSource
from mobilevlm_ros.build.published import CheckpointSource
from mobilevlm_ros.build.stages import Reporter
from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.model.checkpoint import open_checkpoint
from mobilevlm_ros.model.fetch import fetched_path
from mobilevlm_ros.model.manifest import known_models
from mobilevlm_ros.runtime.bundle import Bundle, open_bundle
from mobilevlm_ros.train.config import LoraConfig
from mobilevlm_ros.train.nano_base import write_nano_base
from mobilevlm_ros.train.own_adapter import unpack_adapter

__all__ = ['NANO', 'OwnStart', 'prepare_start']

NANO = 'nano'
OWN_SUFFIX = '-own'


@dataclass(frozen=True)
class OwnStart:
    """What is there before the first step.

    :ivar name: of the model.
    :ivar is_nano: it is the embedded default, whose bundle is put together from packages.
    :ivar checkpoint: folder of the model that is trained on, without its adapter.
    :ivar adapter: the bundle's adapter as peft saves it, and its rank and alpha; None: it has none.
    :ivar before: the bundle that was made of both.
    :ivar profile: that it was built for, and the new one will be.
    """

    name: str
    is_nano: bool
    checkpoint: Path
    adapter: tuple[Path, LoraConfig] | None
    before: Bundle
    profile: str


def prepare_start(
    work: Path,
    reporter: Reporter,
    *,
    bundle: Path | None = None,
    base: str | None = None,
    profile: str | None = None,
    packages: Path | None = None,
) -> OwnStart:
    """Find or make the bundle and the checkpoint; what is in ``work`` already is taken as it is.

    :param bundle: None: built from ``base``.
    :param base: ``nano``, a published name or the folder of a checkpoint; None: what the bundle was built from, or
        nano if there is none.
    :param profile: kind of device; None: the bundle's, or ``cpu``.
    :param packages: a folder with nano's two wheels; None: download them.
    :raise SettingsError: if the two do not belong together, or it cannot be said what the bundle was built from.
    :raise MobileVLMError: if one cannot be used, or not be made.
    """
    opened = None if bundle is None else open_bundle(bundle)
    name = base or (NANO if opened is None else _base_of(opened))
    profile = profile or ('cpu' if opened is None else opened.profile)
    if name == NANO:
        checkpoint = work / 'base'
    else:
        checkpoint = Path(name) if Path(name).is_dir() else _fetched(name)
    if opened is None:
        reporter.step(f'the bundle of {name} as it is')
        opened = make_bundle(name, profile, work / 'before', reporter, packages=packages)
    else:
        _check_belongs(opened, name, checkpoint, packages, reporter)
    if name == NANO and not checkpoint.exists():
        write_nano_base(checkpoint, projector='shipped', packages=packages, reporter=reporter)
    adapter = None
    if opened.adapter_path is not None:
        reporter.step(f'the adapter of {opened.model_id}')
        with open_checkpoint(checkpoint, kind='vlm') as model:
            folder = work / 'adapter-before'
            shutil.rmtree(folder, ignore_errors=True)
            adapter = folder, unpack_adapter(opened.adapter_path, model.config.language, folder)
    called = NANO if name == NANO else checkpoint.resolve().name
    return OwnStart(called, name == NANO, checkpoint, adapter, opened, profile)


def _base_of(bundle: Bundle) -> str:
    if bundle.name.endswith(OWN_SUFFIX):
        raise SettingsError(
            f'{bundle.path} was trained on frames of your own already: start from the bundle that it was made from, '
            'with all frames that you have; `mobilevlm train frames` takes several bags'
        )
    if bundle.name == NANO or bundle.name in known_models():
        return bundle.name
    raise SettingsError(
        f'{bundle.path} was built from {bundle.name}, which is neither nano nor a published model: give the folder of '
        'its checkpoint with --base'
    )


def _fetched(name: str) -> Path:
    if name not in known_models():
        raise SettingsError(
            f'--base {name!r} is neither a folder nor a known model; known are: nano, {", ".join(known_models())}'
        )
    return fetched_path(name)


def _check_belongs(bundle: Bundle, name: str, checkpoint: Path, packages: Path | None, reporter: Reporter) -> None:
    """That a bundle was built from a checkpoint: every hash of the checkpoint's files is among its sources."""
    reporter.step(f'whether {bundle.model_id} was built from {name}')
    if name == NANO:
        made_of = NanoSource(packages, reporter).identity()
    else:
        with open_checkpoint(checkpoint, kind='vlm') as opened:
            made_of = CheckpointSource(opened).identity()
    missing = [one for one in made_of if one not in bundle.description['sources']]
    if missing:
        raise SettingsError(
            f'{bundle.path} was not built from this {name}: {missing[0]} and {len(missing) - 1} more of its '
            f'{len(made_of)} parts are not among what the bundle was made of. Build it again with `mobilevlm build '
            f'{name}`, or give another --base'
        )
