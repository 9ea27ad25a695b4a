"""What ends a run, and how it goes on: kills, Ctrl-C, losses that are no number, full disks, other processes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny_runs
import torch
import yaml

from mobilevlm_ros.cli import main
from mobilevlm_ros.errors import (
    CheckpointShapeError,
    DiskSpaceError,
    DivergedError,
    MobileVLMError,
    TrainingError,
)
from mobilevlm_ros.model.checkpoint import open_checkpoint
from mobilevlm_ros.train.checkpoints import checkpoints, newest
from mobilevlm_ros.train.config import TrainConfig
from mobilevlm_ros.train.run_log import read_log
from mobilevlm_ros.train.stage import run_stage

STEPS = 9
FOLDER = Path(__file__).parent


class Killed(BaseException):
    """Ends a run as a kill does: nothing cleans up on purpose."""


@pytest.fixture(scope='module')
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with eyes."""
    return tiny_runs.write_base(tmp_path_factory.mktemp('base') / 'vlm')


def lora(folder: Path, base: Path, **sections: Any) -> TrainConfig:
    """Three epochs of four steps with dropout, accumulated and grouped: everything that must be restored."""
    tiny_runs.write_data(folder, text_only=4)
    sections = {
        'schedule': {'max_steps': STEPS, 'batch': 2},
        'data': {'group_by_modality': True},
        'saving': {'every_steps': 2, 'keep': 2},
    } | sections
    return tiny_runs.config(folder, 'lora', base, **sections)


def losses(config: TrainConfig) -> list[tuple[int, float]]:
    return [(line['step'], line['loss']) for line in read_log(config.out)]


def after(step: int, action: Callable[[], Any]) -> Callable[[], bool]:
    """Asked once a step: does something after one of them."""
    seen = 0

    def asked() -> bool:
        nonlocal seen
        seen += 1
        return bool(action()) if seen == step else False

    return asked


def kill() -> None:
    raise Killed


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path) -> TrainConfig:
    """A run that nothing disturbed."""
    config = lora(tmp_path_factory.mktemp('whole'), base)
    run_stage(config)
    return config


# -- kills ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('step', [1, 3, 4, 6, 7])
def test_a_killed_run_goes_on_as_if_nothing_had_been(base: Path, whole: TrainConfig, tmp_path: Path, step: int) -> None:
    """To the bit: in the middle of an epoch, at its end, before the first checkpoint."""
    config = lora(tmp_path, base)
    with pytest.raises(Killed):
        run_stage(config, asked_to_stop=after(step, kill))
    outcome = run_stage(config, resume=True)

    assert losses(config) == losses(whole)
    assert len(losses(config)) == STEPS
    same_files(
        whole.out / 'adapter', outcome.products['adapter'], 'adapter_model.safetensors', 'non_lora_trainables.bin'
    )
    same_files(whole.out / 'model', outcome.products['model'], 'pytorch_model.bin')


def same_files(one: Path, other: Path, *names: str) -> None:
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.slow
def test_kill_9(base: Path, tmp_path: Path) -> None:
    """The process itself: killed twice, the second time while it writes a checkpoint.

    The undisturbed run has a process of its own, too: libraries that others of the tests load may change how the
    floating-point unit rounds.
    """
    config = lora(tmp_path / 'killed', base)
    whole = lora(tmp_path / 'whole', base)
    script = (
        'import os, signal, sys\n'
        f'sys.path[:0] = {[str(FOLDER), str(FOLDER.parent), str(FOLDER.parent / "model")]!r}\n'
        'import torch; torch.set_num_threads(1)\n'
        'from test_resuming import after\n'
        'from mobilevlm_ros.train.config import read_config\n'
        'from mobilevlm_ros.train.stage import run_stage\n'
        'die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n'
        'if sys.argv[2] == "while saving":\n'
        '    from transformers import Trainer\n'
        '    Trainer._save_rng_state = die\n'
        'asked = after(5, die) if sys.argv[2] == "between steps" else lambda: False\n'
        'run_stage(read_config(sys.argv[1]), resume=True, asked_to_stop=asked)\n'
    )
    environment = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(FOLDER.parents[1])}

    def run(how: str, config: TrainConfig = config) -> int:
        path = config.out.parent / 'lora.yaml'
        return subprocess.run([sys.executable, '-c', script, str(path), how], env=environment, timeout=110).returncode

    assert run('to the end', whole) == 0
    assert run('between steps') == -signal.SIGKILL
    assert [found.name for found in checkpoints(config.out / 'checkpoints')] == ['checkpoint-2', 'checkpoint-4']
    assert run('while saving') == -signal.SIGKILL
    assert (config.out / 'checkpoints' / 'partial').is_dir()
    assert [found.name for found in checkpoints(config.out / 'checkpoints')] == ['checkpoint-2', 'checkpoint-4']
    assert run('to the end') == 0

    assert losses(config) == losses(whole)
    assert len(losses(whole)) == STEPS
    assert not (config.out / 'checkpoints' / 'partial').exists()


def test_only_the_newest_checkpoints_stay(whole: TrainConfig) -> None:
    names = [path.name for path in (whole.out / 'checkpoints').iterdir()]
    assert sorted(names) == ['checkpoint-8', f'checkpoint-{STEPS}']


def test_a_run_is_not_overwritten(whole: TrainConfig) -> None:
    with pytest.raises(TrainingError, match=r'holds a run already \(checkpoint-9\): go on with --resume'):
        run_stage(whole)


def test_another_run_is_not_resumed(base: Path, whole: TrainConfig) -> None:
    changed = whole.model_copy(update={'schedule': whole.schedule.model_copy(update={'seed': 7})})
    with pytest.raises(TrainingError, match=r'of another run: schedule\.seed was 42 and is 7'):
        run_stage(changed, resume=True)


def test_a_finished_run_only_writes_its_product_again(whole: TrainConfig) -> None:
    before = (whole.out / 'model' / 'pytorch_model.bin').read_bytes()
    outcome = run_stage(whole, resume=True)

    assert outcome.step == STEPS
    assert (outcome.products['model'] / 'pytorch_model.bin').read_bytes() == before
    assert len(losses(whole)) == STEPS


def test_a_checkpoint_of_another_shape_is_refused(base: Path, tmp_path: Path) -> None:
    config = lora(tmp_path, base)
    run_stage(config, asked_to_stop=after(2, lambda: True))
    path = config.out / 'checkpoints' / 'checkpoint-2' / 'trained.safetensors'
    stored = safetensors.torch.load_file(path)
    name = sorted(stored)[0]
    safetensors.torch.save_file(stored | {name: stored[name][:1].contiguous()}, path)
    with pytest.raises(CheckpointShapeError, match=r'trained\.safetensors has shape \[1, .*this model has'):
        run_stage(config, resume=True)
    del stored[name]
    safetensors.torch.save_file(stored, path)
    with pytest.raises(CheckpointShapeError, match=r'is missing from .*it is of another run'):
        run_stage(config, resume=True)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TrainingError, match=r'cannot be read .*remove the folder checkpoint-2'):
        run_stage(config, resume=True)


# -- being asked to stop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(
    base: Path, whole: TrainConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:  # fmt: skip
    config = lora(tmp_path, base)
    path = str(tmp_path / 'lora.yaml')
    real = run_stage
    send = after(3, lambda: os.kill(os.getpid(), number))

    def run(*arguments: Any, asked_to_stop: Callable[[], bool], **options: Any) -> Any:
        return real(*arguments, asked_to_stop=lambda: send() or asked_to_stop(), **options)

    monkeypatch.setattr('mobilevlm_ros.train.stage.run_stage', run)
    assert main(['train', 'lora', '--config', path]) == 130
    said = ''.join(capfd.readouterr().err.split('\n'))
    assert 'stopped after step 3, with a checkpoint' in said
    assert f'mobilevlm train lora --config {path} --resume' in said
    assert newest(config.out / 'checkpoints') == config.out / 'checkpoints' / 'checkpoint-3'

    monkeypatch.setattr('mobilevlm_ros.train.stage.run_stage', real)
    assert main(['train', 'lora', '--config', path, '--resume']) == 0
    assert capfd.readouterr().out.split() == [str(config.out / 'adapter'), str(config.out / 'model')]
    assert losses(config) == losses(whole)


def test_a_stage_and_a_configuration_that_disagree(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora(tmp_path, base)
    assert main(['train', 'align', '--config', str(tmp_path / 'lora.yaml')]) == 2
    assert 'is for stage lora, not align: run `mobilevlm train lora --config' in capsys.readouterr().err


# -- losses that are no number ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_loss_that_is_no_number_ends_the_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """It names the step and the records; weights and checkpoints are from before."""
    from mobilevlm_ros.train.trainee import Trainee

    config = lora(tmp_path, base)
    real, calls = Trainee.forward, 0

    def forward(self: Trainee, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        found = real(self, *arguments, **options)
        return {'loss': found['loss'] * value} if calls == 2 * 4 + 1 else found

    monkeypatch.setattr(Trainee, 'forward', forward)
    with pytest.raises(DivergedError) as caught:
        run_stage(config)
    message = str(caught.value)
    assert f'the loss is {value} in step 5, on record ' in message
    assert message.count('record ') == 2
    assert 'checkpoint-4 is from before it' in message
    assert [path.name for path in checkpoints(config.out / 'checkpoints')] == ['checkpoint-2', 'checkpoint-4']


def test_a_gradient_that_is_no_number_ends_the_run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss may still be finite when the weights would be lost."""
    config = lora(tmp_path, base)
    seen = 0

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return gradient * float('nan')

    from mobilevlm_ros.train.trainee import Trainee

    real = Trainee.forward

    def forward(self: Trainee, *arguments: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        found = real(self, *arguments, **options)
        return {'loss': Poison.apply(found['loss'])} if seen == 5 else found

    monkeypatch.setattr(Trainee, 'forward', forward)
    with pytest.raises(DivergedError, match=r'the gradient has the norm nan in step 3, on record .*were not changed'):
        run_stage(config)


def test_samples_without_anything_to_learn_do_no_harm(base: Path, tmp_path: Path) -> None:
    """Every answer is cut off: no loss, no division by zero."""
    config = lora(tmp_path, base, data={'max_tokens': 20}, schedule={'max_steps': 2})
    run_stage(config)
    assert [loss for _, loss in losses(config)] == [0.0, 0.0]


# -- full disks -------------------------------------------------------------------------------------------------------


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, 'No space left on device')


def torch_full(*_: Any, **__: Any) -> None:
    raise RuntimeError('[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0: No space left on device')


@pytest.mark.parametrize(
    ('place', 'failure'),
    [
        ('safetensors.torch.save_file', full),
        ('torch.save', torch_full),
        ('transformers.TrainerState.save_to_json', full),
        ('os.fsync', full),
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, failure: Callable[..., None]
) -> None:
    config = lora(tmp_path, base)
    folder = config.out / 'checkpoints'

    def fill() -> bool:
        monkeypatch.setattr(place, failure)
        return False

    with pytest.raises(DiskSpaceError, match=r'checkpoint-2 is intact: free some space .*with --resume'):
        run_stage(config, asked_to_stop=after(3, fill))
    assert [path.name for path in folder.iterdir()] == ['checkpoint-2']
    monkeypatch.undo()
    assert run_stage(config, resume=True).step == STEPS


def test_a_disk_that_fills_up_with_the_product(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint is that of the last step: only the product is made again."""
    config = lora(tmp_path, base, schedule={'max_steps': 2})
    monkeypatch.setattr('mobilevlm_ros.train.whole._copy_ids', full)
    with pytest.raises(DiskSpaceError, match=r'the disk is full\. checkpoint-2 is intact'):
        run_stage(config)
    assert not (config.out / 'model').exists()
    monkeypatch.undo()

    assert (run_stage(config, resume=True).products['model'] / 'config.json').is_file()
    assert len(losses(config)) == 2


def test_room_is_looked_at_before_writing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    config = lora(tmp_path, base)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr('shutil.disk_usage', lambda path: usage._replace(free=1 << 16))
    with pytest.raises(DiskSpaceError, match=r'takes 1 MiB, but .* has 1 MiB free\. There is no earlier checkpoint'):
        run_stage(config)


def test_a_folder_that_cannot_be_written_is_named(base: Path, tmp_path: Path) -> None:
    config = lora(tmp_path, base)
    config.out.write_text('a file')
    with pytest.raises(MobileVLMError, match=r'run cannot be written: File exists'):
        run_stage(config)


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('stage', ['instruct', 'align'])
def test_two_processes_give_the_losses_of_one(base: Path, tmp_path: Path, stage: str) -> None:
    """With torchrun and gloo: 2 processes x 2 samples make the step of 1 process x 2 samples x 2 accumulated."""
    tiny_runs.write_data(tmp_path, text_only=0 if stage == 'align' else 4)
    sections = {'schedule': {'max_steps': 6, 'batch': 2}, 'saving': {'every_steps': 3}}
    if stage == 'instruct':
        sections['data'] = {'group_by_modality': True}  # type: ignore[dict-item]
    config = tiny_runs.config(tmp_path, stage, base, **sections)
    run_stage(config)
    two = yaml.safe_load((tmp_path / f'{stage}.yaml').read_text()) | {'out': str(tmp_path / 'two')}
    (tmp_path / 'two.yaml').write_text(yaml.safe_dump(two))
    environment = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(FOLDER.parents[1])}
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', '-m']
    arguments = ['mobilevlm_ros.cli', 'train', stage, '--config', str(tmp_path / 'two.yaml')]
    done = subprocess.run([*launch, *arguments], env=environment, capture_output=True, text=True, timeout=115)

    assert done.returncode == 0, done.stderr[-3000:]
    found = [(line['step'], line['loss']) for line in read_log(tmp_path / 'two')]
    assert found == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in losses(config)]
    assert done.stdout.split()[-1] == str(tmp_path / 'two' / 'model')
    with open_checkpoint(tmp_path / 'two' / 'model') as other, open_checkpoint(config.out / 'model') as one:
        for name, value in one.tensors.items():
            torch.testing.assert_close(
                torch.from_numpy(other.tensors[name]), torch.from_numpy(value), rtol=1e-3, atol=1e-4
            )


def test_figures_are_kept_for_tensorboard(whole: TrainConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole.out / 'tensorboard'))
    events.Reload()
    assert [event.value for event in events.Scalars('loss')] == pytest.approx([loss for _, loss in losses(whole)])
    lines = [json.loads(line) for line in (whole.out / 'log.jsonl').read_text().splitlines()]
    assert {'step', 'loss', 'grad_norm', 'learning_rate', 'epoch'} <= lines[0].keys()
