"""Device profiles: every shipped one is sound, every mistake is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mobilevlm_ros.build.profile import PRECISIONS, known_profiles, read_profile
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.runtime.language import LanguageOptions

GOOD: dict[str, Any] = {
    'name': 'mine',
    'device': 'my robot',
    'vision': {'backend': 'onnxruntime', 'precision': 'fp32'},
    'language': {'quantization': 'Q4_0'},
}


def write(folder: Path, content: object) -> str:
    path = folder / 'mine.yaml'
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize('name', known_profiles())
def test_shipped_profiles_are_read_and_their_language_options_exist(name: str) -> None:
    profile = read_profile(name)
    assert profile.name == name
    assert profile.vision.precision in PRECISIONS[profile.vision.backend]
    LanguageOptions(**profile.language)


def test_the_profiles_of_the_documented_devices_are_there() -> None:
    expected = {'cpu', 'cpu-int8', 'openvino', 'openvino-int8', 'jetson-orin', 'jetson-orin-nano', 'cuda'}
    assert expected | {'snapdragon-cpu'} == set(known_profiles())


def test_limits_follow_the_precision(tmp_path: Path) -> None:
    assert read_profile(write(tmp_path, GOOD)).parity.vision_cosine == 0.99999
    fp16 = {**GOOD, 'vision': {'backend': 'tensorrt', 'precision': 'fp16'}}
    assert read_profile(write(tmp_path, fp16)).parity.vision_cosine == 0.999


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        ({'vision': {'backend': 'onnxruntime', 'precision': 'fp16'}}, 'fp32 or int8'),
        ({'vision': {'backend': 'onnxruntime', 'precision': 'int8'}}, 'parity.vision_cosine'),
        ({'vision': {'backend': 'vulkan', 'precision': 'fp32'}}, 'vulkan'),
        ({'language': {'quantization': 'Q4_0', 'n_thread': 2}}, 'n_thread'),
        ({'language': {'quantization': 'Q4_0', 'kv_type': 'int4'}}, 'int4'),
        ({'language': {}}, 'quantization'),
        ({'memory_mib': 'much'}, 'much'),
        ({'speed': 'fast'}, 'speed'),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(BuildError, match=named):
        read_profile(write(tmp_path, {**GOOD, **change}))


@pytest.mark.parametrize('text', ['a: [', '- a list', '', '\0'])
def test_what_is_no_profile_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(BuildError, match=r'mine\.yaml'):
        read_profile(write(tmp_path, text))


def test_an_unknown_name_lists_those_that_exist() -> None:
    with pytest.raises(BuildError, match='jetson-orin-nano'):
        read_profile('jetson')


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match='cannot be read'):
        read_profile(str(tmp_path / 'none.yaml'))
