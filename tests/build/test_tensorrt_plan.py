"""Plans: with NVIDIA's real parser and builder (``tensorrt_rtx``, which needs no GPU), and with a fake of each version.

A plan that is built here was never run: ``tensorrt_rtx`` cannot load it without a GPU, and builds none for a Jetson.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_models
from fake_tensorrt_builder import VERSIONS, FakeBuilderTensorRt, steps
from onnx import TensorProto, helper, numpy_helper

from mobilevlm_ros.build import tensorrt_plan
from mobilevlm_ros.build.tensorrt_plan import build_plan, key_file
from mobilevlm_ros.build.vision_graph import write_vision_graph
from mobilevlm_ros.errors import BuildError, EngineError
from mobilevlm_ros.model.config import ProjectorConfig
from mobilevlm_ros.runtime.bundle import sha256_of
from mobilevlm_ros.runtime.vision.cuda import Gpu
from mobilevlm_ros.runtime.vision.plan_key import PlanKey
from mobilevlm_ros.runtime.vision.tensorrt_log import log_of

ORIN = Gpu('Orin', '8.7')


@pytest.fixture(scope='session')
def rtx() -> Any:
    return pytest.importorskip('tensorrt_rtx', reason="needs tensorrt-rtx, NVIDIA's builder without a GPU")


@pytest.fixture(params=VERSIONS)
def trt(request: pytest.FixtureRequest) -> FakeBuilderTensorRt:
    return FakeBuilderTensorRt(request.param)


@pytest.fixture
def any_trt() -> FakeBuilderTensorRt:
    """For what does not depend on the version."""
    return FakeBuilderTensorRt('10.3.0')


@pytest.fixture(scope='module')
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny vision engine in both precisions."""
    folder = tmp_path_factory.mktemp('graphs')
    return {precision: write_graph(folder / f'{precision}.onnx', precision) for precision in ('fp32', 'fp16')}


def write_graph(path: Path, precision: str, projector: ProjectorConfig = tiny_models.TINY_PROJECTOR) -> Path:
    write_vision_graph(
        tiny_models.vision_weights(projector=projector),
        tiny_models.TINY_VISION,
        projector,
        tiny_models.TinyLlama.n_embd,
        path,
        precision=precision,
    )
    return path


def small_graph(op: str = 'Relu', **attributes: Any) -> onnx.ModelProto:
    """One node, named, with a weight of 4 KiB added before."""
    weight = numpy_helper.from_array(np.ones((1, 3, 18, 18), np.float32), 'weight')
    shape = [1, 3, 18, 18]
    return helper.make_model(
        helper.make_graph(
            [
                helper.make_node('Add', ['x', 'weight'], ['sum'], name='first'),
                helper.make_node(op, ['sum'], ['y'], name='second', **attributes),
            ],
            'small',
            [helper.make_tensor_value_info('x', TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info('y', TensorProto.FLOAT, shape)],
            [weight],
        ),
        opset_imports=[helper.make_opsetid('', 17)],
        ir_version=8,
    )


def build(onnx_path: Path, plan: Path, trt: Any, **options: Any) -> PlanKey:
    return build_plan(onnx_path, plan, trt=trt, gpu=ORIN, **options)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- NVIDIA's parser and builder ------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['linear', 'mlp2x_gelu', 'ldpnet', 'ldpnetv2'])
@pytest.mark.parametrize('precision', ['fp32', 'fp16'])
def test_the_real_parser_takes_every_projector(rtx: Any, tmp_path: Path, precision: str, kind: str) -> None:
    path = write_graph(tmp_path / 'vision.onnx', precision, ProjectorConfig(kind))
    network = rtx.Builder(log_of(rtx).native).create_network(1)  # the parser does not keep it alive
    parser = rtx.OnnxParser(network, log_of(rtx).native)

    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]


@pytest.mark.parametrize('precision', ['fp32', 'fp16'])
def test_the_real_builder_takes_our_graph(rtx: Any, graphs: dict[str, Path], tmp_path: Path, precision: str) -> None:
    key = build(graphs[precision], tmp_path / 'vision.plan', rtx)

    assert key == PlanKey('tensorrt_rtx', rtx.__version__, 'Orin', '8.7', sha256_of(graphs[precision]), precision)
    assert (tmp_path / 'vision.plan').stat().st_size > 100_000
    assert names_in(tmp_path) == ['vision.plan', 'vision.plan.json']
    assert PlanKey.from_dict(json.loads(key_file(tmp_path / 'vision.plan').read_text())) == key


def test_half_precision_weights_make_half_the_plan(rtx: Any, tmp_path: Path) -> None:
    """Strong typing holds: what the graph has in fp16 is fp16 in the plan."""
    sizes = {}
    width = 512
    for precision, dtype, onnx_type in (
        ('fp32', np.float32, TensorProto.FLOAT),
        ('fp16', np.float16, TensorProto.FLOAT16),
    ):
        weight = np.random.default_rng(0).normal(size=(width, 4 * width)).astype(dtype)
        graph = helper.make_graph(
            [helper.make_node('MatMul', ['x', 'w'], ['y'])],
            'one',
            [helper.make_tensor_value_info('x', onnx_type, [1, width])],
            [helper.make_tensor_value_info('y', onnx_type, [1, 4 * width])],
            [numpy_helper.from_array(weight, 'w')],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
        onnx.save(model, str(tmp_path / f'{precision}.onnx'))
        assert build(tmp_path / f'{precision}.onnx', tmp_path / f'{precision}.plan', rtx).precision == precision
        sizes[precision] = (tmp_path / f'{precision}.plan').stat().st_size

    saved = width * 4 * width * 2
    assert sizes['fp32'] - sizes['fp16'] == pytest.approx(saved, rel=0.05)


def test_the_real_parser_tells_what_it_refuses(rtx: Any, tmp_path: Path) -> None:
    (tmp_path / 'bad.onnx').write_bytes(b'no graph' * 100)

    with pytest.raises(BuildError, match=r'refuses .*bad\.onnx: .*Failed to parse the ONNX model'):
        build(tmp_path / 'bad.onnx', tmp_path / 'vision.plan', rtx)

    assert names_in(tmp_path) == ['bad.onnx']


def test_the_real_parser_names_the_node(rtx: Any, tmp_path: Path) -> None:
    model = small_graph('NoSuchOperation')
    (tmp_path / 'odd.onnx').write_bytes(model.SerializeToString())

    with pytest.raises(BuildError, match=r'node second \(NoSuchOperation\): '):
        build(tmp_path / 'odd.onnx', tmp_path / 'vision.plan', rtx)


@pytest.mark.filterwarnings('ignore:.*no-ops in TensorRT-RTX:DeprecationWarning')
def test_the_real_builder_makes_do_without_a_damaged_timing_cache(
    rtx: Any, graphs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / 'timing.cache'
    cache.write_bytes(b'garbage' * 100)

    build(graphs['fp32'], tmp_path / 'vision.plan', rtx, timing_cache=cache)

    assert 'timing.cache is not used' in caplog.text
    assert b'garbage' not in cache.read_bytes()


def test_progress_of_the_real_builder_rises_to_the_end(rtx: Any, graphs: dict[str, Path], tmp_path: Path) -> None:
    told: list[tuple[float, float]] = []

    build(graphs['fp32'], tmp_path / 'vision.plan', rtx, on_progress=lambda *args: told.append(args))

    shares = [done / total for done, total in told]
    assert shares == sorted(shares)
    assert all(0.0 <= share <= 1.0 for share in shares)
    assert shares[-1] == 1.0


def test_ctrl_c_ends_a_real_build_and_leaves_nothing(
    rtx: Any,
    graphs: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensorrt_plan, '_LOOK_S', 0.001)

    def press_ctrl_c(done: float, total: float) -> None:
        if done > 0:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build(graphs['fp32'], tmp_path / 'vision.plan', rtx, on_progress=press_ctrl_c)

    assert 'Build canceled by user' in caplog.text
    assert names_in(tmp_path) == []


def test_the_real_builder_reads_weights_from_a_second_file(rtx: Any, tmp_path: Path) -> None:
    model = small_graph()
    onnx.save(model, str(tmp_path / 'v.onnx'), save_as_external_data=True, location='v.onnx.data', size_threshold=0)
    first = build(tmp_path / 'v.onnx', tmp_path / 'vision.plan', rtx)
    data = bytearray((tmp_path / 'v.onnx.data').read_bytes())
    data[0] ^= 1
    (tmp_path / 'v.onnx.data').write_bytes(data)

    second = build(tmp_path / 'v.onnx', tmp_path / 'vision.plan', rtx)

    assert first.onnx_sha256 != second.onnx_sha256
    assert dataclasses.replace(first, onnx_sha256=second.onnx_sha256) == second


# -- every version --------------------------------------------------------------------------------------------------


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    (tmp_path / 'in').mkdir()
    onnx.save(small_graph(), str(tmp_path / 'in' / 'vision.onnx'))
    return tmp_path / 'in' / 'vision.onnx'


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    (tmp_path / 'out').mkdir()
    return tmp_path / 'out' / 'vision.plan'


@pytest.mark.parametrize('is_half', [True, False])
def test_types_are_strong_where_they_can_be(trt: FakeBuilderTensorRt, graph: Path, plan: Path, is_half: bool) -> None:
    trt.is_half = is_half

    key = build(graph, plan, trt)

    is_old = trt.major == 8
    assert trt.asked['strong'] == (not is_old)
    assert ('FP16' in trt.asked['flags']) == (is_old and is_half)
    assert ('TF32' in trt.asked['flags']) == is_half  # fp32 means fp32
    assert key.precision == ('fp16' if is_half else 'fp32')
    assert plan.read_bytes() == f'PLAN of {trt.__version__}'.encode()


def test_weak_types_are_told_of(graph: Path, plan: Path, caplog: pytest.LogCaptureFixture) -> None:
    build(graph, plan, FakeBuilderTensorRt('8.6.2'))

    assert 'has no strongly typed networks' in caplog.text


def test_the_workspace_is_limited_when_asked(trt: FakeBuilderTensorRt, graph: Path, plan: Path) -> None:
    build(graph, plan, trt, workspace_bytes=1 << 28)
    assert trt.asked['limits'] == {'WORKSPACE': 1 << 28}

    build(graph, plan, trt)
    assert trt.asked['limits'] == {}


def test_all_errors_of_the_parser_are_told_with_their_nodes(trt: FakeBuilderTensorRt, graph: Path, plan: Path) -> None:
    trt.parser_errors = [
        (0, 'first', 'Add', 'broadcasting failed'),
        (1, 'second', 'Relu', 'no such kernel'),
        (-1, '', '', 'two problems'),
    ]

    with pytest.raises(BuildError) as caught:
        build(graph, plan, trt)

    told = 'node first (Add): broadcasting failed; node second (Relu): no such kernel; two problems.'
    assert told in str(caught.value)
    assert trt.__version__ in str(caught.value)


def test_a_number_that_is_of_no_node_is_told_as_it_is(graph: Path, plan: Path) -> None:
    trt = FakeBuilderTensorRt('8.6.2')
    trt.parser_errors = [(99, '', '', 'odd')]

    with pytest.raises(BuildError, match=r'node 99 \(unknown operator\): odd'):
        build(graph, plan, trt)


def test_a_build_that_gives_nothing_tells_the_log(trt: FakeBuilderTensorRt, graph: Path, plan: Path) -> None:
    trt.on_build = lambda config: 'Error Code 10: Could not find any implementation for node {ForeignNode}'

    with pytest.raises(BuildError, match=r'cannot build a plan from .*Could not find any implementation'):
        build(graph, plan, trt)

    assert names_in(plan.parent) == []


def test_a_build_without_enough_memory_says_so(trt: FakeBuilderTensorRt, graph: Path, plan: Path) -> None:
    trt.on_build = lambda config: 'Error Code 2: OutOfMemory (no further information)'

    with pytest.raises(BuildError, match='too little memory'):
        build(graph, plan, trt)


def test_what_the_bindings_raise_is_a_build_error(any_trt: FakeBuilderTensorRt, graph: Path, plan: Path) -> None:
    def fail(config: Any) -> None:
        raise RuntimeError('out of ideas')

    any_trt.on_build = fail

    with pytest.raises(BuildError, match='out of ideas'):
        build(graph, plan, any_trt)


def interrupt_when(event: threading.Event) -> None:
    """Ctrl-C, as soon as the event is set."""

    def work() -> None:
        event.wait(30)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=work, daemon=True).start()


def test_ctrl_c_leaves_nothing_in_any_version(trt: FakeBuilderTensorRt, graph: Path, plan: Path) -> None:
    is_building = threading.Event()
    ended: list[Any] = []

    def work(config: Any) -> str | None:
        is_building.set()
        ended.append(steps(config, 40, 0.01))
        return ended[-1]

    trt.on_build = work
    interrupt_when(is_building)

    with pytest.raises(KeyboardInterrupt):
        build(graph, plan, trt)

    assert len(ended) == 1  # it had ended before the interrupt went on: nothing runs with what was freed
    assert (ended[0] is None) == (trt.major == 8)
    assert names_in(plan.parent) == []


def test_progress_rises_through_nested_phases(graph: Path, plan: Path) -> None:
    trt = FakeBuilderTensorRt('10.3.0')
    trt.on_build = lambda config: steps(config, 40, 0.01)
    shares: list[float] = []

    build(graph, plan, trt, on_progress=lambda done, total: shares.append(done / total))

    assert shares == sorted(shares)
    assert len([share for share in shares if 0.1 < share < 0.9]) >= 2
    assert shares[-1] == 1.0


def test_an_error_while_telling_of_progress_ends_the_build(
    any_trt: FakeBuilderTensorRt, graph: Path, plan: Path
) -> None:
    any_trt.on_build = lambda config: steps(config, 1000, 0.01)

    def tell(done: float, total: float) -> None:
        raise BrokenPipeError

    started_s = time.monotonic()
    with pytest.raises(BrokenPipeError):
        build(graph, plan, any_trt, on_progress=tell)

    assert time.monotonic() - started_s < 5.0
    assert names_in(plan.parent) == []


# -- timing caches --------------------------------------------------------------------------------------------------


def test_timings_are_kept_for_the_next_build(
    trt: FakeBuilderTensorRt, graph: Path, plan: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / 'caches' / 'timing.cache'

    build(graph, plan, trt, timing_cache=cache)
    assert trt.asked['cache'] == b''
    build(graph, plan, trt, timing_cache=cache)

    assert trt.asked['cache'] == f'CACHE of {trt.__version__}'.encode()
    assert 'timing cache' not in caplog.text
    assert names_in(cache.parent) == ['timing.cache']


def test_a_damaged_timing_cache_is_replaced_with_a_warning(
    trt: FakeBuilderTensorRt, graph: Path, plan: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / 'timing.cache'
    cache.write_bytes(b'garbage')

    build(graph, plan, trt, timing_cache=cache)

    assert 'timing.cache is not used' in caplog.text
    assert trt.asked['cache'] == b''
    assert cache.read_bytes() == f'CACHE of {trt.__version__}'.encode()


def test_timings_of_another_gpu_are_replaced_with_a_warning(
    trt: FakeBuilderTensorRt, graph: Path, plan: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / 'timing.cache'
    cache.write_bytes(b'CACHE of 9.9.9')
    trt.refuses_cache = True

    build(graph, plan, trt, timing_cache=cache)

    assert 'timing.cache is not used' in caplog.text
    assert trt.asked['cache'] == b''


def test_a_timing_cache_that_cannot_be_read_or_written_is_only_a_warning(
    any_trt: FakeBuilderTensorRt, graph: Path, plan: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / 'timing.cache').mkdir()

    build(graph, plan, any_trt, timing_cache=tmp_path / 'timing.cache')

    assert 'is not used' in caplog.text
    assert 'cannot be written' in caplog.text
    assert plan.is_file()


# -- files ----------------------------------------------------------------------------------------------------------


def test_a_missing_graph_is_an_error(any_trt: FakeBuilderTensorRt, plan: Path) -> None:
    with pytest.raises(BuildError, match=r'no ONNX graph at .*nothing\.onnx'):
        build(plan.with_name('nothing.onnx'), plan, any_trt)


def test_missing_weights_are_named(any_trt: FakeBuilderTensorRt, tmp_path: Path, plan: Path) -> None:
    onnx.save(small_graph(), str(tmp_path / 'v.onnx'), save_as_external_data=True, location='w.data', size_threshold=0)
    (tmp_path / 'w.data').unlink()

    with pytest.raises(BuildError, match=r'w\.data, a part of .*v\.onnx, cannot be read: No such file'):
        build(tmp_path / 'v.onnx', plan, any_trt)


def test_a_folder_that_cannot_be_written_is_an_error(any_trt: FakeBuilderTensorRt, graph: Path, plan: Path) -> None:
    with pytest.raises(BuildError, match=r'vision\.plan cannot be written: No such file or directory'):
        build(graph, plan.parent / 'missing' / 'vision.plan', any_trt)


def test_a_full_disk_leaves_no_key_and_no_partial_file(
    any_trt: FakeBuilderTensorRt, graph: Path, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(graph, plan, any_trt)

    def full(path: Path, target: Path) -> None:
        raise OSError(28, 'No space left on device', str(path))

    monkeypatch.setattr(Path, 'replace', full)

    with pytest.raises(BuildError, match='No space left on device'):
        build(graph, plan, any_trt)

    assert names_in(plan.parent) == ['vision.plan']  # the old one, without a key


def test_a_build_needs_a_gpu(
    any_trt: FakeBuilderTensorRt, graph: Path, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_gpu() -> None:
        raise EngineError('no GPU can be used here')

    monkeypatch.setattr(tensorrt_plan, 'open_cuda', no_gpu)

    with pytest.raises(BuildError, match='on the device that will run it: no GPU can be used here'):
        build_plan(graph, plan, trt=any_trt)
