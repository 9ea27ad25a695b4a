"""llama.cpp's own multimodal path (mtmd) on the same language GGUF and an mmproj GGUF.

What ``llama-mtmd-cli`` does for a picture and a question, step by step so that its vision encoder can be timed alone:
tokenise text and picture, encode the picture, compute all chunks, choose a token. Nothing is kept between questions,
as that program keeps nothing. Its answers for MobileVLM are wrong (one ViT block short, class token misplaced:
ggml-org/llama.cpp issues 25817 and 25814); it is compared for its speed only.
"""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.bench.contestants.llamacpp import LlamaCppLoop
from mobilevlm_ros.bench.scenes import scene
from mobilevlm_ros.errors import DependencyError, EngineError
from mobilevlm_ros.runtime.language.llamacpp_library import last_log_lines, load_library

__all__ = ['MtmdPath']

_IMAGE_CHUNK = 1


class MtmdPath(LlamaCppLoop):
    """See the module.

    :param prompt: the whole prompt, with ``<image>`` and ``{question}`` in their places.
    :raise DependencyError: if llama-cpp-python was built without mtmd.
    :raise EngineError: if llama.cpp cannot load a file.
    """

    def __init__(
        self, gguf: str, mmproj: str, n_threads: int, prompt: str, height: int, width: int, adapter: str = ''
    ) -> None:
        self._mtmd = mtmd = _load_mtmd()
        super().__init__(gguf, n_threads, adapter)
        started_s = time.perf_counter()
        self._prompt = prompt
        self._size = height, width
        params = mtmd.mtmd_context_params_default()
        params.n_threads = n_threads
        params.use_gpu = False
        params.print_timings = False
        self._vision = mtmd.mtmd_init_from_file(os.fsencode(mmproj), self.model, params)
        if not self._vision:
            raise EngineError(f'mtmd could not load {mmproj} for {gguf} ({last_log_lines()})')
        self.stack.callback(mtmd.mtmd_free, self._vision)
        self._load_s += time.perf_counter() - started_s

    def first_token(self, index: int, question: str) -> dict[str, float]:
        """See the package; every frame is cold."""
        rgb_hwc = np.ascontiguousarray(scene(index, *self._size))
        started_s = time.perf_counter()
        self.clear()
        chunks = self._tokenize(rgb_hwc, self._prompt.replace('{question}', question))
        try:
            n_past, vision_s = self._compute(chunks)
            self.sample()
            return {
                'total_s': time.perf_counter() - started_s,
                'vision_s': vision_s,
                'prompt_tokens': float(n_past),
                'reused_tokens': 0.0,
            }
        finally:
            self._mtmd.mtmd_input_chunks_free(chunks)

    def _tokenize(self, rgb_hwc: NDArray[np.uint8], prompt: str) -> Any:
        mtmd = self._mtmd
        height, width, _ = rgb_hwc.shape
        bitmap = mtmd.mtmd_bitmap_init(width, height, rgb_hwc.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
        marked = prompt.encode().replace(b'<image>', mtmd.mtmd_default_marker())
        text = mtmd.mtmd_input_text(text=marked, text_len=len(marked), add_special=True, parse_special=True)
        chunks = mtmd.mtmd_input_chunks_init()
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        code = mtmd.mtmd_tokenize(self._vision, chunks, ctypes.byref(text), bitmaps, 1)
        mtmd.mtmd_bitmap_free(bitmap)
        if code != 0:
            mtmd.mtmd_input_chunks_free(chunks)
            raise EngineError(f'mtmd could not tokenise prompt and picture (code {code}: {last_log_lines()})')
        return chunks

    def _compute(self, chunks: Any) -> tuple[int, float]:
        """Compute all chunks; returns positions and the seconds of the vision encoder."""
        mtmd = self._mtmd
        n_past = mtmd.llama_cpp.llama_pos(0)
        vision_s = 0.0
        n_chunks = mtmd.mtmd_input_chunks_size(chunks)
        for number in range(n_chunks):
            chunk = mtmd.mtmd_input_chunks_get(chunks, number)
            last = number == n_chunks - 1
            if mtmd.mtmd_input_chunk_get_type(chunk) == _IMAGE_CHUNK:
                started_s = time.perf_counter()
                code = mtmd.mtmd_encode_chunk(self._vision, chunk)
                vision_s += time.perf_counter() - started_s
                if code == 0:
                    code = mtmd.mtmd_helper_decode_image_chunk(
                        *(self._vision, self.context, chunk, mtmd.mtmd_get_output_embd(self._vision)),
                        *(n_past.value, 0, self.n_batch, ctypes.byref(n_past)),
                        *(mtmd.mtmd_helper_post_decode_callback(), None),
                    )
            else:
                code = mtmd.mtmd_helper_eval_chunk_single(
                    *(self._vision, self.context, chunk, n_past.value, 0, self.n_batch, last, ctypes.byref(n_past))
                )
            if code != 0:
                raise EngineError(f'mtmd failed on a chunk of the prompt (code {code}: {last_log_lines()})')
        return int(n_past.value), vision_s


def _load_mtmd() -> Any:
    lib = load_library(own_kernel=False)
    try:
        from llama_cpp import mtmd_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise DependencyError(
            f'this llama-cpp-python has no mtmd ({error}). Build it again without -DLLAVA_BUILD=OFF: '
            'python tools/setup_env.py --force'
        ) from error
    _quiet(lib, mtmd_cpp)
    return mtmd_cpp


def _quiet(lib: Any, mtmd: Any) -> None:
    """Silence mtmd: it writes what it loads to standard error unless it is told where to."""

    def ignore(level: int, text: bytes, _: Any) -> None:
        """Nothing."""

    _callbacks.append(lib.llama_log_callback(ignore))
    mtmd.mtmd_log_set(_callbacks[-1], None)
    mtmd.mtmd_helper_log_set(_callbacks[-1], None)


_callbacks: list[Any] = []
"""llama.cpp keeps their addresses, so they must not go away."""
