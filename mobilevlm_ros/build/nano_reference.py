"""Records what PyTorch makes of nano, when its weights change: ``python -m mobilevlm_ros.build.nano_reference``.

Needs PyTorch and transformers. The language model is read back out of its GGUF file, the LoRA merged into it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.build.bundle_build import REFERENCE, read_images
from mobilevlm_ros.build.nano import NanoSource
from mobilevlm_ros.build.record import record_reference
from mobilevlm_ros.build.reference import Reference, write_reference
from mobilevlm_ros.build.stages import SilentReporter
from mobilevlm_ros.model.config import LanguageConfig, ModelConfig
from mobilevlm_ros.paths import shared_file
from mobilevlm_ros.runtime.prompt import TEMPLATES

__all__ = ['record_nano']

_N_IMAGES = 3
_NAMES = {
    'attn_q': 'self_attn.q_proj',
    'attn_k': 'self_attn.k_proj',
    'attn_v': 'self_attn.v_proj',
    'attn_output': 'self_attn.o_proj',
    'ffn_gate': 'mlp.gate_proj',
    'ffn_up': 'mlp.up_proj',
    'ffn_down': 'mlp.down_proj',
    'attn_norm': 'input_layernorm',
    'ffn_norm': 'post_attention_layernorm',
}


def record_nano(packages: Path | None = None) -> Reference:
    """Compute the reference."""
    import gguf

    source = NanoSource(packages, SilentReporter())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'language.gguf'
        path.write_bytes(source.language_file())
        reader = gguf.GGUFReader(path)
        config = _config(source, reader)
        weights = _language_weights(config.language, reader, shared_file('models/nano/adapter.gguf'))
        return record_reference(
            config,
            source.vision_weights(),
            weights,
            _ByteLevelTokenizer(reader),
            TEMPLATES[source.prompt['template']](source.prompt['system']),
            read_images(shared_file('models/calibration'))[:_N_IMAGES],
            SilentReporter(),
            n_kept=1,
        )


def _config(source: NanoSource, reader: Any) -> ModelConfig:
    def value(key: str) -> Any:
        return reader.fields[f'llama.{key}'].contents()

    language = LanguageConfig(
        n_vocab=len(reader.fields['tokenizer.ggml.tokens'].contents()),
        n_embd=value('embedding_length'),
        n_layers=value('block_count'),
        n_heads=value('attention.head_count'),
        n_kv_heads=value('attention.head_count_kv'),
        n_ff=value('feed_forward_length'),
        n_ctx=source.n_ctx,
        rope_base=value('rope.freq_base'),
        norm_eps=value('attention.layer_norm_rms_epsilon'),
        tie_embeddings=True,
    )
    return ModelConfig(
        name=source.name, language=language, vision=source.vision, projector=source.projector, template='chatml'
    )


def _language_weights(config: LanguageConfig, reader: Any, adapter: Path) -> Mapping[str, NDArray[np.float32]]:
    """Hugging Face's names and row order, the adapter's deltas added."""
    import gguf

    lora = gguf.GGUFReader(adapter)
    alpha = float(lora.fields['adapter.lora.alpha'].contents())
    deltas = {tensor.name: np.asarray(tensor.data, np.float32) for tensor in lora.tensors}
    weights = {}
    for tensor in reader.tensors:
        matrix = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        a = deltas.get(f'{tensor.name}.lora_a')
        if a is not None:
            matrix = matrix + (alpha / a.shape[0]) * (deltas[f'{tensor.name}.lora_b'] @ a)
        for kind, n_heads in (('attn_q', config.n_heads), ('attn_k', config.n_kv_heads)):
            if f'.{kind}.' in tensor.name:
                pairs = matrix.reshape(n_heads, config.head_width // 2, 2, -1)
                matrix = pairs.swapaxes(1, 2).reshape(matrix.shape)
        weights[_name(tensor.name)] = matrix
    return weights


def _name(name: str) -> str:
    if name == 'token_embd.weight':
        return 'model.embed_tokens.weight'
    if name == 'output_norm.weight':
        return 'model.norm.weight'
    _, layer, kind, _ = name.split('.')
    return f'model.layers.{layer}.{_NAMES[kind]}.weight'


class _ByteLevelTokenizer:
    """The byte-level BPE of the GGUF in Hugging Face's tokenizers: single digits, then GPT-2's pattern."""

    def __init__(self, reader: Any) -> None:
        from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

        def listed(name: str) -> Any:
            return reader.fields[f'tokenizer.ggml.{name}'].contents()

        tokens, types, control = listed('tokens'), listed('token_type'), 3
        merges = [tuple(merge.split(' ', 1)) for merge in listed('merges')]
        self._tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        self._special = {token: i for i, token in enumerate(tokens) if types[i] == control}
        self._tokenizer.add_special_tokens([AddedToken(token, special=True) for token in self._special])

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Token ids; this vocabulary starts no text with a special token."""
        if special:
            return [self._special[text]]
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


if __name__ == '__main__':
    target = shared_file('models/nano') / REFERENCE
    reference = record_nano()
    write_reference(target, reference)
    print(json.dumps({'written': str(target), 'bytes': target.stat().st_size, 'made_by': reference.made_by}))
