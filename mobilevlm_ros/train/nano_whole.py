"""``mobilevlm train nano``: nano from nothing, in one command, and its two small files put where nano is built from.

The steps are the commands that can also be run one by one: ``nano-base``, ``nano-data``, ``features``, ``ground``,
``lora``. Each is left out where it is done already, and resumed where it was interrupted, so the command is simply
run again.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console

from mobilevlm_ros.build.adapter_gguf import write_adapter_gguf
from mobilevlm_ros.errors import DatasetMissingError
from mobilevlm_ros.model.checkpoint import open_checkpoint
from mobilevlm_ros.model.layout import PROJECTOR_PREFIX
from mobilevlm_ros.train import command
from mobilevlm_ros.train.nano_data import command as data_command
from mobilevlm_ros.train.product import ADAPTER, MODEL

__all__ = ['add_nano_arguments', 'run_nano', 'ship']

Declare = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace], int]


def add_nano_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of training nano."""
    parser.add_argument('--work', metavar='DIR', type=Path, required=True, help='folder of all that is made (7 GB)')
    parser.add_argument('--images', metavar='N', type=int, default=3600, help='to train on; default: 3600')
    parser.add_argument('--resolution', type=int, choices=[224, 384], default=224, help='default: 224 (49 tokens)')
    parser.add_argument('--packages', metavar='DIR', type=Path, help='folder with the packages; default: download them')
    parser.add_argument('--ship', metavar='DIR', type=Path, help='put projector.safetensors and adapter.gguf here, too')
    parser.add_argument('overrides', metavar='KEY=VALUE', nargs='*', help='over the configurations of both stages')


def run_nano(options: argparse.Namespace) -> int:
    """Train; returns the exit code, which is that of the step that was stopped.

    :raise MobileVLMError: see the commands.
    """
    work: Path = options.work
    base, data, features = work / f'base-{options.resolution}', work / 'data', work / f'features-{options.resolution}'
    packages = ['--packages', str(options.packages)] if options.packages else []
    stages: dict[str, tuple[str, Path, Path, str]] = {
        'nano-ground': ('ground', base, work / 'ground', 'regions.json'),
        'nano-instruct': ('lora', work / 'ground' / MODEL, work / 'instruct', 'train.json'),
    }
    if not base.exists():
        size = ['--resolution', str(options.resolution)]
        _step(data_command.add_base_arguments, data_command.run_base, ['--out', str(base), *size, *packages])
    # Both go on where they were, and look at what is there otherwise.
    many = ['--images', str(options.images)]
    _step(data_command.add_data_arguments, data_command.run_data, ['--out', str(data), *many, *packages])
    _step(
        data_command.add_features_arguments,
        data_command.run_features,
        [str(base), str(data / 'images'), '--out', str(features)],
    )
    for config, (stage, start, out, records) in stages.items():
        if (out / MODEL).exists():
            continue
        places = {
            'out': out,
            'model.base': start,
            'data.records': data / records,
            'data.images': data / 'images',
            'data.features': features,
        }
        changed = [f'{key}={value}' for key, value in places.items()] + options.overrides
        code = _step(_declare_stage(stage), command.run_training, ['--config', config, '--resume', *changed])
        if code:
            return code
    for path in ship(work / 'instruct', options.ship or work / 'shipped'):
        print(path)
    return 0


def _declare_stage(stage: str) -> Declare:
    def declare(parser: argparse.ArgumentParser) -> None:
        command.add_stage_arguments(parser)
        parser.set_defaults(stage=stage)

    return declare


def _step(declare: Declare, run: Run, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    declare(parser)
    return run(parser.parse_args(arguments))


def ship(run: Path, out: Path) -> tuple[Path, Path]:
    """Write what a run of stage ``lora`` learned as the two files that nano is built from.

    :param run: folder of the run, with ``model`` and ``adapter``.
    :param out: gets ``projector.safetensors`` (float16) and ``adapter.gguf``; each is replaced when it is whole.
    :raise DatasetMissingError: if the run is not finished.
    :raise MobileVLMError: if what it left cannot be read.
    """
    from safetensors.numpy import save_file

    for folder in (run / MODEL, run / ADAPTER):
        if not folder.is_dir():
            raise DatasetMissingError(f'there is no {folder}: finish the run first')
    out.mkdir(parents=True, exist_ok=True)
    projector, adapter = out / 'projector.safetensors', out / 'adapter.gguf'
    with open_checkpoint(run / MODEL, kind='vlm') as opened, tempfile.TemporaryDirectory(dir=out) as scratch:
        names = [name for name in opened.tensors if name.startswith(PROJECTOR_PREFIX)]
        values = {name: opened.tensors[name].astype(np.float16) for name in names}
        save_file(values, Path(scratch) / projector.name, metadata={'format': 'pt'})
        write_adapter_gguf(run / ADAPTER, Path(scratch) / adapter.name, opened.config.language, name='nano')
        for path in (projector, adapter):
            shutil.move(Path(scratch) / path.name, path)
            path.chmod(0o644)  # safetensors writes for its owner alone
    Console(stderr=True).print(f'· {out} holds what nano is built from', highlight=False)
    return projector, adapter
