"""The language engine on a tiny real GGUF: right numbers, reuse to the bit, and no call that leaves it unusable."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tiny_models
from numpy.typing import NDArray

from mobilevlm_ros.errors import AnswerFormatError, EngineError, InterruptedAnswerError, QuestionTooLongError
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.language import EmbeddingSegment, LanguageOptions, Segment, TokenSegment
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine
from mobilevlm_ros.types import ResultCode

EngineMaker = Callable[..., LlamaCppEngine]
ImageMaker = Callable[..., EmbeddingSegment]

BEFORE = TokenSegment((1, 300, 301))
AFTER = TokenSegment((310, 311, 312, 313))
OTHER = TokenSegment((320, 321))


def logits_of(engine: LlamaCppEngine, *segments: Segment) -> NDArray[np.float32]:
    engine.prefill(segments, CancelToken())
    return engine.logits().copy()


@pytest.fixture(scope='module')
def weights(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.Weights:
    """What the tiny GGUF holds, under Hugging Face's names."""
    return tiny_models.write_gguf(tmp_path_factory.mktemp('weights') / 'tiny.gguf')


@pytest.fixture(scope='module')
def reference(weights: tiny_models.Weights) -> Any:
    """The same weights in transformers' Llama."""
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


# -- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('n', [1, 2, 17, 200])
def test_logits_are_those_of_transformers(engine: LlamaCppEngine, reference: Any, n: int) -> None:
    import torch

    tokens = tuple(int(token) for token in np.random.default_rng(n).integers(3, 400, n))

    ours = logits_of(engine, TokenSegment(tokens))

    with torch.no_grad():
        expected = reference(torch.tensor([tokens])).logits[0, -1].numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_embeddings_in_equal_tokens_in(engine: LlamaCppEngine, weights: tiny_models.Weights) -> None:
    table = weights['model.embed_tokens.weight']
    image = EmbeddingSegment('as tokens', 4, lambda: table[list(AFTER.tokens)])

    from_tokens = logits_of(engine, BEFORE, AFTER, OTHER)
    engine.forget()
    from_rows = logits_of(engine, BEFORE, image, OTHER)

    assert np.abs(from_tokens - from_rows).max() <= 1e-5


def test_tokens_one_by_one_equal_a_batch(engine: LlamaCppEngine) -> None:
    batch = logits_of(engine, TokenSegment((1, 300, 301, 302)))
    engine.forget()
    engine.prefill([TokenSegment((1,))], CancelToken())
    for token in (300, 301, 302):
        engine.append([token], CancelToken())

    np.testing.assert_allclose(engine.logits(), batch, atol=1e-5)


def test_a_prompt_longer_than_a_batch_is_split(make_engine: EngineMaker) -> None:
    prompt = TokenSegment(tuple(range(300, 400)))
    whole = logits_of(make_engine(n_batch=128), prompt)

    split = logits_of(make_engine(n_batch=7), prompt)

    np.testing.assert_allclose(split, whole, atol=1e-4)


def test_an_image_longer_than_a_batch_is_split(make_engine: EngineMaker, image_segment: ImageMaker) -> None:
    image = image_segment(1, n_positions=50)
    whole = logits_of(make_engine(n_batch=128), BEFORE, image, AFTER)

    split = logits_of(make_engine(n_batch=8), BEFORE, image, AFTER)

    np.testing.assert_allclose(split, whole, atol=1e-4)


@pytest.fixture(scope='module')
def wide_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with heads as wide as a block of q8_0."""
    path = tmp_path_factory.mktemp('wide') / 'wide.gguf'
    tiny_models.write_gguf(path, tiny_models.TinyLlama(n_heads=2))
    return path


@pytest.mark.parametrize('kv_type', ['f16', 'q8_0'])
def test_smaller_key_and_value_types_stay_close(make_engine: EngineMaker, wide_gguf: Path, kv_type: str) -> None:
    exact = logits_of(make_engine(wide_gguf), BEFORE, AFTER)

    smaller = logits_of(make_engine(wide_gguf, kv_type=kv_type), BEFORE, AFTER)

    assert 0 < np.abs(smaller - exact).max() < 0.5


# -- what it is ---------------------------------------------------------------------------------------------------


def test_it_says_what_it_is(engine: LlamaCppEngine, weights: tiny_models.Weights) -> None:
    assert engine.n_ctx == 512
    assert engine.n_embd == 64
    assert 'llama' in engine.description
    assert len(logits_of(engine, BEFORE)) == len(weights['lm_head.weight'])


@pytest.mark.parametrize('text', ['', 'the red car', ' a  b ', 'naïve 東京 🐻', 'line\nline\t.', 'x' * 3000])
def test_pieces_spell_the_text(engine: LlamaCppEngine, text: str) -> None:
    spelled = b''.join(engine.piece(token) for token in engine.tokenize(text)).decode()

    assert spelled.removeprefix(' ') == text or spelled == text


def test_the_start_token_is_added_on_demand(engine: LlamaCppEngine) -> None:
    assert engine.tokenize('car', bos=True) == [1, *engine.tokenize('car')]


def test_control_tokens_are_read_on_demand(engine: LlamaCppEngine) -> None:
    assert engine.tokenize('</s>', special=True)[-1] == 2
    assert 2 not in engine.tokenize('</s>')


def test_the_end_token_ends_and_spells_nothing(engine: LlamaCppEngine) -> None:
    assert engine.end_token == 2
    assert engine.is_end(2)
    assert not engine.is_end(300)
    assert engine.piece(2) == b''


# -- reuse --------------------------------------------------------------------------------------------------------


def test_a_prompt_is_computed_once(engine: LlamaCppEngine, image_segment: ImageMaker) -> None:
    image = image_segment(1)

    cold = engine.prefill([BEFORE, image, AFTER], CancelToken())
    warm = engine.prefill([BEFORE, image, OTHER], CancelToken())

    assert (cold.n_positions, cold.n_reused) == (3 + 4 + 4, 0)
    assert (warm.n_positions, warm.n_reused) == (3 + 4 + 2, 3 + 4)


def test_a_held_image_is_not_made_again(engine: LlamaCppEngine) -> None:
    calls = []

    def rows() -> NDArray[np.float32]:
        calls.append(1)
        return np.zeros((2, 64), np.float32)

    image = EmbeddingSegment('counted', 2, rows)
    engine.prefill([BEFORE, image, AFTER], CancelToken())
    engine.prefill([BEFORE, image, OTHER], CancelToken())

    assert calls == [1]


def test_warm_logits_are_cold_logits_to_the_bit(make_engine: EngineMaker, image_segment: ImageMaker) -> None:
    image = image_segment(1)
    warm_engine = make_engine()
    warm_engine.prefill([BEFORE, image, AFTER], CancelToken())
    warm_engine.append([330, 331], CancelToken())

    warm = logits_of(warm_engine, BEFORE, image, OTHER)

    np.testing.assert_array_equal(warm, logits_of(make_engine(), BEFORE, image, OTHER))


@pytest.mark.parametrize('kv_type', ['f16', 'f32', 'q8_0'])
def test_a_restored_state_is_a_cold_one_to_the_bit(
    make_engine: EngineMaker, wide_gguf: Path, image_segment: ImageMaker, kv_type: str
) -> None:
    first, second = image_segment(1), image_segment(2)
    engine = make_engine(wide_gguf, kv_type=kv_type)
    engine.prefill([BEFORE, first, AFTER], CancelToken())
    engine.prefill([BEFORE, second, AFTER], CancelToken())

    stats = engine.prefill([BEFORE, first, OTHER], CancelToken())

    assert stats.n_reused == 3 + 4
    np.testing.assert_array_equal(
        engine.logits(), logits_of(make_engine(wide_gguf, kv_type=kv_type), BEFORE, first, OTHER)
    )


def test_images_are_never_mixed_up(make_engine: EngineMaker, image_segment: ImageMaker) -> None:
    engine = make_engine(frame_cache=2)
    expected = {n: logits_of(make_engine(frame_cache=0), BEFORE, image_segment(n), AFTER) for n in range(4)}

    for n in np.random.default_rng(0).integers(0, 4, 25):
        np.testing.assert_array_equal(logits_of(engine, BEFORE, image_segment(int(n)), AFTER), expected[int(n)])


def test_the_state_used_longest_ago_goes_first(make_engine: EngineMaker, image_segment: ImageMaker) -> None:
    engine = make_engine(frame_cache=2)

    def ask(number: int) -> int:
        return engine.prefill([BEFORE, image_segment(number), AFTER], CancelToken()).n_reused

    ask(1)
    ask(2)
    ask(1)
    ask(3)

    assert [engine.holds([BEFORE, image_segment(number)]) for number in (1, 2, 3)] == [True, False, True]
    assert ask(2) == 3  # what comes before the image is in every prompt
    assert ask(3) == 7


def test_without_a_cache_only_the_working_sequence_is_reused(
    make_engine: EngineMaker, image_segment: ImageMaker
) -> None:
    engine = make_engine(frame_cache=0)
    engine.prefill([BEFORE, image_segment(1), AFTER], CancelToken())
    assert engine.prefill([BEFORE, image_segment(1), OTHER], CancelToken()).n_reused == 7

    engine.prefill([BEFORE, image_segment(2), AFTER], CancelToken())

    assert engine.prefill([BEFORE, image_segment(1), OTHER], CancelToken()).n_reused == 3


def test_what_was_forgotten_is_computed_again(engine: LlamaCppEngine, image_segment: ImageMaker) -> None:
    segments = [BEFORE, image_segment(1), AFTER]
    before = logits_of(engine, *segments)

    engine.forget()

    assert engine.n_past == 0
    assert not engine.holds(segments[:2])
    assert engine.prefill(segments, CancelToken()).n_reused == 0
    np.testing.assert_array_equal(engine.logits(), before)


def test_an_appended_answer_is_no_part_of_the_next_prompt(make_engine: EngineMaker) -> None:
    engine = make_engine()
    engine.prefill([BEFORE, AFTER], CancelToken())
    engine.append([330, 331, 332], CancelToken())

    again = logits_of(engine, BEFORE, AFTER)

    assert engine.n_past == 7
    np.testing.assert_array_equal(again, logits_of(make_engine(), BEFORE, AFTER))


def test_rewind_takes_back_what_was_appended(engine: LlamaCppEngine) -> None:
    engine.prefill([BEFORE], CancelToken())
    engine.append([330], CancelToken())
    expected = engine.logits().copy()
    engine.append([331, 332], CancelToken())

    engine.rewind(3)

    assert engine.n_past == 3
    engine.append([330], CancelToken())
    np.testing.assert_array_equal(engine.logits(), expected)


def test_logits_before_anything_was_computed_are_an_error(engine: LlamaCppEngine) -> None:
    with pytest.raises(EngineError, match='no logits'):
        engine.logits()


# -- too long -----------------------------------------------------------------------------------------------------


def test_a_prompt_beyond_the_context_is_refused_and_the_next_works(make_engine: EngineMaker) -> None:
    engine = make_engine(n_ctx=256)
    expected = logits_of(make_engine(n_ctx=256), BEFORE, AFTER)

    with pytest.raises(QuestionTooLongError, match='takes 303 positions, but the context has 256'):
        engine.prefill([BEFORE, TokenSegment((300,) * 300)], CancelToken())

    np.testing.assert_array_equal(logits_of(engine, BEFORE, AFTER), expected)


def test_a_prompt_that_fills_the_context_leaves_no_room_to_answer(make_engine: EngineMaker) -> None:
    engine = make_engine(n_ctx=256)

    with pytest.raises(QuestionTooLongError):
        engine.prefill([TokenSegment((300,) * 256)], CancelToken())

    engine.prefill([TokenSegment((300,) * 255)], CancelToken())
    engine.append([301], CancelToken())
    with pytest.raises(QuestionTooLongError, match='end of the context'):
        engine.append([302], CancelToken())
    assert engine.n_past == 256


# -- cancelling ---------------------------------------------------------------------------------------------------


class WatchedToken(CancelToken):
    """Tells when somebody began to compute under it."""

    def __init__(self) -> None:
        super().__init__()
        self.computing = threading.Event()

    @contextmanager
    def on_set(self, callback: Callable[[], None]) -> Iterator[None]:
        with super().on_set(callback):
            self.computing.set()
            yield


@contextmanager
def canceled_while_computing() -> Iterator[WatchedToken]:
    """A token that another thread sets as soon as llama.cpp computes."""
    token = WatchedToken()

    def cancel() -> None:
        if token.computing.wait(10):
            token.set()

    thread = threading.Thread(target=cancel)
    thread.start()
    yield token
    token.computing.set()
    thread.join()


def test_cancel_before_a_prefill(engine: LlamaCppEngine) -> None:
    cancel = CancelToken()
    cancel.set(ResultCode.CANCELED, 'not needed')

    with pytest.raises(InterruptedAnswerError, match='not needed'):
        engine.prefill([BEFORE, AFTER], cancel)

    assert engine.n_past == 0
    assert engine.perf().n_prompt_eval <= 1


def test_cancel_in_the_middle_of_a_batch_stops_within_it(make_engine: EngineMaker, big_gguf: Path) -> None:
    engine = make_engine(big_gguf, n_ctx=2048, n_batch=2048)
    long_prompt = TokenSegment((1, *np.random.default_rng(0).integers(3, 400, 1500).tolist()))
    started_s = time.monotonic()
    engine.prefill([long_prompt], CancelToken())
    whole_s = time.monotonic() - started_s
    expected = engine.logits().copy()
    engine.forget()

    with canceled_while_computing() as cancel:
        started_s = time.monotonic()
        with pytest.raises(InterruptedAnswerError):
            engine.prefill([long_prompt], cancel)
        canceled_s = time.monotonic() - started_s

    assert canceled_s < whole_s / 2
    assert engine.n_past == 0
    np.testing.assert_array_equal(logits_of(engine, long_prompt), expected)


def test_cancel_between_segments_keeps_what_was_done(make_engine: EngineMaker) -> None:
    engine, cancel = make_engine(), CancelToken()

    def rows() -> NDArray[np.float32]:
        cancel.set()
        return np.ones((4, 64), np.float32)

    segments = [BEFORE, EmbeddingSegment('image', 4, rows), AFTER]

    with pytest.raises(InterruptedAnswerError):
        engine.prefill(segments, cancel)

    assert engine.n_past == 3
    assert engine.prefill(segments, CancelToken()).n_reused == 3
    np.testing.assert_array_equal(engine.logits(), logits_of(make_engine(), *segments))


def test_cancel_between_batches_of_an_image_takes_the_image_back(
    make_engine: EngineMaker, image_segment: ImageMaker
) -> None:
    class SetAtTheSecondBatchOfTheImage(CancelToken):
        n_calls = 0

        @contextmanager
        def on_set(self, callback: Callable[[], None]) -> Iterator[None]:
            self.n_calls += 1
            with super().on_set(callback):
                if self.n_calls == 3:  # one batch before the image, one of it
                    self.set()
                yield

    engine, segments = make_engine(n_batch=4), [BEFORE, image_segment(1, n_positions=8), AFTER]

    with pytest.raises(InterruptedAnswerError):
        engine.prefill(segments, SetAtTheSecondBatchOfTheImage())

    assert engine.n_past == 3
    np.testing.assert_array_equal(logits_of(engine, *segments), logits_of(make_engine(n_batch=4), *segments))


def test_cancel_while_appending_takes_nothing_with_it(make_engine: EngineMaker, big_gguf: Path) -> None:
    engine = make_engine(big_gguf, n_ctx=1024, n_batch=1024)
    engine.prefill([BEFORE], CancelToken())

    with canceled_while_computing() as cancel, pytest.raises(InterruptedAnswerError):
        engine.append([300] * 800, cancel)

    assert engine.n_past == 3
    engine.append([300], CancelToken())
    fresh = make_engine(big_gguf, n_ctx=1024, n_batch=1024)
    fresh.prefill([BEFORE], CancelToken())
    fresh.append([300], CancelToken())
    np.testing.assert_array_equal(engine.logits(), fresh.logits())


def test_a_deadline_stops_a_prefill_with_its_code(make_engine: EngineMaker, big_gguf: Path) -> None:
    engine, cancel = make_engine(big_gguf, n_ctx=2048, n_batch=2048), CancelToken()
    long_prompt = TokenSegment((300,) * 2000)

    with cancel.deadline(time.monotonic() + 0.02), pytest.raises(InterruptedAnswerError) as caught:
        engine.prefill([long_prompt], cancel)

    assert caught.value.code is ResultCode.TIMEOUT
    assert len(logits_of(engine, BEFORE)) > 0


def test_an_error_of_the_image_leaves_a_usable_engine(make_engine: EngineMaker) -> None:
    engine = make_engine()

    def rows() -> NDArray[np.float32]:
        raise EngineError('the vision engine failed')

    with pytest.raises(EngineError, match='vision engine failed'):
        engine.prefill([BEFORE, EmbeddingSegment('bad', 4, rows), AFTER], CancelToken())

    np.testing.assert_array_equal(logits_of(engine, BEFORE, AFTER), logits_of(make_engine(), BEFORE, AFTER))


@pytest.mark.parametrize('shape', [(3, 64), (4, 32), (4,)])
def test_rows_of_another_shape_are_an_error(engine: LlamaCppEngine, shape: Sequence[int]) -> None:
    image = EmbeddingSegment('bad', 4, lambda: np.zeros(shape, np.float32))

    with pytest.raises(EngineError, match='mixes two models'):
        engine.prefill([BEFORE, image, AFTER], CancelToken())

    assert len(logits_of(engine, BEFORE)) > 0


# -- loading and closing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('share', [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_an_error_that_names_it(tiny_gguf: Path, tmp_path: Path, share: float) -> None:
    data = tiny_gguf.read_bytes()
    path = tmp_path / 'cut.gguf'
    path.write_bytes(data[: int(len(data) * share)])

    with pytest.raises(EngineError, match=r'could not load the language model .*cut\.gguf.*mobilevlm build'):
        LlamaCppEngine(path, LanguageOptions(n_ctx=64))


@pytest.mark.parametrize('content', [b'GGUF' + b'\xff' * 100, b'no model at all' * 10], ids=['header', 'text'])
def test_a_file_that_is_no_gguf_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / 'bad.gguf'
    path.write_bytes(content)

    with pytest.raises(EngineError, match=r'bad\.gguf'):
        LlamaCppEngine(path, LanguageOptions(n_ctx=64))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r'nothing\.gguf'):
        LlamaCppEngine(tmp_path / 'nothing.gguf', LanguageOptions(n_ctx=64))


def test_the_error_tells_llama_cpps_own_reason(tmp_path: Path) -> None:
    (tmp_path / 'bad.gguf').write_bytes(b'MLMODEL\0' * 20)

    with pytest.raises(EngineError, match=r'\(.*(magic|invalid|failed).*\)'):
        LlamaCppEngine(tmp_path / 'bad.gguf', LanguageOptions(n_ctx=64))


def write_adapter(path: Path, tensors: dict[str, NDArray[np.float32]], alpha: float = 8.0) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, 'llama')
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string('adapter.type', 'lora')
    writer.add_float32('adapter.lora.alpha', alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def low_rank(n_out: int, n_in: int, rank: int = 4) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    random = np.random.default_rng(7)
    a = random.normal(size=(rank, n_in)).astype(np.float32) * 0.1
    b = random.normal(size=(n_out, rank)).astype(np.float32) * 0.1
    return a, b


def test_an_adapter_acts_as_if_merged(
    make_engine: EngineMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = low_rank(64, 128)
    write_adapter(
        tmp_path / 'lora.gguf', {'blk.1.ffn_down.weight.lora_a': a, 'blk.1.ffn_down.weight.lora_b': b}, alpha=8.0
    )
    original = tiny_models.llama_weights

    def merged(*args: Any) -> tiny_models.Weights:
        weights = original(*args)
        weights['model.layers.1.mlp.down_proj.weight'] += 8.0 / 4 * b @ a
        return weights

    monkeypatch.setattr(tiny_models, 'llama_weights', merged)
    tiny_models.write_gguf(tmp_path / 'merged.gguf')
    plain = logits_of(make_engine(), BEFORE, AFTER)

    adapted = logits_of(make_engine(adapter=tmp_path / 'lora.gguf'), BEFORE, AFTER)

    np.testing.assert_allclose(adapted, logits_of(make_engine(tmp_path / 'merged.gguf'), BEFORE, AFTER), atol=1e-4)
    assert np.abs(adapted - plain).max() > 0.01


def test_an_adapter_of_another_model_is_an_error(make_engine: EngineMaker, tmp_path: Path) -> None:
    a, b = low_rank(32, 32)
    write_adapter(tmp_path / 'other.gguf', {'blk.0.ffn_down.weight.lora_a': a, 'blk.0.ffn_down.weight.lora_b': b})

    with pytest.raises(EngineError, match=r'could not load the LoRA adapter .*other\.gguf'):
        make_engine(adapter=tmp_path / 'other.gguf')


def test_a_model_is_no_adapter(make_engine: EngineMaker, tiny_gguf: Path) -> None:
    with pytest.raises(EngineError, match='LoRA adapter'):
        make_engine(adapter=tiny_gguf)


def test_a_missing_adapter_is_an_error(make_engine: EngineMaker, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r'LoRA adapter .*nothing\.gguf'):
        make_engine(adapter=tmp_path / 'nothing.gguf')


def test_an_engine_may_be_closed_twice(make_engine: EngineMaker) -> None:
    engine = make_engine()
    engine.prefill([BEFORE], CancelToken())

    engine.close()
    engine.close()


@pytest.mark.parametrize(
    'use',
    [
        lambda engine: engine.prefill([BEFORE], CancelToken()),
        lambda engine: engine.append([300], CancelToken()),
        lambda engine: engine.logits(),
        lambda engine: engine.tokenize('a'),
        lambda engine: engine.piece(300),
        lambda engine: engine.perf(),
        lambda engine: engine.set_threads(1, 1),
        lambda engine: engine.json_grammar('{}'),
        lambda engine: engine.forget(),
    ],
)
def test_a_closed_engine_says_so(make_engine: EngineMaker, use: Callable[[LlamaCppEngine], Any]) -> None:
    engine = make_engine()
    engine.close()

    with pytest.raises(EngineError, match='closed'):
        use(engine)


def resident_mib() -> float:
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20


def test_memory_stays_flat_over_many_frames_and_cancels(make_engine: EngineMaker, image_segment: ImageMaker) -> None:
    engine = make_engine(frame_cache=2)

    def cycle(number: int) -> None:
        image = image_segment(number, n_positions=200)
        engine.prefill([BEFORE, image, AFTER], CancelToken())
        cancel = CancelToken()
        cancel.set()
        with pytest.raises(InterruptedAnswerError):
            engine.prefill([BEFORE, image, OTHER], cancel)
        engine.json_grammar('{"type": "boolean"}').close()

    for number in range(20):
        cycle(number)
    before_mib = resident_mib()
    for number in range(20, 220):  # a state is 0.2 MiB
        cycle(number)

    assert resident_mib() - before_mib < 20


def test_memory_comes_back_when_engines_close_or_fail_to_start(
    make_engine: EngineMaker, big_gguf: Path, tmp_path: Path
) -> None:
    def cycle() -> None:
        make_engine(big_gguf, n_ctx=2048).close()
        with pytest.raises(EngineError):
            make_engine(big_gguf, adapter=tmp_path / 'nothing.gguf')

    for _ in range(2):
        cycle()
    before_mib = resident_mib()
    for _ in range(6):  # keys and values alone are 16 MiB
        cycle()

    assert resident_mib() - before_mib < 40


# -- the rest -----------------------------------------------------------------------------------------------------


def test_counters_move(engine: LlamaCppEngine) -> None:
    before = engine.perf()
    engine.prefill([TokenSegment((300,) * 50)], CancelToken())
    engine.logits()
    for _ in range(3):
        engine.append([301], CancelToken())
        engine.logits()

    after = engine.perf()

    assert (before.prompt_eval_ms, before.eval_ms) == (0, 0)
    assert (after.n_prompt_eval, after.n_eval) == (50, 3)
    assert after.prompt_eval_ms > 0
    assert after.eval_ms > 0


def test_threads_can_be_changed_without_changing_the_answer(make_engine: EngineMaker) -> None:
    engine = make_engine()
    before = logits_of(engine, BEFORE, AFTER)

    engine.set_threads(2, 2)
    engine.forget()
    two = logits_of(engine, BEFORE, AFTER)
    engine.set_threads(0, 0)
    engine.forget()

    np.testing.assert_allclose(two, before, atol=1e-5)
    np.testing.assert_array_equal(logits_of(engine, BEFORE, AFTER), before)


def test_a_grammar_forbids_and_allows(engine: LlamaCppEngine) -> None:
    grammar = engine.json_grammar('{"enum": ["red", "blue"]}')
    quote = engine.tokenize('"')[-1]
    word = engine.tokenize('the')[-1]

    assert grammar.allows(quote)
    assert not grammar.allows(word)
    masked = grammar.masked(np.zeros(len(logits_of(engine, BEFORE)), np.float32))
    assert masked[quote] == 0
    assert masked[word] == -np.inf
    assert not grammar.allows(engine.end_token)


def test_a_grammar_may_be_closed_twice(engine: LlamaCppEngine) -> None:
    grammar = engine.json_grammar('{"type": "null"}')

    grammar.close()
    grammar.close()


@pytest.mark.parametrize(
    'schema',
    [
        {'enum': []},
        {'not': {}},
        {'$ref': '#'},
        {'$ref': '#/nowhere'},
        {'anyOf': []},
        {'oneOf': []},
        {'type': []},
        {'type': 'string', 'pattern': 'unanchored'},
        {'type': 'string', 'pattern': '^(()*)*$'},
        {'type': 'string', 'pattern': '^\ud800$'},
        {'type': 'string', 'pattern': '^\0$'},
        {'properties': {'a "b"': {'const': 1}}, 'required': ['a "b"']},
        {'properties': {'a': {'$ref': '#/properties/a'}}},
    ],
    ids=str,
)
def test_a_schema_without_a_grammar_is_bad_format(engine: LlamaCppEngine, schema: Any) -> None:
    with pytest.raises(AnswerFormatError, match='simplify'):
        engine.json_grammar(json.dumps(schema))

    assert engine.json_grammar('{"type": "string"}').allows(engine.tokenize('"')[-1])


@pytest.mark.parametrize(
    'schema',
    [
        {},
        {'allOf': []},
        {'type': 'integer', 'minimum': 5, 'maximum': 2},
        {'type': 'string', 'minLength': 5, 'maxLength': 2},
        {'type': 'string', 'maxLength': 1000},
        {'type': 'array', 'items': {'type': 'array', 'maxItems': 1000}, 'maxItems': 1000},
        {'type': 'string', 'pattern': '^(a?){140}$'},
        {'type': 'string', 'pattern': '^' + 'a?' * 99 + '$'},
        {'type': 'string', 'format': 'date'},
        {'const': ''},
        {'properties': {f'p{i}': {'type': 'string'} for i in range(200)}},
    ],
    ids=lambda schema: str(schema)[:50],
)
def test_weird_schemas_within_the_limits_have_a_grammar(engine: LlamaCppEngine, schema: Any) -> None:
    grammar = engine.json_grammar(json.dumps(schema))
    masked = grammar.masked(np.zeros(len(logits_of(engine, BEFORE)), np.float32))

    assert np.isfinite(masked).any()
