"""Figures of the node on this machine: latencies, reuse, cancelling, and what watching cameras costs.

    make bench                      every part; watches each camera for 60 s
    .venv/bin/python benchmarks/node_figures.py --part watch --seconds 600

The node runs in its own process, as on a robot; a second process plays the camera. Every figure is a median of several
runs or a difference of process times, printed with the machine, and written as one JSON line to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
os.environ.setdefault('ROS_DOMAIN_ID', str(random.randint(1, 101)))

# 640x480 in colour is larger than Fast DDS's default shared-memory segment, which then loses nearly every image.
os.environ.setdefault('FASTDDS_DEFAULT_PROFILES_FILE', str(Path(__file__).parents[1] / 'config' / 'fastdds.xml'))

RESULTS = Path(__file__).parent / 'results'
HEIGHT, WIDTH, RATE_HZ = 480, 640, 30.0
RUNS = 7
# An answer that goes on: nano has little to say by itself.
LONG = {'format': 3, 'json_schema': '{"type": "array", "items": {"type": "integer"}, "minItems": 900}'}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = next(
        (line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines() if 'model name' in line),
        platform.processor(),
    )
    return {
        'cpu': model,
        'cores': len(os.sched_getaffinity(0)),
        'memory_gib': round(psutil.virtual_memory().total / 2**30, 1),
        'python': platform.python_version(),
        'load_average_1min': os.getloadavg()[0],
    }


def scene(index: int) -> np.ndarray:
    """A picture that is no two times the same, uint8 ``[480, 640, 3]``: blocks of colour with noise."""
    rng = np.random.default_rng(index)
    blocks = rng.integers(0, 256, (12, 16, 3), np.uint8).repeat(40, axis=0).repeat(40, axis=1)
    return blocks // 2 + rng.integers(0, 128, (HEIGHT, WIDTH, 3), np.uint8)


def play(kind: str, topic: str) -> None:
    """Play a camera until terminated; runs in a process of its own."""
    import cv2
    import rclpy
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import CompressedImage, Image

    rclpy.init()
    node = rclpy.create_node('bench_camera')
    message_type = Image if kind == 'raw' else CompressedImage
    publisher = node.create_publisher(message_type, topic, qos_profile_sensor_data)
    messages = []
    for index in range(16):
        pixels = scene(index)
        if kind == 'raw':
            data = pixels.tobytes()
            messages.append(Image(height=HEIGHT, width=WIDTH, encoding='bgr8', step=3 * WIDTH, data=data))
        else:
            data = cv2.imencode('.jpg', pixels)[1].tobytes()
            messages.append(CompressedImage(format='bgr8; jpeg compressed bgr8', data=data))
    next_s = time.monotonic()
    count = 0
    while rclpy.ok():
        message = messages[count % len(messages)]
        message.header.stamp = node.get_clock().now().to_msg()
        publisher.publish(message)
        count += 1
        next_s += 1 / RATE_HZ
        time.sleep(max(0.0, next_s - time.monotonic()))


@contextmanager
def camera(kind: str, topic: str) -> Iterator[None]:
    """A camera that plays while the block runs."""
    process = multiprocessing.get_context('spawn').Process(target=play, args=(kind, topic), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join(5.0)


@contextmanager
def node_process(bundle: str, topic: str) -> Iterator[psutil.Process]:
    """The node, in its own process."""
    values = {'bundle': bundle, 'cameras': {'camera': {'topic': topic}}, 'queue_size': 1, 'deadline_s': 0.0}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'parameters.yaml'
        file.write_text(yaml.safe_dump({'/**': {'ros__parameters': values}}))
        command = [sys.executable, '-m', 'mobilevlm_ros.node.main', '--ros-args', '--params-file', str(file)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(20.0)


class Listener:
    """A node of our own, whose callbacks run in a thread."""

    def __init__(self) -> None:
        import rclpy
        from rclpy.executors import SingleThreadedExecutor

        if not rclpy.ok():
            rclpy.init()
        self.node = rclpy.create_node(f'bench_{os.getpid()}_{time.monotonic_ns()}')
        executor = SingleThreadedExecutor()
        executor.add_node(self.node)
        threading.Thread(target=executor.spin, daemon=True).start()


class Client(Listener):
    """Asks the node and waits."""

    def __init__(self) -> None:
        from mobilevlm_msgs.action import AskImage as AskImageAction
        from mobilevlm_msgs.srv import AskImage
        from rclpy.action import ActionClient

        super().__init__()
        self._request, self._goal = AskImage.Request, AskImageAction.Goal
        self._service = self.node.create_client(AskImage, '/vqa_node/ask_image')
        self._action = ActionClient(self.node, AskImageAction, '/vqa_node/ask_image')
        self._service.wait_for_service(60.0)
        self._action.wait_for_server(60.0)
        end_s = time.monotonic() + 60.0
        while not self.ask(image=image_msg(0), max_tokens=1).success:
            if time.monotonic() > end_s:
                raise SystemExit('the node did not answer within a minute')
            time.sleep(0.2)

    def send(self, question: str = 'What is in the picture?', **fields: Any) -> Any:
        """Call the service; returns the future."""
        return self._service.call_async(self._request(question=question, **fields))

    def ask(self, question: str = 'What is in the picture?', **fields: Any) -> Any:
        """Call the service and wait."""
        return _wait(self.send(question, **fields))

    def goal(self, on_text: Callable[[str], None], **fields: Any) -> Any:
        """Send a goal; returns its handle."""
        goal = self._goal(question='Tell me everything that you see.', **fields)
        return _wait(self._action.send_goal_async(goal, lambda message: on_text(message.feedback.text)))


def _wait(future: Any) -> Any:
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    if not done.wait(120.0):
        raise SystemExit('the node did not answer within two minutes')
    return future.result()


def image_msg(index: int) -> Any:
    """A scene as a message."""
    from sensor_msgs.msg import Image

    return Image(height=HEIGHT, width=WIDTH, encoding='rgb8', step=3 * WIDTH, data=scene(index).tobytes())


def latency(client: Client) -> dict[str, Any]:
    """Cold question, second question on the same frame, closed question; and whether the texts agree."""
    cold, warm, closed, same = [], [], [], True
    for run in range(RUNS):
        # A cold frame each time; the same question again is the warm one.
        first = client.ask(image=image_msg(1000 + run), max_tokens=16).detail
        second = client.ask(image=image_msg(1000 + run), max_tokens=16).detail
        third = client.ask('Is there a car?', image=image_msg(1000 + run), format=1).detail
        cold.append(first.timing.first_text_s)
        warm.append(second.timing.first_text_s)
        closed.append(third.timing.total_s)
        same = same and first.text == second.text and second.timing.vision_s == 0.0
    medians = [statistics.median(values) for values in (cold, warm, closed)]
    return {
        'cold_frame_to_first_text_s': medians[0],
        'known_frame_to_first_text_s': medians[1],
        'known_frame_speedup': medians[0] / medians[1],
        'known_frame_yes_no_s': medians[2],
        'same_text_and_no_vision': same,
    }


def stopping(client: Client) -> dict[str, Any]:
    """Time from a cancel, and past a deadline, to the answer."""
    after_cancel, after_deadline, kept = [], [], True
    for run in range(RUNS):
        texts: list[str] = []
        handle = client.goal(texts.append, image=image_msg(2000 + run), max_tokens=1500, **LONG)
        while len(texts) < 6:
            time.sleep(0.001)
        started_s = time.monotonic()
        handle.cancel_goal_async()
        result = _wait(handle.get_result_async()).result
        after_cancel.append(time.monotonic() - started_s)
        kept = kept and bool(result.answer) and result.detail.result_code == 301
        # In the middle of the vision engine, of the prompt, and of decoding.
        deadline_s = (0.1, 0.3, 2.5)[run % 3]
        detail = client.ask(image=image_msg(3000 + run), max_tokens=1500, deadline_s=deadline_s, **LONG).detail
        assert detail.result_code == 302, detail.message
        after_deadline.append(detail.timing.total_s - deadline_s)
    return {
        'cancel_to_result_median_s': statistics.median(after_cancel),
        'cancel_to_result_max_s': max(after_cancel),
        'deadline_overrun_median_s': statistics.median(after_deadline),
        'deadline_overrun_max_s': max(after_deadline),
        'partial_text_kept': kept,
    }


@contextmanager
def camera_rates(node: Any) -> Iterator[list[float]]:
    """The camera's rate in images a second, as the node's diagnostics tell it while the block runs."""
    from diagnostic_msgs.msg import DiagnosticArray

    rates: list[float] = []

    def on_diagnostics(message: Any) -> None:
        for status in message.status:
            if status.name == 'vqa_node: camera camera':
                rates.extend(float(pair.value) for pair in status.values if pair.key == 'rate (Hz)')

    subscription = node.create_subscription(DiagnosticArray, '/diagnostics', on_diagnostics, 10)
    try:
        yield rates
    finally:
        node.destroy_subscription(subscription)


def load(client: Client, topic: str) -> dict[str, Any]:
    """BUSY latency, and the rate at which images are taken while the node decodes."""
    with camera_rates(client.node) as rates, camera('raw', topic):
        time.sleep(3.0)
        rates.clear()
        time.sleep(5.0)
        idle_hz = statistics.median(rates)
        open_questions = [client.send(max_tokens=400, image=image_msg(4000 + n), **LONG) for n in range(2)]
        time.sleep(1.0)
        busy = []
        for _ in range(20):
            started_s = time.monotonic()
            if client.ask(max_tokens=1).detail.result_code == 300:
                busy.append(time.monotonic() - started_s)
        rates.clear()
        for future in open_questions:
            _wait(future)
    return {
        'busy_answer_median_s': statistics.median(busy),
        'busy_answer_max_s': max(busy),
        'camera_rate_idle_hz': idle_hz,
        'camera_rate_decoding_hz': statistics.median(rates) if rates else None,
    }


def watch(bundle: str, kind: str, topic: str, seconds: float) -> dict[str, Any]:
    """CPU share of one core and growth of memory while a camera plays and nobody asks."""
    listener = Listener()
    with node_process(bundle, topic) as process, camera(kind, topic), camera_rates(listener.node) as rates:
        time.sleep(10.0)
        rates.clear()
        cpu_s, rss = sum(process.cpu_times()[:2]), process.memory_info().rss
        started_s = time.monotonic()
        while (elapsed_s := time.monotonic() - started_s) < seconds:
            print(f'\r  {kind}: {elapsed_s:.0f} of {seconds:.0f} s', end='', file=sys.stderr, flush=True)
            time.sleep(min(5.0, seconds))
        elapsed_s = time.monotonic() - started_s
        share = (sum(process.cpu_times()[:2]) - cpu_s) / elapsed_s
        growth = process.memory_info().rss - rss
        rate_hz = len(rates) and statistics.mean(rates)
    print(file=sys.stderr)
    figures = {'s': elapsed_s, 'rate_hz': rate_hz, 'cpu_share': share, 'growth_mib': growth / 2**20}
    return {f'watch_{kind}_{name}': value for name, value in figures.items()}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--part', choices=['all', 'latency', 'stopping', 'load', 'watch'], default='all')
    parser.add_argument('--seconds', type=float, default=60.0, help='how long each camera is watched; default: 60')
    parser.add_argument('--camera', choices=['raw', 'compressed'], help='watch this kind only')
    parser.add_argument('--bundle', default='', help='default: the embedded default, nano')
    options = parser.parse_args()
    figures: dict[str, Any] = {}

    def wanted(part: str) -> bool:
        return options.part in (part, 'all')

    topic = '/bench/image'
    if options.part != 'watch':
        with node_process(options.bundle, topic):
            client = Client()
            for part, measure in (('latency', latency), ('stopping', stopping)):
                if wanted(part):
                    figures |= measure(client)
            if wanted('load'):
                figures |= load(client, topic)
    if wanted('watch'):
        for kind in [options.camera] if options.camera else ['raw', 'compressed']:
            figures |= watch(options.bundle, kind, topic, options.seconds)
    for name, value in figures.items():
        print(f'{name:34} {value:.4f}' if isinstance(value, float) else f'{name:34} {value}')
    record = {'date': datetime.now(timezone.utc).isoformat(timespec='seconds'), 'machine': machine(), **figures}
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / 'node_figures.jsonl').open('a') as file:
        file.write(json.dumps(record) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
