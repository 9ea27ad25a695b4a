"""Configurations of training: published figures, and mistakes that are named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.model.manifest import known_models
from mobilevlm_ros.paths import shared_file
from mobilevlm_ros.train.config import TrainConfig, differences, dump_config, find_config, read_config
from mobilevlm_ros.train.trainer import micro_batches

SHIPPED = sorted(path.stem for path in shared_file('config/train').glob('*.yaml') if path.stem != 'fsdp')
PUBLISHED = [name for name in SHIPPED if not name.startswith(('nano', 'own'))]

# Upstream's scripts/train/run_v1.sh and run.sh: stage, template, aspect, grouping, rate of the projector, rate of the
# rest, batch a GPU, global batch, warm-up, ZeRO stage, steps between checkpoints.
SCHEDULES = {
    'mobilevlm-1.7b-align': ('align', 'plain', 'square', False, 1e-3, None, 32, 256, 0.03, 'zero2', 24000),
    'mobilevlm-3b-align': ('align', 'plain', 'square', False, 1e-3, None, 32, 256, 0.03, 'zero2', 24000),
    'mobilevlm-1.7b-instruct': ('instruct', 'v1', 'pad', True, 2e-5, 2e-5, 16, 128, 0.03, 'zero2', 50000),
    'mobilevlm-3b-instruct': ('instruct', 'v1', 'pad', True, 4e-5, 4e-5, 16, 128, 0.03, 'zero3', 50000),
    'mobilevlm-1.7b-lora': ('lora', 'v1', 'pad', True, 1e-4, 1e-4, 16, 128, 0.03, 'zero2', 50000),
    'mobilevlm-3b-lora': ('lora', 'v1', 'pad', True, 2e-4, 2e-4, 16, 128, 0.03, 'zero3', 50000),
    'mobilevlm_v2-1.7b-align': ('align', 'plain', 'square', False, 1e-3, 2e-5, 32, 256, 0.03, 'zero2', 24000),
    'mobilevlm_v2-3b-align': ('align', 'plain', 'square', False, 1e-3, 2e-5, 32, 256, 0.03, 'zero2', 24000),
    'mobilevlm_v2-1.7b-instruct': ('instruct', 'v1', 'pad', True, 4e-5, 4e-5, 16, 128, 0.03, 'zero3', 2000),
    'mobilevlm_v2-3b-instruct': ('instruct', 'v1', 'pad', True, 4e-5, 4e-5, 16, 128, 0.03, 'zero3', 2000),
    'mobilevlm_v2-1.7b-lora': ('lora', 'v1', 'pad', True, 2e-4, 2e-4, 16, 128, 0.03, 'zero3', 50000),
    'mobilevlm_v2-3b-lora': ('lora', 'v1', 'pad', True, 2e-4, 2e-4, 16, 128, 0.03, 'zero3', 50000),
}


@pytest.mark.parametrize('name', sorted(SCHEDULES))
def test_published_schedules(name: str) -> None:
    config = read_config(name)
    data, schedule, rates = config.data, config.schedule, config.learning_rate

    assert (
        config.stage,
        data.template,
        data.aspect,
        data.group_by_modality,
        rates.projector,
        rates.language,
        schedule.batch,
        schedule.global_batch,
        schedule.warmup,
        config.parallel.deepspeed.stem if config.parallel.deepspeed else None,
        config.saving.every_steps,
    ) == SCHEDULES[name]
    # Common to all of them.
    assert (schedule.epochs, schedule.decay, schedule.weight_decay, schedule.clip_norm) == (1, 'cosine', 0.0, 1.0)
    assert (schedule.betas, schedule.epsilon, schedule.precision) == ((0.9, 0.999), 1e-8, 'bf16')
    assert (schedule.tf32, schedule.checkpoint_activations, data.max_tokens, data.n_workers) == (True, True, 2048, 4)
    if config.lora:
        assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (128, 256, 0.05)


def test_published_pretraining() -> None:
    """Table 12 of the paper: 5,242,880 tokens a step, 3e-4 to 3e-5, 2000 steps of warm-up."""
    config = read_config('mobilellama-1.4b-pretrain')
    schedule = config.schedule

    assert schedule.global_batch * config.data.max_tokens == 5_242_880
    assert schedule.global_batch * config.data.max_tokens * (schedule.max_steps or 0) == pytest.approx(1.3e12, rel=0.01)
    assert config.learning_rate.language == 3e-4
    assert schedule.final_rate * 3e-4 == pytest.approx(3e-5)
    assert (schedule.warmup, schedule.betas, schedule.weight_decay, schedule.clip_norm) == (2000, (0.9, 0.95), 0.1, 1.0)
    assert [shard.weight for shard in config.data.shards] == [67.7, 15.0, 4.5, 4.5, 4.5, 2.5, 2.0]


@pytest.mark.parametrize(('size', 'rate', 'epochs'), [('1.4b', 2e-5, 3), ('2.7b', 3e-5, 2)])
def test_published_sft(size: str, rate: float, epochs: int) -> None:
    config = read_config(f'mobilellama-{size}-sft')

    assert (config.learning_rate.language, config.schedule.epochs) == (rate, epochs)
    assert (config.schedule.global_batch, config.schedule.warmup, config.data.format) == (256, 0.04, 'vicuna')
    assert config.parallel.fsdp == Path('config/train/fsdp.yaml')


@pytest.mark.parametrize('name', PUBLISHED)
def test_what_published_configurations_name_exists(name: str) -> None:
    """Models by name, the files for several GPUs, and, for a stage after another, the one before it."""
    config = read_config(name)

    for model in (config.model.base, config.model.shapes):
        if model is not None and not model.startswith('runs/'):
            assert model in known_models()
    for path in (config.parallel.deepspeed, config.parallel.fsdp):
        assert path is None or shared_file(str(path)).is_file()
    before = [path for path in (config.model.base or '', str(config.model.projector or '')) if path.startswith('runs/')]
    for path in before:
        assert read_config(path.split('/')[1]).out == Path(*path.split('/')[:2])
    assert config.out == Path('runs') / name
    assert micro_batches(config, 8)[0] == config.schedule.batch or name.startswith('mobilellama')


def test_a_configuration_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    config = read_config('mobilevlm_v2-1.7b-qlora')
    (tmp_path / 'again.yaml').write_text(dump_config(config))

    assert read_config(str(tmp_path / 'again.yaml')) == config


# -- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('schedule.bacth=3', r'no key schedule\.bacth: did you mean schedule\.batch\?'),
        ('learning_rte.projector=1.0', r'no key learning_rte: did you mean learning_rate\?'),
        ('data.imges=x', r'no key data\.imges: did you mean data\.images\?'),
        ('schedule.batch=x', r"schedule\.batch is 'x' \(a text\), expected a whole number"),
        ('schedule.batch=1.5', r'schedule\.batch is 1\.5 \(a number\), expected a whole number'),
        ('schedule.batch=true', r'schedule\.batch is True \(true or false\), expected a whole number'),
        ('schedule.batch=0', r'schedule\.batch is 0 .*greater than or equal to 1'),
        ('schedule.tf32=1', r'schedule\.tf32 is 1 \(a whole number\), expected true or false'),
        ('schedule=3', r'schedule is 3 \(a whole number\), expected a section'),
        ('learning_rate.projector=1e-3', r"is '1e-3' \(a text\), expected a number .*write 1\.0e-3"),
        ('learning_rate.projector=null', 'align trains the projector: give learning_rate.projector'),
        ('stage=algin', "stage is 'algin', expected .*did you mean align"),
        ('stage=lora', 'give learning_rate.language'),
        ('data.records=null', r'either data\.records .*or data\.shards'),
        ('data.template=v2', "data.template is 'v2', expected 'plain', 'v1'"),
        ('lora.rank=4', 'align takes no section lora'),
        ('parallel.fsdp=x', 'exclude each other'),
        ('model.projector=x', 'exclude each other'),
        ('model.base=null', 'without model.base there must be'),
        ('data.shards=[{pth: x}]', r'data\.shards\.0\.pth: did you mean data\.shards\.0\.path'),
    ],
)
def test_a_mistake_is_named(override: str, message: str) -> None:
    with pytest.raises(SettingsError, match=rf'mobilevlm-1\.7b-align\.yaml: .*{message}'):
        read_config('mobilevlm-1.7b-align', [override])


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('[1, 2]', r'should be a mapping of keys, found \[1, 2\]'),
        ('a: [', 'is not YAML'),
        ('{}', 'the key stage is missing; the key out is missing'),
        ('extends: 3', 'extends is 3, expected the name of a file'),
        ('extends: bad.yaml', 'goes round in a circle'),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / 'bad.yaml'
    path.write_text(content)
    with pytest.raises(SettingsError, match=rf'bad\.yaml.*{message}'):
        read_config(str(path))


@pytest.mark.parametrize('override', ['schedule.batch', '=3', 'schedule.batch=[1'])
def test_an_override_that_is_none_is_named(override: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(repr(override))):
        read_config('mobilevlm-1.7b-align', [override])


def test_a_name_that_is_nearly_right_gets_help() -> None:
    with pytest.raises(SettingsError, match=r'mobilevlm-1\.7b-aling: did you mean mobilevlm-1\.7b-align\?'):
        find_config('mobilevlm-1.7b-aling')


def test_a_file_extends_another_beside_it(tmp_path: Path) -> None:
    (tmp_path / 'mine.yaml').write_text('extends: mobilevlm-1.7b-lora\nlora: {rank: 8}\nout: mine\n')
    (tmp_path / 'other.yaml').write_text('extends: mine\nschedule: {max_steps: 5}\n')
    config = read_config(str(tmp_path / 'other.yaml'), ['data.records=dialogues.json'])

    assert (config.lora.rank, config.lora.alpha) == (8, 256) if config.lora else False
    assert (config.out, config.schedule.max_steps, config.schedule.global_batch) == (Path('mine'), 5, 128)
    assert config.data.records == Path('dialogues.json')


def test_only_what_changes_the_run_counts_as_a_difference() -> None:
    config = read_config('mobilevlm-1.7b-align')
    same = ['out=elsewhere', 'saving.every_steps=7', 'schedule.batch=2', 'parallel.deepspeed=null', 'data.n_workers=0']

    assert differences(read_config('mobilevlm-1.7b-align', same), config) == []
    other = read_config('mobilevlm-1.7b-align', ['schedule.seed=7', 'learning_rate.projector=0.5'])
    assert differences(other, config) == [
        'learning_rate.projector was 0.001 and is 0.5',
        'schedule.seed was 42 and is 7',
    ]


@pytest.mark.parametrize(
    ('n_processes', 'expected'), [(1, (32, 8)), (8, (32, 1)), (16, (16, 1)), (64, (4, 1)), (2, (32, 4))]
)
def test_any_number_of_processes_makes_the_same_step(n_processes: int, expected: tuple[int, int]) -> None:
    assert micro_batches(read_config('mobilevlm-1.7b-align'), n_processes) == expected


def test_processes_that_cannot_share_a_step_are_refused() -> None:
    with pytest.raises(SettingsError, match='256 cannot be shared by 3 processes'):
        micro_batches(read_config('mobilevlm-1.7b-align'), 3)


# -- several GPUs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('stage', [1, 2, 3])
def test_deepspeed_files_are_what_accelerate_and_transformers_read(stage: int) -> None:
    """As published: ZeRO-2 without, ZeRO-3 with overlapping communication; the Trainer fills in the rest."""
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    path = shared_file(f'config/train/deepspeed/zero{stage}.json')
    found = HfDeepSpeedConfig(str(path))
    zero: dict[str, Any] = found.get_value('zero_optimization')

    assert zero['stage'] == stage
    assert found.get_value('train_micro_batch_size_per_gpu') == 'auto'
    assert (found.get_value('fp16.loss_scale_window'), found.get_value('fp16.initial_scale_power')) == (1000, 16)
    if stage == 2:
        assert (zero['overlap_comm'], zero['contiguous_gradients'], zero['sub_group_size']) == (False, True, 1e9)
    if stage == 3:
        assert found.is_zero3()
        assert (zero['overlap_comm'], zero['stage3_max_live_parameters']) == (True, 1e9)
        assert zero['stage3_gather_16bit_weights_on_model_save'] is True


def test_the_fsdp_file_is_what_accelerate_and_transformers_read(tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from transformers import TrainingArguments

    path = shared_file('config/train/fsdp.yaml')
    launcher = load_config_from_file(str(path))
    assert launcher.distributed_type.value == 'FSDP'
    settings = yaml.safe_load(path.read_text())['fsdp_config']
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, fsdp=True, fsdp_config=settings)
    assert arguments.fsdp_config['transformer_layer_cls_to_wrap'] == ['LlamaDecoderLayer']
    assert arguments.fsdp_config['reshard_after_forward'] is True


def test_every_shipped_configuration_says_what_it_is(tmp_path: Path) -> None:
    """A comment at its top: where its figures come from."""
    for name in SHIPPED:
        assert find_config(name).read_text().startswith('# '), name
        assert isinstance(read_config(name), TrainConfig)
