"""Records as tensors: token ids, labels, and the image as pixels or as the frozen tower's features; batches of them.

Images are read by the code that reads them on the robot (runtime/images.py, runtime/preprocess.py). A sample that
turns out to be unusable only here (its image cannot be decoded, the template cannot hold it) ends the run by a named
error, or is replaced by a single token that nothing is trained on, with a warning.

Source: mobilevlm/train/train.py (``LazySupervisedDataset``, ``DataCollatorForSupervisedDataset``).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from mobilevlm_ros.errors import BadImageError, DatasetError, RecordError, SettingsError
from mobilevlm_ros.runtime.images import read_image
from mobilevlm_ros.runtime.preprocess import PreprocessSpec, preprocess
from mobilevlm_ros.train.dialogue import IGNORED, IMAGE
from mobilevlm_ros.train.problems import printable
from mobilevlm_ros.train.records import OnBad, Record
from mobilevlm_ros.train.templates import encode_dialogue
from mobilevlm_ros.train.tokens import Tokenizer

__all__ = ['DialogueDataset', 'ImageReader', 'PixelReader', 'collate']

_log = logging.getLogger(__name__)
_BATCH_KEYS = {'pixels': 'pixels_nchw', 'features': 'features'}


class ImageReader(Protocol):
    """What makes a tensor of an image file."""

    @property
    def kind(self) -> Literal['pixels', 'features']:
        """What the tensors are: float ``[3, height, width]``, or ``[n_patches, width]`` of the vision tower."""
        ...

    def __call__(self, path: Path) -> Tensor:
        """The tensor of one image.

        :raise BadImageError: if it cannot be read.
        """
        ...

    def blank(self) -> Tensor:
        """Zeros of the same shape, for a sample without an image."""
        ...


class PixelReader:
    """Reads and preprocesses images as published; the stages differ in ``spec.aspect``."""

    kind: Literal['pixels'] = 'pixels'

    def __init__(self, spec: PreprocessSpec) -> None:
        self.spec = spec

    def __call__(self, path: Path) -> Tensor:
        """Float32 ``[3, image_size, image_size]``."""
        return torch.from_numpy(preprocess(read_image(path), self.spec)[0])

    def blank(self) -> Tensor:
        """As published: zeros, not the colour of the padding."""
        return torch.zeros(3, self.spec.image_size, self.spec.image_size)


class DialogueDataset(Dataset[dict[str, Tensor]]):
    """See the module.

    An item is ``input_ids`` int64 ``[n]``, ``labels`` int64 ``[n]``, and, if ``IMAGE`` is among the ids, ``pixels`` or
    ``features`` as the reader makes them; with ``separate`` also ``rounds`` int64 ``[n]``.

    :param read_image: None: the records have no images.
    :param max_tokens: longest sample, before an image takes its place.
    :param system, separate: see ``encode_dialogue``.
    :param on_bad: what becomes of a sample that cannot be made.
    :raise SettingsError: if records have images and there is no reader for them.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: Tokenizer,
        template: str,
        *,
        read_image: ImageReader | None = None,
        max_tokens: int = 2048,
        system: str = '',
        separate: bool = False,
        on_bad: OnBad = 'refuse',
    ) -> None:
        first = next((record for record in records if record.image is not None), None)
        if first is not None and read_image is None:
            raise SettingsError(f'record {first.id} has an image, but this stage reads none: give it a vision tower')
        self.records = records
        self.tokenizer = tokenizer
        self._template = template
        self._read_image = read_image
        self._max_tokens = max_tokens
        self._system = system
        self._separate = separate
        self._on_bad: OnBad = on_bad

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        record = self.records[index]
        try:
            return self._item(record)
        except (RecordError, BadImageError) as error:
            if self._on_bad == 'refuse':
                raise DatasetError(
                    f'record {record.id} ({record.place}) cannot be trained on: {error}. Mend it, or set on_bad to skip'
                ) from error
            _log.warning('record %s (%s) is left out: %s', record.id, record.place, printable(str(error)))
            nothing = {'input_ids': torch.tensor([self.tokenizer.bos_id]), 'labels': torch.tensor([IGNORED])}
            return nothing | ({'rounds': torch.tensor([0])} if self._separate else {})

    def _item(self, record: Record) -> dict[str, Tensor]:
        encoded = encode_dialogue(
            record.turns,
            self._template,
            self.tokenizer,
            self._max_tokens,
            system=self._system,
            separate=self._separate,
        )
        if encoded.masked:
            _log.warning('record %s (%s) is not trained on: %s', record.id, record.place, encoded.masked)
        item = {'input_ids': torch.tensor(encoded.input_ids), 'labels': torch.tensor(encoded.labels)}
        if self._separate:
            item['rounds'] = torch.tensor(encoded.rounds)
        if record.image is not None and self._read_image is not None and IMAGE in encoded.input_ids:
            item[self._read_image.kind] = self._read_image(record.image)
        return item

    @property
    def modality_lengths(self) -> list[int]:
        """For the sampler: words of each sample, negative without an image."""
        return [record.n_words if record.image is not None else -record.n_words for record in self.records]

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch, padded with this vocabulary's token; with blank images where a sample has none."""
        reader = self._read_image
        blank = None if reader is None else (reader.kind, reader.blank())
        return collate(items, pad_id=self.tokenizer.pad_id, blank=blank)


def collate(
    items: Sequence[dict[str, Tensor]], *, pad_id: int = 0, blank: tuple[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A batch of samples, padded on the right.

    :param blank: ``pixels`` or ``features``, and what stands for the image of a sample that has none. With it, every
        batch has images, as published: all processes then compute the same layers. Without it, batches have images if
        one of their samples does.
    :return: ``input_ids`` int64 ``[B, n]``, ``labels`` int64 ``[B, n]``, ``attention_mask`` bool ``[B, n]``, and
        ``pixels_nchw`` ``[B, 3, H, W]`` or ``features`` ``[B, n_patches, width]``; ``rounds`` int64 ``[B, n]``, -1 in
        padding, where the samples have them. The mask goes by lengths, not by the
        padding's id: some vocabularies pad with their end token.
    :raise DatasetError: if the images of a batch differ in kind or shape.
    """
    ids = [item['input_ids'] for item in items]
    batch = {
        'input_ids': pad_sequence(ids, batch_first=True, padding_value=pad_id),
        'labels': pad_sequence([item['labels'] for item in items], batch_first=True, padding_value=IGNORED),
        'attention_mask': pad_sequence([torch.ones(len(one), dtype=torch.bool) for one in ids], batch_first=True),
    }
    if 'rounds' in items[0]:
        rounds = [item['rounds'] for item in items]
        batch['rounds'] = pad_sequence(rounds, batch_first=True, padding_value=-1)
    found = [(kind, item[kind]) for item in items for kind in _BATCH_KEYS if kind in item]
    kind, empty = blank or (found[0][0], torch.zeros_like(found[0][1])) if found or blank else ('', torch.empty(0))
    if kind:
        images = [item.get(kind, empty) for item in items]
        kinds_and_shapes = {(one, tuple(image.shape)) for one, image in found} | {(kind, tuple(empty.shape))}
        if len(kinds_and_shapes) > 1:
            raise DatasetError(f'the images of one batch differ: {sorted(kinds_and_shapes)}')
        batch[_BATCH_KEYS[kind]] = torch.stack([image.to(empty.dtype) for image in images])
    return batch
