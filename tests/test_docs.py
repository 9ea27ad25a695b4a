"""Documentation that is executed cannot rot: commands, names, codes and files that the docs mention exist."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from mobilevlm_ros.cli import build_parser
from mobilevlm_ros.types import ResultCode

ROOT = Path(__file__).resolve().parents[1]
DOCS = (
    'README.md',
    'CONTRIBUTING.md',
    'docs/architecture.md',
    'docs/troubleshooting.md',
    'docs/models.md',
    'docs/tensorrt.md',
    'docs/training.md',
    'docs/evaluation.md',
    'docs/benchmarks.md',
    'docs/own_data.md',
    'models/nano/README.md',
)


def commands(name: str, first_word: str) -> list[str]:
    """Lines of a document's code blocks, and its inline code, that start with a word."""
    text = (ROOT / name).read_text()
    blocks = re.findall(r'^```\n(.*?)^```', text, flags=re.S | re.M)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    lines += re.findall(r'`([^`\n]+)`', re.sub(r'^```\n.*?^```', '', text, flags=re.S | re.M))
    return [line for line in lines if line.split()[:1] == [first_word]]


@pytest.mark.parametrize('name', DOCS)
def test_linked_files_exist(name: str) -> None:
    for target in re.findall(r'\]\(([^)#:]+)\)', (ROOT / name).read_text()):
        assert ((ROOT / name).parent / target).exists(), target


@pytest.mark.parametrize('name', DOCS)
def test_make_targets_exist(name: str) -> None:
    targets = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), flags=re.M))
    for line in commands(name, 'make'):
        assert set(re.findall(r'^make ([a-z-]+)', line)) <= targets, line


@pytest.mark.parametrize('name', DOCS)
def test_mobilevlm_commands_parse(name: str) -> None:
    for line in commands(name, 'mobilevlm'):
        words = shlex.split(line)[1:]
        if words and not words[0].startswith('-'):
            build_parser().parse_args([word for word in words if word != '...'])


def test_first_two_commands_are_demo_and_test() -> None:
    block = re.search(r'^```\n(.*?)^```', (ROOT / 'README.md').read_text(), flags=re.S | re.M)
    assert block is not None
    assert block.group(1).split('\n')[:2] == ['make demo', 'make test']


def test_launch_arguments_in_the_docs_are_declared() -> None:
    tree = ast.parse((ROOT / 'launch' / 'vqa.launch.py').read_text())
    declared = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'DeclareLaunchArgument'
    }
    used = {word for name in DOCS for word in re.findall(r'(\w+):=', (ROOT / name).read_text())}
    assert used <= declared


def test_readme_explains_every_result_code() -> None:
    text = (ROOT / 'README.md').read_text()
    for code in ResultCode:
        assert f'`{code.name}`' in text
        assert re.search(rf'\b{int(code)}\b', text)


def test_result_codes_and_formats_are_those_of_the_message() -> None:
    answer_msg = pytest.importorskip('mobilevlm_msgs.msg', reason='mobilevlm_msgs is not built').Answer
    for code in ResultCode:
        assert getattr(answer_msg, code.name) == int(code)
