"""Text that a grammar forces: the same answer as token by token, in fewer calls of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.generate import Generation, generate
from mobilevlm_ros.runtime.language import Grammar, TokenSegment
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine
from mobilevlm_ros.runtime.language.llamacpp_library import SingleBytes
from mobilevlm_ros.runtime.sampling import Sampler, SamplingSettings

PROMPT = [TokenSegment((1, 300, 310))]
EngineMaker = Callable[..., LlamaCppEngine]


def an_object(**properties: Any) -> dict[str, Any]:
    return {'type': 'object', 'properties': properties, 'required': list(properties)}


PRESENT = an_object(present={'type': 'boolean'})
TWO = an_object(present={'type': 'boolean'}, what={'enum': ['red car', 'red truck', 'table']})
NESTED = an_object(where=an_object(x={'const': 1}, y={'enum': [10, 25]}), sure={'type': 'boolean'})
LIST = {'type': 'array', 'items': an_object(name={'enum': ['car', 'table']}), 'minItems': 2, 'maxItems': 2}
SCHEMAS = [PRESENT, TWO, NESTED, LIST, {'enum': ['naïve', 'näher']}, {'type': 'boolean'}]


class CountedEngine:
    """An engine whose calls of the model are counted."""

    def __init__(self, engine: LlamaCppEngine) -> None:
        self.engine = engine
        self.sizes: list[int] = []
        compute = engine._compute

        def counted(batch: Any, cancel: CancelToken) -> None:
            self.sizes.append(int(batch.n_tokens))
            compute(batch, cancel)

        engine._compute = counted  # type: ignore[method-assign]

    def say(self, schema: Any, max_tokens: int = 200, temperature: float = 0.0, **options: Any) -> Generation:
        self.engine.prefill(PROMPT, CancelToken())
        self.sizes.clear()
        grammar = self.engine.json_grammar(json.dumps(schema))
        try:
            return generate(
                self.engine,
                Sampler(SamplingSettings(temperature=temperature)),
                CancelToken(),
                max_tokens=max_tokens,
                grammar=grammar,
                **options,
            )
        finally:
            grammar.close()


@pytest.fixture
def counted(engine: LlamaCppEngine) -> CountedEngine:
    return CountedEngine(engine)


def allowed_tokens(engine: LlamaCppEngine, grammar: Grammar) -> list[int]:
    n_vocab = len(engine.logits())
    return np.flatnonzero(np.isfinite(grammar.masked(np.zeros(n_vocab, np.float32)))).tolist()


def forced_by_brute_force(engine: LlamaCppEngine, schema: Any, said: list[int]) -> tuple[bytes, bool]:
    """Ask about the whole vocabulary, byte by byte."""
    grammar = engine.json_grammar(json.dumps(schema))
    for token in said:
        grammar.accept(token)
    text = b''
    while True:
        allowed = allowed_tokens(engine, grammar)
        firsts = {engine.piece(token)[:1] for token in allowed}
        if len(firsts) != 1 or firsts == {b''}:
            whole = text.decode(errors='replace').partition('\ufffd')[0].encode()
            return whole, firsts == {b''} and whole == text
        text += next(iter(firsts))
        grammar.accept(next(token for token in allowed if engine.piece(token) == text[-1:]))


def reference(engine: LlamaCppEngine, schema: Any, max_tokens: int = 200) -> tuple[bytes, int]:
    """The same rule, one token a call, over the whole vocabulary; the text, and the number of chosen tokens."""
    engine.forget()
    engine.prefill(PROMPT, CancelToken())
    grammar = engine.json_grammar(json.dumps(schema))
    said: list[int] = []
    n_chosen = 0
    while len(said) < max_tokens:
        forced, ends = forced_by_brute_force(engine, schema, said)
        tokens = engine.tokenize('\n' + forced.decode())[len(engine.tokenize('\n')) :]
        assert b''.join(engine.piece(token) for token in tokens) == forced
        if not ends:
            del tokens[-1:]
        if not tokens and not ends:
            tokens = [int(np.argmax(grammar.masked(engine.logits())))]
            n_chosen += 1
            if engine.is_end(tokens[0]):
                break
        for token in tokens:
            grammar.accept(token)
            engine.append([token], CancelToken())
        said += tokens
        if ends:
            break
    return b''.join(engine.piece(token) for token in said), n_chosen


@pytest.mark.parametrize('schema', SCHEMAS, ids=str)
def test_the_text_is_that_of_token_by_token(counted: CountedEngine, make_engine: EngineMaker, schema: Any) -> None:
    generation = counted.say(schema)

    text, n_chosen = reference(make_engine(), schema)
    assert generation.text == text.decode()
    assert generation.n_tokens - generation.n_forced == n_chosen
    assert not generation.truncated


@pytest.mark.parametrize('schema', SCHEMAS, ids=str)
def test_what_is_forced_is_what_the_whole_vocabulary_says(engine: LlamaCppEngine, schema: Any) -> None:
    engine.prefill(PROMPT, CancelToken())
    grammar, said = engine.json_grammar(json.dumps(schema)), []
    random = np.random.default_rng(0)

    for _ in range(60):
        assert grammar.forced() == forced_by_brute_force(engine, schema, said)
        token = int(random.choice(allowed_tokens(engine, grammar)))
        if engine.is_end(token):
            break
        grammar.accept(token)
        said.append(token)
    assert engine.is_end(token)


def test_forced_tokens_cost_no_call_of_their_own(counted: CountedEngine) -> None:
    generation = counted.say(PRESENT)

    assert json.loads(generation.text)['present'] in (True, False)
    n_chosen = generation.n_tokens - generation.n_forced
    # One call for what is forced at the beginning; then at most one for each choice, together with what follows it.
    assert len(counted.sizes) <= n_chosen
    assert counted.sizes[0] > 5
    assert sum(counted.sizes) <= generation.n_tokens


def test_a_text_without_a_choice_needs_no_model(counted: CountedEngine) -> None:
    generation = counted.say(an_object(a={'const': 'the table'}, b={'const': None}))

    assert generation.text == '{"a": "the table", "b": null}'
    assert counted.sizes == []
    assert generation.n_forced == generation.n_tokens > 0
    assert generation.confidence == 1.0


def test_forced_tokens_do_not_count_for_confidence(counted: CountedEngine) -> None:
    bare, wrapped = counted.say({'type': 'boolean'}), counted.say(PRESENT)

    assert wrapped.n_tokens > bare.n_tokens
    assert 0 < wrapped.confidence < 1


@pytest.mark.parametrize('max_tokens', [1, 3, 6])
def test_forced_tokens_count_as_said(counted: CountedEngine, max_tokens: int) -> None:
    generation = counted.say(PRESENT, max_tokens=max_tokens)

    assert generation.n_tokens == max_tokens
    assert generation.truncated
    assert '{"present": '.startswith(generation.text)


def test_an_answer_that_just_fits_is_whole(counted: CountedEngine) -> None:
    whole = counted.say(TWO)

    assert counted.say(TWO, max_tokens=whole.n_tokens) == whole
    assert counted.say(TWO, max_tokens=whole.n_tokens - 1).truncated


def test_forced_tokens_stop_at_the_end_of_the_context(make_engine: EngineMaker) -> None:
    engine = make_engine(n_ctx=256)
    engine.prefill([TokenSegment((300,) * 250)], CancelToken())
    grammar = engine.json_grammar(json.dumps(PRESENT))

    generation = generate(engine, Sampler(SamplingSettings()), CancelToken(), max_tokens=100, grammar=grammar)

    assert generation.truncated
    assert generation.n_tokens == 256 - 250 + 1


def test_streamed_text_only_grows(counted: CountedEngine) -> None:
    shown: list[str] = []

    final = counted.say(TWO, on_text=shown.append).text

    assert shown[0].startswith('{"present":')
    assert all(final.startswith(text) for text in shown)


def test_sampling_keeps_to_the_schema(counted: CountedEngine) -> None:
    texts = [json.loads(counted.say(TWO, temperature=2.0).text) for _ in range(3)]

    assert all(value['what'] in ('red car', 'red truck', 'table') for value in texts)


def test_a_stopped_answer_keeps_what_was_forced(engine: LlamaCppEngine) -> None:
    engine.prefill(PROMPT, CancelToken())
    cancel = CancelToken()
    cancel.set()

    generation = generate(
        engine, Sampler(SamplingSettings()), cancel, max_tokens=50, grammar=engine.json_grammar(json.dumps(PRESENT))
    )

    assert generation.interrupted is not None
    assert generation.text.startswith('{"present"')


# The converter's grammars do not parse with quotes and backslashes: BAD_FORMAT.
TEXTS = st.text(
    st.characters(codec='utf-8', exclude_categories=('Cc', 'Cs'), exclude_characters='"\\'), min_size=1, max_size=8
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS, TEXTS)
@example('a', '🐻')
@example('🐻 ï', '東京')
def test_any_key_and_any_constant_are_spelled(engine: LlamaCppEngine, key: str, constant: str) -> None:
    expected = {key: constant, 'n': 7}
    schema = an_object(**{key: {'const': constant}}, **({} if key == 'n' else {'n': {'const': 7}}))
    engine.prefill(PROMPT, CancelToken())
    grammar = engine.json_grammar(json.dumps(schema))

    text = generate(engine, Sampler(SamplingSettings()), CancelToken(), max_tokens=400, grammar=grammar).text

    assert json.loads(text) == (expected if key != 'n' else {'n': constant})


def test_json_is_spaced_in_one_way(counted: CountedEngine) -> None:
    text = counted.say(NESTED).text

    assert text == json.dumps(json.loads(text))


def test_a_choice_that_begins_with_no_byte_of_its_own_would_go_unnoticed() -> None:
    pieces = [bytes([value]) for value in range(256)]
    without_a = pieces[:0x61] + pieces[0x62:]

    assert SingleBytes.of(pieces, 256) is not None
    assert SingleBytes.of([*without_a, b'', b'ba'], 256) is not None
    assert SingleBytes.of([*without_a, b'ab'], 256) is None
