"""What is installed, and under which versions: for pip and for colcon."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import setuptools
import yaml

import mobilevlm_ros

ROOT = Path(__file__).resolve().parents[1]
SHARED = ('launch', 'config', 'engines', 'models')
# Names that Python 3.10 lacks, which a robot with Ubuntu 22.04 runs.
NEWER_THAN_3_10 = {
    'asyncio.TaskGroup', 'asyncio.timeout', 'contextlib.chdir', 'datetime.UTC', 'enum.ReprEnum', 'enum.StrEnum',
    'hashlib.file_digest', 'itertools.batched', 'logging.getLevelNamesMapping', 'tomllib', 'typing.LiteralString',
    'typing.Never', 'typing.NotRequired', 'typing.Required', 'typing.Self', 'typing.Unpack', 'typing.assert_never',
    'typing.override', 'typing.reveal_type',
}  # fmt: skip
BUILTINS_NEWER_THAN_3_10 = {'ExceptionGroup', 'BaseExceptionGroup'}


def python_files() -> list[Path]:
    """List the project's own sources."""
    folders = ('mobilevlm_ros', 'tests', 'tools', 'launch', 'benchmarks')
    return [ROOT / 'setup.py', *(path for folder in folders for path in sorted((ROOT / folder).rglob('*.py')))]


@pytest.fixture(scope='module')
def settings() -> dict[str, Any]:
    """Return what setup.py hands to setuptools."""
    seen: dict[str, Any] = {}
    before, folder = setuptools.setup, Path.cwd()
    os.chdir(ROOT)
    try:
        setuptools.setup = lambda **arguments: seen.update(arguments)
        runpy.run_path(str(ROOT / 'setup.py'), run_name='__main__')
    finally:
        setuptools.setup = before
        os.chdir(folder)
    return seen


def package_xml(path: Path) -> ElementTree.Element:
    return ElementTree.parse(path).getroot()


def test_entry_points_exist_and_are_callable(settings: dict[str, Any]) -> None:
    for line in settings['entry_points']['console_scripts']:
        name, target = (part.strip() for part in line.split('='))
        entry = importlib.metadata.EntryPoint(name, target, 'console_scripts')
        assert callable(entry.load()), f'{name} = {target} does not resolve to something callable'


def test_installed_commands_are_where_pip_and_ros_look() -> None:
    prefix = Path(sys.prefix)
    if prefix != ROOT / '.venv':
        pytest.skip(f'runs in {prefix}, not in the environment of make venv')
    for name in ('mobilevlm', 'vqa_node'):
        assert os.access(prefix / 'bin' / name, os.X_OK)
        assert os.access(prefix / 'lib' / 'mobilevlm_ros' / name, os.X_OK), f'ros2 run would not find {name}'
    assert (prefix / 'share/ament_index/resource_index/packages/mobilevlm_ros').exists()
    assert (prefix / 'share/mobilevlm_ros/package.xml').exists()


def test_every_shared_file_is_installed(settings: dict[str, Any]) -> None:
    installed = {source: folder for folder, sources in settings['data_files'] for source in sources}
    assert installed['resource/mobilevlm_ros'] == 'share/ament_index/resource_index/packages'
    assert installed['package.xml'] == 'share/mobilevlm_ros'
    wanted = [
        path.relative_to(ROOT)
        for top in SHARED
        for path in (ROOT / top).rglob('*')
        if path.is_file() and '__pycache__' not in path.parts and not path.name.startswith('.')
    ]
    assert wanted
    for path in wanted:
        assert installed.get(str(path)) == f'share/mobilevlm_ros/{path.parent}'


def test_every_subpackage_is_installed(settings: dict[str, Any]) -> None:
    folders = {path.parent for path in (ROOT / 'mobilevlm_ros').rglob('*.py')}
    names = {'.'.join(folder.relative_to(ROOT).parts) for folder in folders}
    assert names == set(settings['packages']), 'a folder without __init__.py is not installed'


def test_every_file_that_is_no_source_is_installed(settings: dict[str, Any]) -> None:
    sources = ('.py', '.pyc', '.c', '.h', '.so')
    wanted = {path for path in (ROOT / 'mobilevlm_ros').rglob('*') if path.is_file() and path.suffix not in sources}
    installed = {
        path
        for package, patterns in settings['package_data'].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split('.')).glob(pattern)
    }
    assert ROOT / 'mobilevlm_ros' / 'py.typed' in wanted and wanted <= installed


def test_no_source_is_ignored_by_git() -> None:
    files = [str(path.relative_to(ROOT)) for path in python_files()]
    found = subprocess.run(['git', 'check-ignore', '--', *files], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode == 128:
        pytest.skip('not a git checkout')
    assert found.stdout == ''


def test_versions_agree(settings: dict[str, Any]) -> None:
    version = package_xml(ROOT / 'package.xml').findtext('version')
    assert version == package_xml(ROOT / 'mobilevlm_msgs' / 'package.xml').findtext('version')
    assert version == mobilevlm_ros.__version__ == settings['version']


def test_package_descriptions_agree(settings: dict[str, Any]) -> None:
    root = package_xml(ROOT / 'package.xml')
    assert root.get('format') == '3'
    assert root.findtext('name') == settings['name']
    assert root.findtext('license') == settings['license'] == 'Apache-2.0'
    assert root.findtext('export/build_type') == 'ament_python'
    assert settings['python_requires'] == '>=3.10'
    assert set(settings['extras_require']) >= {'build', 'convert', 'openvino', 'dev'}


def test_ros_packages_that_are_imported_are_declared() -> None:
    declared = {element.text for element in package_xml(ROOT / 'package.xml').iter('exec_depend')}
    used = {name.split('.')[0] for path in (ROOT / 'mobilevlm_ros').rglob('*.py') for name in imports(ast_of(path))}
    ros = {name for name in used if re.fullmatch(r'rclpy|launch|launch_ros|\w+_msgs|\w+_interfaces|ament_\w+', name)}
    assert 'rclpy' in ros
    assert ros - {'composition_interfaces'} <= declared


def test_every_interface_is_generated() -> None:
    listed = set(re.findall(r'"(\w+/\w+\.\w+)"', (ROOT / 'mobilevlm_msgs' / 'CMakeLists.txt').read_text()))
    files = {
        f'{kind}/{path.name}'
        for kind in ('msg', 'srv', 'action')
        for path in (ROOT / 'mobilevlm_msgs' / kind).iterdir()
    }
    assert listed == files


@pytest.mark.parametrize('path', sorted((ROOT / 'requirements').glob('*.txt')), ids=lambda path: path.name)
def test_requirements_are_pinned(path: Path) -> None:
    pin = re.compile(r"[A-Za-z0-9._-]+==[^\s;*]+( --hash=sha256:[0-9a-f]{64})?(; python_version (<|>=) '3\.\d+')?")
    for line in path.read_text(encoding='utf-8').splitlines():
        if line and not line.startswith(('#', '-c ', '-r ')):
            assert pin.fullmatch(line), f'{path.name}: {line!r} is no exact pin'


def test_pins_agree_with_the_lock() -> None:
    def pins(name: str) -> set[str]:
        lines = (ROOT / 'requirements' / name).read_text(encoding='utf-8').splitlines()
        return {re.sub(r'[-_.]+', '-', line.split('==')[0]).lower() + '==' + line.split('==')[1]
                for line in lines if '==' in line}  # fmt: skip

    lock = pins('lock.txt')
    alone = {'llama.txt', 'cmake.txt'}  # installed one by one, with hashes
    for name in {path.name for path in (ROOT / 'requirements').glob('*.txt')} - alone:
        assert pins(name) <= lock, f'{name} has pins that lock.txt has not'


def test_the_runtime_needs_neither_torch_nor_transformers() -> None:
    for name in ('ros.txt', 'runtime.txt', 'build.txt', 'llama.txt', 'cmake.txt'):
        text = (ROOT / 'requirements' / name).read_text(encoding='utf-8')
        assert not re.search(r'^(torch|transformers|tensorflow)\b', text, re.MULTILINE), name


def ast_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding='utf-8'), filename=str(path), feature_version=(3, 10))


def imports(tree: ast.Module) -> set[str]:
    """Return all imported names, dotted, wherever they are imported."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f'{node.module}.{alias.name}' for alias in node.names)
    return names


@pytest.mark.parametrize('path', python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_source_is_python_3_10(path: Path) -> None:
    tree = ast_of(path)
    attributes = {
        f'{node.value.id}.{node.attr}'
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not (imports(tree) | attributes) & NEWER_THAN_3_10
    assert not names & BUILTINS_NEWER_THAN_3_10


def test_colcon_is_told_of_both_packages() -> None:
    defaults = yaml.safe_load((ROOT / 'colcon.defaults.yaml').read_text(encoding='utf-8'))
    for verb in ('build', 'test', 'list'):
        assert defaults[verb]['base-paths'] == ['.', 'mobilevlm_msgs']


@pytest.mark.parametrize('name', ['.ci/run', 'tools/find_python'])
def test_scripts_are_executable_and_parse(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
    shell = (ROOT / name).read_text(encoding='utf-8').splitlines()[0].split('/')[-1].split()[-1]
    subprocess.run([shell, '-n', str(ROOT / name)], check=True)


def test_lint_versions_agree_with_the_hooks() -> None:
    hooks = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text(encoding='utf-8'))
    rev = next(repo['rev'] for repo in hooks['repos'] if 'ruff' in repo['repo'])
    assert f'ruff=={rev.lstrip("v")}' in (ROOT / 'requirements' / 'dev.txt').read_text(encoding='utf-8').split()
