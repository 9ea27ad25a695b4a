"""The key of a plan: an untrusted dictionary in, a comparison that names every difference."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilevlm_ros.errors import BundleIncompleteError, PlanMismatchError
from mobilevlm_ros.runtime.vision.plan_key import PlanKey, check_plan, graph_sha256

KEY = PlanKey(
    flavour='tensorrt',
    tensorrt='10.3.0',
    gpu='Orin',
    compute_capability='8.7',
    onnx_sha256='a' * 64,
    precision='fp16',
)
OTHER = {
    'flavour': 'tensorrt_rtx',
    'tensorrt': '10.7.0.23',
    'gpu': 'NVIDIA GeForce RTX 3050',
    'compute_capability': '8.6',
    'onnx_sha256': 'b' * 64,
    'precision': 'fp32',
}
JSON_VALUES = (
    st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text()) | st.dictionaries(st.text(), st.text())
)


def test_it_survives_json() -> None:
    assert PlanKey.from_dict(json.loads(json.dumps(KEY.to_dict()))) == KEY


def test_the_plan_of_this_machine_is_taken() -> None:
    check_plan(KEY, KEY)


@pytest.mark.parametrize('name', sorted(OTHER))
def test_a_difference_is_named_with_what_was_found_and_expected_and_what_to_run(name: str) -> None:
    here = dataclasses.replace(KEY, **{name: OTHER[name]})

    with pytest.raises(PlanMismatchError) as caught:
        check_plan(KEY, here, rebuild='mobilevlm build mobilevlm-1.7b --profile jetson-orin --out /b')

    found, expected = getattr(KEY, name)[:12], OTHER[name][:12]
    message = str(caught.value)
    assert found in message
    assert expected in message
    assert message.index(found) < message.index(expected)
    assert message.endswith('on this machine: mobilevlm build mobilevlm-1.7b --profile jetson-orin --out /b')


def test_every_difference_is_named() -> None:
    with pytest.raises(PlanMismatchError) as caught:
        check_plan(KEY, PlanKey(**OTHER))

    assert all(value[:12] in str(caught.value) for value in (*KEY.to_dict().values(), *OTHER.values()))


def test_what_is_equal_is_not_mentioned() -> None:
    with pytest.raises(PlanMismatchError) as caught:
        check_plan(KEY, dataclasses.replace(KEY, tensorrt='8.6.2'))

    assert 'Orin,' not in str(caught.value)
    assert 'SHA' not in str(caught.value)


@pytest.mark.parametrize('name', sorted(OTHER))
def test_a_missing_entry_is_malformed(name: str) -> None:
    raw = KEY.to_dict()
    del raw[name]

    with pytest.raises(BundleIncompleteError, match=name):
        PlanKey.from_dict(raw)


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('flavour', 'pytorch'),
        ('tensorrt', 10.3),
        ('tensorrt', ''),
        ('tensorrt', '10.3\n'),
        ('tensorrt', '1' * 65),
        ('gpu', ''),
        ('gpu', 'Orin\x1b[2J'),
        ('compute_capability', '87'),
        ('compute_capability', 8.7),
        ('onnx_sha256', 'A' * 64),
        ('onnx_sha256', 'a' * 63),
        ('precision', 'int8'),
        ('colour', 'red'),
    ],
)
def test_a_malformed_entry_is_named(name: str, value: object) -> None:
    with pytest.raises(BundleIncompleteError, match=name):
        PlanKey.from_dict({**KEY.to_dict(), name: value})


@given(
    st.dictionaries(st.sampled_from([*OTHER, 'other']), JSON_VALUES | st.sampled_from(list(OTHER.values())))
    | JSON_VALUES
)
def test_whatever_a_file_says_is_a_key_or_malformed(raw: Any) -> None:
    try:
        key = PlanKey.from_dict(raw)
    except BundleIncompleteError:
        return
    assert key.to_dict() == raw


def test_the_hash_of_a_graph_in_one_file_is_that_of_the_file() -> None:
    assert graph_sha256({'vision.onnx': 'c' * 64}) == 'c' * 64


def test_the_hash_of_a_graph_in_more_files_depends_on_each_but_not_on_their_order() -> None:
    files = {'vision.onnx': 'c' * 64, 'vision.onnx.data': 'd' * 64}

    assert graph_sha256(files) == graph_sha256(dict(reversed(files.items())))
    assert graph_sha256(files) != graph_sha256({**files, 'vision.onnx.data': 'e' * 64})
    assert PlanKey.from_dict({**KEY.to_dict(), 'onnx_sha256': graph_sha256(files)})
