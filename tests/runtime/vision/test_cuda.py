"""CUDA through ctypes: against the real library, as far as it goes without a GPU, and against a fake one."""

from __future__ import annotations

import ctypes

import pytest
from fake_cudart import FakeCudart

from mobilevlm_ros.errors import DependencyError, DeviceMemoryError, EngineError
from mobilevlm_ros.runtime.vision import cuda as cuda_module
from mobilevlm_ros.runtime.vision.cuda import Cuda, Gpu, open_cuda


def real_library() -> str | None:
    for path in cuda_module._candidates():
        try:
            ctypes.CDLL(path)
        except OSError:
            continue
        return path
    return None


REAL = real_library()
needs_real = pytest.mark.skipif(REAL is None, reason='no libcudart is installed')


@pytest.fixture(params=[11, 12, 13], ids=lambda major: f'CUDA {major}')
def library(request: pytest.FixtureRequest) -> FakeCudart:
    return FakeCudart(major=request.param)


@pytest.fixture
def cuda(library: FakeCudart) -> Cuda:
    device = Cuda(library)
    device.use()
    return device


@needs_real
def test_the_real_library_has_all_functions() -> None:
    Cuda(ctypes.CDLL(str(REAL)))


@needs_real
@pytest.mark.parametrize(
    ('code', 'name'),
    [
        (cuda_module._ERROR_MEMORY_ALLOCATION, 'cudaErrorMemoryAllocation'),
        (cuda_module._ERROR_NOT_READY, 'cudaErrorNotReady'),
        (700, 'cudaErrorIllegalAddress'),
        (719, 'cudaErrorLaunchFailure'),
    ],
)
def test_the_real_library_knows_our_error_codes_by_these_names(code: int, name: str) -> None:
    assert Cuda(ctypes.CDLL(str(REAL))).error_text(code).startswith(f'{name} ({code}): ')


def test_what_the_gpu_is(library: FakeCudart, cuda: Cuda) -> None:
    assert cuda.gpu() == Gpu('Orin', '8.7')


def test_free_memory(library: FakeCudart, cuda: Cuda) -> None:
    address = cuda.allocate(1 << 20, 'pixels')

    assert cuda.free_memory() == ((1 << 30) - (1 << 20), 1 << 30)

    cuda.free(address)
    library.assert_clean()


def test_too_little_memory_says_how_much_was_needed_and_is_free(library: FakeCudart, cuda: Cuda) -> None:
    with pytest.raises(
        DeviceMemoryError, match=r'the pixels need 2048\.0 MiB .*but 1024 of 1024 MiB .* are free: stop'
    ):
        cuda.allocate(2 << 30, 'the pixels')
    with pytest.raises(DeviceMemoryError, match='cudaHostAlloc'):
        cuda.allocate_host(2 << 30, 'the pixels')

    library.assert_clean()


def test_an_error_code_becomes_an_error_with_its_name_and_text(library: FakeCudart, cuda: Cuda) -> None:
    library.fail['cudaStreamCreateWithFlags'] = 100

    with pytest.raises(
        EngineError, match=r'cudaStreamCreateWithFlags failed: cudaErrorNoDevice \(100\): no CUDA-capable'
    ):
        cuda.create_stream()

    assert 'cudaGetLastError' in library.calls  # it must not be found by the next library that looks


def test_an_error_that_stays_says_to_restart(library: FakeCudart, cuda: Cuda) -> None:
    library.fail['cudaMalloc'] = 700

    with pytest.raises(EngineError, match=r'illegal memory access.*restart the node'):
        cuda.allocate(16, 'pixels')


def test_a_library_without_a_function_is_too_old() -> None:
    class Old(FakeCudart):
        def __getattr__(self, name: str) -> object:
            if name == 'cudaGraphInstantiateWithFlags':
                raise AttributeError(f'undefined symbol: {name}')
            return super().__getattr__(name)

    with pytest.raises(DependencyError, match=r'too old \(undefined symbol: cudaGraphInstantiateWithFlags\)'):
        Cuda(Old())


def test_a_failed_recording_leaves_the_stream_usable(library: FakeCudart, cuda: Cuda) -> None:
    stream = cuda.create_stream()

    def enqueue() -> None:
        raise EngineError('not recordable')

    with pytest.raises(EngineError, match='not recordable'):
        cuda.record(stream, enqueue)

    assert cuda.is_done(stream)
    cuda.destroy_stream(stream)
    library.assert_clean()


@pytest.mark.parametrize('function', ['cudaStreamEndCapture', 'cudaGraphInstantiateWithFlags'])
def test_a_recording_that_cuda_refuses_leaks_nothing(library: FakeCudart, cuda: Cuda, function: str) -> None:
    stream = cuda.create_stream()
    library.fail[function] = 900

    with pytest.raises(EngineError, match='cudaErrorStreamCaptureUnsupported'):
        cuda.record(stream, lambda: None)

    cuda.destroy_stream(stream)
    library.assert_clean()


class Loader:
    """Stands for ``ctypes.CDLL``: knows some libraries."""

    def __init__(self, **libraries: FakeCudart) -> None:
        self.libraries = {f'libcudart.so.{name[1:]}': library for name, library in libraries.items()}

    def __call__(self, path: str) -> FakeCudart:
        if path not in self.libraries:
            raise OSError(f'{path}: cannot open shared object file')
        return self.libraries[path]


def open_with(monkeypatch: pytest.MonkeyPatch, loader: Loader, device: int = 0) -> Cuda:
    monkeypatch.setattr(ctypes, 'CDLL', loader)
    return open_cuda(device)


def test_the_newest_library_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = FakeCudart(major=13), FakeCudart(major=12)

    open_with(monkeypatch, Loader(v13=new, v12=old))

    assert new.calls
    assert not old.calls


def test_a_library_too_new_for_the_driver_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = FakeCudart(major=13), FakeCudart(major=12)
    new.fail['cudaGetDeviceCount'] = 35

    assert open_with(monkeypatch, Loader(v13=new, v12=old)).gpu().name == 'Orin'
    assert 'cudaSetDevice' in old.calls


def test_no_driver_is_an_error_that_says_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeCudart()
    library.fail['cudaGetDeviceCount'] = 35

    with pytest.raises(EngineError, match=r'driver version is insufficient.*nvidia-smi.*--profile cpu'):
        open_with(monkeypatch, Loader(v12=library))


def test_a_device_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match='CUDA sees 1 devices, number 1 was asked for'):
        open_with(monkeypatch, Loader(v12=FakeCudart()), device=1)


def test_no_library_is_a_missing_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DependencyError, match=r'libcudart.*not found.*JetPack'):
        open_with(monkeypatch, Loader())
