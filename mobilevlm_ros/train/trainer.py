"""transformers' Trainer with this project's rules: what learns at which rate, what a checkpoint is, when to stop.

- Every part has its own learning rate, and what is frozen never reaches the optimiser.
- A step's loss is the mean over all tokens that its samples learn, over micro-batches and processes; upstream averages
  the means of processes. So one process and several give the same losses for the same global batch.
- A checkpoint holds what is trained, the optimiser, the schedule and the random state; it is renamed when whole.
- A loss or gradient that is no number ends the run before the weights change.

Overrides a few private methods of the Trainer; requirements pin its version.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainingArguments

from mobilevlm_ros.errors import CheckpointShapeError, DivergedError, SettingsError, TrainingError
from mobilevlm_ros.train.checkpoints import PARTIAL, check_room, disk_errors_named, keep_newest, newest, publish_folder
from mobilevlm_ros.train.config import TrainConfig
from mobilevlm_ros.train.trainee import Trainee

__all__ = ['TRAINED', 'Feed', 'StageTrainer', 'load_trained', 'micro_batches', 'parameter_groups']

TRAINED = 'trained.safetensors'
"""The file of a checkpoint that holds the weights that learn."""
INDEX = 'index'
_PREFIXES = ('module.', '_fsdp_wrapped_module.', '_orig_mod.')
_BYTES_PER_TRAINED = 12  # a weight and two moments, float32
_SHOWN = 8

Item = dict[str, Tensor]


class Feed(Dataset[Item]):
    """Samples that know their place, so that a bad one can be named.

    :param samples: what is trained on.
    :param collate: makes a batch of samples.
    :param describe: what people call the sample at a place.
    """

    def __init__(
        self,
        samples: Dataset[Item],
        collate: Callable[[Sequence[Item]], Item],
        describe: Callable[[int], str],
    ) -> None:
        self._samples: Any = samples
        self._collate = collate
        self.describe = describe

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Item:
        return {**self._samples[index], INDEX: torch.tensor(index)}

    def batch(self, items: Sequence[Item]) -> Item:
        """A batch, with the places of its samples."""
        places = torch.stack([item[INDEX] for item in items])
        return {**self._collate([{k: v for k, v in item.items() if k != INDEX} for item in items]), INDEX: places}


def micro_batches(config: TrainConfig, n_processes: int) -> tuple[int, int]:
    """Samples at once in one process, and how many such batches make its part of a step.

    :raise SettingsError: if the processes cannot share the global batch evenly.
    """
    total = config.schedule.global_batch
    if total % n_processes:
        raise SettingsError(
            f'schedule.global_batch {total} cannot be shared by {n_processes} processes: choose a multiple of it'
        )
    share = total // n_processes
    size = max(n for n in range(1, min(share, config.schedule.batch) + 1) if share % n == 0)
    return size, share // size


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """What learns, by part and by whether it decays; biases and norms do not.

    :raise TrainingError: if a parameter of the vision tower, or one of no known part, would learn.
    """
    rates = {'language': config.learning_rate.language, 'projector': config.learning_rate.projector}
    decaying = config.schedule.weight_decay
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for full_name, value in model.named_parameters():
        if not value.requires_grad:
            continue
        name = _plain(full_name)
        part = name.removeprefix('model.').partition('.')[0]
        if rates.get(part) is None:
            raise TrainingError(f'{name} would learn, but stage {config.stage} has no learning rate for it')
        decays = value.ndim > 1 and not name.endswith('.bias') and 'norm' not in name
        groups.setdefault((part, decays), []).append(value)
    return [
        {'params': values, 'lr': rates[part], 'weight_decay': decaying if decays else 0.0, 'part': part}
        for (part, decays), values in sorted(groups.items(), key=lambda one: one[0])
    ]


class StageTrainer(Trainer):
    """See the module.

    :param arguments: as ``training_arguments`` makes them.
    :param sampler: order of the samples; ``set_epoch`` chooses an epoch's.
    :param checkpoints: folder of the checkpoints.
    """

    def __init__(
        self,
        trainee: Trainee,
        arguments: TrainingArguments,
        config: TrainConfig,
        feed: Feed,
        sampler: Sampler[int],
        checkpoints: Path,
    ) -> None:
        self.optimizer: Any
        self._config = config
        self._feed = feed
        self._sampler: Any = sampler
        self._folder = checkpoints
        self._writing: Path | None = None
        self._places: list[Tensor] = []
        super().__init__(model=trainee, args=arguments, train_dataset=feed, data_collator=feed.batch)

    # -- data and optimiser -------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self._sampler

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        # Told here because the loaders that skip what was trained on do not pass it on.
        if hasattr(self._sampler, 'set_epoch'):
            self._sampler.set_epoch(options['epoch'])
        super()._run_epoch(*arguments, **options)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over what learns."""
        if self.optimizer is None:
            schedule = self._config.schedule
            groups = parameter_groups(self.model if model is None else model, self._config)
            self.optimizer = torch.optim.AdamW(groups, betas=schedule.betas, eps=schedule.epsilon)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    # -- a step -------------------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one micro-batch.

        :raise DivergedError: if the loss is no finite number.
        """
        self._places.append(inputs.pop(INDEX))
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            self._stop(f'the loss is {loss.item()}', self._places[-1:])
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not math.isfinite(float(norm)):
            self._stop(f'the gradient has the norm {float(norm)}', self._places)
        self._places.clear()
        return norm

    def _stop(self, what: str, places: Sequence[Tensor]) -> None:
        indices = [int(index) for batch in places for index in batch.tolist()]
        names = ', '.join(self._feed.describe(index) for index in indices[:_SHOWN])
        more = f' and {len(indices) - _SHOWN} more' if len(indices) > _SHOWN else ''
        last = newest(self._folder)
        kept = f'{last} is from before it' if last else 'there is no checkpoint yet'
        raise DivergedError(
            f'{what} in step {self.state.global_step + 1}, on {names}{more}: the weights were not changed, and {kept}. '
            'Look at these records, lower learning_rate, or train in fp32 (schedule.precision)'
        )

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing or self._folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name = f'checkpoint-{self.state.global_step}'
        with self._partial() as partial:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish_folder(partial / name, self._folder / name)
                keep_newest(self._folder, self._config.saving.keep)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _partial(self) -> Iterator[Path]:
        """A folder to write in, gone afterwards whatever happens."""
        partial = self._folder / PARTIAL
        last = newest(self._folder)
        self._writing = partial
        try:
            with disk_errors_named(self._folder.parent, last):
                if self.args.should_save:
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir(parents=True)
                    n_trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
                    check_room(partial, n_trained * _BYTES_PER_TRAINED, last)
                self.accelerator.wait_for_everyone()
                yield partial
        finally:
            self._writing = None
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)

    def trained_state(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Name to value of everything that learns, on the CPU.

        :param state: of the whole model, where it is spread over processes.
        """
        found = {_plain(name): value for name, value in (state or self.model.state_dict()).items()}
        names = [_plain(name) for name, value in self.model.named_parameters() if value.requires_grad]
        return {name: found[name].detach().cpu() for name in names}

    def gathered_state(self) -> dict[str, Tensor]:
        """As ``trained_state``, of a model that may be spread over processes; every process has to ask."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            state: Mapping[str, Tensor] = self.accelerator.get_state_dict(self.model_wrapped)
            return self.trained_state(state) if self.args.should_save else {}
        return self.trained_state()

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        from safetensors.torch import save_file

        if not self.args.should_save or output_dir is None:
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        tensors = {name: value.contiguous() for name, value in self.trained_state(state_dict).items()}
        save_file(tensors, Path(output_dir) / TRAINED, metadata={'format': 'pt'})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_trained(self.model, Path(resume_from_checkpoint) / TRAINED)


def load_trained(model: nn.Module, path: Path) -> None:
    """Put the weights of a checkpoint into a model.

    :raise CheckpointShapeError: if it was made by a run that trains other parameters.
    :raise TrainingError: if the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f'{path} cannot be read ({error}): remove the folder {path.parent.name} to go on from the one before it'
        ) from error
    expected = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for name in sorted(expected.keys() ^ stored.keys()):
        where = 'is missing from' if name in expected else 'is not trained by this run, but is in'
        raise CheckpointShapeError(
            f'{name} {where} {path}: it is of another run. Choose another out, or its configuration'
        )
    for name, value in expected.items():
        if stored[name].shape != value.shape:
            raise CheckpointShapeError(
                f'{name} in {path} has shape {list(stored[name].shape)}, this model has {list(value.shape)}: it is of '
                'another run. Choose another out, or its model'
            )
    with torch.no_grad():
        for name, value in expected.items():
            value.copy_(stored[name])


def _plain(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for prefix in _PREFIXES:
        name = name.replace(prefix, '') if prefix != 'module.' else name.removeprefix(prefix)
    return name
