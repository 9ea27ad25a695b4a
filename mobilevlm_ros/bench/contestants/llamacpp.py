"""llama.cpp's own loop on a GGUF file: batches of tokens, ``llama_decode``, its greedy sampler, nothing around them.

Called through ctypes, which costs some microseconds a token. Flash attention, batch sizes, matrix products and
everything else are llama.cpp's own; threads and context are those of the other contestants.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from mobilevlm_ros.bench.contestants.products import q4_products
from mobilevlm_ros.errors import EngineError
from mobilevlm_ros.runtime.language.llamacpp_library import last_log_lines, load_library

__all__ = ['LlamaCppLoop']

_N_CTX = 2048


class LlamaCppLoop:
    """See the module.

    :param adapter: a LoRA adapter that the other side applies, too; empty for none.
    :raise EngineError: if llama.cpp cannot load a file.
    """

    def __init__(self, gguf: str, n_threads: int, adapter: str = '') -> None:
        started_s = time.perf_counter()
        # The same library settings as our engine's, a short spin of OpenMP's threads among them: on quiet cores it
        # costs nothing, and with a busy neighbour it spares this contestant, too, the collapse that waiting would be.
        self.lib: Any
        self.lib = lib = load_library(own_kernel=False)
        with ExitStack() as stack:
            self.model = lib.llama_model_load_from_file(os.fsencode(gguf), lib.llama_model_default_params())
            if not self.model:
                raise EngineError(f'llama.cpp could not load {gguf} ({last_log_lines()})')
            stack.callback(lib.llama_model_free, self.model)
            params = lib.llama_context_default_params()
            params.n_ctx = _N_CTX
            params.n_threads = params.n_threads_batch = n_threads
            self.n_batch = min(int(params.n_batch), _N_CTX)
            self.context = lib.llama_init_from_model(self.model, params)
            if not self.context:
                raise EngineError(f'llama.cpp could not make a context for {gguf} ({last_log_lines()})')
            stack.callback(lib.llama_free, self.context)
            if adapter:
                self._apply(adapter)
            self._memory = lib.llama_get_memory(self.context)
            self._sampler = lib.llama_sampler_init_greedy()
            stack.callback(lib.llama_sampler_free, self._sampler)
            self.stack = stack.pop_all()
        self._load_s = time.perf_counter() - started_s

    def _apply(self, path: str) -> None:
        adapter = self.lib.llama_adapter_lora_init(self.model, os.fsencode(path))
        adapters = (self.lib.llama_adapter_lora_p_ctypes * 1)(adapter)
        if not adapter or self.lib.llama_set_adapters_lora(self.context, adapters, 1, (ctypes.c_float * 1)(1.0)):
            raise EngineError(f'llama.cpp could not apply the adapter {path} ({last_log_lines()})')

    def describe(self) -> dict[str, Any]:
        """How long it took to load, and whose products it uses."""
        return {'load_s': self._load_s, 'kernel': q4_products()}

    def prefill(self, tokens: Sequence[int]) -> float:
        """See the package."""
        ids = (self.lib.llama_token * len(tokens))(*tokens)
        started_s = time.perf_counter()
        self.clear()
        self._decode(ids, len(tokens))
        self.lib.llama_get_logits_ith(self.context, -1)
        return time.perf_counter() - started_s

    def decode(self, tokens: Sequence[int], n_tokens: int) -> float:
        """See the package."""
        self.prefill(tokens)
        one = (self.lib.llama_token * 1)()
        started_s = time.perf_counter()
        for _ in range(n_tokens):
            one[0] = self.sample()
            self._decode(one, 1)
        self.sample()
        return time.perf_counter() - started_s

    def sample(self) -> int:
        """The most probable next token."""
        return int(self.lib.llama_sampler_sample(self._sampler, self.context, -1))

    def clear(self) -> None:
        """Empty the context."""
        self.lib.llama_memory_clear(self._memory, True)

    def _decode(self, ids: Any, n: int) -> None:
        code = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(ids, n))
        if code != 0:
            raise EngineError(f'llama_decode failed with code {code} ({last_log_lines()})')
