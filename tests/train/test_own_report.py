"""The table of before and after, by hand; and adapters out of GGUF files, against what they were written from."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import numpy as np
import own_recordings
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from mobilevlm_ros.build.adapter_gguf import write_adapter_gguf
from mobilevlm_ros.build.llama_tensors import language_tensors
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.model.config import LanguageConfig
from mobilevlm_ros.train.exam import Given, Score
from mobilevlm_ros.train.own_adapter import unpack_adapter
from mobilevlm_ros.train.own_report import OwnReport

LANGUAGE = LanguageConfig(n_vocab=32, n_embd=32, n_layers=2, n_heads=4, n_kv_heads=2, n_ff=64)


def given(right: Sequence[bool], kind: str = 'yes_no') -> list[Given]:
    """Two questions a picture."""
    return [Given(f'q{i}', f'{i // 2}.jpg', kind, 'yes', one, 0.9) for i, one in enumerate(right)]


def report(before: Sequence[bool], after: Sequence[bool]) -> OwnReport:
    constant = Score(len(after) // 2, len(after))
    return OwnReport(given(before), given(after), {'yes_no': ('yes', constant), 'all': ('', constant)})


def test_what_became_right_and_wrong_is_counted() -> None:
    made = report([False] * 20 + [True] * 20, [True] * 18 + [False] * 2 + [True] * 18 + [False] * 2)
    assert (made.paired.n_gained, made.paired.n_lost) == (18, 2)
    assert made.verdict().startswith('better: 18 of 40 questions are right now that were wrong, 2 the other way round')
    assert 'no proof' not in made.verdict() and 'few' not in made.verdict()
    record = made.as_record()
    assert record['scores']['yes_no']['after']['accuracy'] == 0.9
    assert record['scores']['all']['majority']['accuracy'] == 0.5
    assert len(record['before']) == len(record['after']) == 40


def test_little_that_is_better_is_no_proof() -> None:
    verdict = report([False, True] * 3, [True, True, False, True, False, True]).verdict()
    assert verdict.startswith('better: 1 of 6') and 'no proof: label more' in verdict
    assert '6 questions are few' in verdict
    assert report([True] * 4, [False] * 4).verdict().startswith('worse: 0 of 4')
    assert report([True] * 4, [True] * 4).verdict().startswith('neither better nor worse')


def test_questions_about_one_frame_count_together() -> None:
    """Ten pictures of two questions that are always answered alike are worth ten answers, not twenty."""
    share = report([False] * 20, [True, True, False, False] * 5).share(given([True, True, False, False] * 5), 'all')
    assert (share.n, share.n_groups) == (20, 10) and share.n_effective < 11


def test_the_table_has_intervals() -> None:
    console = Console(file=StringIO(), width=100)
    report([False] * 40, [True] * 40).show(console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert 'held-out frames' in printed
    row = next(line for line in printed.splitlines() if line.startswith('yes_no'))
    assert row.split()[:2] == ['yes_no', '40'] and '0.00 (0.00-' in row and '-1.00)' in row and row.endswith('0.50')


# -- adapters -------------------------------------------------------------------------------------------------------


def write_adapter(folder: Path, rank: int = 4, alpha: int = 8) -> dict[str, np.ndarray]:
    """As stage lora leaves it; returns its values."""
    random = np.random.default_rng(0)
    values = {}
    for tensor in language_tensors(LANGUAGE):
        if '.layers.' in tensor.source and len(tensor.shape) == 2:
            module = f'base_model.model.{tensor.source.removesuffix(".weight")}'
            n_out, n_in = tensor.shape
            values[f'{module}.lora_A.weight'] = random.normal(size=(rank, n_in)).astype(np.float16).astype(np.float32)
            values[f'{module}.lora_B.weight'] = random.normal(size=(n_out, rank)).astype(np.float16).astype(np.float32)
    folder.mkdir()
    settings = f'{{"peft_type": "LORA", "r": {rank}, "lora_alpha": {alpha}, "bias": "none"}}'
    (folder / 'adapter_config.json').write_text(settings)
    save_file(values, folder / 'adapter_model.safetensors')
    return values


def test_an_adapter_comes_out_of_its_file_as_it_went_in(tmp_path: Path) -> None:
    values = write_adapter(tmp_path / 'adapter')
    write_adapter_gguf(tmp_path / 'adapter', tmp_path / 'adapter.gguf', LANGUAGE)
    lora = unpack_adapter(tmp_path / 'adapter.gguf', LANGUAGE, tmp_path / 'out')
    assert (lora.rank, lora.alpha) == (4, 8)
    found = load_file(tmp_path / 'out' / 'adapter_model.safetensors')
    assert found.keys() == values.keys() and len(found) == 2 * 7 * 2
    for name, value in values.items():
        np.testing.assert_array_equal(found[name], value)
    write_adapter_gguf(tmp_path / 'out', tmp_path / 'again.gguf', LANGUAGE)
    assert (tmp_path / 'again.gguf').read_bytes() == (tmp_path / 'adapter.gguf').read_bytes()


def test_files_that_are_no_adapter_of_the_model_are_named(tmp_path: Path) -> None:
    write_adapter(tmp_path / 'adapter')
    path = tmp_path / 'adapter.gguf'
    write_adapter_gguf(tmp_path / 'adapter', path, LANGUAGE)
    other = LanguageConfig(n_vocab=32, n_embd=64, n_layers=2, n_heads=4, n_kv_heads=2, n_ff=64)
    with pytest.raises(BuildError, match='it belongs to another model'):
        unpack_adapter(path, other, tmp_path / 'out')
    fewer = LanguageConfig(n_vocab=32, n_embd=32, n_layers=1, n_heads=4, n_kv_heads=2, n_ff=64)
    with pytest.raises(BuildError, match='14 tensors that the model does not have'):
        unpack_adapter(path, fewer, tmp_path / 'out')
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BuildError, match='no GGUF file'):
        unpack_adapter(path, LANGUAGE, tmp_path / 'out')
    tiny_nano = own_recordings.helper('build', 'tiny_nano')
    tiny_nano.write_language(tmp_path / 'language.gguf')
    with pytest.raises(BuildError, match='holds no LoRA adapter'):
        unpack_adapter(tmp_path / 'language.gguf', LANGUAGE, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
