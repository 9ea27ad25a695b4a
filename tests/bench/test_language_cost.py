"""Costs of language models from their GGUF files: a tiny one by hand, MobileLLaMA-1.4B's by its known sizes."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_models

from mobilevlm_ros.bench.language_cost import read_language_cost
from mobilevlm_ros.errors import EngineError


def write_sizes(
    path: Path, *, n_layers: int, n_embd: int, n_heads: int, n_ff: int, n_vocab: int, n_kv: int = 0
) -> None:
    """A GGUF with all tensors of a LLaMA in Q4_0 and none of their values: a sparse file of full length."""
    writer = gguf.GGUFWriter(path, 'llama')
    writer.add_block_count(n_layers)
    writer.add_embedding_length(n_embd)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_kv or n_heads)
    writer.add_feed_forward_length(n_ff)
    kv_width = n_embd // n_heads * (n_kv or n_heads)
    shapes: dict[str, tuple[int, ...]] = {
        'token_embd': (n_vocab, n_embd),
        'output_norm': (n_embd,),
        'output': (n_vocab, n_embd),
    }
    for i in range(n_layers):
        shapes |= {
            f'blk.{i}.attn_norm': (n_embd,),
            f'blk.{i}.ffn_norm': (n_embd,),
            f'blk.{i}.attn_q': (n_embd, n_embd),
            f'blk.{i}.attn_k': (kv_width, n_embd),
            f'blk.{i}.attn_v': (kv_width, n_embd),
            f'blk.{i}.attn_output': (n_embd, n_embd),
            f'blk.{i}.ffn_gate': (n_ff, n_embd),
            f'blk.{i}.ffn_up': (n_ff, n_embd),
            f'blk.{i}.ffn_down': (n_embd, n_ff),
        }
    total = 0
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.Q4_0 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        n_bytes = math.prod(shape) * 18 // 32 if len(shape) == 2 else math.prod(shape) * 4
        writer.add_tensor_info(f'{name}.weight', shape, np.dtype(np.float32), n_bytes, raw_dtype=kind)
        total += n_bytes + 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open('r+b') as file:
        file.truncate(path.stat().st_size + total)


@pytest.fixture(scope='module')
def mobilellama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('gguf') / 'sizes.gguf'
    write_sizes(path, n_layers=24, n_embd=2048, n_heads=16, n_ff=5632, n_vocab=32000)
    return path


def test_mobilellama_costs_what_is_known_of_it(mobilellama: Path) -> None:
    cost = read_language_cost(mobilellama)
    assert cost.n_parameters == 1_364_297_728
    assert cost.kv_bytes == 196_608
    assert cost.decode_flops == pytest.approx(2.6e9, rel=0.01)
    # All matrices but the embedding table, at 4.5 bits; norms in f32.
    matrices = cost.n_parameters - 2048 * (32000 + 2 * 24 + 1)
    assert cost.weight_bytes == matrices * 18 // 32 + 4 * 2048 * (2 * 24 + 1)
    assert cost.decode_flops == 2 * matrices
    assert cost.prompt_flops == 2 * (matrices - 32000 * 2048)
    assert cost.bits_per_weight == pytest.approx(4.5, abs=0.01)
    assert cost.quantized


@pytest.mark.parametrize(('kv_type', 'n_bytes'), [('f32', 393_216), ('q8_0', 104_448)])
def test_the_kv_type_counts(mobilellama: Path, kv_type: str, n_bytes: int) -> None:
    assert read_language_cost(mobilellama, kv_type=kv_type).kv_bytes == n_bytes


def test_a_prompt_costs_its_products_its_attention_and_one_head(mobilellama: Path) -> None:
    cost = read_language_cost(mobilellama)
    head = 2 * 32000 * 2048
    attention = 24 * 4 * 2048
    assert cost.attention_flops == attention
    assert cost.prefill_flops(3, n_past=10) == 3 * cost.prompt_flops + head + (11 + 12 + 13) * attention


def test_grouped_heads_keep_less(tmp_path: Path) -> None:
    write_sizes(tmp_path / 'tiny.gguf', n_layers=22, n_embd=2048, n_heads=32, n_ff=5632, n_vocab=32000, n_kv=4)
    cost = read_language_cost(tmp_path / 'tiny.gguf')
    assert cost.kv_bytes == 22 * 2 * 256 * 2
    assert cost.attention_flops == 22 * 4 * 2048


def test_a_real_file_is_read_alike(tiny_bundle: Path) -> None:
    sizes = tiny_models.TinyLlama()
    cost = read_language_cost(tiny_bundle / 'language.gguf')
    weights = tiny_models.llama_weights(sizes, len(tiny_models.vocabulary()[0]))
    assert cost.n_parameters == sum(tensor.size for tensor in weights.values())
    assert cost.weight_bytes == 4 * (cost.n_parameters - weights['model.embed_tokens.weight'].size)
    assert (cost.n_layers, cost.n_embd, cost.n_ff) == (sizes.n_layers, sizes.n_embd, sizes.n_ff)
    assert not cost.quantized


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'no.gguf'
    path.write_bytes(b'GGUF' + bytes(60))
    with pytest.raises(EngineError, match=r'no\.gguf'):
        read_language_cost(path)


def test_a_gguf_of_something_else_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / 'clip.gguf', 'clip')
    writer.add_tensor('v.class_embd', np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(EngineError, match='expected the GGUF file of a language model'):
        read_language_cost(tmp_path / 'clip.gguf')
