"""Which type llama.cpp gives each tensor of a LLaMA in each quantisation, and the bytes that follow from it.

For cost cards, and for checking that there is room, before any file exists. After ``llama_tensor_get_type_impl`` and
``tensor_type_fallback`` in llama.cpp's ``src/llama-quant.cpp`` (that of llama-cpp-python 0.3.36), for dense models
without an importance matrix; tests compare this with what llama.cpp really writes.
"""

from __future__ import annotations

from math import prod

from mobilevlm_ros.build.llama_tensors import LlamaTensor, language_tensors
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.model.config import LanguageConfig

__all__ = ['BLOCKS', 'QUANTIZATIONS', 'check_quantization', 'predicted_bytes', 'tensor_types']

BLOCKS = {
    'F32': (1, 4),
    'F16': (1, 2),
    'Q4_0': (32, 18),
    'Q5_0': (32, 22),
    'Q5_1': (32, 24),
    'Q8_0': (32, 34),
    'Q4_K': (256, 144),
    'Q5_K': (256, 176),
    'Q6_K': (256, 210),
}
"""Values of a block, and bytes that it takes."""

_DEFAULT = {
    'F16': 'F16',
    'Q4_0': 'Q4_0',
    'Q4_K_S': 'Q4_K',
    'Q4_K_M': 'Q4_K',
    'Q5_K_M': 'Q5_K',
    'Q6_K': 'Q6_K',
    'Q8_0': 'Q8_0',
}
QUANTIZATIONS = tuple(_DEFAULT)
"""Those that ``quantize_gguf`` makes."""

_FALLBACK = {'Q4_K': 'Q5_0', 'Q5_K': 'Q5_1', 'Q6_K': 'Q8_0'}
"""For rows that are no multiple of 256."""

# The 23 keys without the tokens, for a name of 16 characters. Each token takes 8 bytes for its length, 4 for a score
# and 4 for a type, besides its text.
_METADATA_BYTES = 992
_TOKEN_BYTES = 16
_LLAMA_TEXT_BYTES = 210_919 / 32_000
"""Mean length of LLaMA-2's tokens."""
_ALIGNMENT = 32


def check_quantization(quantization: str) -> None:
    """:raise BuildError: if there is no such quantisation; the message lists those that there are."""
    if quantization not in _DEFAULT:
        raise BuildError(f'unknown quantization {quantization!r}; known are {", ".join(QUANTIZATIONS)}')


def tensor_types(config: LanguageConfig, quantization: str) -> dict[str, str]:
    """Names of tensors in GGUF to names of llama.cpp's types.

    :param quantization: one of ``QUANTIZATIONS``, or ``F32``, which no file is quantised to.
    :raise BuildError: if there is no such quantisation.
    """
    if quantization != 'F32':
        check_quantization(quantization)
    default = _DEFAULT.get(quantization, 'F32')
    types = {}
    for tensor in language_tensors(config):
        if len(tensor.shape) == 1:
            types[tensor.name] = 'F32'
        elif default in ('F16', 'F32'):
            types[tensor.name] = default
        else:
            types[tensor.name] = _fitting(_wanted(tensor, config, quantization, default), tensor.shape[-1])
    return types


def _wanted(tensor: LlamaTensor, config: LanguageConfig, quantization: str, default: str) -> str:
    """What llama.cpp would choose if every width were a multiple of 256."""
    n_layers = config.n_layers
    if tensor.name == 'output.weight' or (tensor.name == 'token_embd.weight' and config.tie_embeddings):
        if tensor.shape[-1] % BLOCKS[default][0]:
            return 'Q8_0'
        return default if default == 'Q8_0' else 'Q6_K'
    if not tensor.name.startswith('blk.'):
        return default
    _, index, part, _ = tensor.name.split('.')
    layer = int(index)
    wanted = default
    if part in ('attn_v', 'ffn_down'):
        if quantization in ('Q4_K_M', 'Q5_K_M') and _gets_more_bits(layer, n_layers):
            wanted = 'Q6_K'
        elif quantization == 'Q4_K_S' and layer < (4 if part == 'attn_v' else n_layers // 8):
            wanted = 'Q5_K'
    # What llama.cpp takes for LLaMA-2-70B: 8 heads share a value there.
    if part == 'attn_v' and wanted == 'Q4_K' and n_layers == 80 and config.n_heads != config.n_kv_heads:
        wanted = 'Q5_K'
    return wanted


def _gets_more_bits(layer: int, n_layers: int) -> bool:
    """The first and the last eighth, and each third one between them."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def _fitting(wanted: str, width: int) -> str:
    """The type itself, or what llama.cpp takes for rows that are no multiple of its block."""
    for kind in (wanted, _FALLBACK.get(wanted, wanted)):
        if width % BLOCKS[kind][0] == 0:
            return kind
    return 'F16'


def predicted_bytes(config: LanguageConfig, quantization: str, n_text_bytes: int | None = None) -> int:
    """Size of the file that ``write_language_gguf`` and ``quantize_gguf`` make; exact but for the name's length.

    :param n_text_bytes: bytes of all tokens' texts; None: those of LLaMA-2's vocabulary, scaled to ``n_vocab``.
    :raise BuildError: if there is no such quantisation.
    """
    types = tensor_types(config, quantization)
    if n_text_bytes is None:
        n_text_bytes = round(config.n_vocab * _LLAMA_TEXT_BYTES)
    header, data = _METADATA_BYTES + _TOKEN_BYTES * config.n_vocab + n_text_bytes, 0
    for tensor in language_tensors(config):
        n_values, n_bytes = BLOCKS[types[tensor.name]]
        # Length of the name, name, number of dimensions, dimensions, type, offset.
        header += 8 + len(tensor.name) + 4 + 8 * len(tensor.shape) + 4 + 8
        data += _padded(prod(tensor.shape) // n_values * n_bytes)
    return _padded(header) + data


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
