"""What exists only while the node is active: the loaded model and the worker that uses it.

``open`` makes all of it or nothing; ``close`` stops the worker before it frees what the worker uses.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import psutil
from mobilevlm_msgs.msg import ModelInfo as ModelInfoMsg

from mobilevlm_ros.node.parameters import NodeSettings
from mobilevlm_ros.paths import bundle_dir
from mobilevlm_ros.runtime.ahead import AheadEncoder, AheadSettings
from mobilevlm_ros.runtime.assistant import Assistant
from mobilevlm_ros.runtime.bundle import Bundle, open_bundle
from mobilevlm_ros.runtime.frames import FrameStore
from mobilevlm_ros.runtime.loading import (
    check_memory,
    fake_assistant,
    load_assistant,
    return_freed_memory,
    warm_up,
)
from mobilevlm_ros.runtime.worker import QuestionWorker

__all__ = ['FAKE', 'Session']

FAKE = 'fake'
_STOP_TIMEOUT_S = 10.0
_logger = logging.getLogger(__name__)


def _bundle(settings: NodeSettings, verify_hashes: bool) -> Bundle | None:
    """The bundle that the settings name, checked; None stands for the fake."""
    if settings.bundle == FAKE:
        return None
    path = Path(settings.bundle).expanduser() if settings.bundle else bundle_dir('nano', 'cpu')
    return open_bundle(path, verify_hashes=verify_hashes)


class Session:
    """See the module; made by ``open``."""

    def __init__(
        self, assistant: Assistant, bundle: Bundle | None, settings: NodeSettings, frames: FrameStore, load_s: float
    ) -> None:
        self._assistant = assistant
        self._bundle = bundle
        self._load_s = load_s
        self.ahead = AheadEncoder(assistant, frames, settings.ahead)
        self.worker = QuestionWorker(assistant, capacity=settings.queue_size, idle=self.ahead)

    @staticmethod
    def check(settings: NodeSettings) -> str:
        """Check what ``open`` will need, without loading it; returns the memory budget, for the log.

        :raise MobileVLMError: if it would fail.
        """
        bundle = _bundle(settings, settings.verify_bundle)
        if bundle is None:
            return 'no model: answers are fake'
        check_memory(bundle)
        free = psutil.virtual_memory().available
        return f'{bundle.model_id}: {bundle.size_bytes >> 20} MiB of files, {free >> 20} MiB of memory free'

    @classmethod
    def open(cls, settings: NodeSettings, frames: FrameStore) -> Session:
        """Load the model, run it once, start the worker.

        :param frames: where the newest frames are found while nobody asks.
        :raise MobileVLMError: if something does not work; nothing is left open then.
        """
        started_s = time.monotonic()
        # The hashes were checked when the node was configured; sizes are checked again.
        bundle = _bundle(settings, verify_hashes=False)
        if bundle is None:
            assistant = fake_assistant(settings.assistant)
        else:
            assistant = load_assistant(bundle, settings.assistant, frame_cache=settings.frame_cache)
        try:
            warm_up(assistant)
            return cls(assistant, bundle, settings, frames, time.monotonic() - started_s)
        except BaseException:
            assistant.close()
            raise

    @property
    def model_id(self) -> str:
        """Names the model in every answer."""
        return self._assistant.model_id

    @property
    def warning(self) -> str:
        """What must be known before trusting the answers."""
        return self._bundle.warning if self._bundle else 'the answers are fake: no model is loaded'

    def info_msg(self, stamp: Any) -> ModelInfoMsg:
        """The latched description of the model."""
        message = ModelInfoMsg(
            stamp=stamp,
            model_id=self.model_id,
            warning=self.warning,
            load_s=self._load_s,
            memory_bytes=psutil.Process().memory_info().rss,
            context_length=self._assistant.language.n_ctx,
        )
        bundle = self._bundle
        if bundle is not None:
            message.name, message.profile = bundle.name, bundle.profile
            message.bundle, message.bundle_hash = str(bundle.path), bundle.hash
            message.vision_backend, message.vision_precision = bundle.vision['backend'], bundle.vision['precision']
            message.image_size, message.visual_tokens = bundle.vision['image_size'], bundle.vision['n_tokens']
            message.language_quantization = bundle.language['quantization']
            message.prompt_template = bundle.description['prompt']['template']
        return message

    def encode_ahead(self, settings: AheadSettings) -> None:
        """From now on do by ``settings`` while nobody asks."""
        if settings != self.ahead.settings:
            self.ahead.settings = settings
            self.worker.wake()

    def close(self) -> None:
        """Stop the worker and free the model."""
        if self.worker.stop(_STOP_TIMEOUT_S):
            self._assistant.close()
            return_freed_memory()
        else:
            # Freeing memory that a thread still uses would crash the process.
            _logger.error('the worker did not stop within %.0f s; its model stays loaded', _STOP_TIMEOUT_S)
