"""Which rows the paper's two tables get for models of known shapes, and which of them are done already.

A row is one model in one quantisation in one table. What is done stands in a file of JSON lines, one row each, together
with everything that it depends on: rows of another machine, or with other settings, are not done.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevlm_ros.bench.paper import TABLE5, TABLE6, model_of
from mobilevlm_ros.bench.protocols import Measured
from mobilevlm_ros.bench.random_model import language_bytes, vision_bytes
from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.model.config import LanguageConfig, ModelConfig

__all__ = ['PAPER_MODELS', 'DoneRows', 'Row', 'kv_bytes', 'rows_of']

PAPER_MODELS = (
    'llava-1.5-tinyllama-1.1b',
    'mobilevlm-1.7b',
    'mobilevlm-3b',
    'llava-1.5-openllama-3b',
    'llava-1.5-vicuna-7b',
)
"""Those of Table 6, whose language models are those of Table 5; names of manifests, the smallest first."""
_PAPER_ROWS = (('Q8_0', 5), ('Q4_K_S', 5), ('Q4_K_S', 6))
_WORKING_BYTES = 512 << 20
_VISION_COPIES = 2.2
"""Of a graph that ONNX Runtime loads: the file, and its matrices laid out anew."""


@dataclass(frozen=True)
class Row:
    """One row to be measured.

    :ivar table: 5 or 6.
    """

    config: ModelConfig
    quantization: str
    table: int

    @property
    def name(self) -> str:
        """For people."""
        return f'{self.config.name} {self.quantization}'

    @property
    def disk_bytes(self) -> int:
        """What its files take."""
        seeing = vision_bytes(self.config) if self.table == 6 else 0
        return language_bytes(self.config.language, self.quantization) + seeing

    @property
    def memory_bytes(self) -> int:
        """What it takes to be loaded."""
        seeing = _VISION_COPIES * vision_bytes(self.config) if self.table == 6 else 0
        language = self.config.language
        loaded = language_bytes(language, self.quantization) + kv_bytes(language)
        return round(loaded + seeing) + _WORKING_BYTES


def kv_bytes(config: LanguageConfig) -> int:
    """Keys and values of a whole context in float16."""
    return 4 * config.n_layers * config.n_kv_heads * config.head_width * config.n_ctx


def rows_of(configs: Sequence[ModelConfig], tables: Collection[int], quantizations: Sequence[str]) -> list[Row]:
    """All rows, those of one file after each other.

    :param quantizations: empty: the paper's, and only those models of a table that the paper has there.
    :raise SettingsError: if a model cannot be in any of the tables.
    """
    plan = [(one, table) for one in quantizations for table in (5, 6)] if quantizations else list(_PAPER_ROWS)
    rows = []
    for config in configs:
        own = [
            Row(config, quantization, table)
            for quantization, table in plan
            if table in tables and _belongs(config, table, everything=bool(quantizations))
        ]
        if not own:
            raise SettingsError(f'{config.name} is in none of the tables {", ".join(map(str, sorted(tables)))}')
        rows += own
    return rows


def _belongs(config: ModelConfig, table: int, *, everything: bool) -> bool:
    """Whether a model has a row in a table: Table 6 is about models that see."""
    if table == 6 and config.vision is None:
        return False
    name = model_of(config.language)
    here = {row.model for row in TABLE5} if table == 5 else {row.language for row in TABLE6}
    return everything or not name or name in here


class DoneRows:
    """Rows in a file of JSON lines.

    :param path: the file; None: nothing is kept. It need not exist yet.
    :param circumstances: what all rows of this run have in common and depend on.
    :raise SettingsError: if the file cannot be read, or holds a damaged line.
    """

    def __init__(self, path: Path | None, circumstances: Mapping[str, Any]) -> None:
        self._path = path
        self._circumstances = json.loads(json.dumps(circumstances))
        self._records: list[dict[str, Any]] = list(self._read()) if path is not None and path.exists() else []

    def measured(self, table: int) -> list[Measured]:
        """All rows of a table, in the order in which they were measured."""
        return [Measured(**record['row']) for record in self._records if record['table'] == table]

    def has(self, row: Row) -> bool:
        """Whether a row is done."""
        return any(_is_of(record, row) for record in self._records)

    def expected_s(self, row: Row) -> float | None:
        """How long a row will take, from those of its table that are done, in proportion to their sizes."""
        known = [record for record in self._records if record['table'] == row.table]
        if not known:
            return None
        nearest = min(known, key=lambda record: abs(record['disk_bytes'] - row.disk_bytes))
        return float(nearest['took_s']) * row.disk_bytes / nearest['disk_bytes']

    def add(self, row: Row, measured: Measured, took_s: float, about: Mapping[str, Any]) -> None:
        """Note a row.

        :param took_s: all of it, making the files too.
        :param about: more to be written along.
        :raise SettingsError: if the file cannot be written.
        """
        record = {
            'benchmark': 'shapes',
            **about,
            'circumstances': self._circumstances,
            'table': row.table,
            'model': row.config.name,
            'quantization': row.quantization,
            'disk_bytes': row.disk_bytes,
            'took_s': round(took_s, 1),
            'row': measured.as_record(),
        }
        self._records.append(record)
        if self._path is None:
            return
        try:
            with self._path.open('a', encoding='utf-8') as file:
                file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + '\n')
        except OSError as error:
            raise SettingsError(f'the row cannot be written to {self._path}: {error.strerror}') from error

    def _read(self) -> Iterator[dict[str, Any]]:
        assert self._path is not None
        try:
            lines = self._path.read_text(encoding='utf-8').splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f'{self._path} cannot be read: {error}') from error
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if record['benchmark'] == 'shapes' and record['circumstances'] == self._circumstances:
                    Measured(**record['row'])
                    yield record
            except (ValueError, KeyError, TypeError) as error:
                raise SettingsError(
                    f'line {number} of {self._path} is no record of this benchmark ({error!r}): remove the line, or '
                    'give another --json'
                ) from error


def _is_of(record: Mapping[str, Any], row: Row) -> bool:
    return (record['table'], record['model'], record['quantization']) == (row.table, row.config.name, row.quantization)
