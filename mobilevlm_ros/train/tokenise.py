"""``mobilevlm train tokenise``: text files become a folder of token ids, in bounded memory, and go on after a kill.

Documents follow one another with the end token after each, as MobileLLaMA was pretrained (arXiv 2312.16886, 4.1);
nothing is padded. Shards get their names when they are whole, and the index notes after each where in the inputs the
next one begins: a run that was stopped goes on there, and ends with the same bytes as one that was not.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.build.stages import Reporter, SilentReporter
from mobilevlm_ros.errors import DatasetError, DiskSpaceError, MobileVLMError, RecordError
from mobilevlm_ros.model.tokenizer_files import find_tokenizer
from mobilevlm_ros.train.shards import (
    INDEX,
    InputFile,
    Position,
    ShardWriter,
    TokenIndex,
    is_ours,
    read_index,
    write_index,
)
from mobilevlm_ros.train.text_files import Chunk, Piece, describe, find_inputs, read_chunks
from mobilevlm_ros.train.tokens import Tokenizer, open_tokenizer

__all__ = ['add_tokenise_arguments', 'run_tokenise', 'tokenise']

SHARD_TOKENS = 1 << 27
"""256 MiB of a vocabulary below 65,537."""
CHUNK_BYTES = 1 << 18
_N_EXAMPLES = 20

Encoded = tuple[NDArray[np.uint32], int]
"""Ids, and the number of documents that end among them."""


def tokenise(
    inputs: Sequence[Path],
    tokenizer: Path,
    out: Path,
    *,
    separator: str | None = None,
    field: str = 'text',
    shard_tokens: int = SHARD_TOKENS,
    chunk_bytes: int = CHUNK_BYTES,
    on_bad: Literal['skip', 'refuse'] = 'skip',
    n_workers: int = 1,
    reporter: Reporter | None = None,
) -> TokenIndex:
    """Write the tokens of ``inputs`` to the folder ``out``, or go on with it.

    :param inputs: files and folders, see ``text_files``.
    :param tokenizer: ``tokenizer.model`` or ``tokenizer.json``, or a folder that has one.
    :param separator: a line that parts documents in plain text; None: a file is a document.
    :param field: of a line of JSON, with the text.
    :param shard_tokens: a shard is closed when it has so many; it may have one chunk more.
    :param on_bad: what becomes of a line that cannot be used.
    :param n_workers: processes that tokenise; the result does not depend on it.
    :raise DatasetMissingError: if an input is missing.
    :raise DatasetError: if an input cannot be used, all are empty, or ``out`` holds something else.
    :raise RecordError: if a line cannot be used and ``on_bad`` is ``refuse``.
    :raise DiskSpaceError: if the disk is full; finished shards are kept.
    """
    reporter = reporter or SilentReporter()
    files = find_inputs(inputs, out)
    tokenizer = find_tokenizer(tokenizer) if tokenizer.is_dir() else tokenizer
    described = [describe(file) for file in files]
    index = _new_index(tokenizer, described, separator, field, shard_tokens)
    with _locked(out):
        index = _begun(out, index)
        if index.next is None:
            reporter.step(f'{out}: finished earlier')
            return index
        reporter.step(f'{len(files)} files, {sum(file.n_bytes for file in described) / 1e6:,.1f} MB')
        if index.shards:
            reporter.step(f'going on after {len(index.shards)} finished shards')
        chunks = read_chunks(files, index.next, separator=separator, field=field, chunk_bytes=chunk_bytes)
        encoded = _encoded(chunks, tokenizer, n_workers)
        return _write(encoded, index, out, on_bad, reporter)


def _new_index(
    tokenizer: Path, inputs: list[InputFile], separator: str | None, field: str, shard_tokens: int
) -> TokenIndex:
    opened = open_tokenizer(tokenizer)
    return TokenIndex(
        dtype='uint16' if opened.n_vocab <= 1 << 16 else 'uint32',
        n_vocab=opened.n_vocab,
        eos_id=opened.eos_id,
        tokenizer_sha256=hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
        separator=separator,
        field=field,
        shard_tokens=shard_tokens,
        inputs=inputs,
    )


def _begun(out: Path, index: TokenIndex) -> TokenIndex:
    """What is in ``out`` of ``index``; ``index`` itself if there is nothing.

    :raise DatasetError: if there is something else.
    """
    strangers = sorted(path.name for path in out.iterdir() if not is_ours(path.name))
    if strangers:
        raise DatasetError(f'{out} holds other files, such as {strangers[0]!r:.80}: choose another --out')
    if not (out / INDEX).exists():
        return index
    found = read_index(out)
    for name, was, wanted in zip(
        ('tokenizer', 'separator', 'field', 'shard size', 'inputs'), _recipe(found), _recipe(index), strict=True
    ):
        if was != wanted:
            raise DatasetError(
                f'{out} was made with another {name} (found {was!r:.200}, now {wanted!r:.200}): choose another --out, '
                'or remove it'
            )
    return found


def _recipe(index: TokenIndex) -> tuple[object, ...]:
    """What must be the same for a run to go on; a file may have been moved."""
    inputs = [(Path(file.file).name, file.n_bytes, file.head_sha256[:16]) for file in index.inputs]
    return index.tokenizer_sha256, index.separator, index.field, index.shard_tokens, inputs


def _write(
    encoded: Iterator[tuple[Chunk, Encoded]],
    index: TokenIndex,
    out: Path,
    on_bad: Literal['skip', 'refuse'],
    reporter: Reporter,
) -> TokenIndex:
    """Write shards until nothing is left; the index follows each of them."""
    n_bytes = sum(file.n_bytes for file in index.inputs)
    skipped, examples = Counter(index.skipped), list(index.examples)
    writer: ShardWriter | None = None

    def note(after: Position | None) -> None:
        nonlocal index, writer
        shards = index.shards if writer is None else [*index.shards, writer.finish()]
        writer = None
        update = {'shards': shards, 'skipped': dict(skipped), 'examples': list(examples), 'next': after}
        index = index.model_copy(update=update)
        write_index(out, index)

    try:
        for chunk, (ids, n_documents) in encoded:
            for problem in chunk.problems:
                if on_bad == 'refuse':
                    raise RecordError(problem.kind, f'{problem.place}; --on-bad skip leaves such lines out')
                skipped[problem.kind] += 1
                if len(examples) < _N_EXAMPLES:
                    examples.append(f'{problem.place}: {problem.kind}')
            if len(ids):
                writer = writer or ShardWriter(out, len(index.shards), index.dtype)
                writer.add(ids, n_documents)
            reporter.progress(chunk.n_read, n_bytes)
            if writer is not None and writer.n_tokens >= index.shard_tokens:
                note(chunk.after)
        if writer is None and not index.shards:
            named = f', for example {examples[0]}' if examples else ''
            raise DatasetError(
                f'there is no document in {len(index.inputs)} files; {sum(skipped.values())} lines were left out{named}'
            )
        note(None)
    except OSError as error:
        raise _write_error(out, len(index.shards), error) from error
    finally:
        if writer is not None:
            writer.discard()
    return index


def _write_error(out: Path, n_shards: int, error: OSError) -> MobileVLMError:
    kept = f'{n_shards} finished shards are kept'
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError(f'the disk of {out} is full; {kept}: free some space and run the same command again')
    return DatasetError(f'{out} cannot be written: {error.strerror or error}; {kept}')


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep other processes out of the folder, and remove what a killed one has left half-written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _write_error(out, 0, error) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DatasetError(f'another process is writing {out}: wait for it, or choose another --out') from error
        for left in out.glob('.*.partial'):
            if is_ours(left.name):
                left.unlink(missing_ok=True)
        yield
    finally:
        os.close(lock)


# -- tokenising -------------------------------------------------------------------------------------------------------


def _encoded(chunks: Iterator[Chunk], tokenizer: Path, n_workers: int) -> Iterator[tuple[Chunk, Encoded]]:
    """Chunks in their order with their ids; a few are in work at once."""
    if n_workers == 1:
        opened = open_tokenizer(tokenizer)
        for chunk in chunks:
            yield chunk, _encode(opened, chunk.pieces)
        return
    context = multiprocessing.get_context('spawn')
    pool = ProcessPoolExecutor(n_workers, mp_context=context, initializer=_start_worker, initargs=(tokenizer,))
    try:
        waiting = deque((chunk, pool.submit(_work, chunk.pieces)) for chunk in _first(chunks, 4 * n_workers))
        while waiting:
            chunk, future = waiting.popleft()
            yield chunk, future.result()
            waiting.extend((more, pool.submit(_work, more.pieces)) for more in _first(chunks, 1))
    except BrokenProcessPool as error:
        raise DatasetError(
            'a process that tokenises ended unexpectedly, perhaps for want of memory: run the same command again, '
            'with fewer --workers'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _first(chunks: Iterator[Chunk], n: int) -> Iterator[Chunk]:
    for _, chunk in zip(range(n), chunks, strict=False):
        yield chunk


def _encode(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> Encoded:
    """The ids of some pieces, with the end token after each document.

    :raise DatasetError: if the tokenizer gives an id that is none of its vocabulary.
    """
    ids: list[int] = []
    for piece in pieces:
        if piece.text:
            ids += tokenizer.encode(piece.text)
        if piece.ends_document:
            ids.append(tokenizer.eos_id)
    found = np.asarray(ids, dtype=np.int64)
    if len(found) and not 0 <= int(found.min()) <= int(found.max()) < tokenizer.n_vocab:
        raise DatasetError(
            f'the tokenizer gives ids from {found.min()} to {found.max()}, its vocabulary has {tokenizer.n_vocab}: '
            'its file is damaged'
        )
    return found.astype(np.uint32), sum(piece.ends_document for piece in pieces)


_worker: Tokenizer | None = None


def _start_worker(path: Path) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others
    _worker = open_tokenizer(path)


def _work(pieces: Sequence[Piece]) -> Encoded:
    assert _worker is not None
    return _encode(_worker, pieces)


# -- the command ------------------------------------------------------------------------------------------------------


def add_tokenise_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add('inputs', metavar='INPUT', type=Path, nargs='+', help='text or JSON Lines, also .gz, .bz2, .xz; or folders')
    add('--tokenizer', metavar='FILE', type=Path, required=True, help='tokenizer.model or tokenizer.json')
    add('--out', metavar='DIR', type=Path, required=True, help='a new folder, or an unfinished one to go on with')
    add('--field', metavar='NAME', default='text', help='of JSON Lines, with the text; default: text')
    add(
        '--separator',
        metavar='LINE',
        help="a line that parts documents in plain text, '' is a blank one; default: a file is a document",
    )
    add('--shard-tokens', metavar='N', type=_positive, default=SHARD_TOKENS, help=f'in a file; default: {SHARD_TOKENS}')
    add('--on-bad', choices=('skip', 'refuse'), default='skip', help='a line that cannot be used; default: skip')
    add('--workers', metavar='N', type=_positive, default=1, help='processes that tokenise; default: 1')


def run_tokenise(options: argparse.Namespace) -> int:
    """Tokenise and say what came of it; returns the exit code.

    :raise MobileVLMError: see ``tokenise``.
    """
    from mobilevlm_ros.build.console import ConsoleReporter

    with ConsoleReporter() as reporter:
        index = tokenise(
            options.inputs,
            options.tokenizer,
            options.out,
            separator=options.separator,
            field=options.field,
            shard_tokens=options.shard_tokens,
            on_bad=options.on_bad,
            n_workers=options.workers,
            reporter=reporter,
        )
    lines = [
        f'{index.n_tokens:,} tokens of {index.n_documents:,} documents in {len(index.shards)} shards, {index.dtype}'
    ]
    if index.skipped:
        reasons = ', '.join(f'{n:,} {kind}' for kind, n in sorted(index.skipped.items()))
        lines.append(f'{sum(index.skipped.values()):,} lines were left out: {reasons}')
        lines += [f'  {example}' for example in index.examples]
    for line in lines:
        reporter.console.print(line, markup=False, highlight=False, soft_wrap=True)
    print(options.out)
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be 1 or more, found {value}')
    return value
