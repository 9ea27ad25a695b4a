"""The walls between the rooms: who may import whom. Checked on the source, so an import inside a function counts."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / 'mobilevlm_ros'

# What each room may import from this package. 'ground' is errors, types, paths and the package itself.
MAY_IMPORT = {
    'ground': {'ground'},
    'runtime': {'ground', 'runtime'},
    'bags': {'ground', 'runtime', 'bags'},
    'node': {'ground', 'runtime', 'node'},
    'model': {'ground', 'runtime', 'model'},
    'train': {'ground', 'runtime', 'model', 'build', 'bags', 'evaluate', 'train'},
    'build': {'ground', 'runtime', 'model', 'build'},
    'evaluate': {'ground', 'runtime', 'bags', 'evaluate'},
    'bench': {'ground', 'runtime', 'model', 'build', 'bench'},
    # The applications on the roof.
    'demo': {'ground', 'runtime', 'node', 'build', 'demo'},
    'doctor': {'ground', 'runtime', 'node', 'doctor'},
    'cli': {'ground', 'runtime', 'node', 'model', 'train', 'build', 'evaluate', 'bench', 'demo', 'doctor', 'cli'},
}
ROOM_OF_FOLDER = {('node', 'demo'): 'demo'}
GROUND = {'__init__', 'errors', 'types', 'paths'}

# Heavy modules: where they may be imported (files or folders), inside functions only.
OWNERS = {
    'onnxruntime': ('runtime/vision/onnxruntime.py', 'build/', 'bench/'),
    'openvino': ('runtime/vision/openvino.py', 'build/openvino_ir.py', 'bench/'),
    'nncf': ('build/openvino_ir.py',),
    'tensorrt': ('runtime/vision/tensorrt.py', 'build/'),
    'llama_cpp': ('runtime/language/llamacpp', 'bench/contestants/'),
    'huggingface_hub': ('model/hub.py',),
    'rosbags': ('bags/',),
}
# These make up whole rooms, which may name them at the top of a module.
TRAINING = {'torch', 'transformers', 'safetensors', 'torchvision', 'peft', 'accelerate', 'datasets', 'sentencepiece'}
TRAINING_ROOMS = {'model', 'train'}


@dataclass(frozen=True)
class Import:
    """One import of one module."""

    path: Path
    line: int
    name: str  # dotted
    in_function: bool
    typing_only: bool

    @property
    def top(self) -> str:
        """The imported distribution's module."""
        return self.name.split('.')[0]

    @property
    def file(self) -> str:
        """The importing file below the package."""
        return self.path.relative_to(PACKAGE).as_posix()

    def __str__(self) -> str:
        return f'{self.file}:{self.line} imports {self.name}'


def imports_of(path: Path) -> Iterator[Import]:
    yield from _walk(ast.parse(path.read_text(encoding='utf-8')), path, False, False)


def _walk(node: ast.AST, path: Path, in_function: bool, typing_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(path, child.lineno, alias.name, in_function, typing_only)
        elif isinstance(child, ast.ImportFrom):
            module = _absolute(child, path)
            for alias in child.names:
                yield Import(path, child.lineno, f'{module}.{alias.name}', in_function, typing_only)
        elif isinstance(child, ast.If) and 'TYPE_CHECKING' in ast.unparse(child.test):
            for inner in child.body:
                yield from _walk(ast.Module([inner], []), path, in_function, True)
            yield from _walk(ast.Module(child.orelse, []), path, in_function, typing_only)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, path, in_function or function, typing_only)


def _absolute(node: ast.ImportFrom, path: Path) -> str:
    if not node.level:
        return node.module or ''
    package = ['mobilevlm_ros', *path.relative_to(PACKAGE).parts[:-1]]
    base = package[: len(package) - node.level + 1]
    return '.'.join([*base, *([node.module] if node.module else [])])


def room_of(parts: tuple[str, ...]) -> str:
    """The room of a module, given as its parts below the package."""
    if parts[:2] in ROOM_OF_FOLDER:
        return ROOM_OF_FOLDER[parts[:2]]
    first = parts[0].removesuffix('.py') if parts else '__init__'
    return 'ground' if first in GROUND else first


def room_of_name(name: str) -> str:
    parts = tuple(name.split('.')[1:])
    if len(parts) == 1 and room_of(parts) not in MAY_IMPORT:
        return 'ground'  # a name of the package itself, such as __version__
    return room_of(parts)


FILES = sorted(PACKAGE.rglob('*.py'))
ALL = [found for path in FILES for found in imports_of(path)]


def test_every_module_is_in_a_known_room() -> None:
    assert {room_of(path.relative_to(PACKAGE).parts) for path in FILES} <= set(MAY_IMPORT)


@pytest.mark.parametrize('room', sorted(MAY_IMPORT))
def test_nothing_imports_upwards(room: str) -> None:
    ours = [one for one in ALL if one.top == 'mobilevlm_ros' and room_of(Path(one.file).parts) == room]
    assert [str(one) for one in ours if room_of_name(one.name) not in MAY_IMPORT[room]] == []


def test_only_the_node_knows_ros() -> None:
    names = r'rclpy|\w+_msgs|\w+_interfaces|launch|launch_ros|ament_index_python|cv_bridge|tf2_ros|rosidl_\w+'
    found = [one for one in ALL if re.fullmatch(names, one.top) and not one.file.startswith('node/')]
    assert [str(one) for one in found] == []


@pytest.mark.parametrize('module', sorted(OWNERS))
def test_heavy_modules_have_one_owner_and_are_imported_late(module: str) -> None:
    found = [one for one in ALL if one.top == module and not one.typing_only]
    assert [str(one) for one in found if not one.file.startswith(OWNERS[module])] == []
    assert [str(one) for one in found if not one.in_function] == []


def test_training_libraries_stay_in_training_rooms() -> None:
    found = [one for one in ALL if one.top in TRAINING]
    outside = [one for one in found if room_of(Path(one.file).parts) not in TRAINING_ROOMS]
    # build may turn a checkpoint into a bundle, but nano is assembled where there is no torch.
    # So may the benchmark's process that runs the model in PyTorch, to compare with.
    late_rooms = ('build/', 'bench/contestants/pytorch.py')
    late = [one for one in outside if one.file.startswith(late_rooms) and (one.in_function or one.typing_only)]
    assert [str(one) for one in outside if one not in late] == []


def test_the_walls_are_seen_through_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checker itself: relative imports, imports in functions and for typing only."""
    source = tmp_path / 'runtime' / 'bad.py'
    source.parent.mkdir()
    source.write_text(
        'from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n'
        'from ..node import main\n'
        'def late():\n    import llama_cpp.llama_cpp\n'
        'class C:\n    from . import sibling\n'
    )
    monkeypatch.setattr(sys.modules[__name__], 'PACKAGE', tmp_path)
    found = {one.name: one for one in imports_of(source)}
    assert found['torch'].typing_only
    assert found['llama_cpp.llama_cpp'].in_function
    assert room_of_name('mobilevlm_ros.node.main') == 'node'
    assert 'mobilevlm_ros.node.main' in found
    assert 'mobilevlm_ros.runtime.sibling' in found
    assert not found['mobilevlm_ros.runtime.sibling'].in_function
