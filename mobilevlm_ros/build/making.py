"""What ``mobilevlm build`` does with its arguments: finds the model and the profile, and builds."""

from __future__ import annotations

from pathlib import Path

from mobilevlm_ros.build.bundle_build import build_bundle, read_images
from mobilevlm_ros.build.profile import read_profile
from mobilevlm_ros.build.stages import Reporter
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.runtime.bundle import Bundle

__all__ = ['make_bundle']


def make_bundle(
    model: str,
    profile: str,
    out: Path,
    reporter: Reporter,
    *,
    images: Path | None = None,
    adapter: Path | None = None,
    packages: Path | None = None,
    mmproj: bool = False,
) -> Bundle:
    """Build the bundle of ``model`` (nano, a published name, a folder) for ``profile`` in ``out``.

    See ``build_bundle`` for the errors.

    :raise BuildError: if an option is given that this model has no use for; it would do nothing, unseen.
    """
    if model == 'nano' and (adapter is not None or mmproj):
        option = '--mmproj' if adapter is None else '--adapter'
        raise BuildError(
            f'nano takes no {option}: it is put together from packages, with an adapter of its own. Give {option} with '
            'a published model or the folder of a checkpoint.'
        )
    if model != 'nano' and packages is not None:
        raise BuildError(f'--packages is for nano, which is made of packages; {model} is not')
    settings = read_profile(profile)
    pictures = read_images(images) if images is not None else ()
    if model == 'nano':
        from mobilevlm_ros.build.nano import NanoSource

        return build_bundle(NanoSource(packages, reporter), settings, out, reporter, pictures)
    from mobilevlm_ros.build.published import load_source

    return build_bundle(load_source(model, reporter, adapter), settings, out, reporter, pictures, mmproj=mmproj)
