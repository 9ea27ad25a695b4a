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
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import EngineError, QuestionTooLongError
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.language.branches import Tree, plan_trees
from mobilevlm_ros.runtime.language.interface import (
    EmbeddingSegment,
    LanguageOptions,
    PerfCounters,
    PrefillStats,
    Segment,
)
from mobilevlm_ros.runtime.language.llamacpp_library import (
    LlamaGrammarSampler,
    SingleBytes,
    forget_log_lines,
    json_schema_to_gbnf,
    last_log_lines,
    load_library,
)
from mobilevlm_ros.runtime.language.prefix import PrefixCache

__all__ = ['LlamaCppEngine']

_SEQUENCE = 0
"""The working sequence; the branches of ``branch`` are those after it."""
_ABORTED = 2
_NO_ROOM = 1


class LlamaCppEngine:
    """One llama.cpp model with one context.

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
        self._n_branches = max(1, min(options.n_branches, options.n_batch - 1, options.n_ctx - 1))
        self._n_past = 0
        with ExitStack() as stack:
            model_params = lib.llama_model_default_params()
            model_params.n_gpu_layers = options.n_gpu_layers
            if options.n_gpu_layers == 0:
                # On a CPU llama.cpp lays most matrices out anew. Mapped, the file would be in memory a second time.
                model_params.load_mode = lib.LLAMA_LOAD_MODE_NONE
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
            self._single = _SingleToken(lib)
            self._logits_view: tuple[int, NDArray[np.float32]] | None = None
            self._stack = stack.pop_all()

    def _context_params(self) -> Any:
        lib, options = self._lib, self._options
        params = lib.llama_context_default_params()
        params.n_ctx = options.n_ctx
        params.n_batch = params.n_ubatch = max(2, min(options.n_batch, options.n_ctx))
        # The branches share the cells of the context with the working sequence, so that they take no memory of their
        # own. llama.cpp wants to be able to compute a token of each sequence in one batch.
        params.n_seq_max = 1 + self._n_branches
        params.kv_unified = True
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
        eot, eos = int(self._lib.llama_vocab_eot(self._vocab)), int(self._lib.llama_vocab_eos(self._vocab))
        # llama.cpp guesses the first from texts, and of SmolLM2's tokens picks the one that ends no turn.
        ends_turn = eot >= 0 and self._lib.llama_vocab_get_text(self._vocab, eot) != b'<|endoftext|>'
        return eot if ends_turn or eos < 0 else eos

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
        return LlamaGrammarSampler(self._lib, self._vocab, json_schema_to_gbnf(schema), self._single_bytes)

    @cached_property
    def _single_bytes(self) -> SingleBytes | None:
        return SingleBytes.of([self.piece(token) for token in range(self._n_vocab)], self.end_token)

    # -- the sequence -------------------------------------------------------------------------------------------------

    @property
    def n_past(self) -> int:
        """Positions in the sequence."""
        return self._n_past

    def holds(self, segments: Sequence[Segment]) -> bool:
        """Whether ``segments`` are in the sequence or in a saved state."""
        return self._cache.match_resident(segments) == len(segments) or self._cache.has(segments)

    def prefill(self, segments: Sequence[Segment], cancel: CancelToken, *, want_logits: bool = True) -> PrefillStats:
        """See ``LanguageEngine.prefill``. The state after each image is saved, so that the frame stays warm."""
        n_positions = sum(segment.n_positions for segment in segments)
        if n_positions >= self.n_ctx:
            raise QuestionTooLongError(
                f'the prompt takes {n_positions} positions, but the context has {self.n_ctx}: ask a shorter question'
            )
        # If logits are wanted, the last segment is always computed: they are not part of a state.
        reusable = segments[:-1] if want_logits else segments
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
                wanted = want_logits and index == len(segments) - 1
                if isinstance(segment, EmbeddingSegment):
                    self._decode_rows(segment, want_logits=wanted, cancel=cancel)
                else:
                    self._decode_tokens(segment.tokens, want_logits=wanted, cancel=cancel)
                self._cache.resident_is(segments[: index + 1])
                if isinstance(segment, EmbeddingSegment) and not wanted:
                    self._save(segments[: index + 1])
        except BaseException:
            self.rewind(self._cache.n_resident)
            raise
        return PrefillStats(n_positions, n_reused)

    def append(self, tokens: Sequence[int], cancel: CancelToken) -> None:
        """See ``LanguageEngine.append``."""
        if self._n_past + len(tokens) > self.n_ctx:
            raise QuestionTooLongError(f'the answer reached the end of the context ({self.n_ctx} positions)')
        if len(tokens) == 1:
            self._decode(self._single.batch_of(tokens[0]), cancel)
        else:
            self._decode_tokens(tokens, want_logits=True, cancel=cancel)

    def branch(self, paths: Sequence[Sequence[int]], cancel: CancelToken) -> NDArray[np.float32]:
        """See ``LanguageEngine.branch``."""
        result = np.empty((len(paths), self._n_vocab), dtype=np.float32)
        for tree in plan_trees(paths, max_sequences=self._n_branches, max_tokens=self.n_ctx - self._n_past):
            try:
                for sequence in range(1, 1 + tree.n_sequences):
                    self._lib.llama_memory_seq_cp(self._memory, _SEQUENCE, sequence, -1, -1)
                self._decode_tree(tree, result, cancel)
            finally:
                for sequence in range(1, 1 + tree.n_sequences):
                    self._lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        return result

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
        return self._logits_of(-1)

    def _logits_of(self, output: int) -> NDArray[np.float32]:
        pointer = self._lib.llama_get_logits_ith(self._context, output)
        if not pointer:
            raise EngineError('llama.cpp holds no logits: nothing was computed since the last rewind')
        address = ctypes.addressof(pointer.contents)
        # While decoding, llama.cpp gives the same memory each time; making a view costs more than asking for it.
        if self._logits_view is None or self._logits_view[0] != address:
            self._logits_view = (address, np.ctypeslib.as_array(pointer, shape=(self._n_vocab,)))
        return self._logits_view[1]

    def drop(self, segments: Sequence[Segment]) -> None:
        """See ``LanguageEngine.drop``."""
        self._cache.drop(segments)

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
            last = start + len(chunk) == len(ids)
            self._decode_chunk(chunk, None, want_logits=want_logits and last, cancel=cancel)

    def _decode_rows(self, segment: EmbeddingSegment, *, want_logits: bool, cancel: CancelToken) -> None:
        rows = np.ascontiguousarray(segment.rows(), dtype=np.float32)
        if rows.shape != (segment.n_positions, self._n_embd):
            raise EngineError(
                f'the vision engine gave embeddings of shape {rows.shape}, '
                f'but the language model takes {(segment.n_positions, self._n_embd)}: the bundle mixes two models'
            )
        for start in range(0, len(rows), self._options.n_batch):
            chunk = rows[start : start + self._options.n_batch]
            last = start + len(chunk) == len(rows)
            self._decode_chunk(None, chunk, want_logits=want_logits and last, cancel=cancel)

    def _decode_chunk(
        self,
        tokens: NDArray[np.int32] | None,
        rows: NDArray[np.float32] | None,
        *,
        want_logits: bool,
        cancel: CancelToken,
    ) -> None:
        """Tokens or rows as one batch; positions and sequence are llama.cpp's to count."""
        n = len(rows) if tokens is None else len(tokens)  # type: ignore[arg-type]
        outputs = np.zeros(n, dtype=np.int8)
        outputs[-1] = want_logits
        batch = self._lib.llama_batch(
            n_tokens=n,
            token=None if tokens is None else tokens.ctypes.data_as(ctypes.POINTER(self._lib.llama_token)),
            embd=None if rows is None else rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            logits=outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        self._decode(batch, cancel)

    def _decode(self, batch: Any, cancel: CancelToken) -> None:
        """Continue the working sequence by one batch; it is as it was if that fails."""
        try:
            self._compute(batch, cancel)
        except BaseException:
            self.rewind(self._n_past)
            raise
        self._n_past += int(batch.n_tokens)

    def _decode_tree(self, tree: Tree, result: NDArray[np.float32], cancel: CancelToken) -> None:
        """Compute the branches of a tree, and copy the logits at the ends of its paths into the rows of ``result``."""
        tokens = np.array(tree.tokens, dtype=np.int32)
        positions = np.array(tree.depths, dtype=np.int32) + self._n_past
        counts = np.array([len(sequences) for sequences in tree.sequences], dtype=np.int32)
        sequences = np.array([1 + number for numbers in tree.sequences for number in numbers], dtype=np.int32)
        outputs = np.array([bool(paths) for paths in tree.ends], dtype=np.int8)
        # For each token the address of the numbers of its sequences.
        addresses = sequences.ctypes.data + sequences.itemsize * (counts.cumsum() - counts).astype(np.uint64)
        int_pointer = ctypes.POINTER(ctypes.c_int32)
        for start in range(0, len(tokens), self._options.n_batch):
            part = slice(start, start + self._options.n_batch)
            batch = self._lib.llama_batch(
                n_tokens=len(tokens[part]),
                token=tokens[part].ctypes.data_as(int_pointer),
                pos=positions[part].ctypes.data_as(int_pointer),
                n_seq_id=counts[part].ctypes.data_as(int_pointer),
                seq_id=addresses[part].ctypes.data_as(ctypes.POINTER(int_pointer)),
                logits=outputs[part].ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
            )
            self._compute(batch, cancel)
            for offset, paths in enumerate(tree.ends[part]):
                if paths:
                    result[paths] = self._logits_of(offset)

    def _compute(self, batch: Any, cancel: CancelToken) -> None:
        """One ``llama_decode``."""
        cancel.raise_if_set()
        self._abort_flag.raw = b'\0\0'
        with cancel.on_set(self._abort):
            code = self._lib.llama_decode(self._context, batch)
        if code == 0:
            return
        if code == _ABORTED:
            cancel.raise_if_set()
        if code == _NO_ROOM:
            raise QuestionTooLongError(f'prompt and answer do not fit the context of {self.n_ctx} positions')
        raise EngineError(f'llama.cpp failed to compute {batch.n_tokens} positions (code {code}: {last_log_lines()})')

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


class _SingleToken:
    """A batch of one token with logits, made once: the loop that decodes needs nothing else."""

    def __init__(self, lib: Any) -> None:
        self._token = (lib.llama_token * 1)()
        self._output = (ctypes.c_int8 * 1)(1)
        self._batch = lib.llama_batch(n_tokens=1, token=self._token, logits=self._output)

    def batch_of(self, token: int) -> Any:
        """The batch, now with ``token``."""
        self._token[0] = token
        return self._batch


class _ClosedLibrary:
    """Stands in for the library of a closed engine: an error instead of a crash on freed memory."""

    def __getattr__(self, name: str) -> Any:
        raise EngineError('the language engine is closed')


def _load_message(what: str, path: Path | None) -> str:
    return (
        f'llama.cpp could not load the {what} {path} ({last_log_lines()}). '
        'Rebuild the bundle with `mobilevlm build`, or check that the file is a GGUF for this version of llama.cpp.'
    )
