"""The model as it is trained: which parts learn, what a batch costs, and the loss.

Freezing is explicit: the vision tower never learns and never reaches an optimiser (upstream makes all of the model
trainable and relies on a forward pass without gradients). The output matrix is applied only where a token is
learned, since prompts and pictures are most of a sample and the loss does not look at them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.model.mobilevlm import IGNORED_LABEL, MobileVLM, published_name
from mobilevlm_ros.train.config import LearningRates

__all__ = ['UNDISTURBED', 'CachedTower', 'Disturbance', 'Trainee', 'freeze', 'rounds_apart']


class CachedTower(nn.Module):
    """Stands in for a frozen tower whose features were computed before."""

    def forward(self, features: Tensor) -> Tensor:
        """``[B, 1, n_patches, width]``, one set for each picture, to ``[B, n_patches, width]``."""
        return features.squeeze(1)


@dataclass(frozen=True)
class Disturbance:
    """What is done to the tower's features while the model learns, so that it does not know its pictures by heart.

    :ivar noise: standard deviation of a factor around 1 on each feature.
    :ivar left_out: share of the channels that a picture goes without; the others are scaled up for it.
    """

    noise: float = 0.0
    left_out: float = 0.0

    def __call__(self, features: Tensor) -> Tensor:
        """``[B, n_patches, width]``, same shape."""
        if self.noise:
            features = features * (1 + self.noise * torch.randn_like(features))
        if self.left_out:
            kept = torch.rand(len(features), 1, features.shape[-1], device=features.device) >= self.left_out
            features = features * kept / (1 - self.left_out)
        return features


UNDISTURBED = Disturbance()


class Trainee(nn.Module):
    """A model and its loss, as transformers' Trainer wants them.

    :param model: whole, or a language model alone.
    :param cached: whether batches bring the tower's features instead of pixels; the tower is then let go.
    """

    accepts_loss_kwargs = True
    """Tells the Trainer to hand over how many tokens a whole step learns."""
    loss_type: str | None = 'ForCausalLM'
    """Tells the Trainer that the first label of a sample is never learned."""
    runs_language = True
    """Whether a step goes through the language model."""

    def __init__(self, model: MobileVLM, *, cached: bool = False, disturbance: Disturbance = UNDISTURBED) -> None:
        super().__init__()
        self.model = model
        if cached:
            if model.vision_tower is None:
                raise SettingsError(f'{model.config.name} is a language model alone: it has no use for features')
            model.vision_tower = CachedTower()
        if disturbance != UNDISTURBED and model.vision_tower is not None:
            model.vision_tower.register_forward_hook(
                lambda _, _inputs, features: disturbance(features) if self.training else features
            )

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        pixels_nchw: Tensor | None = None,
        features: Tensor | None = None,
        rounds: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """The loss: cross-entropy of the next token, summed over learned tokens and divided by their number.

        :param input_ids: ``[B, n]``, int64, -200 for a picture, padded on the right.
        :param labels: ``[B, n]``, int64, -100 where nothing is learned.
        :param attention_mask: ``[B, n]``, 0 in padding.
        :param pixels_nchw: ``[B, 3, S, S]``, one picture for each sample; zeros for a sample without.
        :param features: ``[B, n_patches, width]`` in their place, of a tower that is not run.
        :param rounds: ``[B, n]``, int64: question that a token belongs to, 0 for what all questions follow, -1 in
            padding; a token sees those of its own question and of 0 only. None: it sees all before it.
        :param num_items_in_batch: tokens that all micro-batches of all processes learn in this step; None: those of
            this batch.
        """
        images = pixels_nchw if features is None else features[:, None]
        spliced = self.model.splice(input_ids, images, attention_mask=attention_mask, labels=labels)
        assert spliced.labels is not None
        seen: dict[str, Tensor] = {'attention_mask': spliced.attention_mask}
        if rounds is not None:
            in_place = rounds.gather(1, spliced.positions.clamp(min=0)).masked_fill(spliced.positions < 0, -1)
            seen = dict(zip(('attention_mask', 'position_ids'), rounds_apart(in_place), strict=True))
        hidden = self.decoder(inputs_embeds=spliced.embeddings, use_cache=False, **seen)
        targets = spliced.labels[:, 1:]
        learned = targets != IGNORED_LABEL
        logits = self.head(hidden.last_hidden_state[:, :-1][learned]).float()
        total = nn.functional.cross_entropy(logits, targets[learned], reduction='sum')
        n = learned.sum() if num_items_in_batch is None else num_items_in_batch
        return {'loss': total / torch.as_tensor(n, device=total.device).clamp(min=1)}

    @property
    def causal_lm(self) -> Any:
        """Transformers' LlamaForCausalLM, adapters inside it if there are any."""
        language: Any = self.model.language
        return language.get_base_model() if hasattr(language, 'get_base_model') else language

    @property
    def decoder(self) -> Any:
        """Everything of the language model but its output matrix."""
        return self.causal_lm.model

    @property
    def head(self) -> Any:
        """The output matrix."""
        return self.causal_lm.lm_head

    @property
    def config(self) -> Any:
        """Of the language model; DeepSpeed's "auto" settings are made of it."""
        return self.causal_lm.config

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Compute activations twice instead of keeping them; called by the Trainer."""
        self.causal_lm.activation_checkpointing_enable(**options)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and value of every parameter that learns."""
        return ((name, value) for name, value in self.named_parameters() if value.requires_grad)

    def n_parameters(self) -> tuple[int, int]:
        """Parameters that learn, and all that are held."""
        return sum(p.numel() for _, p in self.trained()), sum(p.numel() for p in self.parameters())


def freeze(model: MobileVLM, rates: LearningRates) -> None:
    """Let exactly those parts learn that have a learning rate; adapters are added afterwards."""
    model.requires_grad_(False)
    model.language.requires_grad_(rates.language is not None)
    if model.projector is not None:
        model.projector.requires_grad_(rates.projector is not None)


def rounds_apart(rounds: Tensor) -> tuple[Tensor, Tensor]:
    """Attention mask and positions under which each question of a sample stands alone after what they share.

    :param rounds: ``[B, L]``, int64, as in ``Trainee.forward``; the same values lie side by side, 0 first.
    :return: bool ``[B, 1, L, L]``, where row sees column; int64 ``[B, L]``.
    """
    place = torch.arange(rounds.shape[1], device=rounds.device)
    own, shared = rounds[:, :, None] == rounds[:, None, :], (rounds == 0)[:, None, :]
    mask = (own | shared & (rounds >= 0)[:, :, None]) & (place[:, None] >= place)
    changes = torch.ones_like(rounds, dtype=torch.bool)
    changes[:, 1:] = rounds[:, 1:] != rounds[:, :-1]
    begun = torch.where(changes, place, 0).cummax(1).values
    n_shared = (rounds == 0).sum(1, keepdim=True)
    return mask[:, None], place - begun + torch.where(rounds > 0, n_shared, 0)


def published_trained(name: str) -> str:
    """What published checkpoints call a parameter of ``Trainee``, adapters aside."""
    return published_name(name.removeprefix('model.'))
