"""From labels to a bundle that was examined: the steps between, each left out where it is done already.

The folder of a run holds ``train.json``, ``own.yaml`` (the configuration), ``features/``, ``run/`` (the stage),
``bundle/`` and ``report.json``; ``before/`` and ``base/`` where they had to be made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mobilevlm_ros.build.console import ConsoleReporter
from mobilevlm_ros.build.stages import Reporter
from mobilevlm_ros.errors import SettingsError, TrainingError
from mobilevlm_ros.model.checkpoint import open_checkpoint
from mobilevlm_ros.runtime.bundle import Bundle
from mobilevlm_ros.runtime.loading import load_assistant
from mobilevlm_ros.train.command import asked_to_stop
from mobilevlm_ros.train.config import TrainConfig, find_config, read_config
from mobilevlm_ros.train.exam import Given, answer_all, majority
from mobilevlm_ros.train.exam_questions import ExamQuestion
from mobilevlm_ros.train.features import fill_cache, identity_of, load_tower
from mobilevlm_ros.train.own_bundle import build_own
from mobilevlm_ros.train.own_records import write_records
from mobilevlm_ros.train.own_report import OwnReport
from mobilevlm_ros.train.own_split import Split
from mobilevlm_ros.train.own_start import OwnStart, prepare_start
from mobilevlm_ros.train.stage import run_stage

__all__ = ['BUNDLE', 'REPORT', 'OwnSettings', 'train_own']

BUNDLE, REPORT, RUN = 'bundle', 'report.json', 'run'
_RECORDS, _CONFIG, _FEATURES = 'train.json', 'own.yaml', 'features'


@dataclass(frozen=True)
class OwnSettings:
    """What was asked for.

    :ivar folder: of the labels.
    :ivar out: of everything that is made.
    :ivar bundle, base, profile, packages: see ``prepare_start``.
    :ivar config: file of the stage, or its name in ``config/train``; ``overrides`` come on top.
    """

    folder: Path
    out: Path
    bundle: Path | None = None
    base: str | None = None
    profile: str | None = None
    packages: Path | None = None
    config: str = 'own-data'
    overrides: tuple[str, ...] = ()
    resume: bool = False


def train_own(settings: OwnSettings, split: Split, reporter: ConsoleReporter) -> OwnReport | None:
    """Train on the frames of a split, build the bundle, and ask both bundles about the held-out frames.

    :param reporter: not entered; the training has a bar of its own.
    :return: None if the training was stopped by Ctrl-C or a termination; then ``resume`` goes on.
    :raise SettingsError: if what was asked for does not fit together.
    :raise TrainingError: if there is a run already that is not to be resumed, or it is another one.
    :raise MobileVLMError: if a step fails; what is done stays.
    """
    out, run = settings.out, settings.out / RUN
    if int(os.environ.get('WORLD_SIZE', '1')) > 1:
        raise SettingsError('`mobilevlm train own` runs in one process: run it without torchrun')
    if not settings.resume and (out / _RECORDS).exists():
        raise TrainingError(f'{out} holds a run already: go on with --resume, or choose another --out')
    read_config(settings.config, settings.overrides)  # mistakes cost no time
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f'{out} cannot be made: {error.strerror}') from error
    write_records(out / _RECORDS, split.train, settings.folder, resume=settings.resume)
    with reporter:
        start = prepare_start(
            out,
            reporter,
            bundle=settings.bundle,
            base=settings.base,
            profile=settings.profile,
            packages=settings.packages,
        )
        config = _configured(settings, start, [frame.image for frame in split.train], reporter)
    reporter.console.print('· training', highlight=False)
    with asked_to_stop() as asked:
        outcome = run_stage(config, resume=settings.resume, console=reporter.console, asked_to_stop=asked.__bool__)
    if outcome.stopped:
        return None
    questions = [question for frame in split.held_out for question in frame.questions]
    with reporter:
        after = build_own(start, run, out / BUNDLE, out / 'shipped', reporter, packages=settings.packages)
        report = OwnReport(
            _examined(start.before, questions, reporter, 'before'),
            _examined(after, questions, reporter, 'after'),
            majority(questions),
        )
    record = {'before': start.before.model_id, 'after': after.model_id, 'held_out_from_s': split.from_s}
    text = json.dumps(record | {'report': report.as_record()}, indent=1, ensure_ascii=False)
    _write(out / REPORT, text + '\n')
    return report


def _configured(settings: OwnSettings, start: OwnStart, images: Sequence[Path], reporter: Reporter) -> TrainConfig:
    """The configuration of the stage, written down, and the frozen tower's features of every image."""
    out = settings.out
    with open_checkpoint(start.checkpoint, kind='vlm') as model:
        vision = model.config.vision
        assert vision is not None
        reporter.step(f'what the frozen tower sees in {len(images)} frames')
        fill_cache(
            out / _FEATURES,
            images,
            load_tower(model),
            identity_of(vision, model.vision_weights, model.config.aspect),
            mean=vision.mean,
            std=vision.std,
            on_progress=reporter.progress,
        )
        values: dict[str, Any] = {
            'extends': str(find_config(settings.config).resolve()),
            'out': str(out / RUN),
            'model': {'base': str(start.checkpoint)},
            'data': {
                'records': str(out / _RECORDS),
                'images': str(settings.folder),
                'features': str(out / _FEATURES),
                'template': model.config.template,
                'aspect': model.config.aspect,
                'system': model.config.system if model.config.template == 'chatml' else '',
            },
            'saving': {'dtype': model.dtype},
        }
    if start.adapter is not None:
        folder, lora = start.adapter
        values['model']['adapter'] = str(folder)
        values['lora'] = {'rank': lora.rank, 'alpha': lora.alpha}
    path = out / _CONFIG
    _write(path, yaml.safe_dump(values, sort_keys=False))
    return read_config(str(path), settings.overrides)


def _examined(bundle: Bundle, questions: Sequence[ExamQuestion], reporter: Reporter, when: str) -> list[Given]:
    reporter.step(f'{len(questions)} questions about held-out frames, {when}')
    assistant = load_assistant(bundle)
    try:
        return answer_all(assistant, questions, on_progress=reporter.progress)
    finally:
        assistant.close()


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding='utf-8')
    except OSError as error:
        raise TrainingError(f'{path} cannot be written: {error.strerror or error}') from error
