"""Log probabilities against transformers on a tiny random LLaMA, and the model class against a stand-in of the harness.

What stands for the harness shows how it is called; its own tasks run in test_language_real_harness.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

from mobilevlm_ros.errors import DependencyError, QuestionTooLongError, SettingsError
from mobilevlm_ros.evaluate.benchmarks.harness import add_language_arguments, harness_model, run_language
from mobilevlm_ros.evaluate.benchmarks.language import LanguageScorer, _segments
from mobilevlm_ros.evaluate.benchmarks.paper import LANGUAGE_TASKS
from mobilevlm_ros.runtime.language import LanguageOptions
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine

BOS = 1
# On a busy machine with cold disks, importing transformers alone has taken two minutes.
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope='module')
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('gguf') / 'mobilellama-1.4b-tiny.gguf'


@pytest.fixture(scope='module')
def reference(model_file: Path) -> Any:
    """The weights of the file in transformers' Llama."""
    weights = tiny_models.write_gguf(model_file)
    torch = pytest.importorskip('torch', reason='needs torch and transformers as references: make venv-dev')
    transformers = pytest.importorskip('transformers')
    sizes = tiny_models.TinyLlama()
    config = transformers.LlamaConfig(
        vocab_size=len(weights['lm_head.weight']),
        hidden_size=sizes.n_embd,
        intermediate_size=sizes.n_ff,
        num_hidden_layers=sizes.n_layers,
        num_attention_heads=sizes.n_heads,
        rms_norm_eps=sizes.norm_eps,
        rope_theta=sizes.rope_base,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in weights.items()})
    return model


@pytest.fixture
def scorer(model_file: Path, reference: Any) -> Iterator[LanguageScorer]:
    options = LanguageOptions(n_ctx=512, kv_type='f32', frame_cache=0, n_threads=1, n_threads_batch=1)
    made = LanguageScorer(LlamaCppEngine(model_file, options))
    yield made
    made.close()


def expected(reference: Any, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """As the harness computes it from one pass over all tokens."""
    import torch

    tokens = [*context, *continuation]
    with torch.no_grad():
        rows = torch.log_softmax(reference(torch.tensor([tokens])).logits[0].double(), -1)
    rows = rows[len(context) - 1 : -1]
    picked = rows[torch.arange(len(continuation)), torch.tensor(continuation)]
    return float(picked.sum()), bool((rows.argmax(-1) == torch.tensor(continuation)).all())


PAIRS = [
    ('what is the', ' red car'),
    ('what is the', ' red truck'),
    ('what is the', ' blue'),
    ('what is the', ' red'),  # the beginning of another
    ('the car is ', 'green'),
    ('', 'yes no'),
    ('a table: ' * 40, ' the end'),
    ('a table: ' * 39 + 'a car: ', ' the end'),
]


def test_log_likelihoods_are_those_of_transformers(scorer: LanguageScorer, reference: Any) -> None:
    found = list(scorer.log_likelihoods(PAIRS))
    for pair, (value, is_greedy) in zip(PAIRS, found, strict=True):
        context, continuation = scorer.tokens_of(*pair)
        assert context[0] == BOS and continuation
        right, right_greedy = expected(reference, context, continuation)
        assert value == pytest.approx(right, abs=1e-3)
        assert is_greedy is right_greedy


def test_what_greedy_decoding_says_is_recognised(scorer: LanguageScorer, reference: Any) -> None:
    import torch

    context, _ = scorer.tokens_of('what is the', ' red')
    said: tuple[int, ...] = ()
    for _ in range(4):
        with torch.no_grad():
            said += (int(reference(torch.tensor([[*context, *said]])).logits[0, -1].argmax()),)
    other = (*said[:3], said[3] + 1)
    assert [is_greedy for _, is_greedy in scorer._scored(context, [said, other, said[:2]])] == [True, False, True]


def test_order_and_company_change_nothing(scorer: LanguageScorer) -> None:
    alone = [next(iter(scorer.log_likelihoods([pair])))[0] for pair in reversed(PAIRS)][::-1]
    together = [value for value, _ in scorer.log_likelihoods(PAIRS)]
    np.testing.assert_allclose(together, alone, atol=1e-3)


def test_a_space_at_the_end_of_a_context_belongs_to_what_follows(scorer: LanguageScorer) -> None:
    assert scorer.tokens_of('the car is ', 'green') == scorer.tokens_of('the car is', ' green')


def test_texts_may_begin_without_the_start_token(model_file: Path, reference: Any) -> None:
    scorer = LanguageScorer.open(model_file, n_ctx=512, n_threads=1, add_bos=False)
    try:
        assert scorer.tokens_of('the car', ' is')[0][0] != BOS
        assert scorer.tokens_of('', 'yes')[0] == (BOS,)  # something has to come first
    finally:
        scorer.close()


def test_long_contexts_lose_their_beginning(scorer: LanguageScorer, reference: Any) -> None:
    context, continuation = scorer.tokens_of('red ' * 600, 'blue')
    ((value, _),) = scorer.log_likelihoods([('red ' * 600, 'blue')])
    kept = context[-(512 - len(continuation)) :]
    assert len(context) > 512 and value == pytest.approx(expected(reference, kept, continuation)[0], abs=2e-3)
    with pytest.raises(QuestionTooLongError, match='raise n_ctx'):
        list(scorer.log_likelihoods([('a', ' red' * 600)]))


@pytest.mark.parametrize('n', [1, 2, 127, 128, 129, 130, 256, 257, 300])
def test_contexts_are_cut_into_blocks_and_a_last_token(n: int) -> None:
    tokens = tuple(range(n))
    segments = [segment.tokens for segment in _segments(tokens)]
    assert sum(segments, ()) == tokens and len(segments[-1]) == 1
    assert all(len(one) == 128 for one in segments[:-2]) and all(segments)


# -- the stand-in of the harness --------------------------------------------------------------------------------------


class StandIn:
    """``lm_eval.api.model.LM``, as far as a model needs it."""

    def __init__(self) -> None:
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *_: None)


def request(*args: Any) -> Any:
    return types.SimpleNamespace(args=args)


def test_the_model_class_answers_what_the_harness_asks(scorer: LanguageScorer) -> None:
    model = harness_model(StandIn, scorer)
    assert isinstance(model, StandIn)
    scored = model.loglikelihood([request(*pair) for pair in PAIRS[:4]])
    expected = list(scorer.log_likelihoods(PAIRS[:4]))
    assert [one[0] for one in scored] == pytest.approx([one[0] for one in expected])
    assert [one[1] for one in scored] == [one[1] for one in expected]
    (text,) = model.generate_until([request('what is the', {'until': '\n', 'max_gen_toks': 5})])
    assert text == scorer.generate('what is the', ['\n'], 5)
    with pytest.raises(NotImplementedError):
        model.loglikelihood_rolling([request('x')])
    with pytest.raises(NotImplementedError):
        model.generate_until([request('x', {'until': [], 'temperature': 0.7})])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Puts a harness in place whose tasks have one question of two options; returns how it was called."""
    calls: list[dict[str, Any]] = []

    def simple_evaluate(model: Any, tasks: list[str], **settings: Any) -> dict[str, Any]:
        calls.append({'tasks': tasks, **settings})
        options = [request('what is the', ' red car'), request('what is the', ' blue truck')]
        scores = [value for value, _ in model.loglikelihood(options)]
        return {'results': {task: {'acc,none': float(scores[0] > scores[1])} for task in tasks}}

    harness, api, module = (types.ModuleType(f'lm_eval{name}') for name in ('', '.api', '.api.model'))
    harness.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    module.LM = StandIn  # type: ignore[attr-defined]
    for one in (harness, api, module):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    return calls


def language(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    add_language_arguments(parser)
    return run_language(parser.parse_args([str(argument) for argument in arguments]))


def test_the_papers_tasks_are_run_with_the_papers_examples(
    stand_in: list[dict[str, Any]],
    model_file: Path,
    reference: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert language(model_file, '--threads', '1', '--limit', '3', '--n-ctx', '256', '--out', tmp_path / 'out.json') == 0
    assert [(call['num_fewshot'], call['limit']) for call in stand_in] == [(0, 3), (5, 3)]
    assert stand_in[1]['tasks'] == ['mmlu'] and len(stand_in[0]['tasks']) == 9
    figures = json.loads((tmp_path / 'out.json').read_text())['accuracy']
    assert set(figures) == set(LANGUAGE_TASKS) and len(set(figures.values())) == 1
    printed = capsys.readouterr().out
    assert 'mobilellama-1.4b (paper)' in printed and '0.2497' in printed


def test_what_is_missing_or_unknown_is_named(
    stand_in: list[dict[str, Any]], model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError, match='arc_easy'):
        language(model_file, '--tasks', 'arc_easier')
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    with pytest.raises(DependencyError, match='pip install lm_eval'):
        language(model_file)
