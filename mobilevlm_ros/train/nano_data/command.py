"""``mobilevlm train nano-data``, ``nano-base`` and ``features``: the arguments, and what is printed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mobilevlm_ros.build.console import ConsoleReporter
from mobilevlm_ros.paths import cache_dir

__all__ = [
    'add_base_arguments',
    'add_data_arguments',
    'add_features_arguments',
    'run_base',
    'run_data',
    'run_features',
]


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of generating data."""
    parser.add_argument('--out', metavar='DIR', type=Path, required=True, help='folder of the data')
    parser.add_argument('--images', metavar='N', type=int, default=6000, help='for training; default: 6000')
    parser.add_argument('--held-out', metavar='N', type=int, default=300, help='of held-out objects; default: 300')
    parser.add_argument('--resolution', metavar='N', type=int, default=448, help='longest side; default: 448')
    parser.add_argument('--questions', metavar='N', type=int, default=9, help='at most, about a picture; default: 9')
    parser.add_argument('--seed', metavar='N', type=int, default=0, help='default: 0')
    parser.add_argument('--packages', metavar='DIR', type=Path, help='folder with the packages; default: download them')


def run_data(options: argparse.Namespace) -> int:
    """Generate; returns the exit code.

    :raise DatasetError: if a package cannot be had or used, or the folder holds other data.
    """
    from mobilevlm_ros.train.nano_data.cutouts import load_materials
    from mobilevlm_ros.train.nano_data.generate import Plan, generate
    from mobilevlm_ros.train.nano_data.photos import load_photos
    from mobilevlm_ros.train.nano_data.sources import BACKGROUNDS, fetch_packages, licence_text, photo_packages

    with ConsoleReporter() as reporter:
        found = fetch_packages(cache_dir() / 'nano-data', reporter, local=options.packages)
        reporter.step('cut-outs and backgrounds')
        materials = load_materials(
            found['tuxpaint-stamps-default'], found['sweethome3d-furniture'], [found[name] for name in BACKGROUNDS]
        )
        photos = load_photos({name: found[name] for name in photo_packages()})
        plan = Plan(options.images, options.held_out, options.resolution, options.questions, options.seed)
        reporter.step(f'{plan.images} pictures for training and {plan.held_out} held out')
        made = generate(options.out, materials, photos, plan, licence_text(), on_progress=reporter.progress)
    print(json.dumps(made, indent=2))
    return 0


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of writing nano's frozen parts."""
    parser.add_argument('--out', metavar='DIR', type=Path, required=True, help='folder of the checkpoint')
    parser.add_argument('--resolution', type=int, choices=[224, 384], default=224, help='default: 224 (49 tokens)')
    parser.add_argument('--projector', choices=['random', 'shipped'], default='random', help='default: random')
    parser.add_argument('--seed', metavar='N', type=int, default=0, help='of the random projector; default: 0')
    parser.add_argument('--dtype', choices=['fp32', 'fp16', 'bf16'], default='fp32', help='default: fp32, exact')
    parser.add_argument('--packages', metavar='DIR', type=Path, help='folder with the two wheels')


def run_base(options: argparse.Namespace) -> int:
    """Write the checkpoint; returns the exit code.

    :raise MobileVLMError: see ``write_nano_base``.
    """
    from mobilevlm_ros.train.nano_base import write_nano_base

    with ConsoleReporter() as reporter:
        out = write_nano_base(
            options.out,
            resolution=options.resolution,
            seed=options.seed,
            projector=options.projector,
            dtype=options.dtype,
            packages=options.packages,
            reporter=reporter,
        )
    print(out)
    return 0


def add_features_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of computing features."""
    parser.add_argument('checkpoint', metavar='CHECKPOINT', type=Path, help='whose frozen tower')
    parser.add_argument('images', metavar='IMAGES', type=Path, help='folder of the pictures')
    parser.add_argument('--out', metavar='DIR', type=Path, required=True, help='folder of the features')
    parser.add_argument('--aspect', choices=['pad', 'square'], help="default: the checkpoint's")
    parser.add_argument('--batch', metavar='N', type=int, default=8, help='pictures at once; default: 8')
    parser.add_argument('--max-gb', metavar='N', type=float, default=64.0, help='the most they may take; default: 64')


def run_features(options: argparse.Namespace) -> int:
    """Compute what is missing; returns the exit code.

    :raise MobileVLMError: see ``fill_cache``.
    """
    from mobilevlm_ros.errors import DatasetMissingError
    from mobilevlm_ros.model.checkpoint import open_checkpoint
    from mobilevlm_ros.train.features import fill_cache, identity_of, load_tower

    if not options.images.is_dir():
        raise DatasetMissingError(f'there is no folder of pictures {options.images}')
    images = sorted(path for path in options.images.rglob('*') if path.suffix in ('.jpg', '.jpeg', '.png', '.webp'))
    with ConsoleReporter() as reporter, open_checkpoint(options.checkpoint, kind='vlm') as checkpoint:
        vision = checkpoint.config.vision
        assert vision is not None
        identity = identity_of(vision, checkpoint.vision_weights, options.aspect or checkpoint.config.aspect)
        tower = load_tower(checkpoint)
        reporter.step(f'features of {len(images)} pictures, {identity.row_bytes >> 10} KiB each')
        cache = fill_cache(
            options.out,
            images,
            tower,
            identity,
            mean=vision.mean,
            std=vision.std,
            batch=options.batch,
            max_bytes=int(options.max_gb * (1 << 30)),
            on_progress=reporter.progress,
        )
    print(f'{options.out}: {len(cache)} pictures')
    return 0
