"""The native library behind the llama.cpp engine: loading it, its log, and its grammars.

The only other place than ``llamacpp.py`` that knows llama-cpp-python. The library is imported when it is first needed,
so that the rest of the package works, and says what is missing, without it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import AnswerFormatError, DependencyError
from mobilevlm_ros.runtime.language import q4_kernel

__all__ = [
    'TESTED_VERSION',
    'LlamaGrammarSampler',
    'SingleBytes',
    'forget_log_lines',
    'json_schema_to_gbnf',
    'last_log_lines',
    'load_library',
]

TESTED_VERSION = '0.3.36'

_logger = logging.getLogger('mobilevlm_ros.llama_cpp')
# enum ggml_log_level in ggml.h; the numbers in llama-cpp-python's own logger are those of an older llama.cpp.
_LOG_WARN, _LOG_ERROR = 3, 4
_log_tail: deque[str] = deque(maxlen=4)
_MOST_FORCED_BYTES = 4096
"""A rule that only ever leads to itself would never end."""
_NEEDED = ('llama_set_adapters_lora', 'llama_state_seq_set_data', 'llama_memory_seq_rm', 'llama_vocab_eot')


def load_library(*, own_kernel: bool = True) -> Any:
    """The module ``llama_cpp.llama_cpp``, with its log sent to Python's logging.

    :param own_kernel: False: from now on llama.cpp's own products do all the work (``q4_kernel``), for comparisons.
    :raise DependencyError: if llama-cpp-python is missing, does not load, or lacks functions that are used here.
    """
    lib = _loaded()
    if not own_kernel:
        q4_kernel.leave()
    return lib


@lru_cache(maxsize=1)
def _loaded() -> Any:
    # How long OpenMP's threads spin at a barrier before they sleep. By default practically for ever: with one other
    # busy process on two cores, a prompt of 64 tokens then took up to 3.5 s instead of 0.4 s, and a robot is never
    # without busy neighbours. Sleeping at once costs a prompt of 11 tokens 0.3 s instead of 0.09 s. A thousand turns
    # give nearly the best of both (0.75 s and 0.09 s). Read once, when OpenMP is loaded.
    if 'OMP_WAIT_POLICY' not in os.environ:
        os.environ.setdefault('GOMP_SPINCOUNT', '1000')
    q4_kernel.preload()
    try:
        import llama_cpp
        import llama_cpp.llama_cpp as lib
    except (ImportError, OSError, RuntimeError) as error:
        raise DependencyError(
            f'llama-cpp-python cannot be loaded ({error}). '
            f'Install it with: pip install llama-cpp-python=={TESTED_VERSION}'
        ) from error
    missing = [name for name in _NEEDED if not hasattr(lib, name)]
    if missing:
        raise DependencyError(
            f'llama-cpp-python {llama_cpp.__version__} lacks {", ".join(missing)}. '
            f'Install the version this was tested with: pip install llama-cpp-python=={TESTED_VERSION}'
        )
    if llama_cpp.__version__ != TESTED_VERSION:
        _logger.warning('llama-cpp-python %s found, %s was tested', llama_cpp.__version__, TESTED_VERSION)
    lib.llama_log_set(_native_log_callback(lib), None)
    lib.llama_backend_init()
    q4_kernel.choose()
    return lib


@lru_cache(maxsize=1)
def _native_log_callback(lib: Any) -> Any:
    """The callback object; cached for the life of the process because llama.cpp keeps its address."""

    def on_log(level: int, text: bytes, _: Any) -> None:
        line = text.decode(errors='replace').strip()
        if not line or line == '.':
            return
        if level in (_LOG_WARN, _LOG_ERROR):
            _log_tail.append(line)
        _logger.debug('%s', line)

    return lib.llama_log_callback(on_log)


def last_log_lines() -> str:
    """The last warnings and errors that llama.cpp logged, for an error message."""
    return '; '.join(_log_tail) or 'llama.cpp gave no reason'


def forget_log_lines() -> None:
    """Before something is tried, so that an error message does not tell of what was tried earlier."""
    _log_tail.clear()


def json_schema_to_gbnf(schema: str) -> str:
    """llama.cpp's grammar notation for the JSON texts that ``schema`` describes, written as ``json.dumps`` would.

    :raise AnswerFormatError: if the schema uses what cannot be turned into a grammar.
    """
    load_library()
    from llama_cpp.llama_grammar import json_schema_to_gbnf as convert

    try:
        gbnf = str(convert(schema))
        gbnf.encode()
    except Exception as error:  # the converter asserts and indexes its way through: whatever it is, it is the schema
        raise AnswerFormatError(f'the JSON schema cannot be turned into a grammar ({error}): simplify it') from error
    return _with_fixed_spaces(_with_whole_characters(gbnf))


# An escaped backslash, or the two halves of a character that JSON escapes in UTF-16.
_GBNF_PAIR = re.compile(r'\\\\|\\u(d[89ab]..)\\u(d[c-f]..)', re.IGNORECASE)


def _with_whole_characters(gbnf: str) -> str:
    """The converter leaves characters beyond 16 bits in two halves, which llama.cpp takes for two characters."""

    def whole(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0]
        return bytes.fromhex(match[1] + match[2]).decode('utf-16-be')

    return _GBNF_PAIR.sub(whole, gbnf)


# A literal, a class of characters, a name, or anything else, in llama.cpp's grammar notation.
_GBNF_PART = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|[A-Za-z0-9-]+|.', re.DOTALL)


def _with_fixed_spaces(gbnf: str) -> str:
    """One space after ``,`` and ``:``, none elsewhere, where the converter's rule ``space`` leaves the model a choice.

    The choice is of no use to whoever reads the JSON, and without it all that stands between two values is certain,
    so that it can be computed in one batch.
    """
    result: list[str] = []
    before = ''
    for part in _GBNF_PART.findall(gbnf.replace('space ::= " "?', 'space ::= ""')):
        if part == 'space' and before in ('","', '":"'):
            part = '" "'
        result.append(part)
        if not part.isspace():
            before = part
    return ''.join(result)


@dataclass(frozen=True)
class SingleBytes:
    """One token for each byte, and the end token: with them, a grammar can be asked for the next byte.

    :ivar tokens: int32 ``[n]``.
    :ivar values: the bytes, uint8 ``[n - 1]``; the last token is the end.
    """

    tokens: NDArray[np.int32]
    values: bytes

    @classmethod
    def of(cls, pieces: Sequence[bytes], end_token: int) -> SingleBytes | None:
        """None if a token begins with a byte that is no token itself: such a choice would go unnoticed."""
        found = {piece: token for token, piece in enumerate(pieces) if len(piece) == 1}
        if not {piece[:1] for piece in pieces if piece} <= set(found):
            return None
        values = b''.join(sorted(found))
        return cls(np.array([*(found[bytes([value])] for value in values), end_token], dtype=np.int32), values)


class LlamaGrammarSampler:
    """A grammar in llama.cpp's GBNF, applied to logits.

    :param single_bytes: what ``forced`` asks with; None: it finds nothing.
    :raise AnswerFormatError: if the grammar does not parse.
    """

    def __init__(self, lib: Any, vocab: Any, gbnf: str, single_bytes: SingleBytes | None = None) -> None:
        self._lib = lib
        self._single_bytes = single_bytes
        sampler = lib.llama_sampler_init_grammar(vocab, gbnf.encode(), b'root')
        if not sampler:
            raise AnswerFormatError('llama.cpp cannot use the grammar of this JSON schema: simplify the schema')
        self._sampler = sampler
        self._finalizer = weakref.finalize(self, lib.llama_sampler_free, sampler)

    def allows(self, token: int) -> bool:
        """Whether ``token`` may come next."""
        return bool(self.allowed(np.array([token], dtype=np.int32))[0])

    def allowed(self, tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which of ``tokens [n]`` may come next."""
        return np.isfinite(self._apply(self._sampler, tokens, np.zeros(len(tokens), dtype=np.float32)))

    def masked(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """A copy of ``logits [n_vocab]`` with forbidden tokens at minus infinity."""
        return self._apply(self._sampler, np.arange(len(logits), dtype=np.int32), logits)

    def forced(self) -> tuple[bytes, bool]:
        """See ``Grammar.forced``: asks for the next byte, on a copy, as long as there is only one."""
        single_bytes = self._single_bytes
        if single_bytes is None:
            return b'', False
        zeros = np.zeros(len(single_bytes.tokens), dtype=np.float32)
        text = bytearray()
        ends = False
        with ExitStack() as stack:
            sampler = self._sampler
            while len(text) < _MOST_FORCED_BYTES:
                (possible,) = np.isfinite(self._apply(sampler, single_bytes.tokens, zeros)).nonzero()
                if len(possible) != 1:
                    break
                ends = int(possible[0]) == len(single_bytes.values)
                if ends:
                    break
                if not text:
                    sampler = self._lib.llama_sampler_clone(sampler)
                    stack.callback(self._lib.llama_sampler_free, sampler)
                self._lib.llama_sampler_accept(sampler, int(single_bytes.tokens[possible[0]]))
                text.append(single_bytes.values[possible[0]])
        try:
            text.decode()
        except UnicodeDecodeError as error:  # a part of a character; or no character at all, which only a model spells
            return bytes(text[: error.start]), False
        return bytes(text), ends

    def _apply(self, sampler: Any, ids: NDArray[np.int32], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        # The layout of llama_token_data: int32 id, float32 logit, float32 p.
        data = np.zeros(len(ids), dtype=[('id', np.int32), ('logit', np.float32), ('p', np.float32)])
        data['id'], data['logit'] = ids, logits
        array = self._lib.llama_token_data_array(
            data=data.ctypes.data_as(self._lib.llama_token_data_p), size=len(ids), selected=-1, sorted=False
        )
        self._lib.llama_sampler_apply(sampler, ctypes.byref(array))
        return data['logit'].copy()

    def accept(self, token: int) -> None:
        """Move on by ``token``."""
        self._lib.llama_sampler_accept(self._sampler, token)

    def close(self) -> None:
        """Free the native grammar; may be called again."""
        self._finalizer()
