"""The language engine on llama.cpp, through the low-level API of llama-cpp-python.

Promises what ``LanguageEngine`` says, and in particular: an interrupted call returns within one node of the compute
graph on the CPU (not after a whole batch), every native resource is freed exactly once, also after a half-finished
start, and a failed or interrupted call leaves an engine that answers the next question.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import EngineError, QuestionTooLongError
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.language.interface import (
    EmbeddingSegment,
    LanguageOptions,
    PerfCounters,
    PrefillStats,
    Segment,
)
from mobilevlm_ros.runtime.language.llamacpp_library import (
    LlamaGrammarSampler,
    forget_log_lines,
    json_schema_to_gbnf,
    last_log_lines,
    load_library,
)
from mobilevlm_ros.runtime.language.prefix import PrefixCache

__all__ = ['LlamaCppEngine']

_SEQUENCE = 0
_ABORTED = 2
_NO_ROOM = 1


class LlamaCppEngine:
    """One llama.cpp model with one context and one sequence.

    :param model_path: the GGUF file.
    :param options: context size, threads, device, cache; see ``LanguageOptions``.
    :param adapter_path: a LoRA adapter (GGUF) to apply, or None.
    :raise DependencyError: if llama-cpp-python is missing or of another version.
    :raise EngineError: if a file cannot be loaded.
    """

    def __init__(self, model_path: Path, options: LanguageOptions, adapter_path: Path | None = None) -> None:
        self._lib: Any
        self._lib = lib = load_library()
        forget_log_lines()
        self._options = options
        self._cache = PrefixCache(options.frame_cache)
        self._n_past = 0
        with ExitStack() as stack:
            model_params = lib.llama_model_default_params()
            model_params.n_gpu_layers = options.n_gpu_layers
            self._model = lib.llama_model_load_from_file(os.fsencode(model_path), model_params)
            if not self._model:
                raise EngineError(_load_message('language model', model_path))
            stack.callback(lib.llama_model_free, self._model)
            self._vocab = lib.llama_model_get_vocab(self._model)
            self._n_vocab = int(lib.llama_vocab_n_tokens(self._vocab))
            self._n_embd = int(lib.llama_model_n_embd(self._model))

            adapter = None
            if adapter_path is not None:
                adapter = lib.llama_adapter_lora_init(self._model, os.fsencode(adapter_path))
                if not adapter:
                    raise EngineError(_load_message('LoRA adapter', adapter_path))
                # Freed with the model: llama.cpp owns adapters of a model since they refer to its tensors.

            # The switch that stops a running graph: llama.cpp asks "abort?" after every node, on a compute thread.
            # A Python callback would take the GIL each time; strlen() on a one-byte buffer answers 0 or 1 in C.
            self._abort_flag = ctypes.create_string_buffer(2)
            self._context = lib.llama_init_from_model(self._model, self._context_params())
            if not self._context:
                raise EngineError(
                    f'llama.cpp could not make a context of {options.n_ctx} positions ({last_log_lines()}). '
                    'Close other programs or build the bundle with a smaller context.'
                )
            stack.callback(self._free_context)
            self._memory = lib.llama_get_memory(self._context)
            if adapter is not None:
                adapters = (lib.llama_adapter_lora_p_ctypes * 1)(adapter)
                if lib.llama_set_adapters_lora(self._context, adapters, 1, (ctypes.c_float * 1)(1.0)) != 0:
                    raise EngineError(_load_message('LoRA adapter', adapter_path))
            self.set_threads(0, 0)
            self._stack = stack.pop_all()

    def _context_params(self) -> Any:
        lib, options = self._lib, self._options
        params = lib.llama_context_default_params()
        params.n_ctx = options.n_ctx
        params.n_batch = params.n_ubatch = min(options.n_batch, options.n_ctx)
        params.n_seq_max = 1
        params.no_perf = False
        params.type_k = params.type_v = {
            'f16': lib.GGML_TYPE_F16,
            'f32': lib.GGML_TYPE_F32,
            'q8_0': lib.GGML_TYPE_Q8_0,
        }[options.kv_type]
        flash_attention = options.flash_attention
        if flash_attention is None and options.kv_type == 'f32':
            flash_attention = False  # it would read keys and values as f16
        if flash_attention is not None:
            params.flash_attn_type = (
                lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attention else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
            )
        params.abort_callback = ctypes.cast(ctypes.CDLL(None).strlen, lib.ggml_abort_callback)
        params.abort_callback_data = ctypes.addressof(self._abort_flag)
        return params

    def _free_context(self) -> None:
        self._lib.llama_free(self._context)

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def n_ctx(self) -> int:
        """Positions of the context."""
        return int(self._lib.llama_n_ctx(self._context))

    @property
    def n_embd(self) -> int:
        """Width of an embedding."""
        return self._n_embd

    @property
    def description(self) -> str:
        """As llama.cpp describes the file, for example ``llama 1B Q4_0``."""
        buffer = ctypes.create_string_buffer(256)
        self._lib.llama_model_desc(self._model, buffer, len(buffer))
        return buffer.value.decode(errors='replace')

    @property
    def end_token(self) -> int:
        """End of turn where the vocabulary has one, else end of sequence."""
        eot = int(self._lib.llama_vocab_eot(self._vocab))
        return eot if eot >= 0 else int(self._lib.llama_vocab_eos(self._vocab))

    def perf(self) -> PerfCounters:
        """Counters of llama.cpp since the start."""
        data = self._lib.llama_perf_context(self._context)
        return PerfCounters(data.t_load_ms, data.t_p_eval_ms, data.n_p_eval, data.t_eval_ms, data.n_eval)

    # -- text and tokens ----------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Token ids by the vocabulary in the GGUF; ``bos`` adds what the file says starts a text."""
        raw = text.encode()
        size = len(raw) + 8
        buffer = (self._lib.llama_token * size)()
        n = self._lib.llama_tokenize(self._vocab, raw, len(raw), buffer, size, bos, special)
        if n < 0:
            raise EngineError(f'llama.cpp could not tokenize {len(raw)} bytes of text (it asked for {-n} tokens)')
        return list(buffer[:n])

    def piece(self, token: int) -> bytes:
        """The bytes of one token."""
        buffer = ctypes.create_string_buffer(256)
        n = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[: max(n, 0)]

    def is_end(self, token: int) -> bool:
        """Whether the vocabulary marks the token as an end of generation."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def json_grammar(self, schema: str) -> LlamaGrammarSampler:
        """A grammar over this vocabulary."""
        return LlamaGrammarSampler(self._lib, self._vocab, json_schema_to_gbnf(schema))

    # -- the sequence -------------------------------------------------------------------------------------------------

    @property
    def n_past(self) -> int:
        """Positions in the sequence."""
        return self._n_past

    def holds(self, segments: Sequence[Segment]) -> bool:
        """Whether ``segments`` are in the sequence or in a saved state."""
        return self._cache.match_resident(segments) == len(segments) or self._cache.has(segments)

    def prefill(self, segments: Sequence[Segment], cancel: CancelToken) -> PrefillStats:
        """See ``LanguageEngine.prefill``. The state after each image is saved, so that the frame stays warm."""
        n_positions = sum(segment.n_positions for segment in segments)
        if n_positions >= self.n_ctx:
            raise QuestionTooLongError(
                f'the prompt takes {n_positions} positions, but the context has {self.n_ctx}: ask a shorter question'
            )
        # The last segment is always computed: its logits are wanted, and they are not part of a state.
        reusable = segments[:-1]
        done = self._cache.match_resident(reusable)
        saved = self._cache.match_saved(reusable, more_than=done)
        if saved is not None and self._restore(saved):
            self._cache.resident_is(segments[: saved.n_segments])
            done = saved.n_segments
        self.rewind(self._cache.truncate(done))
        n_reused = self._n_past
        try:
            for index in range(done, len(segments)):
                segment = segments[index]
                last = index == len(segments) - 1
                if isinstance(segment, EmbeddingSegment):
                    self._decode_rows(segment, want_logits=last, cancel=cancel)
                else:
                    self._decode_tokens(segment.tokens, want_logits=last, cancel=cancel)
                self._cache.resident_is(segments[: index + 1])
                if isinstance(segment, EmbeddingSegment) and not last:
                    self._save(segments[: index + 1])
        except BaseException:
            self.rewind(self._cache.n_resident)
            raise
        return PrefillStats(n_positions, n_reused)

    def append(self, tokens: Sequence[int], cancel: CancelToken) -> None:
        """See ``LanguageEngine.append``."""
        if self._n_past + len(tokens) > self.n_ctx:
            raise QuestionTooLongError(f'the answer reached the end of the context ({self.n_ctx} positions)')
        self._decode_tokens(tokens, want_logits=True, cancel=cancel)

    def rewind(self, n_past: int) -> None:
        """See ``LanguageEngine.rewind``."""
        if not self._lib.llama_memory_seq_rm(self._memory, _SEQUENCE, n_past, -1):
            # Cannot happen with a plain KV cache; starting over is always right.
            self._lib.llama_memory_clear(self._memory, True)
            self._cache.truncate(0)
            n_past = 0
        self._n_past = n_past

    def logits(self) -> NDArray[np.float32]:
        """See ``LanguageEngine.logits``."""
        pointer = self._lib.llama_get_logits_ith(self._context, -1)
        if not pointer:
            raise EngineError('llama.cpp holds no logits: nothing was computed since the last rewind')
        return np.ctypeslib.as_array(pointer, shape=(self._n_vocab,))

    def forget(self) -> None:
        """Drop every kept state."""
        self._cache.clear()
        self.rewind(0)

    def set_threads(self, n_threads: int, n_threads_batch: int) -> None:
        """Change the thread counts; 0: those of the options."""
        cores = len(os.sched_getaffinity(0))
        threads = n_threads or self._options.n_threads or max(1, cores - 1)
        threads_batch = n_threads_batch or self._options.n_threads_batch or cores
        self._lib.llama_set_n_threads(self._context, threads, threads_batch)

    def close(self) -> None:
        """Free model and context; may be called again."""
        self._cache.clear()
        self._stack.close()
        self._lib = _ClosedLibrary()

    def _decode_tokens(self, tokens: Sequence[int], *, want_logits: bool, cancel: CancelToken) -> None:
        ids = np.asarray(tokens, dtype=np.int32)
        for start in range(0, len(ids), self._options.n_batch):
            chunk = np.ascontiguousarray(ids[start : start + self._options.n_batch])
            token_pointer = chunk.ctypes.data_as(ctypes.POINTER(self._lib.llama_token))
            last = start + len(chunk) == len(ids)
            self._decode(len(chunk), token_pointer, None, want_logits=want_logits and last, cancel=cancel)

    def _decode_rows(self, segment: EmbeddingSegment, *, want_logits: bool, cancel: CancelToken) -> None:
        rows = np.ascontiguousarray(segment.rows(), dtype=np.float32)
        if rows.shape != (segment.n_positions, self._n_embd):
            raise EngineError(
                f'the vision engine gave embeddings of shape {rows.shape}, '
                f'but the language model takes {(segment.n_positions, self._n_embd)}: the bundle mixes two models'
            )
        for start in range(0, len(rows), self._options.n_batch):
            chunk = rows[start : start + self._options.n_batch]
            row_pointer = chunk.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            last = start + len(chunk) == len(rows)
            self._decode(len(chunk), None, row_pointer, want_logits=want_logits and last, cancel=cancel)

    def _decode(self, n: int, tokens: Any, rows: Any, *, want_logits: bool, cancel: CancelToken) -> None:
        """One ``llama_decode``; positions and sequence are llama.cpp's to count."""
        cancel.raise_if_set()
        outputs = np.zeros(n, dtype=np.int8)
        outputs[-1] = want_logits
        batch = self._lib.llama_batch(
            n_tokens=n, token=tokens, embd=rows, logits=outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        )
        self._abort_flag.raw = b'\0\0'
        with cancel.on_set(self._abort):
            code = self._lib.llama_decode(self._context, batch)
        if code == 0:
            self._n_past += n
            return
        self.rewind(self._n_past)
        if code == _ABORTED:
            cancel.raise_if_set()
        if code == _NO_ROOM:
            raise QuestionTooLongError(f'prompt and answer do not fit the context of {self.n_ctx} positions')
        raise EngineError(f'llama.cpp failed to compute {n} positions (code {code}: {last_log_lines()})')

    def _abort(self) -> None:
        self._abort_flag.raw = b'\1\0'

    # -- kept states --------------------------------------------------------------------------------------------------

    def _save(self, segments: Sequence[Segment]) -> None:
        if self._cache.capacity == 0:
            return
        size = self._lib.llama_state_seq_get_size(self._context, _SEQUENCE)
        data = np.empty(size, dtype=np.uint8)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        written = self._lib.llama_state_seq_get_data(self._context, pointer, size, _SEQUENCE)
        if written == size:
            self._cache.save(segments, data)

    def _restore(self, saved: Any) -> bool:
        self._lib.llama_memory_seq_rm(self._memory, _SEQUENCE, -1, -1)
        pointer = saved.data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        read = self._lib.llama_state_seq_set_data(self._context, pointer, saved.data.nbytes, _SEQUENCE)
        if read == 0:
            self._cache.truncate(0)
            self._lib.llama_memory_clear(self._memory, True)
        return bool(read)


class _ClosedLibrary:
    """Stands in for the library of a closed engine: an error instead of a crash on freed memory."""

    def __getattr__(self, name: str) -> Any:
        raise EngineError('the language engine is closed')


def _load_message(what: str, path: Path | None) -> str:
    return (
        f'llama.cpp could not load the {what} {path} ({last_log_lines()}). '
        'Rebuild the bundle with `mobilevlm build`, or check that the file is a GGUF for this version of llama.cpp.'
    )
