"""From a configuration's data section to samples in an order that is a function of seed and epoch alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Sampler, SequentialSampler

from mobilevlm_ros.errors import DatasetError, DatasetMissingError, SettingsError
from mobilevlm_ros.model.config import ModelConfig
from mobilevlm_ros.model.layout import TOWER_PREFIX
from mobilevlm_ros.model.mobilevlm import IGNORED_LABEL
from mobilevlm_ros.runtime.bundle import sha256_of
from mobilevlm_ros.runtime.preprocess import PreprocessSpec
from mobilevlm_ros.train.config import DataConfig, TrainConfig
from mobilevlm_ros.train.cost_card import sample_length
from mobilevlm_ros.train.dataset import DialogueDataset, ImageReader, PixelReader, collate
from mobilevlm_ros.train.dialogue_text import read_dialogues
from mobilevlm_ros.train.features import FeatureCache, FeatureReader, identity_of
from mobilevlm_ros.train.grounding import GroundedDataset, Words, collate_grounded, words_of
from mobilevlm_ros.train.packed import PackedDataset, Source
from mobilevlm_ros.train.pixel_colours import COLOURS
from mobilevlm_ros.train.records import Records, read_records
from mobilevlm_ros.train.regions import Grounded, read_grounded
from mobilevlm_ros.train.sampler import ModalityLengthSampler
from mobilevlm_ros.train.shards import TokenShards
from mobilevlm_ros.train.starting import StartingPoint
from mobilevlm_ros.train.tokens import open_tokenizer
from mobilevlm_ros.train.trainer import Feed

__all__ = ['ShuffledSampler', 'Supply', 'check_places', 'open_supply']

_MEASURED_SAMPLES = 64
_NAMED = 5


@dataclass(frozen=True)
class Supply:
    """What a run reads.

    :ivar n_samples: in one epoch.
    :ivar lengths: tokens, pictures included, and learned tokens of some samples, spread over all.
    :ivar note: what was left out; empty if nothing was.
    :ivar words: what visual tokens are taught to say, in stage ``ground``.
    """

    feed: Feed
    sampler: Sampler[int]
    n_samples: int
    lengths: list[tuple[int, int]]
    note: str
    words: Words | None = None


class ShuffledSampler(Sampler[int]):
    """Each index once an epoch, in an order that seed and epoch decide."""

    def __init__(self, n: int, seed: int) -> None:
        self._n = n
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of the epoch that is read next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng((self._seed, self._epoch)).permutation(self._n).tolist())


def check_places(data: DataConfig) -> None:
    """That what the configuration names is there, before anything is loaded.

    :raise DatasetMissingError: if it is not.
    """
    places: dict[str, Path | None] = {'records': data.records, 'images': data.images, 'features': data.features}
    places |= {f'shards.{i}.path': shard.path for i, shard in enumerate(data.shards)}
    for key, place in places.items():
        if place is not None and not place.exists():
            raise DatasetMissingError(f'data.{key}: there is nothing at {place.absolute()}')


def open_supply(config: TrainConfig, start: StartingPoint, micro_batch: int) -> Supply:
    """Open the data.

    :param start: the model that will read it.
    :param micro_batch: samples at once in one process; batches that are grouped are grouped by it.
    :raise DatasetError: if it cannot be trained on.
    """
    if config.data.shards:
        return _packed(config, start.config, start.tokenizer)
    if config.stage == 'ground':
        return _grounded(config, start)
    return _dialogues(config, start, micro_batch)


def _dialogues(config: TrainConfig, start: StartingPoint, micro_batch: int) -> Supply:
    data = config.data
    records = _read(data)
    dataset = DialogueDataset(
        records,
        open_tokenizer(start.tokenizer),
        data.template,
        read_image=_image_reader(data, start) if config.has_images else None,
        max_tokens=data.max_tokens,
        system=data.system,
        separate=data.separate_questions,
        on_bad=data.on_bad,
    )
    seed, n = config.schedule.seed, len(records)
    sampler: Sampler[int] = ShuffledSampler(n, seed)
    if data.group_by_modality:
        signed = [one.n_words if one.image is not None else -one.n_words for one in records]
        sampler = ModalityLengthSampler(signed, micro_batch, config.schedule.global_batch // micro_batch, seed)

    def describe(index: int) -> str:
        return f'record {records[index].id} ({records[index].place})'

    places = np.unique(np.linspace(0, n - 1, min(n, _MEASURED_SAMPLES)).astype(int)).tolist()
    lengths = [sample_length(dataset[place], start.config.n_visual_tokens) for place in places]
    note = f'{records.problems.total} records left out: {records.problems.summary()}' if records.problems.total else ''
    return Supply(Feed(dataset, dataset.collate, describe), sampler, n, lengths, note)


def _grounded(config: TrainConfig, start: StartingPoint) -> Supply:
    """Pictures whose things are known with their places."""
    data, n_tokens = config.data, start.config.n_visual_tokens
    if data.records is None or data.images is None:
        raise SettingsError('stage ground needs data.records (a regions.json) and data.images')
    pictures = read_grounded(data.records, data.images)
    words = words_of(pictures)
    grid = math.isqrt(n_tokens)
    if grid * grid != n_tokens:
        raise SettingsError(f'{start.config.name} has {n_tokens} visual tokens, which are no square grid of cells')
    dataset = GroundedDataset(pictures, words, _image_reader(data, start), grid, data.aspect)
    feed = Feed(dataset, collate_grounded, lambda index: f'picture {pictures[index].id}')
    n = len(pictures)
    known = [int((dataset[i]['labels'] != IGNORED_LABEL).sum()) for i in range(0, n, -(-n // _MEASURED_SAMPLES))]
    note = f'{len(words.nouns) - 1} nouns, {len(COLOURS)} colours and {len(words.places)} places are told'
    note += _strange(pictures)
    lengths = [(n_tokens, one) for one in known]
    return Supply(feed, ShuffledSampler(n, config.schedule.seed), n, lengths, note, words)


def _strange(pictures: Sequence[Grounded]) -> str:
    """Which told colours are none; their things are of the colours of their pixels."""
    told = Counter(colour for picture in pictures for _, colour in picture.things if colour is not None)
    strange = sorted(told.keys() - set(COLOURS))
    if not strange:
        return ''
    named = ', '.join(repr(colour) for colour in strange[:_NAMED]) + (', ...' if len(strange) > _NAMED else '')
    n = sum(told[colour] for colour in strange)
    return f'; {n} things are told a colour that is none of {", ".join(COLOURS)} ({named}): their pixels say it instead'


def _read(data: DataConfig) -> Records:
    if data.records is None:
        raise SettingsError('data.records is missing')
    if data.format != 'llava':
        return read_dialogues(data.records, data.format, data.template, on_bad=data.on_bad)
    return read_records(data.records, data.images, on_bad=data.on_bad)


def _image_reader(data: DataConfig, start: StartingPoint) -> ImageReader:
    vision = start.config.vision
    if vision is None:
        raise SettingsError(f'{start.config.name} is a language model alone: it reads no images')
    if data.features is None:
        return PixelReader(PreprocessSpec(vision.image_size, data.aspect, vision.mean, vision.std))
    cache = FeatureCache(data.features)
    names = [name for name in start.tensors if name.startswith(TOWER_PREFIX)]
    tower = {name.removeprefix(TOWER_PREFIX): start.tensors[name] for name in names}
    cache.check(identity_of(vision, tower, data.aspect))
    return FeatureReader(cache)


def _packed(config: TrainConfig, model: ModelConfig, tokenizer: Path) -> Supply:
    """Packed text, read in order: it is shuffled where it is packed."""
    data, schedule = config.data, config.schedule
    sources = [Source(shard.path, shard.weight) for shard in data.shards]
    n = (schedule.max_steps or 0) * schedule.global_batch
    if not n:
        n = schedule.epochs * sum(len(TokenShards(source.path)) // data.max_tokens for source in sources)
        n -= n % schedule.global_batch
    if not n:
        raise DatasetError(f'the shards hold no {schedule.global_batch} sequences of {data.max_tokens}: no whole step')
    seed = schedule.seed
    dataset = PackedDataset(sources, n_tokens=data.max_tokens, seed=seed, length=n, n_vocab=model.language.n_vocab)
    if dataset.tokenizer_sha256 != sha256_of(tokenizer):
        raise DatasetError(
            f'the shards were made with another tokenizer than {tokenizer}: tokenise the text with this one'
        )

    def describe(index: int) -> str:
        place = dataset.place(index)
        return f'sequence {place.sequence} of {sources[place.source].path}'

    note = ', '.join(f'{source.path.name} {n:.2g} times' for source, n in zip(sources, dataset.epochs(), strict=True))
    lengths = [sample_length(dataset[0], 0)]
    return Supply(Feed(dataset, collate, describe), SequentialSampler(dataset), n, lengths, f'the run reads {note}')
