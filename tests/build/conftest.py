"""Fixtures of the builder's tests: nano in small, with what PyTorch makes of it, recorded once in a run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_nano

from mobilevlm_ros.build import bundle_build, nano, nano_reference
from mobilevlm_ros.build.nano_reference import record_nano
from mobilevlm_ros.build.reference import write_reference

# The fakes of TensorRT's running half and of CUDA are the runtime's.
sys.path.append(str(Path(__file__).parents[1] / 'runtime' / 'vision'))


@pytest.fixture(scope='session')
def nano_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that nano is made of, in small; not to be changed."""
    pytest.importorskip('torch', reason='the record is made with PyTorch: make venv-dev')
    root = tmp_path_factory.mktemp('nano')
    tiny_nano.write_all(root)
    with pytest.MonkeyPatch.context() as patch:
        _redirect(patch, root)
        write_reference(root / 'models' / 'nano' / 'reference.npz', record_nano(root / 'packages'))
    return root


@pytest.fixture
def nano_workshop(
    nano_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tiny_nano.NanoWorkshop]:
    """A copy of it that takes the place of the shipped one."""
    root = Path(shutil.copytree(nano_template, tmp_path / 'workshop'))
    _redirect(monkeypatch, root)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    yield tiny_nano.NanoWorkshop(root)


def _redirect(patch: pytest.MonkeyPatch, root: Path) -> None:
    for module in (nano, nano_reference, bundle_build):
        patch.setattr(module, 'shared_file', lambda relative: root / relative)
