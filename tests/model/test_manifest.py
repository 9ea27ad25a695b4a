"""Manifests: every one that is shipped can be read and says what the papers say; a wrong one names file and key."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from mobilevlm_ros.errors import SettingsError
from mobilevlm_ros.model import manifest
from mobilevlm_ros.model.config import LanguageConfig, ModelConfig, VisionConfig
from mobilevlm_ros.model.manifest import known_models, open_manifest, read_manifest, read_manifest_files
from mobilevlm_ros.model.mobilevlm import MobileVLM
from mobilevlm_ros.model.projectors import build_projector
from mobilevlm_ros.model.towers import build_tower

PUBLISHED = {
    'mobilevlm-1.7b': 1_686_742_016,
    'mobilevlm-3b': 3_033_981_696,
    'mobilevlm_v2-1.7b': 1_674_121_216,
    'mobilevlm_v2-3b': 3_014_273_536,
    'mobilevlm_v2-7b': 7_062_943_744,
    'mobilellama-1.4b-base': 1_364_297_728,
    'mobilellama-1.4b-chat': 1_364_297_728,
    'mobilellama-2.7b-base': 2_701_560_320,
    'mobilellama-2.7b-chat': 2_701_560_320,
}
RIVALS = {
    'openllama-3b': 3_426_473_600,
    'tinyllama-1.1b': 1_100_048_384,
    'llava-1.5-vicuna-7b': 6_738_415_616 + 303_507_456 + 20_979_712,
    'llava-1.5-openllama-3b': 3_426_473_600 + 303_507_456 + (1024 + 1 + 3200 + 1) * 3200,
    'llava-1.5-tinyllama-1.1b': 1_100_048_384 + 303_507_456 + 6_295_552,
}
ABLATIONS = [name for name in known_models() if name.startswith('ablations/')]
OF_CLIP = [name for name in ABLATIONS if 'table8' not in name or 'clip' in name]
# Visual tokens as the papers' tables print them, but for the two rows that contradict themselves (their manifests).
TOKENS = {
    r'mobilevlm(_v2)?-.*': 144,
    r'mobilellama-.*|openllama-3b|tinyllama-1.1b': 0,
    r'llava-.*': 576,
    r'table[78].*-b16-224-.*': 196,
    r'table7.*-[lg]14-224-.*': 256,
    r'table7.*-336-mlp|table9-pw2': 576,
    r'table7.*-336-ldp|table9-.*-.*': 144,
    r'table8-(gdino-)?(swin|twins).*-224-mlp': 49,
    r'table8-(gdino-)?(swin|twins).*-384-mlp': 144,
}
GOOD: dict[str, Any] = {
    'name': 'mine',
    'parameters': 123,
    'vision': {'name': 'openai/any', 'image_size': 224},
    'projector': {'type': 'ldpnet'},
    'language': {'norm_eps': 1.0e-5},
    'files': {'pytorch_model.bin': {'bytes': 7}},
}


def n_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@cache
def n_language(config: LanguageConfig) -> int:
    with torch.device('meta'):
        model = MobileVLM(ModelConfig('m', config)).language
    assert isinstance(model, LlamaForCausalLM)
    return n_parameters(model)


@cache
def n_tower(config: VisionConfig) -> int:
    with torch.device('meta'):
        return n_parameters(build_tower(config))


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes one manifest into a folder of models of its own."""
    monkeypatch.setattr(manifest, 'shared_file', lambda name: tmp_path / name)
    (tmp_path / 'models').mkdir()

    def write_one(content: Any, name: str = 'mine') -> Path:
        path = tmp_path / 'models' / f'{name}.yaml'
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write_one


def changed(key: str, value: Any) -> dict[str, Any]:
    """The good manifest with one key changed, ``part.key`` for one of a part."""
    content = {name: dict(part) if isinstance(part, dict) else part for name, part in GOOD.items()}
    *parts, last = key.split('.', 1)
    (content[parts[0]] if parts else content)[last] = value
    return content


# -- what is shipped ----------------------------------------------------------------------------------------------


def test_known_are_the_published_the_rivals_and_the_ablations() -> None:
    assert [name for name in known_models() if name not in ABLATIONS] == sorted({**PUBLISHED, **RIVALS})
    assert [sum(f'table{table}' in name for name in ABLATIONS) for table in (7, 8, 9)] == [10, 10, 5]


@pytest.mark.parametrize('name', known_models())
def test_every_manifest_has_the_tokens_of_its_table(name: str) -> None:
    (expected,) = {n for pattern, n in TOKENS.items() if re.fullmatch(pattern, name.rpartition('/')[2])}

    assert read_manifest(name).n_visual_tokens == expected


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_models_have_their_parameters(name: str) -> None:
    with torch.device('meta'):
        model = MobileVLM(read_manifest(name))

    assert n_parameters(model) == open_manifest(name).n_parameters == PUBLISHED[name]


@pytest.mark.parametrize('name', [*RIVALS, *OF_CLIP])
def test_rivals_and_ablations_have_the_parameters_that_they_say(name: str) -> None:
    config = read_manifest(name)
    found = n_language(config.language)
    if config.vision is not None and config.projector is not None:
        with torch.device('meta'):
            projector = build_projector(config.projector, config.vision.width, config.language.n_embd)
        found += n_tower(config.vision) + n_parameters(projector)

    assert found == open_manifest(name).n_parameters == RIVALS.get(name, found)


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_models_say_where_and_under_which_licence(name: str) -> None:
    known = open_manifest(name)

    assert known.config.repo.lower() == f'mtgv/{name}'
    assert re.fullmatch('[0-9a-f]{7}|[0-9a-f]{40}', known.config.revision)
    assert known.licence == 'Apache-2.0'
    assert {'tokenizer.model'} < set(known.files)


def test_known_sizes_and_hashes_of_files_are_told() -> None:
    weights = read_manifest_files('mobilevlm_v2-1.7b')['pytorch_model.bin']

    assert weights.n_bytes == 3_348_457_261
    assert weights.sha256.startswith('cd166484')
    assert read_manifest_files('openllama-3b') == {}


def test_an_ablation_is_found_with_and_without_its_folder() -> None:
    assert read_manifest('table9-pw0-dw1-dws1') == read_manifest('ablations/table9-pw0-dw1-dws1')


@pytest.mark.parametrize(
    'name', ['nano', 'mobilevlm-9b', '', '../models/mobilevlm-3b', 'ablations/../mobilevlm-3b', 'a\n']
)
def test_an_unknown_name_is_told_the_known_ones(name: str) -> None:
    with pytest.raises(
        SettingsError, match=re.escape(f'there is no model {name!r}; the models are llava-1.5-openllama')
    ):
        read_manifest(name)


# -- what is refused ----------------------------------------------------------------------------------------------


def test_earlier_layers_are_a_list_of_any_length(write: Any) -> None:
    write(GOOD | {'vision': GOOD['vision'] | {'also_layers': [-12, -5]}})

    vision = read_manifest('mine').vision
    assert vision is not None
    assert vision.also_layers == (-12, -5)


def test_what_is_not_said_has_its_default(write: Any) -> None:
    write(GOOD)

    config = read_manifest('mine')

    assert config.vision == VisionConfig('openai/any', image_size=224)
    assert config.language == LanguageConfig(norm_eps=1e-5)


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('colour', 1, 'unknown key colour; known are name, aspect'),
        (3, 1, 'unknown key 3'),
        ('vision.imagesize', 1, 'unknown key vision.imagesize; known are name, kind, image_size'),
        ('language.n_embed', 1, 'unknown key language.n_embed'),
        ('vision.image_size', '224', "vision.image_size is '224', expected a whole number"),
        ('vision.image_size', 224.0, 'vision.image_size is 224.0, expected a whole number'),
        ('vision.image_size', True, 'vision.image_size is True, expected a whole number'),
        ('vision.class_token', 1, 'vision.class_token is 1, expected true or false'),
        ('vision.kind', 'siglip', "vision.kind is 'siglip', expected one of clip, timm"),
        ('vision.mean', [1, 2], r'vision.mean is [1, 2], expected a list of 3 numbers'),
        ('vision.mean', [1, 2, 'x'], "vision.mean is 'x', expected a number"),
        ('vision.also_layers', -3, 'vision.also_layers is -3, expected a list'),
        ('vision.also_layers', [-5, '-3'], "vision.also_layers is '-3', expected a whole number"),
        ('vision.also_layers', [-1], 'vision: also_layers must be ascending'),
        ('vision.image_size', 225, 'vision: image_size 225 is no multiple'),
        ('vision', None, 'vision should be a mapping, found None'),
        ('projector.type', 'qformer', "projector: unknown projector 'qformer'"),
        ('vision', {}, 'the key vision.name is missing'),
        ('language.norm_eps', '1e-5', "language.norm_eps is '1e-5', expected a number (with a point: 1.0e-6)"),
        ('name', 'yours', "name is 'yours', expected 'mine' as the file is called"),
        ('template', 'v9', "template is 'v9', expected one of v1"),
        ('aspect', 'stretch', "aspect is 'stretch', expected one of pad, square"),
        ('parameters', None, 'parameters is None, expected a whole number'),
        ('files.pytorch_model.bin', {'bytes': -1}, 'files.pytorch_model.bin.bytes is -1, expected at least 1'),
        ('files.pytorch_model.bin', {'sha256': 'ABC'}, "files.pytorch_model.bin.sha256 is 'ABC', expected 64"),
        ('files.pytorch_model.bin', {'md5': 'x'}, 'unknown key files.pytorch_model.bin.md5'),
        ('files.pytorch_model.bin', None, 'files.pytorch_model.bin should be a mapping'),
    ],
)
def test_a_wrong_key_is_named_with_its_file(write: Any, key: Any, value: Any, message: str) -> None:
    path = write(changed(key, value) if isinstance(key, str) else GOOD | {key: value})

    with pytest.raises(SettingsError, match=re.escape(f'{path}: {message}')):
        read_manifest('mine')


@pytest.mark.parametrize('key', ['name', 'language', 'parameters'])
def test_a_missing_key_is_named(write: Any, key: str) -> None:
    write({name: part for name, part in GOOD.items() if name != key})

    with pytest.raises(SettingsError, match=rf'mine.yaml: .*{key}'):
        read_manifest('mine')


@pytest.mark.parametrize('text', ['', '- a\n', 'name: [', 'name: \x00', 'just text'])
def test_what_is_no_manifest_is_named(write: Any, text: str) -> None:
    path = write(text)

    with pytest.raises(SettingsError, match=re.escape(str(path))):
        read_manifest('mine')


SCALARS = st.none() | st.booleans() | st.integers(-5, 5000) | st.floats() | st.text(max_size=8)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
PLACES = [*GOOD, *(f'{part}.{key}' for part, content in GOOD.items() if isinstance(content, dict) for key in content)]


@given(key=st.sampled_from(PLACES), value=ANYTHING)
def test_any_value_is_read_or_refused_by_name(key: str, value: Any) -> None:
    try:
        manifest._manifest(changed(key, value), 'mine')
    except SettingsError as error:
        assert key.split('.')[0] in str(error) or isinstance(value, dict)
