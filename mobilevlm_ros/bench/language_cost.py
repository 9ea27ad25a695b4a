"""What a language model must read and compute for a token, from the GGUF file itself.

Names of models are not looked at: sizes come from the file's metadata and tensors. Counted are the products with
weight matrices (two operations for each multiply-add) and, apart from them, attention over the context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevlm_ros.errors import DependencyError, EngineError

__all__ = ['LanguageCost', 'read_language_cost']

# Bytes of a number of the KV cache; q8_0 keeps 32 numbers and one f16 scale in 34 bytes.
_KV_BYTES = {'f16': 2.0, 'f32': 4.0, 'q8_0': 34 / 32}


@dataclass(frozen=True)
class LanguageCost:
    """Costs of a language model.

    :ivar file_bytes: of the GGUF file, and of the adapter's if there is one.
    :ivar weight_bytes: read from memory for one token: all tensors but the embedding table, of which one row is read.
    :ivar decode_flops: of one token that is answered with logits.
    :ivar prompt_flops: of one token of a prompt; its logits are not wanted, so the output matrix is not multiplied.
    :ivar attention_flops: of one token, for each position it attends to.
    :ivar kv_bytes: kept for one position.
    """

    architecture: str
    n_layers: int
    n_embd: int
    n_heads: int
    n_kv_heads: int
    n_ff: int
    n_vocab: int
    n_parameters: int
    file_bytes: int
    weight_bytes: int
    decode_flops: int
    prompt_flops: int
    attention_flops: int
    kv_bytes: int
    quantized: bool

    @property
    def bits_per_weight(self) -> float:
        """Of the matrices that a token reads."""
        return 16.0 * self.weight_bytes / self.decode_flops

    def prefill_flops(self, n_tokens: int, n_past: int = 0) -> float:
        """Of a prompt of ``n_tokens`` after ``n_past`` positions; only the last token's logits are wanted."""
        attended = n_tokens * n_past + n_tokens * (n_tokens + 1) / 2
        head = self.decode_flops - self.prompt_flops
        return n_tokens * self.prompt_flops + head + attended * self.attention_flops


def read_language_cost(path: Path, adapter: Path | None = None, kv_type: str = 'f16') -> LanguageCost:
    """Read the costs of a GGUF file of the LLaMA kind.

    :param adapter: a LoRA adapter (GGUF) that is applied at run time.
    :raise DependencyError: if the gguf package is missing.
    :raise EngineError: if the file is no such GGUF.
    """
    fields, tensors = _read(path)
    try:
        architecture = str(fields['general.architecture'])
        n_layers = int(fields[f'{architecture}.block_count'])
        n_embd = int(fields[f'{architecture}.embedding_length'])
        n_heads = int(fields[f'{architecture}.attention.head_count'])
        n_ff = int(fields[f'{architecture}.feed_forward_length'])
        n_vocab = tensors['token_embd.weight'][0][-1]
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f'{path} lacks {error}: expected the GGUF file of a language model') from error
    n_kv_heads = int(fields.get(f'{architecture}.attention.head_count_kv', n_heads))
    head_width = int(fields.get(f'{architecture}.attention.key_length', n_embd // n_heads))
    value_width = int(fields.get(f'{architecture}.attention.value_length', head_width))
    head = 'output.weight' if 'output.weight' in tensors else 'token_embd.weight'  # tied
    read = {name: tensor for name, tensor in tensors.items() if name != 'token_embd.weight' or name == head}
    adapted = _read(adapter)[1] if adapter is not None else {}
    matrices = [shape for shape, _, _ in (*read.values(), *adapted.values()) if len(shape) == 2]
    flops = sum(2 * shape[0] * shape[1] for shape in matrices)
    head_flops = 2 * tensors[head][0][0] * tensors[head][0][1]
    return LanguageCost(
        architecture=architecture,
        n_layers=n_layers,
        n_embd=n_embd,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        n_ff=n_ff,
        n_vocab=n_vocab,
        n_parameters=sum(math.prod(shape) for shape, _, _ in tensors.values()),
        file_bytes=path.stat().st_size + (adapter.stat().st_size if adapter is not None else 0),
        weight_bytes=sum(n_bytes for _, n_bytes, _ in (*read.values(), *adapted.values())),
        decode_flops=flops,
        prompt_flops=flops - head_flops,
        # Scores and their sum: each a multiply-add for every channel of every head.
        attention_flops=2 * n_layers * n_heads * (head_width + value_width),
        kv_bytes=round(n_layers * n_kv_heads * (head_width + value_width) * _KV_BYTES[kv_type]),
        quantized=any(kind not in ('F32', 'F16', 'BF16') for _, _, kind in tensors.values()),
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, str]]]:
    """Scalar metadata; and of each tensor its shape, bytes and type."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise DependencyError(f'reading a GGUF file needs gguf ({error}). Install it with: pip install gguf') from error
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise EngineError(f'{path} cannot be read as GGUF ({error}). Rebuild the bundle.') from error
    # Lists are vocabularies, slow to read and of no interest.
    fields = {name: field.contents() for name, field in reader.fields.items() if len(field.types) == 1}
    tensors = {
        tensor.name: (tuple(int(n) for n in tensor.shape), int(tensor.n_bytes), tensor.tensor_type.name)
        for tensor in reader.tensors
    }
    return fields, tensors
