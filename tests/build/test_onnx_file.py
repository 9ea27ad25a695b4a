"""ONNX files written tensor by tensor: one file or two, complete or not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mobilevlm_ros.build.onnx_file import OnnxFile
from mobilevlm_ros.errors import BuildError

MATRIX = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)
X = [helper.make_tensor_value_info('x', TensorProto.FLOAT, [1, 40])]
Y = [helper.make_tensor_value_info('y', TensorProto.FLOAT, [1, 50])]


def write(path: Path, one_file_bytes: int = 10**9) -> None:
    with OnnxFile(path, one_file_bytes) as file:
        product = file.node('MatMul', 'x', file.tensor('m', MATRIX))
        file.node('Add', product, file.tensor('b', np.ones(50, np.float32)), output='y')
        file.finish(X, Y)


def run(path: Path) -> NDArray[np.float32]:
    session = ort.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    result: NDArray[np.float32] = session.run(None, {'x': np.ones((1, 40), np.float32)})[0]
    return result


@pytest.mark.parametrize(('one_file_bytes', 'names'), [(10**9, ['g.onnx']), (100, ['g.onnx', 'g.onnx.data'])])
def test_small_ones_are_one_file_and_large_ones_two(tmp_path: Path, one_file_bytes: int, names: list[str]) -> None:
    write(tmp_path / 'g.onnx', one_file_bytes)

    assert sorted(path.name for path in tmp_path.iterdir()) == names
    np.testing.assert_allclose(run(tmp_path / 'g.onnx')[0], MATRIX.sum(axis=0) + 1, rtol=1e-5)
    onnx.checker.check_model(str(tmp_path / 'g.onnx'), full_check=True)


def test_tensors_in_the_data_file_can_be_mapped(tmp_path: Path) -> None:
    write(tmp_path / 'g.onnx', 100)

    model = onnx.load(tmp_path / 'g.onnx', load_external_data=False)
    (outside,) = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    where = {entry.key: entry.value for entry in outside.external_data}
    assert where['location'] == 'g.onnx.data'
    assert int(where['offset']) % 4096 == 0


def test_data_of_an_older_and_larger_graph_goes(tmp_path: Path) -> None:
    write(tmp_path / 'g.onnx', 100)
    write(tmp_path / 'g.onnx')

    assert [path.name for path in tmp_path.iterdir()] == ['g.onnx']


def test_the_bytes_are_those_that_the_library_writes(tmp_path: Path) -> None:
    """No oddity of the format: what is read and written again is as long, field for field."""
    write(tmp_path / 'g.onnx')

    model = onnx.load(tmp_path / 'g.onnx')
    assert len(model.SerializeToString()) == (tmp_path / 'g.onnx').stat().st_size


@given(
    values=st.lists(
        arrays.arrays(
            st.sampled_from([np.dtype(kind) for kind in ('float32', 'float16', 'int8', 'int64', 'uint8')]),
            arrays.array_shapes(min_dims=0, max_dims=3, max_side=40),
            fill=st.nothing(),
            elements=st.integers(0, 100),
        ),
        min_size=1,
        max_size=6,
    )
)
@settings(deadline=None, max_examples=30)
def test_every_tensor_comes_back(tmp_path_factory: pytest.TempPathFactory, values: list[NDArray[np.float32]]) -> None:
    path = tmp_path_factory.mktemp('any') / 'g.onnx'
    with OnnxFile(path) as file:
        for index, value in enumerate(values):
            file.tensor(f't{index}', value)
        file.node('Identity', 'x', output='y')
        file.finish(X, [helper.make_tensor_value_info('y', TensorProto.FLOAT, [1, 40])])

    found = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    for index, value in enumerate(values):
        np.testing.assert_array_equal(found[f't{index}'], value)
        assert found[f't{index}'].dtype == value.dtype


def test_a_constant_of_a_known_name_is_kept_once(tmp_path: Path) -> None:
    with OnnxFile(tmp_path / 'g.onnx') as file:
        for _ in range(2):
            file.tensor('same', MATRIX)
        file.node('MatMul', 'x', 'same', output='y')
        file.finish(X, Y)

    assert len(onnx.load(tmp_path / 'g.onnx').graph.initializer) == 1


def test_an_interruption_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / 'g.onnx').write_bytes(b'older')

    with pytest.raises(KeyboardInterrupt), OnnxFile(tmp_path / 'g.onnx') as file:
        file.tensor('m', MATRIX)
        raise KeyboardInterrupt

    assert [path.name for path in tmp_path.iterdir()] == ['g.onnx']
    assert (tmp_path / 'g.onnx').read_bytes() == b'older'


def test_an_invalid_graph_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r'g\.onnx is invalid'), OnnxFile(tmp_path / 'g.onnx') as file:
        file.node('MatMul', 'x', 'nothing', output='y')
        file.finish(X, Y)

    assert list(tmp_path.iterdir()) == []
