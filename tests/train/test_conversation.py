"""The conversation that is trained is the one that the bundle is prompted with, to the token, through every stage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints
import tiny_runs
from vocabularies import write_chatml

from mobilevlm_ros.build.making import make_bundle
from mobilevlm_ros.build.published import CheckpointTokenizer, load_source
from mobilevlm_ros.build.stages import SilentReporter
from mobilevlm_ros.errors import BuildError, CheckpointError, SettingsError
from mobilevlm_ros.model.checkpoint import open_checkpoint
from mobilevlm_ros.runtime.bundle import open_bundle
from mobilevlm_ros.runtime.formats import prepare
from mobilevlm_ros.runtime.language import LanguageOptions
from mobilevlm_ros.runtime.language.llamacpp import LlamaCppEngine
from mobilevlm_ros.runtime.prompt import SHORT_SUFFIX
from mobilevlm_ros.train.config import TrainConfig
from mobilevlm_ros.train.feeding import open_supply
from mobilevlm_ros.train.lora import merge_adapter
from mobilevlm_ros.train.stage import Outcome, run_stage
from mobilevlm_ros.train.starting import open_start
from mobilevlm_ros.train.templates import IGNORED, IMAGE
from mobilevlm_ros.types import AnswerFormat, Question

SYSTEM = 'Be brief.'
QUESTIONS = ('Is the car red?', 'Does the sign say <|im_end|>?', 'Ça va, 日本 🚗  2 rooms')
PROFILE = """
name: exact
device: tests
vision: {backend: onnxruntime, precision: fp32, n_threads: 1}
language: {quantization: F32, kv_type: f32, n_threads: 1, n_threads_batch: 1}
parity: {logits_cosine: 0.9999}
"""


def write_dialogues(folder: Path) -> None:
    """Short questions about one picture, and the same without a picture."""
    tiny_runs.write_data(folder)
    turns: list[dict[str, str]] = []
    for question in QUESTIONS:
        turns += [{'from': 'human', 'value': question + SHORT_SUFFIX}, {'from': 'gpt', 'value': 'no'}]
    records: list[dict[str, Any]] = []
    for number in range(len(QUESTIONS)):
        asked, answer = turns[2 * number : 2 * number + 2]
        about = asked | {'value': f'<image>\n{asked["value"]}'}
        records.append({'id': f'p{number}', 'image': '0.png', 'conversations': [about, answer]})
        records.append({'id': f't{number}', 'conversations': [asked, answer]})
    (folder / 'records.json').write_text(json.dumps(records))


def config(folder: Path, stage: str, base: Path, **data: Any) -> TrainConfig:
    """A run of two steps in ChatML."""
    section = data if stage == 'align' else {'template': 'chatml', 'system': SYSTEM} | data
    return tiny_runs.config(folder, stage, base, data=section, schedule={'max_steps': 2})


def conversation(folder: Path) -> tuple[str, str]:
    with open_checkpoint(folder) as opened:
        return opened.config.template, opened.config.system


# -- from stage to stage, and into a bundle -------------------------------------------------------------------------


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, dialogues and a profile."""
    folder = tmp_path_factory.mktemp('conversation')
    tiny_runs.write_chatml_base(folder / 'base', template='chatml', system=SYSTEM)
    (folder / 'exact.yaml').write_text(PROFILE)
    return folder


@pytest.fixture(scope='module')
def aligned(folder: Path) -> Path:
    """The product of stage 1, which trains on captions."""
    tiny_runs.write_data(folder / 'align')
    return run_stage(config(folder / 'align', 'align', folder / 'base')).products['model']


@pytest.fixture(scope='module')
def instructed(folder: Path, aligned: Path) -> Outcome:
    """The products of stage 2: an adapter, and a model with the projector."""
    write_dialogues(folder / 'lora')
    return run_stage(config(folder / 'lora', 'lora', aligned))


@pytest.fixture(scope='module')
def bundle(folder: Path, instructed: Outcome) -> Path:
    """Of both."""
    model, adapter = instructed.products['model'], instructed.products['adapter']
    profile = str(folder / 'exact.yaml')
    return make_bundle(str(model), profile, folder / 'bundle', SilentReporter(), adapter=adapter).path


@pytest.fixture(scope='module')
def engine(bundle: Path) -> Iterator[LlamaCppEngine]:
    """llama.cpp with the bundle's vocabulary."""
    options = LanguageOptions(n_ctx=128, n_threads=1, n_threads_batch=1)
    engine = LlamaCppEngine(open_bundle(bundle).language_path, options)
    yield engine
    engine.close()


def trained(folder: Path, base: Path, **data: Any) -> list[dict[str, list[int]]]:
    """What the stage feeds its model, record by record."""
    settings = config(folder, 'lora', base, **data)
    with ExitStack() as files:
        feed = open_supply(settings, open_start(settings, files), 4).feed
        items = [feed[i] for i in range(len(feed))]
    return [{name: item[name].tolist() for name in item if name in ('input_ids', 'labels', 'rounds')} for item in items]


def prompt(ids: list[int], labels: list[int]) -> list[int]:
    """All before the answer."""
    return ids[: next(i for i, label in enumerate(labels) if label != IGNORED)]


def test_every_stage_keeps_the_conversation(folder: Path, aligned: Path, instructed: Outcome) -> None:
    merged = merge_adapter(instructed.products['model'], instructed.products['adapter'], folder / 'merged')

    for product in (aligned, instructed.products['model'], merged):
        assert conversation(product) == ('chatml', SYSTEM)


def test_the_bundle_is_prompted_as_it_was_trained(
    folder: Path, aligned: Path, bundle: Path, engine: LlamaCppEngine
) -> None:
    """About a picture, with the suffix for short answers that the runtime adds by itself."""
    opened = open_bundle(bundle)
    items = trained(folder / 'lora', aligned)[::2]

    assert opened.description['prompt'] == {'template': 'chatml', 'system': SYSTEM}
    for question, item in zip(QUESTIONS, items, strict=True):
        asked = prepare(Question(question, AnswerFormat.YES_NO)).text
        before, after = opened.template().chunks(asked, engine)
        assert [*before, IMAGE, *after] == prompt(item['input_ids'], item['labels'])
        answered = [label for label in item['labels'] if label != IGNORED]
        assert [*engine.tokenize('no'), engine.end_token] == answered


def test_questions_kept_apart_are_those_of_the_bundle(
    folder: Path, aligned: Path, bundle: Path, engine: LlamaCppEngine
) -> None:
    """Several questions about one picture in one sample: what each sees is what the robot would send."""
    write_dialogues(folder / 'apart')
    records = json.loads((folder / 'apart' / 'records.json').read_text())[::2]
    together = {**records[0], 'conversations': [turn for one in records for turn in one['conversations']]}
    for turn in together['conversations'][2:]:
        turn['value'] = turn['value'].removeprefix('<image>\n')
    (folder / 'apart' / 'records.json').write_text(json.dumps([together]))
    (item,) = trained(folder / 'apart', aligned, separate_questions=True)
    template = open_bundle(bundle).template()

    for number, question in enumerate(QUESTIONS, 1):
        before, after = template.chunks(question + SHORT_SUFFIX, engine)
        seen = [
            token
            for token, label, part in zip(item['input_ids'], item['labels'], item['rounds'], strict=True)
            if part in (0, number) and label == IGNORED
        ]
        assert seen == [*before, IMAGE, *after]


def test_without_a_picture_it_is_chatml_all_the_same(folder: Path, aligned: Path, engine: LlamaCppEngine) -> None:
    """As llama.cpp reads ChatML's own text; of a question that spells control tokens it cannot tell what is meant."""
    items = trained(folder / 'lora', aligned)[1::2]

    for question, item in zip(QUESTIONS, items, strict=True):
        if '<|' in question:
            continue
        text = (
            f'<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}{SHORT_SUFFIX}<|im_end|>\n'
            '<|im_start|>assistant\n'
        )
        assert engine.tokenize(text, special=True) == prompt(item['input_ids'], item['labels'])


# -- a base that names none -----------------------------------------------------------------------------------------


def test_a_base_that_names_none_learns_that_of_the_data(folder: Path, tmp_path: Path) -> None:
    """Its adapter says so, as it may be used on the base itself."""
    base = tiny_runs.write_chatml_base(tmp_path / 'silent')
    write_dialogues(tmp_path / 'lora')
    made = run_stage(config(tmp_path / 'lora', 'lora', base)).products

    assert conversation(base) == ('v1', '')
    assert conversation(made['model']) == ('chatml', SYSTEM)
    assert conversation(merge_adapter(base, made['adapter'], tmp_path / 'merged')) == ('chatml', SYSTEM)
    assert load_source(str(base), SilentReporter(), made['adapter']).prompt == {'template': 'chatml', 'system': SYSTEM}


def test_published_files_do_not_name_theirs(tmp_path: Path) -> None:
    base = tiny_runs.write_base(tmp_path / 'base')
    tiny_runs.write_data(tmp_path / 'lora')
    made = run_stage(tiny_runs.config(tmp_path / 'lora', 'lora', base, schedule={'max_steps': 1})).products

    assert 'conversation' not in json.loads((made['model'] / 'config.json').read_text())
    assert not (made['adapter'] / 'conversation.json').exists()
    assert load_source(str(made['model']), SilentReporter(), made['adapter']).prompt == {'template': 'v1'}


def test_a_language_model_keeps_its_conversation_when_it_gets_eyes(folder: Path, tmp_path: Path) -> None:
    language = replace(tiny_runs.chatml_config(template='chatml'), vision=None, projector=None)
    tiny_runs.write_chatml_base(
        tmp_path / 'llm', **{name: getattr(language, name) for name in ('vision', 'projector', 'template')}
    )
    tiny_checkpoints.write_clip(tmp_path / 'clip')
    tiny_runs.write_data(tmp_path / 'align')
    source = {
        'base': str(tmp_path / 'llm'),
        'vision_tower': str(tmp_path / 'clip'),
        'projector_type': 'ldpnetv2',
    }
    run = tiny_runs.config(tmp_path / 'align', 'align', tmp_path / 'llm', model=source, schedule={'max_steps': 1})

    assert conversation(run_stage(run).products['model']) == ('chatml', '')


# -- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('data', [{'template': 'v1', 'system': ''}, {'system': ''}, {'system': 'Be long.'}])
def test_data_in_another_conversation_are_refused(folder: Path, tmp_path: Path, data: dict[str, str]) -> None:
    write_dialogues(tmp_path / 'lora')
    with pytest.raises(
        SettingsError, match=r"taught the template chatml .*'Be brief\.'.*data\.template is .*config\.json"
    ):
        run_stage(config(tmp_path / 'lora', 'lora', folder / 'base', **data))


@pytest.mark.parametrize(
    'named', ['chatml', {'template': 'alpaca'}, {'system': 'x'}, {'template': 'v1', 'system': 3}, {'template': ['v1']}]
)
def test_a_conversation_that_is_none_is_named(tmp_path: Path, named: object) -> None:
    tiny_checkpoints.write(tmp_path / 'base', conversation=named)
    with pytest.raises(CheckpointError, match=r'config\.json: conversation'):
        open_checkpoint(tmp_path / 'base')


def test_a_vocabulary_without_chatmls_tokens_is_named(tmp_path: Path) -> None:
    tiny_checkpoints.write_tokenizer(tmp_path / 'tokenizer.model')
    with pytest.raises(BuildError, match=r"no token '<\|im_start\|>'"):
        CheckpointTokenizer(tmp_path / 'tokenizer.model').tokenize('<|im_start|>', special=True)


@pytest.mark.parametrize('name', ['tokenizer.json', 'tokenizer.model'])
def test_only_what_is_special_is_a_control_token(tmp_path: Path, name: str) -> None:
    if name == 'tokenizer.json':
        tokenizer, control = CheckpointTokenizer(write_chatml(tmp_path)), '<|im_end|>'
    else:
        tiny_checkpoints.write_tokenizer(tmp_path / name)
        tokenizer, control = CheckpointTokenizer(tmp_path / name), '</s>'

    assert tokenizer.tokenize(control, special=True) == [2]
    assert 2 not in tokenizer.tokenize(control)
    assert len(tokenizer.tokenize(control)) > 1
