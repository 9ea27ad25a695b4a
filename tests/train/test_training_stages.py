"""Every stage on tiny random models: the loss falls, what is frozen stays, and the product is what it is said to be."""

from __future__ import annotations

import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints
import tiny_runs
import torch
from rich.console import Console
from safetensors.torch import load_file

from mobilevlm_ros.build.adapter_gguf import write_adapter_gguf
from mobilevlm_ros.errors import (
    CheckpointError,
    DatasetError,
    DependencyError,
    MobileVLMError,
    SettingsError,
    TrainingError,
)
from mobilevlm_ros.model.checkpoint import open_checkpoint
from mobilevlm_ros.model.layout import PROJECTOR_PREFIX, TOWER_PREFIX
from mobilevlm_ros.model.mobilevlm import MobileVLM, load_mobilevlm
from mobilevlm_ros.train.config import LoraConfig, TrainConfig
from mobilevlm_ros.train.features import fill_cache, identity_of, load_tower
from mobilevlm_ros.train.lora import add_adapters, merge_adapter
from mobilevlm_ros.train.run_log import read_log
from mobilevlm_ros.train.stage import Outcome, run_stage
from mobilevlm_ros.train.trainer import parameter_groups

Weights = dict[str, Any]

# How far the mean loss of the last steps falls below that of the first ones.
FALLS = {'llm-pretrain': 4.0, 'sft': 20.0, 'align': 1.8, 'align-both': 4.0, 'instruct': 5.0, 'lora': 2.0}


@pytest.fixture(scope='module')
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny language model alone, and one with eyes."""
    folder = tmp_path_factory.mktemp('bases')
    return {
        'llm': tiny_runs.write_base(folder / 'llm', None),
        'vlm': tiny_runs.write_base(folder / 'vlm'),
    }


class Runs:
    """Runs every stage once, when it is asked for."""

    def __init__(self, folder: Path, bases: dict[str, Path]) -> None:
        self._folder = folder
        self._bases = bases
        self._done: dict[str, tuple[TrainConfig, Outcome]] = {}

    def __call__(self, name: str) -> tuple[TrainConfig, Outcome]:
        """Configuration and outcome."""
        if name not in self._done:
            self._done[name] = self._run(name)
        return self._done[name]

    def base(self, name: str) -> Path:
        """What a stage starts from."""
        return self._bases['llm' if name in ('llm-pretrain', 'sft') else 'vlm']

    def _run(self, name: str) -> tuple[TrainConfig, Outcome]:
        folder = self._folder / name
        base = self.base(name)
        folder.mkdir()
        sections: dict[str, Any] = {'schedule': {'max_steps': 24}}
        stage = name.removesuffix('-both')
        if stage == 'llm-pretrain':
            tiny_runs.write_text(folder, base / 'tokenizer.model')
        elif stage == 'sft':
            tiny_runs.write_records(folder / 'records.json', [], text_only=8)
        else:
            tiny_runs.write_data(folder, text_only=0 if stage == 'align' else 4)
        if name == 'align-both':
            sections['learning_rate'] = {'projector': 3e-3, 'language': 1e-3}
        if stage in ('instruct', 'lora'):
            sections['data'] = {'group_by_modality': True}
        if stage == 'lora':
            sections['learning_rate'] = {'projector': 5e-3, 'language': 1e-2}
        config = tiny_runs.config(folder, stage, base, **sections)
        return config, run_stage(config)


@pytest.fixture(scope='module')
def runs(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path]) -> Runs:
    """Every stage, run once."""
    return Runs(tmp_path_factory.mktemp('runs'), bases)


def tensors(folder: Path) -> Weights:
    with open_checkpoint(folder) as opened:
        return dict(opened.tensors)


def model_of(folder: Path) -> MobileVLM:
    with open_checkpoint(folder) as opened:
        return load_mobilevlm(opened.config, opened.tensors)


def logits(model: MobileVLM) -> torch.Tensor:
    """Of a prompt about a picture."""
    random = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, 32, 32, generator=random)
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([[1, 5, -200, 270, 265]]), pixels).logits
    return found


@pytest.mark.parametrize('name', sorted(FALLS))
def test_the_loss_falls(runs: Runs, name: str) -> None:
    config, outcome = runs(name)
    losses = [line['loss'] for line in read_log(config.out)]

    assert len(losses) == outcome.step == 24
    assert np.mean(losses[:2]) / np.mean(losses[-4:]) > FALLS[name]


@pytest.mark.parametrize('name', sorted(FALLS))
def test_exactly_what_learns_has_changed(runs: Runs, name: str) -> None:
    """Bit for bit: the tower always, the language model of a projector's run and of LoRA."""
    _, outcome = runs(name)
    before, after = tensors(runs.base(name)), tensors(outcome.products['model'])
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    projector = {key for key in before if key.startswith(PROJECTOR_PREFIX)}
    tower = {key for key in before if key.startswith(TOWER_PREFIX)}
    language = before.keys() - projector - tower

    assert before.keys() == after.keys()
    expected = {'align': projector, 'lora': projector, 'sft': language, 'llm-pretrain': language}
    assert changed == expected.get(name, projector | language)


def test_a_projector_is_left_as_upstream_leaves_it(runs: Runs) -> None:
    _, outcome = runs('align')
    folder = outcome.products['projector']
    as_bin = torch.load(folder / 'mm_projector.bin', weights_only=True)
    as_safetensors = load_file(folder / 'mm_projector.safetensors')
    trained = tensors(outcome.products['model'])

    assert {path.name for path in folder.iterdir()} == {'mm_projector.bin', 'mm_projector.safetensors', 'config.json'}
    assert as_bin.keys() == as_safetensors.keys() == {key for key in trained if key.startswith(PROJECTOR_PREFIX)}
    for name, value in as_bin.items():
        assert torch.equal(value, as_safetensors[name])
        assert np.array_equal(value.numpy(), trained[name])


def test_parts_are_put_together_and_a_projector_goes_on_from_its_file(
    runs: Runs, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 1 from a language model and a CLIP, stage 2 with its mm_projector.bin, as V1 is trained."""
    tiny_checkpoints.write_clip(tmp_path / 'clip')
    tiny_runs.write_data(tmp_path / 'data')
    parts = {'base': str(bases['llm']), 'vision_tower': str(tmp_path / 'clip')}
    short = {'max_steps': 2}
    one = tiny_runs.config(
        tmp_path / 'data', 'align', bases['llm'], model=parts | {'projector_type': 'ldpnet'}, schedule=short
    )
    first = run_stage(replace_out(one, tmp_path / 'one'))
    shapes = tiny_checkpoints.config('ldpnet')
    shapes = replace(shapes, vision=replace(shapes.vision, name='clip')) if shapes.vision else shapes
    monkeypatch.setattr('mobilevlm_ros.train.starting.read_manifest', lambda name: shapes)
    projector = str(first.products['projector'] / 'mm_projector.bin')
    two = tiny_runs.config(
        tmp_path / 'data',
        'instruct',
        bases['llm'],
        model=parts | {'shapes': 'tiny', 'projector': projector},
        schedule=short | {'max_steps': 1},
        learning_rate={'projector': 1e-9, 'language': 1e-9},
    )
    second = run_stage(replace_out(two, tmp_path / 'two'))

    before, after = tensors(first.products['model']), tensors(second.products['model'])
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, atol=1e-6)


def replace_out(config: TrainConfig, out: Path) -> TrainConfig:
    return config.model_copy(update={'out': out})


def test_from_random_weights(tmp_path: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('mobilevlm_ros.train.starting.read_manifest', lambda name: tiny_checkpoints.config(None))
    tokenizer = bases['llm'] / 'tokenizer.model'
    tiny_runs.write_text(tmp_path, tokenizer)
    source = {'base': None, 'shapes': 'tiny', 'tokenizer': str(tokenizer)}
    config = tiny_runs.config(tmp_path, 'llm-pretrain', bases['llm'], model=source, schedule={'max_steps': 2})
    outcome = run_stage(config)

    assert open_checkpoint(outcome.products['model']).kind == 'llm'
    assert read_log(config.out)[0]['loss'] == pytest.approx(np.log(len(tiny_checkpoints.VOCABULARY[0])), rel=0.05)


def test_features_instead_of_pixels(bases: dict[str, Path], tmp_path: Path) -> None:
    """The same losses as with pixels, but for what float16 rounds; the product has its tower."""
    tiny_runs.write_data(tmp_path)
    with open_checkpoint(bases['vlm']) as opened:
        vision = opened.config.vision
        assert vision is not None
        identity = identity_of(vision, opened.vision_weights, 'pad')
        images = sorted((tmp_path / 'images').iterdir())
        options = {'mean': vision.mean, 'std': vision.std}
        fill_cache(tmp_path / 'features', images, load_tower(opened), identity, **options)
    pixels = tiny_runs.config(tmp_path, 'instruct', bases['vlm'], out=str(tmp_path / 'pixels'))
    data = {'features': str(tmp_path / 'features')}
    features = tiny_runs.config(tmp_path, 'instruct', bases['vlm'], out=str(tmp_path / 'cached'), data=data)
    run_stage(pixels)
    outcome = run_stage(features)

    losses = [[line['loss'] for line in read_log(config.out)] for config in (pixels, features)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert any(name.startswith(TOWER_PREFIX) for name in tensors(outcome.products['model']))
    with pytest.raises(DatasetError, match='have aspect pad, the model needs square'):
        square = tiny_runs.config(tmp_path, 'instruct', bases['vlm'], data=data | {'aspect': 'square'})
        run_stage(square)


@pytest.mark.parametrize('form', ['vicuna', 'alpaca'])
def test_sft_reads_what_is_published(bases: dict[str, Path], tmp_path: Path, form: str) -> None:
    """ShareGPT's dialogues with Vicuna's template, Alpaca's instructions with its own."""
    turns = [{'from': who, 'value': text} for who, text in (('human', 'is it'), ('gpt', 'yes'), ('human', 'the car'))]
    records = {
        'vicuna': {'id': 'x', 'conversations': [*turns, {'from': 'gpt', 'value': 'no'}]},
        'alpaca': {'instruction': 'is it', 'input': 'the car', 'output': 'yes'},
    }
    (tmp_path / 'records.json').write_text(json.dumps([records[form]] * 4 + [{'nothing': 1}]))
    data = {'format': form, 'template': {'vicuna': 'v1'}.get(form, form), 'on_bad': 'skip'}
    config = tiny_runs.config(tmp_path, 'sft', bases['llm'], data=data)
    said = io.StringIO()
    run_stage(config, console=Console(file=said, width=200))
    losses = [line['loss'] for line in read_log(config.out)]

    assert losses[0] > 5 * losses[-1]
    assert '1 records left out' in said.getvalue()


# -- adapters -------------------------------------------------------------------------------------------------------


def test_merged_is_applied(runs: Runs, tmp_path: Path) -> None:
    """The adapter put into the weights computes what peft computes with the adapter beside them."""
    from peft import PeftModel

    _, outcome = runs('lora')
    applied = model_of(outcome.products['model'])
    applied.language = PeftModel.from_pretrained(applied.language, str(outcome.products['adapter']))
    merged = merge_adapter(runs.base('lora'), outcome.products['adapter'], tmp_path / 'merged', dtype='fp32')

    torch.testing.assert_close(logits(model_of(merged)), logits(applied), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model_of(runs.base('lora'))), logits(applied), atol=0.1)


def test_an_adapter_becomes_a_gguf(runs: Runs, tmp_path: Path) -> None:
    import gguf

    _, outcome = runs('lora')
    write_adapter_gguf(outcome.products['adapter'], tmp_path / 'adapter.gguf', tiny_checkpoints.LANGUAGE)
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / 'adapter.gguf').tensors}

    assert len(names) == 2 * 7 * tiny_checkpoints.LANGUAGE.n_layers
    assert 'blk.0.attn_q.weight.lora_a' in names


def test_an_adapter_of_another_model_is_not_merged(runs: Runs, tmp_path: Path) -> None:
    _, outcome = runs('lora')
    wide = replace(tiny_checkpoints.config(), language=replace(tiny_checkpoints.LANGUAGE, n_ff=256))
    tiny_checkpoints.write(tmp_path / 'wide', wide)

    with pytest.raises(CheckpointError, match=r'down_proj.*trained on another model'):
        merge_adapter(tmp_path / 'wide', outcome.products['adapter'], tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('library', 'sections', 'advice'),
    [
        ('bitsandbytes', {}, 'or train in 16 bits with stage lora'),
        ('peft', {}, 'peft'),
        ('deepspeed', {'parallel': {'deepspeed': 'config/train/deepspeed/zero2.json'}}, 'parallel.deepspeed=null'),
    ],
)
def test_a_missing_library_is_named(
    bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    library: str,
    sections: Weights,
    advice: str,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None if name == library else find(name))
    tiny_runs.write_data(tmp_path)
    stage = 'qlora' if library == 'bitsandbytes' else 'lora'
    with pytest.raises(DependencyError, match=rf'needs {library}, which is not installed: pip install .*{advice}'):
        run_stage(tiny_runs.config(tmp_path, stage, bases['vlm'], **sections))


def test_qlora_learns(bases: dict[str, Path], tmp_path: Path) -> None:
    """On the CPU, too, where bitsandbytes is installed: four bits below, adapters above."""
    pytest.importorskip('bitsandbytes', reason='bitsandbytes is not installed')
    tiny_runs.write_data(tmp_path)
    rates = {'projector': 5e-3, 'language': 1e-2}
    config = tiny_runs.config(tmp_path, 'qlora', bases['vlm'], learning_rate=rates, schedule={'max_steps': 24})
    outcome = run_stage(config)
    losses = [line['loss'] for line in read_log(config.out)]

    assert np.mean(losses[:2]) / np.mean(losses[-4:]) > 2.0
    assert {'adapter', 'model'} == outcome.products.keys()


# -- what may not learn ---------------------------------------------------------------------------------------------


def test_the_tower_never_reaches_the_optimiser(bases: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_runs.config(tmp_path, 'instruct', bases['vlm'])
    model = model_of(bases['vlm'])
    model.vision_tower.requires_grad_(True)  # type: ignore[union-attr]

    with pytest.raises(TrainingError, match=r'vision_tower\..* would learn'):
        parameter_groups(model, config)


def test_two_rates_and_no_decay_of_norms(bases: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_runs.config(
        tmp_path,
        'instruct',
        bases['vlm'],
        learning_rate={'projector': 0.5, 'language': 0.25},
        schedule={'weight_decay': 0.1},
    )
    model = model_of(bases['vlm'])
    names = {id(value): name for name, value in model.named_parameters()}
    model.requires_grad_(True)
    model.vision_tower.requires_grad_(False)  # type: ignore[union-attr]
    groups = parameter_groups(model, config)

    assert [(group['part'], group['lr'], group['weight_decay']) for group in groups] == [
        ('language', 0.25, 0.0), ('language', 0.25, 0.1), ('projector', 0.5, 0.0), ('projector', 0.5, 0.1),
    ]  # fmt: skip
    assert all('norm' in names[id(value)] for value in groups[0]['params'])
    assert all(names[id(value)].endswith('.bias') for value in groups[2]['params'])
    assert sum(len(group['params']) for group in groups) == sum(p.requires_grad for p in model.parameters())


def test_adapters_are_on_the_published_matrices() -> None:
    model = MobileVLM(tiny_checkpoints.config())
    add_adapters(model, LoraConfig(rank=2, alpha=4))
    trained = {name.partition('.lora_')[0].rpartition('.')[2] for name, p in model.language.named_parameters()
               if p.requires_grad}  # fmt: skip

    assert trained == {'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'}


# -- what cannot be run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('sections', 'message'),
    [
        ({'data': {'records': 'gone.json'}}, r'data\.records: there is nothing at .*gone\.json'),
        ({'data': {'images': 'gone'}}, r'data\.images: there is nothing at .*gone'),
        ({'model': {'base': 'gone'}}, r"model\.base 'gone' is neither a folder nor a known model"),
        ({'parallel': {'fsdp': 'gone.yaml'}}, r'parallel\.fsdp: there is no file gone\.yaml'),
    ],
)
def test_what_is_missing_is_named_at_once(
    bases: dict[str, Path], tmp_path: Path, sections: Weights, message: str
) -> None:
    tiny_runs.write_data(tmp_path)
    with pytest.raises(MobileVLMError, match=message):
        run_stage(tiny_runs.config(tmp_path, 'align', bases['vlm'], **sections))
    assert not (tmp_path / 'run').exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_fsdp_without_a_gpu_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """Accelerate would train without it and say nothing."""
    tiny_runs.write_data(tmp_path)
    parallel = {'fsdp': 'config/train/fsdp.yaml'}
    with pytest.raises(SettingsError, match=r'parallel\.fsdp needs GPUs.*parallel\.fsdp=null'):
        run_stage(tiny_runs.config(tmp_path, 'align', bases['vlm'], parallel=parallel))


def test_a_language_model_alone_needs_eyes(bases: dict[str, Path], tmp_path: Path) -> None:
    tiny_runs.write_data(tmp_path)
    with pytest.raises(SettingsError, match='name the folder of a CLIP as'):
        run_stage(tiny_runs.config(tmp_path, 'align', bases['llm']))


def test_damaged_weights_are_named_before_anything_is_computed(bases: dict[str, Path], tmp_path: Path) -> None:
    """A checkpoint whose tensors are not those that its configuration says."""
    tiny_runs.write_data(tmp_path)
    tiny_checkpoints.write(tmp_path / 'base', intermediate_size=64)
    with pytest.raises(CheckpointError, match=r'has shape \[128, 64\], expected \[64, 64\]'):
        run_stage(tiny_runs.config(tmp_path, 'align', tmp_path / 'base'))


def test_the_card_only(bases: dict[str, Path], tmp_path: Path) -> None:
    tiny_runs.write_data(tmp_path)
    outcome = run_stage(tiny_runs.config(tmp_path, 'align', bases['vlm']), card_only=True)
    n_llm = sum(np.prod(value.shape) for value in tensors(bases['llm']).values())
    n_own = n_llm - len(tiny_checkpoints.VOCABULARY[0]) * tiny_checkpoints.LANGUAGE.n_embd
    card = outcome.card

    assert not (tmp_path / 'run').exists()
    # BOS, four visual tokens, a word or two, a newline; 4 samples in each of 8 steps.
    assert 6 <= card.tokens_per_sample <= 10
    assert card.tokens == pytest.approx(card.tokens_per_sample * 32)
    tower = card.flops - card.tokens * (4 * n_own + 2 * card.n_trained)
    assert 0 < tower < card.flops
