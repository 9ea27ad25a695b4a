"""Folders of results, as `mobilevlm evaluate bag` leaves them, made up."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from mobilevlm_ros.evaluate.results import ResultsWriter, write_run

START_NS = 1_700_000_000_000_000_000

TIMING: dict[str, Any] = {
    'queue_s': 0.0,
    'image_s': 0.004,
    'preprocess_s': 0.006,
    'vision_s': 0.3,
    'prefill_s': 0.2,
    'decode_s': 0.05,
    'first_text_s': 0.52,
    'total_s': 0.56,
    'prompt_tokens': 90,
    'reused_tokens': 20,
    'generated_tokens': 2,
    'vision_reused': False,
}


def answer(question_id: str = 'q', frame: int = 0, *, blind: bool = False, **changes: Any) -> dict[str, Any]:
    """One line of the results: a frame every second, asked whether there is a door; rightly answered yes."""
    which = 'blind' if blind else 'seen'
    camera = changes.get('camera', '/camera')
    stamp = START_NS + frame * 1_000_000_000
    timing = TIMING | changes.pop('timing', {})
    return {
        'key': f'{which}/{question_id}/{camera}/{frame}',
        'pass': which,
        'question_id': question_id,
        'kind': 'door',
        'question': 'Is there a door?',
        'format': 'YES_NO',
        'choices': [],
        'truth': 'yes',
        'answer': 'yes',
        'correct': True,
        'result_code': 'OK',
        'message': '',
        'confidence': 0.9,
        'options': ['yes', 'no'],
        'probabilities': [0.9, 0.1],
        'truncated': False,
        'camera': camera,
        'frame_index': frame,
        'stamp_ns': stamp,
        'received_ns': stamp,
        'frame_id': 'camera',
        'image': '' if blind else f'frames/{frame}.jpg',
        'timing': timing,
        'prompt_hash': 'abc',
        'model_id': 'tiny',
        'negation_of': '',
        'neighbours': question_id,
        'realtime': None,
    } | changes


def question(question_id: str = 'q', kind: str = 'door', accepted: tuple[Any, ...] = ('yes',), **truth: Any) -> Any:
    """One question of the run's description."""
    return {'id': question_id, 'kind': kind, 'truth': {'checker': 'normalised', 'accepted': list(accepted)} | truth}


def run_of(questions: Iterable[Any] = (), **changes: Any) -> dict[str, Any]:
    """The description of a finished run."""
    return {
        'finished': True,
        'bundle': {'model_id': 'tiny', 'path': '/bundles/tiny', 'hash': 'c0ffee', 'warning': ''},
        'bag': {
            'path': 'hall.mcap',
            'topics': [{'topic': '/camera', 'type': 'sensor_msgs/msg/Image', 'n_messages': 40}],
            'start_ns': START_NS,
            'end_ns': START_NS + 40_000_000_000,
        },
        'questions_file': {'path': 'questions.yaml', 'sha256': 'feed'},
        'questions': list(questions) or [question()],
        'settings': {'stamp': 'receive', 'realtime': False, 'blind': False},
        'machine': {'cpu': 'a processor', 'n_cpus': 2},
        'started': '2026-01-01T00:00:00Z',
        'updated': '2026-01-01T00:10:00Z',
        'wall_s': 600.0,
        'n_expected': None,
        'n_done': 0,
        'broken_frames': [],
        'n_broken_frames': 0,
        'realtime': None,
    } | changes


def write_folder(folder: Path, rows: Iterable[dict[str, Any]], run: dict[str, Any] | None = None) -> Path:
    """Write results, the description, and the frames that they name."""
    rows = list(rows)
    with ResultsWriter(folder) as writer:
        for row in rows:
            writer.add(row)
    write_run(folder, (run or run_of()) | {'n_done': len(rows)})
    (folder / 'frames').mkdir(exist_ok=True)
    for number, name in enumerate(sorted({row['image'] for row in rows if row['image'].startswith('frames/')})):
        colour = (40 * number % 256, 90, 255 - 40 * number % 256)
        Image.new('RGB', (640, 480), colour).save(folder / name)
    return folder


def read_json(path: Path) -> Any:
    """JSON as others read it: without NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f'{name} is no JSON')

    return json.loads(path.read_text(encoding='utf-8'), parse_constant=refuse)
