"""What a run will cost, before it starts: tokens, arithmetic, memory; the time follows once steps are measured.

Arithmetic, in floating point operations, for D tokens through a language model of N parameters (its embedding
matrix, which is looked up, not counted): 2 N D forward, 2 N D back to what comes before it, and 2 T D for the T of
them that learn. All of them learning makes the usual 6 N D. Activations that are computed twice add 2 N D. A tower
that is run adds 2 of its parameters for each patch. The part of attention that grows with the square of the length is
left out: it is below a tenth for 2048 tokens of these models. Stage ground runs the projector alone: 6 of its
parameters for each patch.

Memory: weights as they are held, 12 bytes for each parameter that learns (gradient and two moments in float32),
and activations: for each token of a micro-batch and block 34 widths (Korthikanti et al. 2022, without the quadratic
part), or one width if they are computed twice; logits only where a token is learned. An estimate, not a limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from mobilevlm_ros.train.config import TrainConfig
from mobilevlm_ros.train.trainee import CachedTower, Trainee

__all__ = ['CostCard', 'cost_card']

_ACTIVATION_WIDTHS = 34
_OPTIMISER_BYTES = 12


@dataclass(frozen=True)
class CostCard:
    """See the module.

    :ivar n_samples: in one epoch.
    :ivar tokens_per_sample: mean, pictures included; measured on ``n_measured`` samples.
    :ivar learned_per_sample: mean of the tokens that the loss looks at.
    :ivar flops: of the whole run.
    :ivar memory_bytes: of one process that holds all of the model.
    """

    stage: str
    origin: str
    n_trained: int
    n_held: int
    n_samples: int
    n_measured: int
    n_steps: int
    global_batch: int
    micro_batch: int
    n_processes: int
    tokens_per_sample: float
    learned_per_sample: float
    flops: float
    memory_bytes: int

    @property
    def tokens(self) -> float:
        """Of the whole run."""
        return self.tokens_per_sample * self.global_batch * self.n_steps

    def table(self) -> Table:
        """For people."""
        accumulated = self.global_batch // (self.micro_batch * self.n_processes)
        table = Table(box=None, show_header=False, pad_edge=False)
        rows = (
            ('stage', f'{self.stage}, from {self.origin}'),
            ('learns', f'{_count(self.n_trained)} of {_count(self.n_held)} parameters held'),
            ('data', f'{self.n_samples} samples, {self.tokens_per_sample:.0f} tokens each ({self._measured()})'),
            (
                'steps',
                f'{self.n_steps} of {self.global_batch} samples: {self.micro_batch} at once x {accumulated} '
                f'accumulated x {self.n_processes} processes',
            ),
            ('tokens', f'{_count(self.tokens)}, of which {self._share():.0%} are learned'),
            ('arithmetic', f'{self.flops:.3g} operations'),
            ('memory', f'about {self.memory_bytes / 2**30:.1f} GiB a process that holds all of it'),
            ('time', 'after a few measured steps'),
        )
        for name, text in rows:
            table.add_row(name, text)
        return table

    def _measured(self) -> str:
        return 'all of them' if self.n_measured >= self.n_samples else f'mean of {self.n_measured}'

    def _share(self) -> float:
        return self.learned_per_sample / self.tokens_per_sample


def cost_card(
    config: TrainConfig,
    trainee: Trainee,
    origin: str,
    lengths: list[tuple[int, int]],
    n_samples: int,
    n_steps: int,
    micro_batch: int,
    n_processes: int,
) -> CostCard:
    """Count.

    :param lengths: tokens, pictures included, and learned tokens of some samples; at least one.
    """
    tokens = sum(n for n, _ in lengths) / len(lengths)
    learned = sum(n for _, n in lengths) / len(lengths)
    model = trainee.model
    language = model.config.language
    n_language = sum(p.numel() for p in model.language.parameters()) - language.n_vocab * language.n_embd
    n_trained, n_held = trainee.n_parameters()
    twice = config.schedule.checkpoint_activations
    vision = model.config.vision
    if trainee.runs_language:
        per_sample = float((6 if twice else 4) * n_language + 2 * n_trained) * tokens
    else:  # only the projector, for each patch
        per_sample = 6.0 * n_trained * (vision.n_patches if vision is not None else 0)
    if vision is not None and model.vision_tower is not None and not isinstance(model.vision_tower, CachedTower):
        per_sample += 2.0 * sum(p.numel() for p in model.vision_tower.parameters()) * vision.n_patches
    widths = 1 if twice else _ACTIVATION_WIDTHS
    n_bytes = 2 if config.schedule.precision == 'bf16' else 4
    activations = tokens * micro_batch * language.n_embd * n_bytes * (language.n_layers * widths + _ACTIVATION_WIDTHS)
    logits = 3 * 4 * learned * micro_batch * language.n_vocab
    held = sum(p.numel() * p.element_size() for p in trainee.parameters())
    return CostCard(
        stage=config.stage,
        origin=origin,
        n_trained=n_trained,
        n_held=n_held,
        n_samples=n_samples,
        n_measured=len(lengths),
        n_steps=n_steps,
        global_batch=config.schedule.global_batch,
        micro_batch=micro_batch,
        n_processes=n_processes,
        tokens_per_sample=tokens,
        learned_per_sample=learned,
        flops=per_sample * config.schedule.global_batch * n_steps,
        memory_bytes=int(held + n_trained * _OPTIMISER_BYTES + activations + logits),
    )


def sample_length(item: dict[str, Any], n_visual_tokens: int) -> tuple[int, int]:
    """Tokens of a sample, pictures included, and how many of them are learned."""
    from mobilevlm_ros.model.mobilevlm import IGNORED_LABEL, IMAGE_TOKEN

    ids, labels = item['input_ids'], item['labels']
    n_images = int(torch.sum(ids == IMAGE_TOKEN))
    return len(ids) + n_images * (n_visual_tokens - 1), int(torch.sum(labels[1:] != IGNORED_LABEL))


def _count(n: float) -> str:
    for unit, size in (('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if n >= size:
            return f'{n / size:.3g} {unit}'
    return f'{n:.0f}'
