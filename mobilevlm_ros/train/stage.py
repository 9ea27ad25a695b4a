"""Runs one stage of training, from its configuration to its product; resumes one that was ended.

The folder of a run holds ``config.yaml`` (as it was run), ``checkpoints/``, ``log.jsonl``, ``tensorboard/`` and in the
end ``model/``, and ``projector/`` or ``adapter/`` if the stage leaves one.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainingArguments, set_seed

from mobilevlm_ros.errors import DependencyError, SettingsError, TrainingError
from mobilevlm_ros.model.mobilevlm import load_mobilevlm
from mobilevlm_ros.paths import shared_file
from mobilevlm_ros.train.checkpoints import disk_errors_named, newest
from mobilevlm_ros.train.config import ADAPTER_STAGES, Parallel, TrainConfig, differences, dump_config, read_config
from mobilevlm_ros.train.cost_card import CostCard, cost_card
from mobilevlm_ros.train.feeding import Supply, check_places, open_supply
from mobilevlm_ros.train.grounding import GroundedTrainee, Words
from mobilevlm_ros.train.lora import add_adapters, load_adapter, quantise_language
from mobilevlm_ros.train.product import write_product
from mobilevlm_ros.train.progress import Bar, StepLog, StopWhenAsked
from mobilevlm_ros.train.starting import StartingPoint, open_start
from mobilevlm_ros.train.tokens import open_tokenizer
from mobilevlm_ros.train.trainee import Disturbance, Trainee, freeze
from mobilevlm_ros.train.trainer import TRAINED, StageTrainer, load_trained, micro_batches

__all__ = ['CHECKPOINTS', 'Outcome', 'run_stage']

CHECKPOINTS = 'checkpoints'
CONFIG = 'config.yaml'


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    :ivar step: the last one.
    :ivar stopped: whether it was asked to stop before its end; then there are no products.
    :ivar products: ``model``, ``projector``, ``adapter``: what was written.
    """

    step: int
    stopped: bool
    products: dict[str, Path]
    card: CostCard


def run_stage(
    config: TrainConfig,
    *,
    resume: bool = False,
    console: Console | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    card_only: bool = False,
) -> Outcome:
    """Train.

    :param resume: go on from the newest checkpoint in ``config.out``; from the start if there is none yet.
    :param asked_to_stop: looked at after every step; a checkpoint is made, and the run ends.
    :param card_only: say what it would cost, and stop before the first step.
    :raise SettingsError: if the configuration asks for what cannot be.
    :raise CheckpointError: if the model to start from cannot be used.
    :raise DatasetError: if the data cannot be used.
    :raise TrainingError: if the run cannot start or go on; DivergedError if the loss is no number any more.
    :raise DiskSpaceError: if the disk is full; the last checkpoint stays.
    :raise DependencyError: if a library is missing.
    """
    n_processes = int(os.environ.get('WORLD_SIZE', '1'))
    is_first = os.environ.get('RANK', '0') == '0'
    console = console if console is not None and is_first else Console(quiet=True)
    check_places(config.data)
    _check_libraries(config)
    _spread(config.parallel)
    last = _last_checkpoint(config, resume)
    micro_batch, accumulated = micro_batches(config, n_processes)
    with ExitStack() as files:
        start = open_start(config, files)
        supply = open_supply(config, start, micro_batch)
        if supply.note:
            console.print(f'· {supply.note}', highlight=False)
        set_seed(config.schedule.seed)
        trainee = _trainee(config, start, supply.words)
        n_steps = _n_steps(config, supply)
        card = cost_card(
            config, trainee, start.origin, supply.lengths, supply.n_samples, n_steps, micro_batch, n_processes
        )
        console.print(card.table(), highlight=False)
        if card_only:
            return Outcome(0, False, {}, card)
        if is_first:
            _write_config(config)
        trainer = StageTrainer(
            trainee,
            _arguments(config, micro_batch, accumulated, n_steps),
            config,
            supply.feed,
            supply.sampler,
            config.out / CHECKPOINTS,
        )
        step = _step_of(last)
        if last is not None and step >= n_steps:  # the Trainer would do one step more
            load_trained(trainee, last / TRAINED)
            trained = trainer.trained_state()
        else:
            stop = StopWhenAsked(lambda: _any_process(asked_to_stop()))
            _run(trainer, config, last, stop, console if is_first else None)
            step = trainer.state.global_step
            if stop.stopped:
                return Outcome(step, True, {}, card)
            trained = trainer.gathered_state()
        if not is_first:
            return Outcome(step, False, {}, card)
        console.print('· writing the product', highlight=False)
        settings = trainee.model.language.peft_config['default'].to_dict() if config.lora else None
        with disk_errors_named(config.out, newest(config.out / CHECKPOINTS)):
            return Outcome(step, False, write_product(config, start, trained, settings), card)


def _run(
    trainer: StageTrainer, config: TrainConfig, last: Path | None, stop: StopWhenAsked, console: Console | None
) -> None:
    """All steps that are left."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(stop)
    if console is None:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        return
    if last is not None:
        console.print(f'· going on from {last}', highlight=False)
    with disk_errors_named(config.out, last):
        log = StepLog(config.out, _step_of(last))
    bar = Bar(console, config.stage)
    trainer.add_callback(log)
    trainer.add_callback(bar)
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    finally:
        bar.close()
        log.close()


def _step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.partition('-')[2]) if checkpoint else 0


def _trainee(config: TrainConfig, start: StartingPoint, words: Words | None) -> Trainee:
    """The model with what learns, on the CPU."""
    model = load_mobilevlm(start.config, start.tensors, torch.float32)
    freeze(model, config.learning_rate)
    half = config.schedule.precision == 'bf16' and config.parallel.deepspeed is None and config.parallel.fsdp is None
    if config.lora is not None:
        model.language.requires_grad_(False)
    if half and not any(p.requires_grad for p in model.language.parameters()):
        model.language.to(torch.bfloat16)  # frozen, so nothing is lost that the forward pass would see
    if config.lora is not None:
        if config.stage == 'qlora':
            quantise_language(model, config.lora.bits, torch.bfloat16 if half else torch.float32)
        add_adapters(model, config.lora)
        if config.model.adapter is not None:
            load_adapter(model, config.lora, config.model.adapter)
    cached = config.data.features is not None
    disturbance = Disturbance(config.data.feature_noise, config.data.feature_dropout)
    trainee = (  # one and no more: each hooks itself to the tower
        Trainee(model, cached=cached, disturbance=disturbance)
        if words is None
        else GroundedTrainee(model, words, open_tokenizer(start.tokenizer), cached=cached, disturbance=disturbance)
    )
    if not any(True for _ in trainee.trained()):
        raise TrainingError(f'nothing learns in stage {config.stage}')
    return trainee


def _n_steps(config: TrainConfig, supply: Supply) -> int:
    schedule = config.schedule
    if schedule.max_steps is not None:
        return schedule.max_steps
    n_epochs = 1 if config.data.shards else schedule.epochs  # packed text has its epochs in its length
    return n_epochs * -(-supply.n_samples // schedule.global_batch)


def _arguments(config: TrainConfig, micro_batch: int, accumulated: int, n_steps: int) -> TrainingArguments:
    """The same for transformers' Trainer."""
    schedule, saving = config.schedule, config.saving
    on_gpu = torch.cuda.is_available()
    decays: dict[str, Any] = {'lr_scheduler_type': 'constant_with_warmup'}
    if schedule.decay == 'cosine':
        decays = {'lr_scheduler_type': 'cosine'}
        if schedule.final_rate:
            decays = {
                'lr_scheduler_type': 'cosine_with_min_lr',
                'lr_scheduler_kwargs': {'min_lr_rate': schedule.final_rate},
            }
    rates = (config.learning_rate.language, config.learning_rate.projector)
    arguments = TrainingArguments(
        output_dir=str(config.out / CHECKPOINTS),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulated,
        max_steps=n_steps,
        learning_rate=max(rate for rate in rates if rate is not None),
        warmup_steps=schedule.warmup,
        weight_decay=schedule.weight_decay,
        adam_beta1=schedule.betas[0],
        adam_beta2=schedule.betas[1],
        adam_epsilon=schedule.epsilon,
        max_grad_norm=schedule.clip_norm,
        bf16=schedule.precision == 'bf16',
        tf32=schedule.tf32 if on_gpu and torch.cuda.get_device_capability()[0] >= 8 else None,
        activation_checkpointing=schedule.checkpoint_activations,
        logging_steps=saving.log_every_steps,
        logging_nan_inf_filter=False,
        save_strategy='steps',
        save_steps=saving.every_steps,
        report_to='none',
        disable_tqdm=True,
        seed=schedule.seed,
        use_cpu=not on_gpu,
        dataloader_num_workers=config.data.n_workers,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        label_names=['labels'],
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
        **decays,
        **_spread(config.parallel),
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs are for several processes
    return arguments


def _spread(parallel: Parallel) -> dict[str, Any]:
    """How the model is spread over processes."""
    if parallel.deepspeed is not None:
        return {'deepspeed': str(_shipped(parallel.deepspeed, 'parallel.deepspeed'))}
    if parallel.fsdp is not None:
        path = _shipped(parallel.fsdp, 'parallel.fsdp')
        if not torch.cuda.is_available():
            raise SettingsError('parallel.fsdp needs GPUs, and there is none here: set parallel.fsdp=null')
        return {'fsdp': True, 'fsdp_config': _fsdp_settings(path)}
    return {}


def _shipped(path: Path, key: str) -> Path:
    """A file where it is named, or among what is installed.

    :raise SettingsError: if it is at neither place.
    """
    if path.is_file():
        return path
    try:
        return shared_file(str(path))
    except SettingsError as error:
        raise SettingsError(f'{key}: there is no file {path}') from error


def _fsdp_settings(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding='utf-8'))
    settings = content.get('fsdp_config') if isinstance(content, dict) else None
    if not isinstance(settings, dict):
        raise SettingsError(f'{path} has no section fsdp_config: expected a configuration of accelerate for FSDP')
    return settings


def _check_libraries(config: TrainConfig) -> None:
    needed = {'transformers': 'transformers', 'accelerate': 'accelerate'}
    if config.stage in ADAPTER_STAGES:
        needed['peft'] = 'peft'
    if config.stage == 'qlora':
        needed['bitsandbytes'] = 'bitsandbytes, or train in 16 bits with stage lora'
    if config.parallel.deepspeed is not None:
        needed['deepspeed'] = 'deepspeed, or train without it: parallel.deepspeed=null'
    for module, advice in needed.items():
        if importlib.util.find_spec(module) is None:
            raise DependencyError(f'this run needs {module}, which is not installed: pip install {advice}')


def _last_checkpoint(config: TrainConfig, resume: bool) -> Path | None:
    """The checkpoint to go on from.

    :raise TrainingError: if there is a run already that is not to be resumed, or it is another one.
    """
    last = newest(config.out / CHECKPOINTS)
    written = config.out / CONFIG
    if not resume:
        if last is not None or (config.out / 'model').exists() or (config.out / 'adapter').exists():
            raise TrainingError(
                f'{config.out} holds a run already ({last.name if last else "finished"}): go on with --resume, or '
                'choose another out'
            )
        return None
    if last is not None and written.is_file():
        changed = differences(config, read_config(str(written)))
        if changed:
            raise TrainingError(
                f'{last} is of another run: {"; ".join(changed[:5])}. Change it back, or choose another out'
            )
    return last


def _write_config(config: TrainConfig) -> None:
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / CONFIG).write_text(dump_config(config))
    except OSError as error:
        raise TrainingError(f'{config.out} cannot be written: {error.strerror or error}') from error


def _any_process(asked: bool) -> bool:
    """Whether any process was asked: all of them have to stop after the same step."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return asked
    device = 'cuda' if distributed.get_backend() == 'nccl' else 'cpu'
    flag = torch.tensor(int(asked), device=device)
    distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
    return bool(flag.item())
