"""The decoding loop, on an engine that says what the test wants, and on a real one."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mobilevlm_ros.errors import AnswerFormatError
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.generate import Generation, _choose, generate
from mobilevlm_ros.runtime.language import LanguageOptions, TokenSegment
from mobilevlm_ros.runtime.language.fake import FakeLanguageEngine
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine
from mobilevlm_ros.runtime.sampling import Sampler, SamplingSettings, log_softmax
from mobilevlm_ros.types import ResultCode


def say(reply: str | bytes, n_ctx: int = 512, **options: Any) -> Generation:
    """What ``generate`` makes of a model that says ``reply``, one byte a token."""
    engine = FakeLanguageEngine(LanguageOptions(n_ctx=n_ctx), reply=lambda prompt, image: '')
    engine.prefill([TokenSegment((1, 2, 3))], CancelToken())
    engine._reply = reply if isinstance(reply, bytes) else reply.encode()
    settings: dict[str, Any] = {'max_tokens': 200, 'cancel': CancelToken(), **options}
    cancel = settings.pop('cancel')
    return generate(engine, Sampler(SamplingSettings()), cancel, **settings)


def test_an_answer_ends_at_the_end_token() -> None:
    generation = say('a red car')

    assert generation.text == 'a red car'
    assert generation.n_tokens == 9
    assert not generation.truncated
    assert generation.interrupted is None


def test_white_space_around_an_answer_is_cut() -> None:
    assert say('  a car \n').text == 'a car'


def test_an_answer_may_be_empty() -> None:
    generation = say('')

    assert (generation.text, generation.n_tokens, generation.truncated) == ('', 0, False)


@pytest.mark.parametrize('max_tokens', [1, 5])
def test_max_tokens_cuts_and_says_so(max_tokens: int) -> None:
    generation = say('a red car', max_tokens=max_tokens)

    assert generation.text == 'a red car'[:max_tokens].strip()
    assert generation.n_tokens == max_tokens
    assert generation.truncated


def test_the_end_of_the_context_cuts_and_says_so() -> None:
    generation = say('a red car', n_ctx=8)

    assert generation.text == 'a red'[: 8 - 3 + 1].strip()
    assert generation.truncated
    assert generation.interrupted is None


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it() -> None:
    generation = say('a car</s> and more', stop_texts=('</s>', 'USER:'))

    assert generation.text == 'a car'
    assert generation.n_tokens == len('a car</s>')
    assert not generation.truncated


def test_the_first_of_two_stop_texts_counts() -> None:
    assert say('a USER: b</s>', stop_texts=('</s>', 'USER:')).text == 'a'


def test_what_only_began_like_a_stop_text_is_part_of_the_answer() -> None:
    assert say('x </USER </', stop_texts=('</s>', 'USER:')).text == 'x </USER </'


def test_an_empty_stop_text_stops_nothing() -> None:
    assert say('a car', stop_texts=('',)).text == 'a car'


@pytest.mark.parametrize(
    'reply', ['a car</s>b', 'aa</</s>', '</s>', 'a<</s', 'UUSER: x', 'a b c', 'naïve 🐻</s>!', ' a </'], ids=repr
)
def test_streamed_text_only_grows_and_never_shows_a_stop_text(reply: str) -> None:
    shown: list[str] = []

    final = say(reply, stop_texts=('</s>', 'USER:'), on_text=shown.append).text

    assert all(later.startswith(earlier) and later != earlier for earlier, later in pairwise(shown))
    assert all(final.startswith(text) for text in shown)
    assert not any('</s>' in text or 'USER:' in text for text in (*shown, final))


def test_a_listener_gets_the_answer_as_it_grows() -> None:
    shown: list[str] = []

    say('ab c', on_text=shown.append)

    assert shown == ['a', 'ab', 'ab c']


def test_characters_of_several_tokens_are_streamed_whole() -> None:
    shown: list[str] = []

    final = say('é🐻', on_text=shown.append).text

    assert final == 'é🐻'
    assert shown == ['é', 'é🐻']


def test_a_character_cut_in_half_is_left_out() -> None:
    generation = say('a🐻', max_tokens=3)

    assert generation.text == 'a'
    assert generation.truncated


def test_bytes_that_are_no_text_are_marked() -> None:
    assert say(b'a\xff\xfeb').text == 'a\ufffd\ufffdb'


def test_cancelling_keeps_the_text_so_far() -> None:
    cancel = CancelToken()

    def stop_after_three(text: str) -> None:
        if len(text) == 3:
            cancel.set(ResultCode.CANCELED, 'enough')

    generation = say('abcdef', cancel=cancel, on_text=stop_after_three)

    assert generation.text == 'abc'
    assert generation.interrupted is not None
    assert generation.interrupted.code is ResultCode.CANCELED
    assert not generation.truncated


def test_a_listeners_error_is_not_swallowed() -> None:
    def fail(text: str) -> None:
        raise RuntimeError('listener')

    with pytest.raises(RuntimeError, match='listener'):
        say('abc', on_text=fail)


def test_confidence_is_the_mean_probability_of_the_chosen_tokens(engine: LlamaCppEngine) -> None:
    engine.prefill([TokenSegment((1, 300, 301))], CancelToken())
    expected, token = [], 0
    for step in range(5):
        logits = engine.logits()
        token = int(np.argmax(logits))
        expected.append(float(np.exp(log_softmax(logits)[token])))
        if step < 4:
            engine.append([token], CancelToken())
    engine.prefill([TokenSegment((1, 300, 301))], CancelToken())

    generation = generate(engine, Sampler(SamplingSettings()), CancelToken(), max_tokens=5)

    assert generation.confidence == pytest.approx(np.mean(expected), rel=1e-6)


def test_confidence_ignores_the_temperature(engine: LlamaCppEngine) -> None:
    engine.prefill([TokenSegment((1, 300))], CancelToken())
    logits = engine.logits().copy()
    sampler = Sampler(SamplingSettings(temperature=3.0, top_k=1))

    generation = generate(engine, sampler, CancelToken(), max_tokens=1)

    assert generation.confidence == pytest.approx(float(np.exp(log_softmax(logits).max())), rel=1e-6)


def test_greedy_text_is_that_of_a_plain_loop(engine: LlamaCppEngine) -> None:
    engine.prefill([TokenSegment((1, 310))], CancelToken())
    pieces = []
    for _ in range(12):
        token = int(np.argmax(engine.logits()))
        pieces.append(engine.piece(token))
        engine.append([token], CancelToken())
    engine.prefill([TokenSegment((1, 310))], CancelToken())

    generation = generate(engine, Sampler(SamplingSettings()), CancelToken(), max_tokens=12)

    assert generation.text == b''.join(pieces).decode(errors='replace').strip()


@pytest.mark.parametrize('temperature', [0.0, 1.0])
@pytest.mark.parametrize(
    ('schema', 'check'),
    [
        ({'enum': ['red', 'green']}, lambda value: value in ('red', 'green')),
        ({'type': 'boolean'}, lambda value: isinstance(value, bool)),
        (
            {
                'type': 'object',
                'properties': {'n': {'type': 'integer'}, 'ok': {'type': 'boolean'}},
                'required': ['n', 'ok'],
            },
            lambda value: isinstance(value['n'], int) and isinstance(value['ok'], bool),
        ),
        ({'type': 'array', 'items': {'const': 7}, 'minItems': 2, 'maxItems': 2}, lambda value: value == [7, 7]),
    ],
    ids=['enum', 'boolean', 'object', 'array'],
)
def test_with_a_grammar_a_random_model_speaks_json(
    engine: LlamaCppEngine, schema: Any, check: Callable[[Any], bool], temperature: float
) -> None:
    engine.prefill([TokenSegment((1, 300))], CancelToken())
    grammar = engine.json_grammar(json.dumps(schema))
    sampler = Sampler(SamplingSettings(temperature=temperature, seed=5))

    text = generate(engine, sampler, CancelToken(), max_tokens=200, grammar=grammar).text

    grammar.close()
    assert check(json.loads(text))


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_a_grammar_without_a_way_on_is_an_error_not_a_crash(engine: LlamaCppEngine, temperature: float) -> None:
    """No vocabulary has a token that spells a NUL; llama.cpp ends the process if it must accept another."""
    engine.prefill([TokenSegment((1, 300))], CancelToken())
    grammar = engine.json_grammar(json.dumps({'const': '\0'}))

    with pytest.raises(AnswerFormatError, match='cannot spell'):
        generate(engine, Sampler(SamplingSettings(temperature)), CancelToken(), max_tokens=20, grammar=grammar)


class OnlyEven:
    """A grammar of even tokens that counts how it is asked."""

    def __init__(self) -> None:
        self.n_masked = 0
        self.accepted: list[int] = []

    def allows(self, token: int) -> bool:
        return token % 2 == 0

    def allowed(self, tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
        return tokens % 2 == 0

    def forced(self) -> tuple[bytes, bool]:
        return b'', False

    def masked(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        self.n_masked += 1
        result = logits.copy()
        result[1::2] = -np.inf
        return result

    def accept(self, token: int) -> None:
        self.accepted.append(token)

    def close(self) -> None:
        pass


def test_a_grammar_is_only_asked_about_all_tokens_where_the_choice_breaks_it() -> None:
    grammar = OnlyEven()

    generation = say('bdf', grammar=grammar)  # 98, 100, 102 and the end token 256 are even

    assert generation.text == 'bdf'
    assert grammar.n_masked == 0
    assert grammar.accepted == [98, 100, 102, 256]


def test_a_choice_that_breaks_the_grammar_is_made_again() -> None:
    grammar = OnlyEven()

    say('bcd', grammar=grammar, max_tokens=2)

    assert grammar.n_masked == 1
    assert all(token % 2 == 0 for token in grammar.accepted)


@pytest.mark.parametrize('n_best_forbidden', [0, 1, 30, 200])
def test_the_best_allowed_token_is_that_of_a_full_pass(engine: LlamaCppEngine, n_best_forbidden: int) -> None:
    engine.prefill([TokenSegment((1, 300))], CancelToken())
    n_vocab = len(engine.logits())
    random = np.random.default_rng(n_best_forbidden)
    for _ in range(20):
        logits = random.normal(size=n_vocab).astype(np.float32)
        grammar = engine.json_grammar('{"type": "string"}')
        forbidden = np.flatnonzero(~np.isfinite(grammar.masked(logits)))
        logits[random.permutation(forbidden)[:n_best_forbidden]] += 10.0
        expected = int(np.argmax(grammar.masked(logits)))

        assert _choose(logits, Sampler(SamplingSettings()), grammar) == expected
        grammar.close()


def test_of_equal_allowed_tokens_the_first_is_chosen(engine: LlamaCppEngine) -> None:
    engine.prefill([TokenSegment((1, 300))], CancelToken())
    logits = np.zeros(len(engine.logits()), np.float32)
    grammar = engine.json_grammar('{"enum": ["red", "blue"]}')
    expected = int(np.argmax(grammar.masked(logits)))

    assert _choose(logits, Sampler(SamplingSettings()), grammar) == expected
