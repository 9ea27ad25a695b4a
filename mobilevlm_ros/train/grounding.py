"""Stage ``ground``: the projector learns to say, with each visual token, the word for what is at its place.

Captions tell a projector only what is somewhere in a picture, and through a whole language model; where the places of
things are known, each token can be told its word directly. The target of a token is a sum of word embeddings of the
language model, which therefore is not run: the mean of all, the nouns and colours that its cell shows by their shares,
and where in the picture it is. The loss of a cell adds the squared distance to that target, and the cross-entropies of
the right noun, colour and place among all of them by cosine. So a step costs what the projector costs.
Colours are told everywhere, by the pixels where nobody told them: those of things alone are too few to learn from.
It is no part of the published recipe, and comes before ``align`` or ``lora``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from mobilevlm_ros.errors import BadImageError, DatasetError
from mobilevlm_ros.model.mobilevlm import IGNORED_LABEL, MobileVLM
from mobilevlm_ros.train.dataset import ImageReader
from mobilevlm_ros.train.pixel_colours import COLOURS
from mobilevlm_ros.train.regions import Cells, Grounded, cells_of
from mobilevlm_ros.train.tokens import Tokenizer
from mobilevlm_ros.train.trainee import UNDISTURBED, Disturbance, Trainee

__all__ = ['GroundedDataset', 'GroundedTrainee', 'Words', 'collate_grounded', 'words_of']

NOTHING = 'background'
_LEAST_SHARE, _LEAST_EMPTY, _LEAST_COLOURED = 0.25, 0.05, 0.3
_EMPTY_WEIGHT, _COLOUR_WEIGHT, _POSITION_WEIGHT = 0.5, 0.8, 0.3
_SHARPNESS = 16.0
"""Inverse temperature of the cosines."""
_NOUN_LOSS, _COLOUR_LOSS, _PLACE_LOSS = 0.5, 0.5, 0.1
_COVERED_WEIGHT = 3.0
"""How much more than an empty cell one that shows a thing counts."""


class Words:
    """The words that tokens may say.

    :ivar nouns: the first is what an empty cell says.
    """

    def __init__(self, nouns: Sequence[str], places: Sequence[str]) -> None:
        self.nouns = (NOTHING, *nouns)
        self.places = tuple(places)


def words_of(pictures: Sequence[Grounded]) -> Words:
    """All words of the pictures, in an order that is theirs alone."""
    things = {thing for picture in pictures for thing in picture.things}
    return Words(
        sorted({noun for noun, _ in things}),
        sorted({picture.place for picture in pictures if picture.place}),
    )


class GroundedDataset(Dataset[dict[str, Tensor]]):
    """What the cells of each picture show.

    An item is ``pixels`` or ``features`` as the reader makes them, and for ``n = grid * grid`` cells: ``labels`` int64
    ``[n]``, the noun that is learned (0: nothing is there; -100: not known); ``nouns`` int64 ``[n, 2]`` and ``shares``
    float32 ``[n, 2]``, the two things that cover the most of it (-1: none); ``colours`` float32 ``[n, len(COLOURS)]``,
    how much of it is of each; ``place`` int64 ``[]``.

    :param grid: cells a side: the square root of the number of visual tokens.
    """

    def __init__(
        self,
        pictures: Sequence[Grounded],
        words: Words,
        read_image: ImageReader,
        grid: int,
        aspect: Literal['pad', 'square'],
    ) -> None:
        self._pictures = pictures
        self._read_image = read_image
        self._grid = grid
        self._aspect: Literal['pad', 'square'] = aspect
        self._nouns = {word: index for index, word in enumerate(words.nouns)}
        self._places = {word: index for index, word in enumerate(words.places)}
        self._known: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        picture = self._pictures[index]
        try:
            if index not in self._known:
                self._known[index] = self._targets(picture, cells_of(picture, self._grid, self._aspect))
            return {self._read_image.kind: self._read_image(picture.image)} | self._known[index]
        except BadImageError as error:
            raise DatasetError(f'picture {picture.id} cannot be learned from: {error}') from error

    def _targets(self, picture: Grounded, cells: Cells) -> dict[str, Tensor]:
        n = self._grid * self._grid
        nouns = np.full((n, 2), -1)
        shares = np.zeros((n, 2), np.float32)
        labels = np.where(cells.unknown < _LEAST_EMPTY, 0, IGNORED_LABEL)
        if picture.things:
            own_nouns = np.array([self._nouns[noun] for noun, _ in picture.things])
            order = np.argsort(-cells.shares, axis=0)[:2]
            for rank, things in enumerate(order):
                shares[:, rank] = np.take_along_axis(cells.shares, things[None], 0)[0]
                nouns[:, rank] = own_nouns[things]
            labels[shares.sum(1) > _LEAST_EMPTY] = IGNORED_LABEL
            named = shares[:, 0] > _LEAST_SHARE
            # However small a thing is, one cell says its name, unless another thing fills it more.
            best = cells.shares.argmax(1)
            named[best] |= (order[0][best] == np.arange(len(best))) & (shares[best, 0] > 0)
            labels[named] = nouns[named, 0]
            nouns[shares == 0] = -1
        return {
            'labels': torch.from_numpy(labels),
            'nouns': torch.from_numpy(nouns),
            'colours': torch.from_numpy(cells.colours),
            'shares': torch.from_numpy(shares),
            'place': torch.tensor(self._places.get(picture.place, -1)),
        }


def collate_grounded(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch: ``pixels_nchw`` ``[B, 3, S, S]`` or ``features`` ``[B, n_patches, width]``, the rest stacked."""
    names = {'pixels': 'pixels_nchw'}
    return {names.get(name, name): torch.stack([item[name] for item in items]) for name in items[0]}


class GroundedTrainee(Trainee):
    """The projector and its loss; of the language model only the embeddings of words are used.

    :param words: what tokens may say; those of the dataset.
    """

    _mean: Tensor
    _nouns: Tensor
    _colours: Tensor
    _places: Tensor
    _base: Tensor
    accepts_loss_kwargs = True
    loss_type = None
    runs_language = False

    def __init__(
        self,
        model: MobileVLM,
        words: Words,
        tokenizer: Tokenizer,
        *,
        cached: bool = False,
        disturbance: Disturbance = UNDISTURBED,
    ) -> None:
        super().__init__(model, cached=cached, disturbance=disturbance)
        table = model.language.get_input_embeddings().weight.detach().float()
        mean = table.mean(0)
        grid = math.isqrt(model.config.n_visual_tokens)

        def embed(names: Sequence[str]) -> Tensor:
            rows = [table[tokenizer.encode(f' {name}')].mean(0) - mean for name in names]
            return torch.stack(rows) if rows else torch.zeros(0, table.shape[1])

        sides = embed(('left', 'right', 'top', 'bottom'))
        tables = {
            '_mean': mean,
            '_nouns': embed(words.nouns),
            '_colours': embed(COLOURS),
            '_places': embed(words.places),
            '_base': mean + _POSITION_WEIGHT * _positions(sides, grid),
        }
        for name, values in tables.items():
            self.register_buffer(name, values, persistent=False)
        self._scale = float((table - mean).square().mean())

    def forward(  # type: ignore[override]  # its batches are others
        self,
        labels: Tensor,
        nouns: Tensor,
        colours: Tensor,
        shares: Tensor,
        place: Tensor,
        pixels_nchw: Tensor | None = None,
        features: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """The loss, summed over the cells and divided by the number of those with a label.

        :param num_items_in_batch: cells with a label in all micro-batches of all processes; None: in this batch.
        """
        pictures = pixels_nchw if features is None else features[:, None]
        assert pictures is not None
        tokens = self.model.encode_images(pictures)
        said = F.normalize(tokens - self._mean, dim=-1)
        learned = labels != IGNORED_LABEL
        weights = torch.where(labels > 0, _COVERED_WEIGHT, 1.0)[learned]
        distance = (tokens - self._target(nouns, colours, shares)).square().mean(-1)[learned] / self._scale
        named = self._cross_entropy(said[learned], self._nouns, labels[learned])
        total = (weights * (distance + _NOUN_LOSS * named)).sum()
        told = colours.sum(-1)
        coloured = told > _LEAST_COLOURED
        right = self._cross_entropy(said[coloured], self._colours, (colours / told[..., None])[coloured])
        total = total + _COLOUR_LOSS * (torch.where(labels > 0, _COVERED_WEIGHT, 1.0)[coloured] * right).sum()
        # What is not a thing by a name still shows what kind of place it is.
        around = (place >= 0)[:, None] & (shares.sum(-1) == 0) & ~learned
        right = self._cross_entropy(said[around], self._places, place[:, None].expand(labels.shape)[around])
        total = total + _PLACE_LOSS * right.sum()
        n = learned.sum() if num_items_in_batch is None else num_items_in_batch
        return {'loss': total / torch.as_tensor(n, device=total.device).clamp(min=1)}

    def _target(self, nouns: Tensor, colours: Tensor, shares: Tensor) -> Tensor:
        """``[B, n, n_embd]``; a thin thing still names its cell."""
        parts = shares.sqrt()
        parts = parts / parts.sum(-1, keepdim=True).clamp(min=1)
        empty = 1 - parts.sum(-1, keepdim=True)
        noun = self._nouns[nouns.clamp(min=0)] * (nouns >= 0)[..., None]
        target: Tensor = self._base + _EMPTY_WEIGHT * empty * self._nouns[0] + (parts[..., None] * noun).sum(-2)
        return target + _COLOUR_WEIGHT * colours @ self._colours

    @staticmethod
    def _cross_entropy(said: Tensor, words: Tensor, labels: Tensor) -> Tensor:
        """Of each row."""
        if not len(labels):
            return said.new_zeros(1)
        return F.cross_entropy(_SHARPNESS * said @ F.normalize(words, dim=-1).T, labels, reduction='none')


def _positions(sides: Tensor, grid: int) -> Tensor:
    """``[grid * grid, n_embd]``: the words for the sides, the more the farther from the middle.

    :param sides: embeddings of left, right, top and bottom.
    """
    away = torch.linspace(-1, 1, grid) if grid > 1 else torch.zeros(1)
    left, right, top, bottom = sides
    across = away.clamp(max=0).neg()[:, None] * left + away.clamp(min=0)[:, None] * right
    down = away.clamp(max=0).neg()[:, None] * top + away.clamp(min=0)[:, None] * bottom
    return (down[:, None] + across[None]).flatten(0, 1)
