"""The command line: what it prints, its exit codes, its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import mobilevlm_ros
from mobilevlm_ros.cli import main

Pixels = NDArray[np.uint8]


@pytest.fixture
def picture(tmp_path: Path, photo: Pixels) -> str:
    """An image file."""
    path = tmp_path / 'picture.png'
    Image.fromarray(photo).save(path)
    return str(path)


def ask(tiny_bundle: Path, *arguments: str) -> int:
    return main(['ask', *arguments, '--bundle', str(tiny_bundle), '--max-tokens', '6'])


def test_text_is_streamed_to_stdout(tiny_bundle: Path, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tiny_bundle, picture, 'what is the table') == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert 'random weights' in captured.err
    assert 'confidence' in captured.err


def test_yes_no_prints_the_probabilities(tiny_bundle: Path, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tiny_bundle, picture, 'is the car red', '--format', 'yes_no') == 0
    lines = capsys.readouterr().out.split('\n')
    assert lines[0] in ('yes', 'no')
    assert '%  yes' in lines[1]
    assert '%  no' in lines[2]


def test_json_output_is_one_object(tiny_bundle: Path, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ('what is it', '--format', 'choice', '--choices', 'red,blue,green', '--min-confidence', '0', '--json')
    assert ask(tiny_bundle, picture, *arguments) == 0
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert record['result_code'] == 'OK'
    assert record['options'] == ['red', 'blue', 'green']
    assert record['text'] in record['options']
    assert record['timing']['vision_s'] > 0


def test_schema_is_read_from_a_file(
    tiny_bundle: Path, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = tmp_path / 'schema.json'
    schema.write_text('{"enum": ["a", "b"]}')
    assert ask(tiny_bundle, picture, 'which', '--format', 'json', '--schema', str(schema), '--json') == 0
    assert json.loads(json.loads(capsys.readouterr().out)['text']) in ('a', 'b')


def test_unanswered_question_exits_with_1(tiny_bundle: Path, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tiny_bundle, picture, 'which', '--format', 'choice') == 1
    assert 'BAD_FORMAT' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        (['ask', '/nonexistent.png', 'x'], 'cannot be read'),
        (['ask', 'PICTURE', 'x', '--bundle', '/nonexistent'], 'mobilevlm build nano'),
        (['ask', 'PICTURE', 'x', '--format', 'json', '--schema', '/nonexistent'], 'cannot be read'),
        (['build', 'nano', '--profile', 'toaster'], 'the profiles are: cpu'),
        (['build', 'nano', '--out', '/proc/nowhere/bundle'], '--out'),
    ],
)
def test_errors_of_the_set_up_exit_with_2(
    arguments: list[str], says: str, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([picture if argument == 'PICTURE' else argument for argument in arguments]) == 2
    assert says in capsys.readouterr().err


def test_wrong_arguments_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(['ask'])
    assert raised.value.code == 2
    assert 'usage: mobilevlm ask' in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(['--version'])
    assert raised.value.code == 0
    assert mobilevlm_ros.__version__ in capsys.readouterr().out


def test_asking_loads_neither_torch_nor_ros(tiny_bundle: Path, picture: str) -> None:
    code = (
        'import sys; from mobilevlm_ros.cli import main; '
        f'main(["ask", {picture!r}, "what is the table", "--bundle", {str(tiny_bundle)!r}, "--max-tokens", "2"]); '
        'assert not {"torch", "transformers", "rclpy", "onnx", "gguf"} & set(sys.modules)'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
