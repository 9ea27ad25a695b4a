"""What a run of a benchmark leaves in its folder, so that it can be gone on with and scored again.

``predictions.jsonl`` has a line for each answer, as the published scripts write it, so that their scorers read it, too;
what this package knows besides is under ``metadata``. ``run.json`` says whose answers they are.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from mobilevlm_ros.errors import BenchmarkError, DiskSpaceError, SettingsError
from mobilevlm_ros.evaluate.benchmarks.asking import Replied
from mobilevlm_ros.evaluate.benchmarks.files import MAX_LINE_CHARACTERS, Record, read_document, read_lines
from mobilevlm_ros.evaluate.benchmarks.items import Given, Item

__all__ = ['RunRecord', 'write_file']

PREDICTIONS = 'predictions.jsonl'
RUN = 'run.json'


class RunRecord:
    """The folder of a run.

    :param benchmark: by name.
    :param model_id: whose answers these are.
    :raise SettingsError: if the folder cannot be made, holds a run already and is not to be gone on with, or holds one
        of another benchmark or model.
    """

    def __init__(self, folder: Path, benchmark: str, model_id: str, *, resume: bool) -> None:
        self._folder, self._model_id = folder, model_id
        self.predictions = folder / PREDICTIONS
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f'--out {folder} cannot be made: {error.strerror}') from error
        wanted = {'benchmark': benchmark, 'model_id': model_id}
        if self.predictions.exists():
            if not resume:
                raise SettingsError(f'{self.predictions} is there already: go on with --resume, or give another --out')
            run = Record.of(read_document(folder / RUN), str(folder / RUN))
            found = {name: run.text(name) for name in wanted}
            if found != wanted:
                raise SettingsError(f'{folder} holds a run of {found}, not of {wanted}: give another --out')
        else:
            write_file(folder / RUN, json.dumps(wanted, indent=1, ensure_ascii=False) + '\n')
        self._file: IO[bytes] | None = None

    def done(self) -> dict[int, str]:
        """The questions that have an answer: number, and a hash of id and prompt. A torn last line is cut off.

        :raise BenchmarkError: if the file is damaged.
        """
        if not self.predictions.exists():
            return {}
        self._cut_torn_line()
        done = {}
        for record in read_lines(self.predictions):
            metadata = Record.of(record.values.get('metadata'), f'{record.place}, metadata')
            done[metadata.whole('number')] = question_hash(record.identity('question_id'), record.text('prompt'))
        return done

    def _cut_torn_line(self) -> None:
        try:
            with self.predictions.open('rb+') as file:
                end = file.seek(0, os.SEEK_END)
                start = max(0, end - 4 * MAX_LINE_CHARACTERS)
                file.seek(start)
                tail = file.read()
                if tail and not tail.endswith(b'\n'):
                    file.truncate(start + tail.rfind(b'\n') + 1)
        except OSError as error:
            raise _no_room(self.predictions, error) from error

    def add(self, replies: Iterable[Replied]) -> None:
        """Write answers down at once.

        :raise DiskSpaceError: if there is no room; the answers before are kept.
        """
        lines = [json.dumps(self._line(*replied)) + '\n' for replied in replies]
        try:
            if self._file is None:
                self._file = self.predictions.open('ab')
            self._file.write(''.join(lines).encode())
            self._file.flush()
        except OSError as error:
            raise _no_room(self.predictions, error) from error

    def _line(self, item: Item, reply: Any) -> dict[str, Any]:
        timing = reply.timing
        return {
            'question_id': item.question_id,
            'prompt': item.prompt,
            'text': reply.text,
            'answer_id': f'{item.number}',
            'model_id': self._model_id,
            **item.extra,
            'metadata': {
                'number': item.number,
                'result': reply.result_code.name,
                'message': reply.message,
                'truncated': reply.truncated,
                'confidence': reply.confidence,
                'prompt_hash': reply.prompt_hash,
                'vision_s': timing.vision_s,
                'total_s': timing.total_s,
                'generated_tokens': timing.generated_tokens,
            },
        }

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def answers(self, n_items: int) -> tuple[list[Given], list[str]]:
        """The answers to the first questions in the benchmark's order, and what was wrong with those without one.

        :param n_items: so many questions; answers to others stay out.
        """
        given: dict[int, Given] = {}
        problems: list[str] = []
        for record in read_lines(self.predictions):
            metadata = Record.of(record.values.get('metadata'), f'{record.place}, metadata')
            number = metadata.whole('number')
            if number < n_items:
                given[number] = Given(record.identity('question_id'), record.text('prompt'), record.text('text'))
                if metadata.text('result') not in ('OK', 'UNKNOWN'):
                    problems.append(f'question {record.identity("question_id")}: {metadata.text("message")}')
        return [given[number] for number in sorted(given)], problems


def question_hash(question_id: int | str, prompt: str) -> str:
    """Short and equal for equal questions."""
    return hashlib.blake2b(f'{question_id}\n{prompt}'.encode(errors='surrogatepass'), digest_size=8).hexdigest()


def write_file(path: Path, text: str) -> None:
    """Write a file of results.

    :raise DiskSpaceError: if there is no room.
    :raise BenchmarkError: if it cannot be written.
    """
    try:
        path.write_text(text, encoding='utf-8')
    except OSError as error:
        raise _no_room(path, error) from error


def _no_room(path: Path, error: OSError) -> DiskSpaceError | BenchmarkError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError(f'no room left for {path}; what was written is kept: make room, and go on with --resume')
    return BenchmarkError(f'{path} cannot be written: {error.strerror}')
