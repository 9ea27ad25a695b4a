"""Each contestant really computes what it is timed for, on tiny models in the real formats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

from mobilevlm_ros.bench.process import Contestant
from mobilevlm_ros.bench.scenes import CHOICES, YES_NO_QUESTIONS, scene
from mobilevlm_ros.errors import DependencyError, EngineError
from mobilevlm_ros.model.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from mobilevlm_ros.model.layout import PROJECTOR_PREFIX, projector_tensors, tower_tensors
from mobilevlm_ros.runtime.language import LanguageOptions
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine

QUESTION = 'What is on the table?'
SIZE = {'height': 40, 'width': 56}
# llama.cpp's graph of LDPv2 has 24 patches a side as a constant.
VISION = VisionConfig('tiny', image_size=96, patch_size=4, width=64, n_heads=4, n_blocks=2, mlp_width=128)


@pytest.fixture(scope='module')
def ours(tiny_bundle: Path) -> Iterator[Contestant]:
    with Contestant('ours', bundle=str(tiny_bundle), n_threads=1, **SIZE) as contestant:
        yield contestant


@pytest.fixture(scope='module')
def mmproj(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mobilevlm_ros.build.mmproj_gguf import write_mmproj_gguf

    n_embd = tiny_models.TinyLlama.n_embd
    language = LanguageConfig(n_embd=n_embd, n_heads=4, n_kv_heads=4)
    config = ModelConfig('tiny', language, VISION, ProjectorConfig('ldpnetv2'))
    shapes = dict(tower_tensors(VISION))
    shapes |= {PROJECTOR_PREFIX + name: s for name, s in projector_tensors(ProjectorConfig('ldpnetv2'), 64, n_embd)}
    random = np.random.default_rng(0)
    weights = {name: random.normal(0.0, 0.1, s).astype(np.float32) for name, s in shapes.items()}
    path = tmp_path_factory.mktemp('mmproj') / 'mmproj.gguf'
    write_mmproj_gguf(weights, config, path)
    return path


def mtmd_arguments(ours: Contestant, bundle: Path, mmproj: Path) -> dict[str, Any]:
    prompt = ours.call('prompt_parts', question='{question}')[2]
    return {'gguf': str(bundle / 'language.gguf'), 'mmproj': str(mmproj), 'n_threads': 1, 'prompt': prompt, **SIZE}


def test_no_two_scenes_are_equal() -> None:
    assert scene(1, 40, 56).shape == (40, 56, 3)
    assert np.array_equal(scene(1, 40, 56), scene(1, 40, 56))
    assert not np.array_equal(scene(1, 40, 56), scene(2, 40, 56))


def test_a_second_question_on_a_frame_is_known_and_a_new_frame_is_not(ours: Contestant) -> None:
    cold = ours.call('first_token', index=1, question=QUESTION)
    known = ours.call('first_token', index=1, question='Is it red?')
    other = ours.call('first_token', index=2, question=QUESTION)
    assert cold['vision_s'] > 0
    assert other['vision_s'] > 0
    assert known['vision_s'] == 0
    assert known['reused_tokens'] > cold['reused_tokens']
    assert cold['total_s'] >= cold['vision_s']


def test_a_first_question_after_the_start_finds_nothing_and_the_next_one_the_prompt(ours: Contestant) -> None:
    first = ours.call('first_question', index=20, question=QUESTION)
    second = ours.call('first_token', index=21, question=QUESTION)
    assert first['reused_tokens'] == 0
    assert first['vision_s'] > 0
    assert second['reused_tokens'] == len(ours.call('prompt_parts', question=QUESTION)[0])


def test_the_prompt_is_held_again_after_other_work(ours: Contestant) -> None:
    ours.call('decode', tokens=ours.call('tokens', text='the table is red'), n_tokens=2)
    n_held = ours.call('hold_prompt')
    assert n_held == len(ours.call('prompt_parts', question=QUESTION)[0])
    assert ours.call('first_token', index=22, question=QUESTION)['reused_tokens'] == n_held


def test_closed_questions_are_answered(ours: Contestant) -> None:
    for arguments in ({'format_name': 'YES_NO'}, {'format_name': 'CHOICE', 'choices': CHOICES}):
        assert ours.call('ask', index=1, question='Which?', **arguments)['total_s'] > 0


def test_several_questions_get_the_same_answers_together_and_in_turn(ours: Contestant) -> None:
    ours.call('first_token', index=3, question=QUESTION)
    together, in_turn = (
        ours.call('ask_several', index=3, questions=YES_NO_QUESTIONS, together=together) for together in (True, False)
    )
    assert together['texts'] == in_turn['texts']
    assert len(together['texts']) == 8


def test_an_answer_goes_on_to_the_wanted_length(ours: Contestant) -> None:
    row = ours.call('answer', index=4, side=48, question=QUESTION, n_tokens=20)
    assert (row['sampled'], row['evaluated']) == (20, 19)
    assert row['total_s'] >= row['vision_s'] + row['prompt_s'] + row['eval_s'] + row['sample_s']
    text = ours.call('complete', prompt='the car is', n_tokens=20)
    assert (text['sampled'], text['evaluated']) == (20, 19)


def test_a_question_that_cannot_be_answered_is_an_error_not_a_figure(ours: Contestant) -> None:
    with pytest.raises(EngineError, match='was not answered: BAD_QUESTION'):
        ours.call('first_token', index=1, question=' ')


def test_end_tokens_do_not_end_a_benchmark(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / 'ends.gguf'
    tiny_models.write_gguf(path)
    reader = gguf.GGUFReader(path, 'r+')
    output = next(tensor for tensor in reader.tensors if tensor.name == 'output.weight')
    output.data[:] = 0.0  # all tokens are equally probable: the first of them is chosen, <unk>
    reader.fields['tokenizer.ggml.eos_token_id'].parts[-1][0] = 0
    del reader, output
    engine = LlamaCppEngine(path, LanguageOptions(n_threads=1, n_threads_batch=1))
    assert engine.is_end(0)
    engine.close()
    with Contestant('language', gguf=str(path), n_threads=1) as model:
        assert model.call('complete', prompt='the', n_tokens=9)['sampled'] == 9


def test_a_language_model_alone_takes_random_rows_for_an_image(tiny_bundle: Path) -> None:
    with Contestant('language', gguf=str(tiny_bundle / 'language.gguf'), n_threads=1) as model:
        row = model.call('answer', index=1, before='a', after='?', n_visual_tokens=30, n_tokens=5)
    assert row['prompt_tokens'] > 30
    assert row['sampled'] == 5


def test_llama_cpps_own_loop_runs(ours: Contestant, tiny_bundle: Path) -> None:
    tokens = ours.call('tokens', text='the table is red')
    with Contestant('llamacpp', gguf=str(tiny_bundle / 'language.gguf'), n_threads=1) as loop:
        assert loop.call('prefill', tokens=tokens) > 0
        assert loop.call('decode', tokens=tokens, n_tokens=4) > 0
        assert loop.call('describe')['kernel']['kernel'] == 'llama.cpp'
        with pytest.raises(EngineError, match='llama_decode failed'):
            loop.call('prefill', tokens=[10**6])


def test_mtmd_sees_the_same_prompt(ours: Contestant, tiny_bundle: Path, mmproj: Path) -> None:
    arguments = mtmd_arguments(ours, tiny_bundle, mmproj)
    try:
        contestant = Contestant('mtmd', **arguments)
    except DependencyError as error:
        pytest.skip(str(error))
    before, after, _ = ours.call('prompt_parts', question=QUESTION)
    with contestant:
        assert contestant.call('describe')['kernel']['kernel'] == 'llama.cpp'
        first = contestant.call('first_token', index=1, question=QUESTION)
    # Its 144 visual tokens, and our text but for the spaces that tokenizers add at the beginning of a stretch.
    assert abs(first['prompt_tokens'] - (len(before) + 144 + len(after))) <= 2
    assert 0 < first['vision_s'] < first['total_s']


def test_mtmd_that_is_missing_is_a_dependency(ours: Contestant, tiny_bundle: Path, mmproj: Path) -> None:
    with pytest.raises(DependencyError, match=r'has no mtmd.*LLAVA_BUILD'):
        Contestant('mtmd', {'MTMD_CPP_LIB': '/nowhere'}, **mtmd_arguments(ours, tiny_bundle, mmproj))


def test_mtmd_says_which_file_it_cannot_load(ours: Contestant, tiny_bundle: Path, tmp_path: Path) -> None:
    bad = tmp_path / 'bad.gguf'
    bad.write_bytes(b'GGUF')
    with pytest.raises((EngineError, DependencyError), match=r'bad\.gguf|has no mtmd'):
        Contestant('mtmd', **mtmd_arguments(ours, tiny_bundle, bad))


def test_pytorch_computes_the_same_positions(ours: Contestant, tmp_path: Path) -> None:
    pytest.importorskip('torch', reason='needs torch: make venv-dev')
    pytest.importorskip('transformers', reason='needs transformers: make venv-dev')
    from mobilevlm_ros.model.publish import init_random

    n_vocab = len(tiny_models.vocabulary()[0])
    language = LanguageConfig(n_vocab=n_vocab, n_embd=64, n_layers=2, n_heads=4, n_kv_heads=4, n_ff=128)
    config = ModelConfig('tiny', language, tiny_models.TINY_VISION, ProjectorConfig('ldpnetv2'))
    init_random(config, tmp_path / 'checkpoint', dtype='fp32')
    before, after, _ = ours.call('prompt_parts', question=QUESTION)
    with Contestant(
        'pytorch',
        checkpoint=str(tmp_path / 'checkpoint'),
        n_threads=1,
        dtype='float32',
        before=before,
        after={QUESTION: after},
        **SIZE,
    ) as model:
        first = model.call('first_token', index=1, question=QUESTION)
        assert first['prompt_tokens'] == ours.call('first_token', index=9, question=QUESTION)['prompt_tokens']
        assert 0 < first['vision_s'] < first['total_s']
        assert model.call('prefill', tokens=before) > 0
        assert model.call('decode', tokens=before, n_tokens=3) > 0
