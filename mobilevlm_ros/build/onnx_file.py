"""An ONNX file that is written while its graph is thought up: tensors go to disk one by one, never all into memory.

What is too large for one file (protobuf ends at 2 GB) becomes two: ``NAME`` and ``NAME.data`` beside it. The result
appears complete and checked, or not at all. Knows nothing about vision.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mobilevlm_ros.errors import BuildError

__all__ = ['OPSET', 'OnnxFile', 'data_file']

OPSET = 17
"""The first with LayerNormalization, and what TensorRT 8.6 reads."""
_IR_VERSION = 8
_ONE_FILE_BYTES = 1_500_000_000
_INLINE_BYTES = 1024
"""Smaller tensors stay inside the graph, where shape inference can read them."""
_ALIGNMENT = 4096
"""Of tensors in the data file, so that they can be mapped into memory."""
_CHUNK_BYTES = 1 << 24
_GRAPH_FIELD, _INITIALIZER_FIELD, _RAW_DATA_FIELD = 7, 5, 9
"""Numbers of ModelProto.graph, GraphProto.initializer and TensorProto.raw_data in onnx.proto."""


def data_file(path: Path) -> Path:
    """Where the tensors of a graph at ``path`` lie if they are too large for one file."""
    return path.with_name(path.name + '.data')


class OnnxFile(AbstractContextManager['OnnxFile']):
    """One graph on its way to ``out``; leaving the block without ``finish`` leaves nothing.

    :param one_file_bytes: tensors of more bytes than this go into a file of their own.
    """

    def __init__(self, out: Path, one_file_bytes: int = _ONE_FILE_BYTES) -> None:
        self._out = out
        self._one_file_bytes = one_file_bytes
        self._folder = Path(tempfile.mkdtemp(prefix=f'.{out.name}-', dir=out.parent))
        self._data: BinaryIO = data_file(self._folder / out.name).open('wb')
        self._data_bytes = 0
        self._names: set[str] = set()
        self.nodes: list[Any] = []
        self._tensors: list[Any] = []

    def __exit__(self, *_: object) -> None:
        self._data.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def node(self, op: str, *inputs: str, output: str = '', **attributes: Any) -> str:
        """Append a node with one output; returns the output's name.

        :param output: its name; empty: one is made up.
        :param attributes: of the operator; ``domain`` if it is not one of ONNX itself.
        """
        from onnx import helper

        output = output or f'{op.lower()}_{len(self.nodes)}'
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def tensor(self, name: str, value: NDArray[Any]) -> str:
        """Append a constant; one of a name that is there already is that one. Returns the name."""
        from onnx import TensorProto, helper, numpy_helper

        if name in self._names:
            return name
        self._names.add(name)
        value = np.asarray(value, order='C')
        if value.nbytes < _INLINE_BYTES:
            self._tensors.append(numpy_helper.from_array(value, name))
            return name
        self._data.write(bytes(-self._data.tell() % _ALIGNMENT))
        tensor = TensorProto(name=name, dims=value.shape, data_type=helper.np_dtype_to_tensor_dtype(value.dtype))
        tensor.data_location = TensorProto.EXTERNAL
        where = {
            'location': data_file(self._out).name,
            'offset': self._data.tell(),
            'length': value.nbytes,
        }
        for key, entry in where.items():
            tensor.external_data.add(key=key, value=str(entry))
        self._data.write(value.astype(value.dtype.newbyteorder('<'), copy=False).data)
        self._data_bytes += value.nbytes
        self._tensors.append(tensor)
        return name

    def finish(self, inputs: Sequence[Any], outputs: Sequence[Any], inner: Sequence[Any] = ()) -> None:
        """Check the graph and put it in its place.

        :param inputs: ValueInfoProto each, as ``outputs`` and ``inner``, values inside that somebody may ask for.
        :raise BuildError: if the graph is invalid.
        """
        from onnx import checker, helper, shape_inference

        self._data.close()
        domains = sorted({node.domain for node in self.nodes} - {''})
        model = helper.make_model(
            helper.make_graph(self.nodes, 'graph', inputs, outputs, self._tensors, value_info=list(inner)),
            opset_imports=[helper.make_opsetid('', OPSET), *(helper.make_opsetid(name, 1) for name in domains)],
            ir_version=_IR_VERSION,
            producer_name='mobilevlm_ros',
        )
        path = self._folder / self._out.name
        path.write_bytes(model.SerializeToString())
        try:
            checker.check_model(str(path), full_check=True)
        except (checker.ValidationError, shape_inference.InferenceError) as error:
            raise BuildError(f'the graph for {self._out} is invalid: {error}') from error
        if self._data_bytes > self._one_file_bytes:
            data_file(path).replace(data_file(self._out))
            path.replace(self._out)
        else:
            whole = path.with_suffix('.whole')
            self._write_whole(model, whole)
            whole.replace(self._out)
            data_file(self._out).unlink(missing_ok=True)

    def _write_whole(self, model: Any, path: Path) -> None:
        """Write the model with its tensors inside.

        Field by field, since the library would need all of it in memory twice; the bytes are an ordinary ModelProto.
        """
        graph, tensors = model.graph, self._tensors
        del graph.initializer[:]
        heads = [_Head(tensor) for tensor in tensors]
        body = graph.SerializeToString()
        model.ClearField('graph')
        n_bytes = len(body) + sum(len(_tag(_INITIALIZER_FIELD, head.n_bytes)) + head.n_bytes for head in heads)
        with path.open('wb') as file, data_file(self._folder / self._out.name).open('rb') as data:
            file.write(model.SerializeToString())
            file.write(_tag(_GRAPH_FIELD, n_bytes))
            file.write(body)
            for head in heads:
                file.write(_tag(_INITIALIZER_FIELD, head.n_bytes))
                file.write(head.data)
                data.seek(head.offset)
                left = head.n_raw_bytes
                while left:
                    left -= file.write(data.read(min(left, _CHUNK_BYTES)))


class _Head:
    """A tensor's message without the bytes of its values, if these lie in the data file."""

    def __init__(self, tensor: Any) -> None:
        from onnx import TensorProto

        self.offset = self.n_raw_bytes = 0
        if tensor.data_location == TensorProto.EXTERNAL:
            where = {entry.key: entry.value for entry in tensor.external_data}
            self.offset, self.n_raw_bytes = int(where['offset']), int(where['length'])
            tensor = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
        self.data: bytes = tensor.SerializeToString()
        if self.n_raw_bytes:
            self.data += _tag(_RAW_DATA_FIELD, self.n_raw_bytes)
        self.n_bytes = len(self.data) + self.n_raw_bytes


def _tag(field: int, n_bytes: int) -> bytes:
    """Protobuf's start of a field of ``n_bytes`` bytes: its number, the kind "length-delimited", the length."""
    return bytes([field << 3 | 2]) + _varint(n_bytes)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first, the top bit set in all but the last."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
