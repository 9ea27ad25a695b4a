"""What people see of a run, what is kept of it, and what it is said to cost."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_checkpoints
import torch
from rich.console import Console

from mobilevlm_ros.model.config import LanguageConfig, ModelConfig
from mobilevlm_ros.model.manifest import read_manifest
from mobilevlm_ros.model.mobilevlm import MobileVLM
from mobilevlm_ros.train.checkpoints import checkpoints, keep_newest, newest
from mobilevlm_ros.train.config import LearningRates, TrainConfig, read_config
from mobilevlm_ros.train.cost_card import cost_card, sample_length
from mobilevlm_ros.train.progress import Bar, StepLog, remaining
from mobilevlm_ros.train.run_log import LOG, read_log
from mobilevlm_ros.train.trainee import Trainee, freeze


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [(0.4, '0 s'), (59.0, '59 s'), (61.0, '1 min'), (3600.0, '1 h 0 min'), (5.5 * 86400, '5 d 12 h')],
)
def test_lengths_of_time_are_for_people(seconds: float, text: str) -> None:
    assert remaining(seconds) == text


def test_the_log_goes_on_where_the_checkpoint_was_made(tmp_path: Path) -> None:
    """Later lines are of steps that will be made again; a line that a kill cut short is none."""
    lines = [{'step': step, 'loss': float(step)} for step in (1, 2, 3)]
    (tmp_path / LOG).write_text(''.join(json.dumps(line) + '\n' for line in lines) + '{"step": 4, "lo')
    log = StepLog(tmp_path, 2)
    state: Any = SimpleNamespace(global_step=3)
    log.on_log(None, state, None, logs={'loss': 9.0, 'epoch': 1.0})  # type: ignore[arg-type]
    log.on_log(None, state, None, logs={'train_runtime': 1.0})  # type: ignore[arg-type]
    log.close()

    assert read_log(tmp_path) == [*lines[:2], {'step': 3, 'loss': 9.0, 'epoch': 1.0}]


def test_output_that_is_no_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    bar = Bar(Console(file=text, width=120), 'align')
    now = 0.0
    monkeypatch.setattr('time.monotonic', lambda: now)
    bar.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=100), None)  # type: ignore[arg-type]
    for step in range(1, 31):
        now = 2.0 * step
        state: Any = SimpleNamespace(global_step=step, max_steps=100)
        bar.on_step_end(None, state, None)  # type: ignore[arg-type]
        bar.on_log(None, state, None, logs={'loss': 1.5, 'learning_rate': 1e-3})  # type: ignore[arg-type]
    bar.close()
    lines = text.getvalue().splitlines()

    assert lines[0] == '· step 1 of 100: loss 1.5  learning_rate 0.001'
    assert '· 2 s a step, measured: 3 min for the rest' in lines
    assert 4 <= len(lines) <= 8
    assert '\x1b' not in text.getvalue()


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for name in ('checkpoint-9', 'checkpoint-10', 'checkpoint-100', 'partial', 'checkpoint-x', 'checkpoint-8.old'):
        (tmp_path / name).mkdir()

    assert [path.name for path in checkpoints(tmp_path)] == ['checkpoint-9', 'checkpoint-10', 'checkpoint-100']
    keep_newest(tmp_path, 2)
    assert [path.name for path in checkpoints(tmp_path)] == ['checkpoint-10', 'checkpoint-100']
    assert newest(tmp_path) == tmp_path / 'checkpoint-100'
    assert newest(tmp_path / 'none') is None


# -- the card ---------------------------------------------------------------------------------------------------------


def card_of(name: str, model: ModelConfig, tokens: int, learned: int, n_steps: int) -> Any:
    """The card of a published configuration, from shapes alone."""
    config: TrainConfig = read_config(name)
    with torch.device('meta'):
        module = MobileVLM(model)
    freeze(module, config.learning_rate)
    return cost_card(config, Trainee(module), 'nothing', [(tokens, learned)], 1000, n_steps, config.schedule.batch, 8)


def test_pretraining_costs_what_everybody_counts() -> None:
    """6 N D, and 2 N D more for activations that are computed twice; N without the embedding matrix."""
    model = read_manifest('mobilellama-1.4b-base')
    card = card_of('mobilellama-1.4b-pretrain', model, 2048, 2047, 248_000)
    n = 1_364_297_728 - 32000 * 2048

    assert card.tokens == pytest.approx(1.3e12, rel=0.001)
    assert card.flops == pytest.approx((8 * n + 2 * 32000 * 2048) * card.tokens, rel=1e-6)


def test_a_projector_is_cheap_in_memory_and_not_in_arithmetic() -> None:
    model = read_manifest('mobilevlm-1.7b')
    projector = card_of('mobilevlm-1.7b-align', model, 164, 20, 2179)
    both = card_of('mobilevlm-1.7b-instruct', model, 164, 20, 2179)

    assert projector.n_trained == 18_936_832
    assert both.n_trained == 18_936_832 + 1_364_297_728
    assert both.memory_bytes - projector.memory_bytes > 1_364_297_728 * 10
    assert 0.6 < projector.flops / 2 / both.flops < 1.0  # twice the samples a step


def test_the_tower_is_counted_where_it_runs() -> None:
    model = tiny_checkpoints.config()
    config = read_config('mobilevlm-1.7b-align')
    costs = []
    for cached in (False, True):
        module = MobileVLM(model)
        freeze(module, LearningRates(projector=1e-3))
        costs.append(cost_card(config, Trainee(module, cached=cached), '', [(10, 2)], 9, 1, 32, 8).flops)
    n_tower = sum(p.numel() for p in MobileVLM(model).vision_tower.parameters())  # type: ignore[union-attr]
    assert model.vision is not None

    assert costs[0] - costs[1] == pytest.approx(2 * n_tower * model.vision.n_patches * 256)


def test_pictures_count_as_their_tokens() -> None:
    item = {'input_ids': torch.tensor([1, -200, 7, 8, 2]), 'labels': torch.tensor([-100, -100, -100, 8, 2])}
    assert sample_length(item, 144) == (148, 2)


def test_the_card_is_for_people() -> None:
    text = io.StringIO()
    card = card_of('mobilellama-1.4b-pretrain', ModelConfig('m', LanguageConfig(n_layers=1)), 2048, 2047, 10)
    Console(file=text, width=120).print(card.table())

    assert 'mean of 1' in text.getvalue()
    assert '10 of 2560 samples: 16 at once x 20 accumulated x 8 processes' in text.getvalue()
    assert 'tokens      52.4 M, of which 100% are learned' in text.getvalue()


# -- features instead of pixels ---------------------------------------------------------------------------------------


def test_features_are_the_tower_computed_before() -> None:
    """Pixels through the tower, or its output: the same loss; the tower is let go."""
    torch.manual_seed(0)
    whole = MobileVLM(tiny_checkpoints.config()).eval()
    pixels = torch.randn(2, 3, 32, 32)
    batch = {
        'input_ids': torch.tensor([[1, -200, 7, 8, 2], [1, 9, 10, 0, 0]]),
        'labels': torch.tensor([[-100, -100, -100, 8, 2], [-100, 9, 10, -100, -100]]),
        'attention_mask': torch.tensor([[True] * 5, [True] * 3 + [False] * 2]),
    }
    assert whole.vision_tower is not None
    with torch.no_grad():
        features = whole.vision_tower(pixels)
        from_pixels = Trainee(whole)(**batch, pixels_nchw=pixels)['loss']
        reference = whole(
            batch['input_ids'], pixels, attention_mask=batch['attention_mask'], labels=batch['labels']
        ).loss
        cached = Trainee(whole, cached=True)
        from_features = cached(**batch, features=features)['loss']

    torch.testing.assert_close(from_pixels, reference)
    torch.testing.assert_close(from_features, from_pixels)
    assert list(whole.vision_tower.parameters()) == []
    with torch.no_grad():
        counted = cached(**batch, features=features, num_items_in_batch=torch.tensor(8))['loss']
    torch.testing.assert_close(counted * 2, from_features)
