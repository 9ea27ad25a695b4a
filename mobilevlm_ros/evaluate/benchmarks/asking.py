"""Asks the questions of a benchmark: in this process, or in several that share the questions out.

Questions that follow each other about one image are asked together, so that the image is computed once. Which process
gets which is decided by their order alone. Nothing is held but the images of one group, however long the benchmark is.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mobilevlm_ros import errors
from mobilevlm_ros.errors import EngineError, MobileVLMError
from mobilevlm_ros.evaluate.answerer import Answerer, BundleAnswerer, Reply
from mobilevlm_ros.evaluate.benchmarks.catalogue import BENCHMARKS
from mobilevlm_ros.evaluate.benchmarks.items import FileImage, Item
from mobilevlm_ros.evaluate.server import ServerAnswerer
from mobilevlm_ros.runtime.bundle import open_bundle
from mobilevlm_ros.runtime.preprocess import Aspect
from mobilevlm_ros.types import Frame, Question, ResultCode

__all__ = ['Replied', 'Source', 'Task', 'ask_all', 'grouped']

MOST_TOGETHER = 16
"""Questions about one image that are asked together."""
_FAILED = 100
_OF_THE_QUESTION = {ResultCode.BAD_QUESTION, ResultCode.TOO_LONG, ResultCode.BAD_FORMAT}
_POLL_S = 1.0

Replied = tuple[Item, Reply]


@dataclass(frozen=True)
class Source:
    """Where answers come from; can be sent to other processes.

    :ivar bundle: folder of a bundle; None: the server answers.
    :ivar server: URL of a server.
    :ivar model: of the server.
    :ivar timeout_s: for one request to the server.
    :ivar n_threads: of the bundle's engines; 0: as the bundle says.
    """

    bundle: Path | None = None
    server: str = ''
    model: str = ''
    api_key: str = ''
    timeout_s: float = 120.0
    n_threads: int = 0

    def open(self, aspect: Aspect | None = None) -> Answerer:
        """Whoever answers, ready.

        :raise MobileVLMError: if it cannot be loaded or reached.
        """
        if self.bundle is None:
            return self._server()
        return BundleAnswerer.open(self.bundle, n_threads=self.n_threads, aspect=aspect)

    def model_id(self) -> str:
        """Names the model, without loading it.

        :raise MobileVLMError: if the bundle cannot be used, or the server not be reached.
        """
        if self.bundle is None:
            return self._server().model_id
        return open_bundle(self.bundle, verify_hashes=False).model_id

    def _server(self) -> ServerAnswerer:
        return ServerAnswerer(self.server, self.model, timeout_s=self.timeout_s, api_key=self.api_key)


@dataclass(frozen=True)
class Task:
    """What is to be asked.

    :ivar benchmark: by name.
    :ivar limit: only so many questions, from the first on; None: all.
    :ivar done: numbers of the questions that are answered already.
    """

    benchmark: str
    data: Path
    limit: int | None = None
    done: Collection[int] = ()

    def items(self) -> Iterator[Item]:
        """The questions, those that are answered among them."""
        return islice(BENCHMARKS[self.benchmark].items(self.data), self.limit)


def ask_all(task: Task, source: Source, n_processes: int = 1) -> Iterator[list[Replied]]:
    """Ask what is not answered yet; replies come as they are ready.

    :raise BadImageError: if an image cannot be read.
    :raise EngineError: if the model fails.
    :raise ServerError: if the server does.
    """
    if n_processes > 1:
        yield from _ask_in_processes(task, source, n_processes)
        return
    answerer = source.open(BENCHMARKS[task.benchmark].aspect)
    try:
        yield from _ask(answerer, task, 0, 1)
    finally:
        answerer.close()


def grouped(items: Iterable[Item], longest: int = MOST_TOGETHER) -> Iterator[list[Item]]:
    """Items that follow each other and are about one image."""
    group: list[Item] = []
    for item in items:
        if group and (item.image != group[0].image or len(group) == longest):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _ask(answerer: Answerer, task: Task, index: int, n_processes: int) -> Iterator[list[Replied]]:
    for group in islice(grouped(task.items()), index, None, n_processes):
        open_items = [item for item in group if item.number not in task.done]
        if not open_items:
            continue
        questions = [Question(item.text, max_tokens=item.max_tokens) for item in open_items]
        replies = answerer.answer_many(Frame(open_items[0].image.read()), questions)
        for item, reply in zip(open_items, replies, strict=True):
            if reply.result_code >= _FAILED and reply.result_code not in _OF_THE_QUESTION:
                raise EngineError(f'question {item.question_id} got no answer: {reply.message}')
        yield list(zip(open_items, replies, strict=True))


def _ask_in_processes(task: Task, source: Source, n_processes: int) -> Iterator[list[Replied]]:
    # Started anew, not forked: engines have threads.
    context = multiprocessing.get_context('spawn')
    replies: Any = context.Queue(maxsize=4 * n_processes)
    workers = [
        context.Process(target=_work, args=(task, source, index, n_processes, replies), daemon=True)
        for index in range(n_processes)
    ]
    try:
        for worker in workers:
            worker.start()
        n_busy = n_processes
        while n_busy:
            try:
                message = replies.get(timeout=_POLL_S)
            except queue.Empty:
                _raise_if_died(workers)
                continue
            if message is None:
                n_busy -= 1
            elif isinstance(message, list):
                yield message
            else:
                raise _error(*message)
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
                worker.join()
        replies.close()


def _work(task: Task, source: Source, index: int, n_processes: int, replies: Any) -> None:
    """One process; ends with None, or with the name and the message of an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears it, and ends this one
    try:
        answerer = source.open(BENCHMARKS[task.benchmark].aspect)
        try:
            for group in _ask(answerer, task, index, n_processes):
                # The text of an image can have megabytes, and nobody needs it back.
                replies.put([(_light(item), reply) for item, reply in group])
        finally:
            answerer.close()
        replies.put(None)
    except MobileVLMError as error:
        replies.put((type(error).__name__, str(error)))


def _light(item: Item) -> Item:
    return replace(item, image=FileImage(Path()))


def _raise_if_died(workers: Iterable[Any]) -> None:
    for worker in workers:
        if worker.exitcode:
            raise EngineError(
                f'a process that asked questions ended with code {worker.exitcode} (-9: for want of memory). '
                'What is answered is kept: go on with --resume, and perhaps with fewer --processes'
            )


def _error(name: str, message: str) -> MobileVLMError:
    """The error of another process."""
    try:
        error: MobileVLMError = getattr(errors, name)(message)
    except TypeError:  # one that takes more than a message
        return EngineError(message)
    return error
