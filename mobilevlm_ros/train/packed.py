"""Packed text to train a language model on: sequence i is a function of the seed and i, and of nothing else.

A source's row of ids is cut into sequences of equal length, with as many documents in each as fit and attention across
them, as MobileLLaMA was pretrained (arXiv 2312.16886, 4.1 and table 12); the last ids that fill no sequence are left
out. The mixture says which source sequence i is read from. A source is read in a shuffled order, and in another one
each time it has been read to its end.

So a run that resumes reads on at ``step * global_batch`` and needs no state of the data; any process, and any worker
of a loader, can compute its own part. Read it in order: the shuffling is done here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from mobilevlm_ros.errors import DatasetError
from mobilevlm_ros.train.mixture import Mixture
from mobilevlm_ros.train.permutation import Permutation
from mobilevlm_ros.train.shards import TokenShards

__all__ = ['PackedDataset', 'Place', 'Source']


@dataclass(frozen=True)
class Source:
    """A folder that ``mobilevlm train tokenise`` wrote, and its weight in the mixture, in any unit."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Place:
    """Where a sequence is read.

    :ivar source: number of the source.
    :ivar epoch: how often the source was read to its end before.
    :ivar sequence: number of the sequence in the source.
    """

    source: int
    epoch: int
    sequence: int


class PackedDataset(Dataset[dict[str, torch.Tensor]]):
    """See the module. Items are ``{'input_ids': int64 [n_tokens], 'labels': int64 [n_tokens]}``, labels unshifted.

    :param n_tokens: length of a sequence.
    :param seed: of all orders.
    :param length: number of sequences of the run: steps times sequences of a step.
    :param n_vocab: of the model that is trained; None: not compared.
    :raise DatasetMissingError: if a folder or one of its shards is missing.
    :raise DatasetError: if a folder is unfinished or damaged, too small for one sequence, or made with another
        tokenizer than the others or a larger vocabulary than the model's.
    :raise SettingsError: if the weights are no mixture.
    """

    def __init__(
        self, sources: Sequence[Source], *, n_tokens: int, seed: int, length: int, n_vocab: int | None = None
    ) -> None:
        self._mixture = Mixture([source.weight for source in sources])
        self._shards = [TokenShards(source.path) for source in sources]
        self._n_tokens, self._seed, self._length = n_tokens, seed, length
        first = self._shards[0].index
        for shards in self._shards:
            if len(shards) < n_tokens:
                raise DatasetError(
                    f'{shards.folder} has {len(shards)} tokens, less than one sequence of {n_tokens}: add text, or '
                    'train with shorter sequences'
                )
            if shards.index.tokenizer_sha256 != first.tokenizer_sha256:
                raise DatasetError(
                    f'{shards.folder} and {self._shards[0].folder} were made with different tokenizers: tokenise all '
                    'sources with that of the model'
                )
            if n_vocab is not None and shards.index.n_vocab > n_vocab:
                raise DatasetError(
                    f'{shards.folder} was made with a vocabulary of {shards.index.n_vocab}, the model has {n_vocab}: '
                    "tokenise with the model's tokenizer"
                )

    @property
    def tokenizer_sha256(self) -> str:
        """Of the file that all sources were tokenised with."""
        return self._shards[0].index.tokenizer_sha256

    def __len__(self) -> int:
        return self._length

    def place(self, i: int) -> Place:
        """Where sequence ``i`` is read.

        :raise IndexError: if ``i`` is outside ``range(len(self))``.
        """
        if not 0 <= i < self._length:
            raise IndexError(f'sequence {i} of {self._length}')
        source, n_before = self._mixture.at(i)
        epoch, position = divmod(n_before, self.n_sequences(source))
        order = Permutation(self.n_sequences(source), (self._seed, source, epoch))
        return Place(source, epoch, order(position))

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        place = self.place(i)
        start = place.sequence * self._n_tokens
        ids = torch.from_numpy(self._shards[place.source].read(start, start + self._n_tokens))
        return {'input_ids': ids, 'labels': ids.clone()}

    def n_sequences(self, source: int) -> int:
        """That the source has, each read once in an epoch."""
        return len(self._shards[source]) // self._n_tokens

    def epochs(self) -> list[float]:
        """How often each source is read in this run."""
        counts = self._mixture.counts(self._length)
        return [count / self.n_sequences(source) for source, count in enumerate(counts)]
